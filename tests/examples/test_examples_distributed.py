"""The example for several processes does what its first lines say."""

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed_training.py"


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(EXAMPLE), *map(str, arguments)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output
    return figures(output)


def alone(monkeypatch, capsys, *arguments):
    """Run the example as the only process, here."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return figures(capsys.readouterr().out)


def figures(output):
    found = re.search(r"steps (\d+) to (\d+), (\d+) rank\(s\): loss ([\d.]+), error ([\d.]+)", output)
    assert found, output
    return [float(number) for number in found.groups()]


def test_example_goes_on_from_a_sharded_checkpoint_in_one_process(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    checkpoint = tmp_path / "digits"
    first = torchrun(2, "--shard", "--checkpoint", checkpoint, "--steps", 60)
    assert first[:3] == [0, 60, 2]
    resumed = alone(monkeypatch, capsys, "--checkpoint", checkpoint, "--steps", 200)
    assert resumed[:3] == [60, 200, 1]
    assert resumed[3] < 0.7 * first[3]
    assert resumed[4] < 0.1
    straight = alone(monkeypatch, capsys, "--steps", 200)
    assert straight[3] == pytest.approx(resumed[3], rel=1e-4)
