"""The store: bit-exact, append-only, shared by processes, and careful with files that are not its own."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.exceptions import StoreError
from weightlab.trial.spec import CurvePoint, RunResult, RunSpec
from weightlab.trial.store import APPLICATION_ID, SCHEMA_VERSION, Store

SPEC = RunSpec("task", "f", "arm", "g", {"lr": 0.1}, 0, "test", 10, 2, 8, 1, "cpu", {"torch": "2"})


def run(seed: int = 0, status: str = "ok", **fields) -> RunResult:
    return RunResult(replace(SPEC, seed=seed), status, **fields)


def bits(value: float) -> bytes:
    return b"nan" if math.isnan(value) else struct.pack("<d", value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trials.db"


def filled(path: Path, runs: int = 30) -> bytes:
    with Store(path) as store:
        for seed in range(runs):
            store.put(run(seed, curve=tuple(CurvePoint(i, i / 7, None, math.pi * i) for i in range(20))))
    assert os.listdir(path.parent) == [path.name]
    return path.read_bytes()


anything = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=40, deadline=None)
@given(
    metrics=st.dictionaries(st.text(max_size=5), anything, max_size=4),
    curve=st.lists(st.tuples(st.integers(0, 10**9), anything, st.none() | anything, anything), max_size=5),
    untrained=st.none() | anything,
    hyperparameters=st.dictionaries(
        st.text(max_size=5), anything | st.integers() | st.booleans() | st.text(max_size=5), max_size=4
    ),
    error=st.none() | st.text(),
)
def test_results_come_back_bit_for_bit(metrics, curve, untrained, hyperparameters, error):
    result = RunResult(
        replace(SPEC, hyperparameters=hyperparameters),
        "error",
        metrics,
        untrained,
        tuple(CurvePoint(*point) for point in curve),
        error=error,
    )
    with tempfile.TemporaryDirectory() as folder, Store(f"{folder}/s.db") as store:
        assert store.put(result)
        back = store.get(result.key)
    assert back is not None
    assert back.key == result.key
    assert back.error == error
    assert {name: bits(value) for name, value in back.metrics.items()} == {
        name: bits(value) for name, value in metrics.items()
    }
    assert back.spec.hyperparameters.keys() == hyperparameters.keys()
    for name, value in hyperparameters.items():
        assert type(back.spec.hyperparameters[name]) is type(value)
        assert repr(back.spec.hyperparameters[name]) == repr(value)
    for point, (step, *values) in zip(back.curve, curve, strict=True):
        assert point.step == step
        for mine, theirs in zip((point.seconds, point.train_loss, point.metric), values, strict=True):
            assert (mine is None) if theirs is None else bits(mine) == bits(theirs)
    assert (back.untrained is None) if untrained is None else bits(back.untrained) == bits(untrained)


def test_latest_row_wins_and_nothing_is_deleted(path):
    with Store(path) as store:
        assert store.put(run(status="timeout", timeout=1.0))
        assert store.put(run(metrics={"loss": 1.0}))
        assert not store.put(run(metrics={"loss": 2.0})), "a second good result is a repeated run"
        assert store.get(run().key).metrics == {"loss": 1.0}
        assert store.discard([run().key, run().key, run(5).key]) == 1
        assert store.get(run().key) is None
        assert list(store.results()) == []
        assert store.discard([run().key]) == 0
        assert store.put(run(metrics={"loss": 3.0}))
        assert [row and (row.status, dict(row.metrics)) for row in store.history(run().key)] == [
            ("timeout", {}),
            ("ok", {"loss": 1.0}),
            None,
            ("ok", {"loss": 3.0}),
        ]
    with closing(sqlite3.connect(path)) as raw:
        for statement in ("DELETE FROM runs", "UPDATE runs SET result = ''"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                raw.execute(statement)


def test_many_runs_are_found_in_the_order_asked(path):
    seeds = list(range(1234))
    random.Random(0).shuffle(seeds)
    with Store(path) as store:
        for seed in range(0, 1234, 2):
            store.put(run(seed))
        store.discard([run(2).key])
        keys = [run(seed).key for seed in seeds]
        expected = [seed for seed in seeds if seed % 2 == 0 and seed != 2]
        assert [result.spec.seed for result in store.get_many(keys).values()] == expected
        assert [result.spec.seed for result in store.results()] == sorted(expected)


def test_trials_are_listed_with_their_latest_definition(path):
    with Store(path) as store:
        store.save_trial("a", {"arms": ["x", "y"], "steps": 3})
        store.save_trial("b", {"level": 0.95})
        store.save_trial("a", {"arms": ["x"], "steps": 4})
        store.save_trial("a", {"arms": ["x"], "steps": 4})
        assert store.trials() == [{"level": 0.95}, {"arms": ["x"], "steps": 4}]
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT count(*) FROM trials").fetchone() == (3,)


def test_a_read_only_store_reads_and_refuses_to_write(path):
    before = filled(path)
    path.chmod(0o444)
    with Store(path, read_only=True) as store:
        assert store.get(run(3).key) == run(3, curve=store.get(run(3).key).curve)
        assert len(list(store.results())) == 30
        for write in (lambda: store.put(run(99)), lambda: store.claim("k"), lambda: store.discard(["k"])):
            with pytest.raises(StoreError, match="read-only"):
                write()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_an_empty_file_is_a_new_store_and_folders_are_made(tmp_path):
    empty = tmp_path / "empty.db"
    empty.touch()
    for path in (empty, tmp_path / "a" / "b #?%" / "new.db"):
        with Store(path) as store:
            assert store.put(run())
        with Store(path, read_only=True) as store:
            assert store.get(run().key) is not None
        header = path.read_bytes()[:100]
        assert struct.unpack(">i", header[68:72]) == (APPLICATION_ID,)
        assert struct.unpack(">i", header[60:64]) == (SCHEMA_VERSION,)


def _foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE runs (key TEXT, result TEXT)")


def _newer(path: Path) -> None:
    filled(path)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA journal_mode = DELETE")
        raw.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


def _cut(path: Path) -> None:
    path.write_bytes(filled(path)[:-5000])


def _cut_in_header(path: Path) -> None:
    path.write_bytes(filled(path)[:60])


def _scribbled(path: Path) -> None:
    data = bytearray(filled(path))
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = os.urandom(64)
    path.write_bytes(data)


def _without_permission(mode: int):
    def spoil(path: Path) -> None:
        filled(path)
        path.chmod(mode)

    return spoil


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_text("steps: 3\n" * 50), "not a weightlab store"),
        (lambda path: path.write_bytes(b"\x00"), "not a weightlab store"),
        (_foreign, "another program"),
        (_newer, "upgrade weightlab"),
        (_cut, "damaged or cut short"),
        (_cut_in_header, "damaged or cut short"),
        (_scribbled, "damaged or cut short"),
        (_without_permission(0o000), "not readable"),
    ],
    ids=["text", "short", "foreign", "newer", "cut", "cut in header", "scribbled", "unreadable"],
)
def test_a_file_that_is_no_sound_store_is_refused_and_left_alone(path, spoil, message, read_only):
    spoil(path)
    mode = path.stat().st_mode
    path.chmod(0o600)
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    path.chmod(mode)
    with pytest.raises(StoreError, match=message) as caught:
        Store(path, read_only=read_only)
    assert str(path) in str(caught.value)
    assert str(caught.value).count("\n") <= 1
    path.chmod(0o600)
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == stamp
    assert os.listdir(path.parent) == [path.name]


def test_places_where_no_store_can_be_are_refused(tmp_path):
    with pytest.raises(StoreError, match="is a folder"):
        Store(tmp_path)
    with pytest.raises(StoreError, match="does not exist"):
        Store(tmp_path / "none.db", read_only=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path / "file" / "s.db")
    folder = tmp_path / "locked"
    folder.mkdir()
    before = filled(folder / "kept.db")
    (folder / "kept.db").chmod(0o444)
    with pytest.raises(StoreError, match="is read-only"):
        Store(folder / "kept.db")
    assert (folder / "kept.db").read_bytes() == before
    folder.chmod(0o555)
    with pytest.raises(StoreError, match="folder is read-only"):
        Store(folder / "s.db")
    assert os.listdir(folder) == ["kept.db"]
    folder.chmod(0o755)


def test_a_flipped_bit_within_a_stored_run_is_noticed(path):
    data = filled(path)
    at = data.index(b"3.141592653589793")
    path.write_bytes(data[:at] + b"4" + data[at + 1 :])
    with Store(path) as store, pytest.raises(StoreError, match="not what was stored"):
        list(store.results())


def test_a_damaged_store_with_a_log_beside_it_is_left_alone(path):
    """After a kill the log lies beside the file; refusing must not move it into the file."""
    filled(path)
    copy = path.with_name("copy.db")
    log = Path(f"{copy}-wal")
    with Store(path) as store:
        store.put(run(99))
        shutil.copy(path, copy)
        shutil.copy(f"{path}-wal", log)
    with Store(copy, read_only=True) as store:
        assert len(list(store.results())) == 31
    data = bytearray(copy.read_bytes())
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = b"\xa5" * 64
    copy.write_bytes(data)
    before = copy.read_bytes(), log.read_bytes()
    with pytest.raises(StoreError, match="damaged"):
        Store(copy)
    assert (copy.read_bytes(), log.read_bytes()) == before


def put_until_full(store: Store) -> tuple[int, str]:
    for seed in itertools.count():
        try:
            store.put(run(seed, error="x" * 1500))
        except StoreError as error:
            return seed, str(error)
    raise AssertionError


def test_a_full_disk_loses_nothing_stored(path):
    with Store(path) as store:
        assert store._db is not None
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 10}")
        stored, message = put_until_full(store)
        assert str(path) in message
        assert "full" in message
        assert stored > 3
        assert len(list(store.results())) == stored
        store._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
        assert store.put(run(stored))
    with Store(path) as store:
        assert len(list(store.results())) == stored + 1


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root on Linux")
def test_a_full_file_system_loses_nothing_stored(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount is not permitted here")
    try:
        with Store(disk / "s.db") as store:
            stored, message = put_until_full(store)
            assert "full" in message
            assert stored > 3
            assert len(list(store.results())) == stored
        with Store(disk / "s.db", read_only=True) as store:
            assert len(list(store.results())) == stored
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        with pytest.raises(StoreError, match="full"):
            Store(disk / "new.db")
    finally:
        subprocess.run(["umount", disk], check=True)


def _child(source: str, *arguments: str) -> subprocess.Popen[str]:
    header = (
        "import os, sys, time\n"
        "from dataclasses import replace\n"
        "from weightlab.trial.spec import RunResult, RunSpec\n"
        "from weightlab.trial.store import Store\n"
        f"SPEC = RunSpec(**{SPEC.to_dict()!r})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", header + source, *arguments], stdout=subprocess.PIPE, text=True
    )


def test_leases_keep_runs_apart(path):
    key = run().key
    with Store(path) as one, Store(path) as two:
        assert one.claim(key)
        assert not two.claim(key)
        assert not one.claim(key)
        two.release(key)
        assert not two.claim(key), "only the holder can give a lease back"
        one.release(key)
        assert two.claim(key)
        assert two.put(run())
        assert not one.claim(key)
        one.discard([key])
        assert one.claim(key)
        one.close()
        assert two.claim(key), "a closed store holds nothing"


def test_the_leases_of_a_killed_process_are_free_at_once(path):
    child = _child(
        "s = Store(sys.argv[1]); print(s.claim('k'), s.claim('l'), flush=True); time.sleep(60)", str(path)
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "True True\n"
    with Store(path) as store:
        assert not store.claim("k")
        child.kill()
        if sys.platform == "linux":  # not waited for yet: a zombie does no more work
            deadline = time.monotonic() + 10
            while "Z" not in Path(f"/proc/{child.pid}/stat").read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert store.claim("k")
        child.communicate()
        assert store.claim("l")


def test_leases_elsewhere_live_by_their_heartbeat(path):
    with Store(path, beat_seconds=0.05) as holder, Store(path, stale_seconds=2.0) as other:
        assert holder.claim("k")
        with closing(sqlite3.connect(path, isolation_level=None)) as raw:
            raw.execute("UPDATE leases SET place = 'another machine', beat = 0")
            deadline = time.monotonic() + 10
            while raw.execute("SELECT beat FROM leases").fetchone() == (0,) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not other.claim("k"), "the holder's heart beats"
            raw.execute("UPDATE leases SET owner = 'somebody else', beat = ?", (time.time() - 1,))
            assert not other.claim("k")
            raw.execute("UPDATE leases SET beat = ?", (time.time() - 3,))
            assert other.claim("k")


def test_a_recycled_process_id_does_not_hold_a_lease(path):
    with Store(path) as one, Store(path) as two:
        assert one.claim("k")
        with closing(sqlite3.connect(path)) as raw, raw:
            raw.execute("UPDATE leases SET started = started || '1'")
        assert two.claim("k")


WORKER = """
store = Store(sys.argv[1])
print("ready", flush=True)
for seed in range(int(sys.argv[2])):
    spec = replace(SPEC, seed=seed)
    if store.claim(spec.key):
        time.sleep(float(sys.argv[3]))
        assert store.put(RunResult(spec, "ok", {"loss": seed / 7}))
"""


def test_processes_that_start_together_share_the_runs_without_repeating_one(path):
    children = [_child(WORKER + "store.close()", str(path), "60", "0.002") for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    for child in children:
        assert child.stdout is not None
        child.stdout.close()
    with closing(sqlite3.connect(path)) as raw:
        counts = Counter(key for (key,) in raw.execute("SELECT key FROM runs"))
        assert raw.execute("SELECT count(*) FROM leases").fetchone() == (0,)
    assert counts == Counter(run(seed).key for seed in range(60))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_any_moment_lose_no_stored_run(path):
    """Children report each stored run through a pipe; what they reported must be in the file."""
    rng = random.Random(1)
    reported: set[int] = set()
    for attempt in range(15):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                store = Store(path)
                for seed in range(100_000):
                    if store.claim(run(seed).key):
                        assert store.put(run(seed, metrics={"loss": seed / 7}))
                        os.write(writer, struct.pack("<i", seed))
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(rng.uniform(0.0, 0.004 if attempt < 8 else 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as stream:
            data = stream.read()
        new = {seed for (seed,) in struct.iter_unpack("<i", data)}
        assert not new & reported, "a run was done twice"
        reported |= new
    with Store(path) as store:
        stored = {result.spec.seed: result.metrics["loss"] for result in store.results()}
    assert stored.items() >= {(seed, seed / 7) for seed in reported}
    assert len(stored) <= len(reported) + 15, "at most the run in flight is there unreported"
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT count(*) - count(DISTINCT key) FROM runs").fetchone() == (0,)


def test_a_closed_store_says_so(path):
    store = Store(path)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.get("k")


def test_the_file_is_plain_json_inside(path):
    with Store(path) as store:
        store.put(run(metrics={"loss": 0.1}))
    with closing(sqlite3.connect(path)) as raw:
        (text,) = raw.execute("SELECT result FROM runs").fetchone()
    assert json.loads(text)["metrics"] == {"loss": 0.1}
