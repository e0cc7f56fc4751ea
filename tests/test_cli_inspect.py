import csv
import errno
import json
import os
import pickle
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weightlab import cli
from weightlab.inspect import Checkpoint, compare_checkpoints, layer_report, reading


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {f"h.{index}.mlp.weight": gaussian(24, 32, seed=index) for index in range(5)}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command line in a folder with a checkpoint; return exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    save_file(WEIGHTS, "model.safetensors")

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["weightlab", *arguments])
        code = cli.run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return go


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_table_flags_and_where_to_read_on(run):
    save_file(WEIGHTS | {"broken": torch.full((9, 9), float("nan")), "tiny": gaussian(3, 3)}, "m.safetensors")
    code, out, err = run("inspect", "m.safetensors")
    assert (code, err) == (0, "")
    report = layer_report("m.safetensors")
    for row in report.rows:
        assert row.name in out
    assert f"{report.rows[2].alpha:.3g}" in out
    assert re.search(r"^broken .*non-finite", out, re.MULTILINE)
    assert re.search(r"^tiny .*too small", out, re.MULTILINE)
    assert "non-finite: the weight holds NaN or infinity\n    broken\n" in out
    assert "5 of 7 layers fitted, 3,930 parameters in them" in out
    assert "What the numbers mean, and what they do not" in out
    assert files() == ["m.safetensors", "model.safetensors"]


def test_json_is_the_reports(run):
    code, out, err = run("inspect", "model.safetensors", "--json", "--randomize", "--seed", "3")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(layer_report("model.safetensors", randomize=True, seed=3).to_json())


def test_options_are_passed_on(run):
    save_file({"conv.weight": gaussian(16, 8, 3, 3), "skip.weight": gaussian(9, 9)}, "conv.safetensors")
    options = {"conv": "flattened", "dtype": torch.float32, "min_eigenvalues": 4, "max_eigenvalues": 100}
    code, out, _ = run(
        "inspect", "conv.safetensors", "--conv", "flattened", "--dtype", "float32", "--min-eigenvalues", "4",
        "--max-eigenvalues", "100", "--layers", "conv*, none*", "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0
    expected = layer_report("conv.safetensors", layers=["conv*"], **options)
    assert json.loads(out) == json.loads(expected.to_json())


def save_sharded(folder, tensors):
    Path(folder).mkdir()
    names = {name: f"model-{index}.safetensors" for index, name in enumerate(tensors)}
    for name, file in names.items():
        save_file({name: tensors[name]}, f"{folder}/{file}")
    Path(folder, "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def save_lora(folder):
    Path(folder).mkdir()
    name = "base_model.model.h.0.q.lora_{}.weight"
    factors = {name.format("A"): gaussian(10, 50), name.format("B"): gaussian(40, 10, seed=1)}
    save_file(factors, f"{folder}/adapter_model.safetensors")
    Path(folder, "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 20}')


def test_every_kind_of_input(run, monkeypatch):
    save_sharded("sharded", WEIGHTS)
    save_lora("lora")
    torch.save({"state_dict": WEIGHTS}, "model.pt")
    save_file({"attn.c_attn.weight": gaussian(16, 48)}, "fused.safetensors")
    save_file({"conv.weight": gaussian(16, 8, 3, 3)}, "conv.safetensors")
    Path("hub/owner").mkdir(parents=True)
    Path("sharded").rename("hub/owner/name")
    monkeypatch.setenv("WEIGHTLAB_DATA", "hub")
    rows = {}
    for source, *options in (
        ("model.safetensors",),
        ("model.pt",),
        ("owner/name",),
        ("lora",),
        ("fused.safetensors", "--split-qkv"),
        ("conv.safetensors",),
    ):
        code, out, err = run("inspect", source, *options, "--json")
        assert (code, err) == (0, "")
        rows[source] = json.loads(out)["rows"]
    assert rows["model.safetensors"] == rows["model.pt"] == rows["owner/name"]
    assert [(row["name"], row["kind"], row["shape"]) for row in rows["lora"]] == [
        ("h.0.q", "delta", [40, 50])
    ]
    assert [row["name"][-3:] for row in rows["fused.safetensors"]] == ["[q]", "[k]", "[v]"]
    assert rows["conv.safetensors"][0]["n_eigenvalues"] == 72
    _, out, _ = run("inspect", "fused.safetensors", "--split-qkv")
    assert "c_attn.weight[k]" in out


def test_files_are_written_and_not_replaced(run):
    command = ("inspect", "model.safetensors", "--html", "new/page.html", "--csv", "layers.csv")
    code, out, _ = run(*command)
    assert code == 0
    assert "page: new/page.html\ntable: layers.csv\n" in out
    assert Path("layers.csv").read_text() == layer_report("model.safetensors").to_csv()
    page = Path("new/page.html").read_text()
    assert "weightlab inspect model.safetensors --html new/page.html --csv layers.csv" in page
    assert page.count('<figure id="layer-') == 5
    Path("layers.csv").write_text("mine")
    code, out, err = run(*command)
    assert (code, out) == (2, "")
    assert "page.html exists; give another --html, or --force to replace it" in err
    assert Path("layers.csv").read_text() == "mine"
    assert run(*command, "--force")[0] == 0
    assert len(list(csv.DictReader(Path("layers.csv").read_text().splitlines()))) == 5


def interrupt_after(monkeypatch, name, count):
    """Let the generator `name` of `reading` be interrupted after some results; return what it is asked to read."""
    asked = []
    rows = getattr(reading, name)

    def results(layers, options):
        for index, result in enumerate(rows(layers, **options)):
            if index == count:
                raise KeyboardInterrupt
            yield result

    def stopped(layers, **options):
        asked.append(len(layers))
        return results(layers, options)

    monkeypatch.setattr(reading, name, stopped)
    return asked


def kept():
    return [path for path in files() if path.startswith("weightlab-out/inspect-")]


@pytest.mark.parametrize("compared", [False, True])
def test_ctrl_c_keeps_what_was_read(run, monkeypatch, compared):
    save_file({name: W + 0.1 * gaussian(24, 32, seed=9) for name, W in WEIGHTS.items()}, "tuned.safetensors")
    other = ("--compare", "tuned.safetensors") if compared else ("--randomize",)
    command = ("inspect", "model.safetensors", *other, "--html", "a.html", "--json")
    _, whole, _ = run(*command)
    page = Path("a.html").read_text()
    Path("a.html").unlink()
    name = "change_rows" if compared else "layer_rows"
    with monkeypatch.context() as patch:
        interrupt_after(patch, name, 2)
        code, out, err = run(*command)
    assert (code, out) == (cli.INTERRUPTED, "")
    assert "Stopped after 2 layers, which are kept; the same command with --resume goes on." in err
    assert len(kept()) == 1
    code, _, err = run(*command)
    assert code == 2
    assert re.search(r"weightlab-out/inspect-\S+ holds an unfinished run, 2 done; --resume goes on", err)
    with monkeypatch.context() as patch:
        asked = interrupt_after(patch, name, 1)
        assert run(*command, "--resume")[0] == cli.INTERRUPTED
        assert asked == [3]
    # A line that was cut off, as by a full disk, is read again.
    file = Path(kept()[0])
    file.write_text(file.read_text()[:-5])
    with monkeypatch.context() as patch:
        asked = interrupt_after(patch, name, 99)
        code, out, err = run(*command, "--resume")
        assert asked == [3]
    assert (code, out) == (0, whole)
    assert Path("a.html").read_text().replace(" --resume", "") == page
    assert not Path("weightlab-out").exists()


def test_what_was_read_is_not_taken_for_other_files_or_settings(run, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, "layer_rows", 2)
        run("inspect", "model.safetensors")
    asked = interrupt_after(monkeypatch, "layer_rows", 99)
    run("inspect", "model.safetensors", "--seed", "1", "--resume")
    os.utime("model.safetensors", (1, 1))
    run("inspect", "model.safetensors", "--resume")
    assert asked == [5, 5]


def test_force_starts_over(run, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, "layer_rows", 2)
        run("inspect", "model.safetensors")
    asked = interrupt_after(monkeypatch, "layer_rows", 99)
    assert run("inspect", "model.safetensors", "--force")[0] == 0
    assert asked == [5]
    assert kept() == []


def test_full_disk_leaves_no_half_file_and_what_was_read(run, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: full() if str(b).endswith(".csv") else replace(a, b))
        code, out, err = run("inspect", "model.safetensors", "--csv", "layers.csv")
    assert (code, out) == (1, "")
    assert "cannot write layers.csv: No space left on device" in err
    assert files() == ["model.safetensors", *kept()]
    asked = interrupt_after(monkeypatch, "layer_rows", 99)
    assert run("inspect", "model.safetensors", "--csv", "layers.csv", "--resume")[0] == 0
    assert asked == [0]
    assert files() == ["layers.csv", "model.safetensors"]


def test_rows_that_cannot_be_kept_stop_nothing(run, monkeypatch):
    Path("weightlab-out").write_text("a file where the folder should be")
    code, out, err = run("inspect", "model.safetensors")
    assert code == 0
    assert "mean of 5 fitted" in out
    assert err.count("Warning: cannot write weightlab-out/inspect-") == 1
    interrupt_after(monkeypatch, "layer_rows", 2)
    code, _, err = run("inspect", "model.safetensors")
    assert code == cli.INTERRUPTED
    assert "No layer was kept" in err


def test_compare_shows_what_has_changed(run):
    tuned = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    tuned["h.1.mlp.weight"] += 0.5 * gaussian(24, 1) @ gaussian(1, 32)
    tuned["h.2.mlp.weight"] = gaussian(9, 9)
    del tuned["h.3.mlp.weight"]
    save_file(tuned | {"added": gaussian(9, 9)}, "tuned.safetensors")
    code, out, err = run(
        "inspect", "model.safetensors", "--compare", "tuned.safetensors", "--csv", "c.csv", "--html", "c.html"
    )
    assert (code, err) == (0, "")
    assert re.search(r"^0\.mlp .* unchanged", out, re.MULTILINE)
    assert "only in model.safetensors, not compared:\n    h.3.mlp.weight\n" in out
    assert "only in tuned.safetensors, not compared:\n    added\n" in out
    assert "of different shapes, not compared:\n    h.2.mlp.weight (24, 32) → (9, 9)\n" in out
    rows = list(csv.DictReader(Path("c.csv").read_text().splitlines()))
    assert [(row["name"], row["rank"]) for row in rows] == [
        ("h.0.mlp.weight", "0"),
        ("h.1.mlp.weight", "1"),
        ("h.4.mlp.weight", "0"),
    ]
    code, out, _ = run("inspect", "model.safetensors", "--compare", "tuned.safetensors", "--json")
    expected = compare_checkpoints("model.safetensors", "tuned.safetensors")
    assert json.loads(out) == json.loads(expected.to_json())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_are_held_one_at_a_time(run, monkeypatch, suffix):
    """Wide and flat, so that reading is quick: 24 weights of 4 MB, of which at most 40 MB may be alive."""
    weights = {f"{index}.weight": torch.ones(16, 1 << 16) + index for index in range(24)}
    (save_file if suffix == "safetensors" else torch.save)(weights, f"wide.{suffix}")
    sizes, most = {}, []
    load = Checkpoint.__getitem__

    def watched(self, name):
        tensor = load(self, name)
        sizes[name] = tensor.nbytes
        weakref.finalize(tensor, sizes.pop, name, None)
        most.append(sum(sizes.values()))
        return tensor

    monkeypatch.setattr(Checkpoint, "__getitem__", watched)
    assert run("inspect", f"wide.{suffix}", "--json")[0] == 0
    assert len(most) == 24
    assert max(most) <= 40 << 20


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


def make_bad_inputs():
    whole = Path("model.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("foreign.safetensors").write_text("a text, which is no checkpoint at all")
    Path("text.pt").write_text("a text, which is no checkpoint at all")
    Path("pickle.pt").write_bytes(pickle.dumps({"a": Code()}))
    torch.save({"a": gaussian(9, 9), "x": Code()}, "code.pt")
    torch.save(WEIGHTS, "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:3000])
    save_file({"bias": gaussian(9)}, "vectors.safetensors")
    Path("empty").mkdir()
    Path("folder.csv").mkdir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cut.safetensors"], "truncated, damaged or no safetensors file"),
        (["foreign.safetensors"], "truncated, damaged or no safetensors file"),
        (["text.pt"], "no checkpoint that can be read"),
        (["pickle.pt"], "plain pickle, which may run code when it is loaded"),
        (["code.pt"], "holds more than tensors, and loading it would run code"),
        (["cut.pt"], "is truncated"),
        (["empty"], "is no checkpoint"),
        (["nowhere.safetensors"], "cannot read nowhere.safetensors: No such file"),
        (["model.safetensors", "--layers", "x*"], "matches x*; names are like h.0.mlp.weight"),
        (["model.safetensors", "--min-eigenvalues", "1"], "--min-eigenvalues must be at least 2"),
        (["model.safetensors", "--dtype", "half"], "--dtype"),
        (["model.safetensors", "--device", "abacus"], "--device abacus is not to be had"),
        (["model.safetensors", "--csv", "folder.csv"], "--csv folder.csv is a folder or a device"),
        (["model.safetensors", "--csv", os.devnull, "--force"], "is a folder or a device"),
        (["model.safetensors", "--csv", "whole.pt/a.csv"], "whole.pt is no folder"),
        (["model.safetensors", "--csv", "model.safetensors", "--force"], "is the checkpoint itself"),
        (["model.safetensors", "--csv", "a", "--html", "./a"], "are the same file"),
        (["model.safetensors", "--compare", "vectors.safetensors"], "and no layers"),
        (["model.safetensors", "--compare", "nowhere.pt"], "cannot read nowhere.pt"),
        (["model.safetensors", "--compare", "model.safetensors", "--randomize"], "--randomize is for one"),
    ],
)
def test_wrong_requests_are_explained(run, arguments, message):
    make_bad_inputs()
    before = files()
    code, out, err = run("inspect", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert files() == before


def test_a_checkpoint_without_layers(run):
    save_file({"bias": gaussian(9)}, "vectors.safetensors")
    code, out, _ = run("inspect", "vectors.safetensors", "--html", "page.html")
    assert code == 0
    assert "0 of 0 layers fitted" in out


def test_torch_modules_are_the_same_as_their_files(run):
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 12))
    save_file(model.state_dict(), "mlp.safetensors")
    _, out, _ = run("inspect", "mlp.safetensors", "--json")
    assert json.loads(out)["rows"] == json.loads(layer_report(model).to_json())["rows"]


def test_help_teaches_with_examples(run):
    code, out, _ = run("inspect", "--help")
    assert code == 0
    assert "Examples" in out
    assert "--compare" in out
