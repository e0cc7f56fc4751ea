import json
import resource
import sys
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from weightlab import cli
from weightlab.inspect import Checkpoint
from weightlab.merge import Permutation, PermutationSpec, apply_permutation, average, slerp, task_arithmetic

NET = """
import torch
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3)
    )

def batches():
    generator = torch.Generator().manual_seed(9)
    for size in (30, 10):
        x = torch.randn(size, 1, 4, 4, generator=generator)
        yield x, (x.flatten(1)[:, :3]).argmax(1)

def pair():
    return build(), torch.randn(2, 1, 4, 4)

number = 3
def broken():
    return 1 / 0
"""
SPEC = {
    "0.weight": ["c", None, None, None],
    "0.bias": ["c"],
    "1.weight": ["c"],
    "1.bias": ["c"],
    "1.running_mean": ["c"],
    "1.running_var": ["c"],
    "4.weight": ["h", ["c", 4]],
    "4.bias": ["h"],
    "6.weight": [None, "h"],
}
space: dict = {}
exec(NET, space)


def trained(seed):
    torch.manual_seed(seed)
    model = space["build"]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        for x, y in space["batches"]():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval().state_dict()


STATES = [trained(seed) for seed in range(3)]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run the command line in a folder with three networks; return exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    for name, state in zip("abc", STATES, strict=True):
        save_file(state, tmp_path / f"{name}.safetensors", metadata={"format": "pt", "from": name})
    capfd.readouterr()

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["weightlab", *arguments])
        code = cli.run(list(arguments))
        out, err = capfd.readouterr()
        return code, out, err

    return go


def listing(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


A, B, C = "a.safetensors", "b.safetensors", "c.safetensors"
OUT = ("--out", "m.safetensors")
MERGE = ("merge", A, B, *OUT)
WEIGHTS = (*MERGE, "--method", "weights", "--model", "net.py:build", "--input-shape", "2,1,4,4")


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in state.items())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "average"], lambda: average(STATES[:2])),
        (["--method", "average", "--lam", "0.2"], lambda: average(STATES[:2], [0.8, 0.2])),
        (["--method", "average", "--weights", "1, 3"], lambda: average(STATES[:2], [1, 3])),
        (["--method", "slerp", "--lam", "0.3"], lambda: slerp(*STATES[:2], 0.3)),
        (
            ["--method", "task-arithmetic", "--base", C, "--scale", "0.4,-1"],
            lambda: task_arithmetic(STATES[2], STATES[:2], [0.4, -1]),
        ),
        (
            ["--method", "task-arithmetic", "--base", C, "--scale", "0.4"],
            lambda: task_arithmetic(STATES[2], STATES[:2], 0.4),
        ),
    ],
)
def test_files_hold_what_the_functions_give(run, tmp_path, arguments, expected):
    code, out, err = run(*MERGE, *arguments)
    assert (code, err) == (0, "")
    assert same(load_file(tmp_path / "m.safetensors"), expected())
    source = C if "--base" in arguments else A
    with safe_open(source, "pt") as old, safe_open("m.safetensors", "pt") as new:
        assert new.metadata() == old.metadata()
    assert arguments[1] in out
    assert "m.safetensors" in out


def test_a_relabelled_copy_merges_to_the_original(run, tmp_path):
    spec = PermutationSpec.from_model(space["build"](), torch.randn(2, 1, 4, 4))
    sizes = spec.group_sizes(STATES[0])
    moved = apply_permutation(
        spec, Permutation.random(sizes, generator=torch.Generator().manual_seed(0)), STATES[0]
    )
    save_file(moved, tmp_path / B)
    for extra in ([], ["--spec", "spec.json"]):
        code, out, _ = run(*WEIGHTS, *extra, "--force")
        assert code == 0
        assert same(load_file(tmp_path / "m.safetensors"), STATES[0])
        assert "0 after" in out


def test_matching_with_data_tells_barriers_and_writes_a_page(run, tmp_path):
    command = (
        *MERGE, "--method", "weights", "--model", "net.py:build", "--data", "net.py:batches", "--reset-batch-norm",
        "--report", "page.html", "--points", "5", "--json",
    )  # fmt: skip
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    result = json.loads(out)
    losses = result["losses"]
    assert losses["before"]["barrier"] > 0
    assert losses["lambdas"] == [0, 0.25, 0.5, 0.75, 1]
    assert losses["after"]["losses"][0] == pytest.approx(losses["models"][0], rel=1e-5)
    assert losses["after"]["losses"][-1] == pytest.approx(losses["models"][1], rel=1e-4)
    assert losses["reset"]["losses"][2] == pytest.approx(losses["merged"], rel=1e-4)
    assert result["matching"]["distance"]["after"][0] < result["matching"]["distance"]["before"][0]
    assert result["batch_norm"] == ["1"]
    assert result["command"].startswith("weightlab merge a.safetensors")
    page = (tmp_path / "page.html").read_text()
    assert "The barrier between the two goes from" in page
    assert page.count("<svg") > 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    # The statistics are those of the merged network on the data.
    merged = load_file(tmp_path / "m.safetensors")
    model = space["build"]()
    model.load_state_dict(merged)
    x = torch.cat([model[0](x) for x, _ in space["batches"]()]).double().transpose(0, 1).flatten(1)
    assert torch.allclose(merged["1.running_mean"].double(), x.mean(1), atol=1e-6)
    assert torch.allclose(merged["1.running_var"].double(), x.var(1), rtol=1e-5)


def test_reset_without_matching_changes_only_statistics(run, tmp_path):
    command = (*MERGE, "--method", "average", "--model", "net.py:pair", "--data", "net.py:batches")
    assert run(*command, "--reset-batch-norm")[0] == 0
    merged, plain = load_file(tmp_path / "m.safetensors"), average(STATES[:2])
    assert {name for name in plain if not torch.equal(plain[name], merged[name])} == {
        "1.running_mean",
        "1.running_var",
    }


def test_three_networks_and_equal_seeds(run, tmp_path):
    command = (
        "merge",
        A,
        B,
        C,
        *OUT,
        "--method",
        "weights",
        "--model",
        "net.py:pair",
        "--force",
        "--report",
        "page.html",
    )
    assert run(*command)[0] == 0
    first = (tmp_path / "m.safetensors").read_bytes()
    code, out, _ = run(*command, "--json")
    assert (code, (tmp_path / "m.safetensors").read_bytes()) == (0, first)
    assert len(json.loads(out)["matching"]["moved"]) == 2
    assert "3 networks in one" in (tmp_path / "page.html").read_text()
    assert run(*command, "--scheme", "star", "--weights", "1,1,0")[0] == 0


def test_a_task_gives_model_data_and_scores(run, tmp_path):
    from weightlab.tasks import get

    task = get("digits-mlp")
    for seed, name in enumerate((A, B)):
        save_file(task.build(torch.Generator().manual_seed(seed)).state_dict(), tmp_path / name)
    code, out, _ = run(
        *MERGE, "--method", "weights", "--task", "digits-mlp", "--batches", "2", "--points", "3"
    )
    assert code == 0
    assert "error: models" in out
    assert "barrier:" in out


def folder(path, seed, shards, dtype=torch.bfloat16):
    path.mkdir()
    torch.manual_seed(seed)
    tensors = {name: torch.randn(x.shape).to(dtype) for name, x in STATES[0].items() if x.is_floating_point()}
    tensors["position_ids"] = torch.arange(5)[None]
    names = list(tensors)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        for i, file in enumerate(files):
            save_file(
                {name: tensors[name] for name in names[i::shards]}, path / file, metadata={"format": "pt"}
            )
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    for name, text in {
        "config.json": "{}",
        "tokenizer.json": "words",
        "LICENSE": "free",
        "trainer_state.json": "{}",
        "README.md": "about this one",
        "training_args.bin": "pickle",
    }.items():
        (path / name).write_text(text)
    return tensors


def test_sharded_folders_keep_layout_dtype_and_description(run, tmp_path):
    a, b = folder(tmp_path / "A", 0, 3), folder(tmp_path / "B", 1, 1)
    code, _, _ = run("merge", "A", "B", "--out", "M", "--method", "average", "--report", "page.html")
    assert code == 0
    out = Checkpoint(tmp_path / "M")
    assert same(dict(out), {**average([a, b]), "position_ids": a["position_ids"]})
    assert {out[name].dtype for name in a} == {torch.bfloat16, torch.int64}
    kept = {path.name for path in (tmp_path / "A").iterdir()} - {
        "trainer_state.json",
        "README.md",
        "training_args.bin",
    }
    assert set(listing(tmp_path / "M")) == kept
    for path in (tmp_path / "M").glob("*.safetensors"):
        with safe_open(path, "pt") as new, safe_open(tmp_path / "A" / path.name, "pt") as old:
            assert list(new.keys()) == list(old.keys())
            assert new.metadata() == {"format": "pt"}
    assert "Where the networks differ" in (tmp_path / "page.html").read_text()


def test_one_tensor_of_each_model_at_a_time(run, tmp_path, monkeypatch):
    folder(tmp_path / "A", 0, 2)
    folder(tmp_path / "B", 1, 1)
    alive = []
    read = Checkpoint.__getitem__

    def watched(self, name):
        held = {other for other, reference in alive if reference() is not None}
        assert held <= {name}
        tensor = read(self, name)
        alive.append((name, weakref.ref(tensor)))
        return tensor

    monkeypatch.setattr(Checkpoint, "__getitem__", watched)
    for method in (["average"], ["slerp"], ["task-arithmetic", "--base", "C"]):
        if "C" in method:
            folder(tmp_path / "C", 2, 1)
        code, _, err = run("merge", "A", "B", "--out", "M", "--force", "--method", *method)
        assert (code, err) == (0, "")
    assert len(alive) > 30


def test_folders_of_transformers_make_their_own_model(run, tmp_path):
    from tiny_causal_lm import tiny_llama

    for seed, name in enumerate("AB"):
        model = tiny_llama(tie_word_embeddings=True)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.05)
        model.save_pretrained(tmp_path / name)
    code, out, err = run("merge", "A", "B", "--out", "M", "--method", "weights", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["matching"]["distance"]["after"][0] < result["matching"]["distance"]["before"][0]
    spec = {"model.embed_tokens.weight": [None, "stream"]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    code, _, err = run("merge", "A", "B", "--out", "N", "--method", "weights", "--spec", "spec.json")
    assert code == 2
    assert "--spec spec.json is wrong: the permuted model is another function" in err
    assert not (tmp_path / "N").exists()


def test_models_that_transformers_stores_under_other_names(run, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    model.save_pretrained(tmp_path / "A")
    stored = load_file(tmp_path / "A" / "model.safetensors")
    # Swap two units of the middle of the block, by hand and by the names in the file.
    (first,) = (name for name in stored if name.endswith("intermediate.dense.weight"))
    block = first.removesuffix("intermediate.dense.weight")
    order = torch.arange(12).roll(1)
    moved = dict(stored)
    for name in (first, f"{block}intermediate.dense.bias"):
        moved[name] = stored[name][order].clone()
    moved[f"{block}output.dense.weight"] = stored[f"{block}output.dense.weight"][:, order].clone()
    (tmp_path / "B").mkdir()
    save_file(moved, tmp_path / "B" / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("merge", "A", "B", "--out", "M", "--method", "weights")
    assert code == 0, err
    assert same(load_file(tmp_path / "M" / "model.safetensors"), stored)


def test_saved_masks_of_infinities_are_copied(run, tmp_path):
    mask = torch.full((2, 2), -torch.inf).triu(1)
    for seed, name in enumerate((A, B)):
        save_file({"mask": mask, "w": torch.full((2,), float(seed))}, tmp_path / name)
    assert run(*MERGE, "--method", "average")[0] == 0
    assert same(load_file(tmp_path / "m.safetensors"), {"mask": mask, "w": torch.full((2,), 0.5)})


def test_names_with_a_wrapper_before_them(run, tmp_path):
    save_file({f"module.{name}": x for name, x in STATES[0].items()}, tmp_path / A)
    assert run(*MERGE, "--method", "average")[0] == 0
    merged = load_file(tmp_path / "m.safetensors")
    assert same({name.removeprefix("module."): x for name, x in merged.items()}, average(STATES[:2]))
    assert all(name.startswith("module.") for name in merged)


def test_equal_networks_and_unlike_dtypes_are_noted(run, tmp_path):
    save_file({name: x.half() if x.is_floating_point() else x for name, x in STATES[0].items()}, tmp_path / B)
    _, out, _ = run(*MERGE, "--method", "average")
    assert "note: b.safetensors stores 10 tensors in another dtype" in out
    save_file(STATES[0], tmp_path / B)
    _, out, _ = run(*MERGE, "--method", "average", "--force")
    assert "note: the first two networks have the same weights" in out


def change(name, value):
    return lambda path: save_file({**STATES[1], name: value}, path / B)


def without(name):
    return lambda path: save_file({key: x for key, x in STATES[1].items() if key != name}, path / B)


def wrong_spec(**axes):
    return lambda path: (path / "spec.json").write_text(json.dumps({**SPEC, **axes}))


def nothing(path):
    pass


def poisoned(path):
    weight = STATES[1]["4.weight"].clone()
    weight[0, :2] = torch.nan
    save_file({**STATES[1], "4.weight": weight}, path / B)


def quantized(path):
    for name, seed in ((A, 0), (B, 1)):
        generator = torch.Generator().manual_seed(seed)
        save_file({"q": torch.randint(9, (3, 3), generator=generator), "w": torch.zeros(2)}, path / name)


def eight_bits(path):
    for name in (A, B):
        save_file({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, path / name)


def pickles(path):
    torch.save(STATES[1], path / "b.pt")
    (path / "bin").mkdir()
    torch.save(STATES[1], path / "bin" / "pytorch_model.bin")


def adapter(path):
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_config.json").write_text("{}")


AVERAGE = (*MERGE, "--method", "average")
SPECIFIED = (*WEIGHTS, "--spec", "spec.json")


@pytest.mark.parametrize(
    ("prepare", "command", "message"),
    [
        (change("4.weight", torch.zeros(9, 24)), AVERAGE, "4.weight has shape (8, 24) in a.safetensors, but (9, 24) in b.safetensors"),
        (without("6.bias"), AVERAGE, "6.bias, of shape (3,), is in a.safetensors, but not in b.safetensors"),
        (change("extra", torch.zeros(2)), AVERAGE, "extra, of shape (2,), is in b.safetensors, but not in a.safetensors"),
        (change("6.bias", torch.zeros(3, dtype=torch.int8)), AVERAGE, "one of them is quantized"),
        (quantized, AVERAGE, "q holds integers that differ"),
        (eight_bits, AVERAGE, "8-bit"),
        (pickles, ("merge", A, "b.pt", *OUT, "--method", "average"), "b.pt is no safetensors file; pickles"),
        (pickles, ("merge", A, "bin", *OUT, "--method", "average"), "bin has no safetensors file; pickles"),
        (adapter, ("merge", "adapter", B, *OUT, "--method", "average"), "use weightlab merge-adapters"),
        (lambda path: (path / B).write_bytes((path / A).read_bytes()[:900]), AVERAGE, "truncated"),
        (lambda path: (path / B).unlink(), AVERAGE, "there is no file or folder b.safetensors"),
        (lambda path: (path / "m.safetensors").touch(), AVERAGE, "m.safetensors exists; give another --out, or --force"),
        (lambda path: (path / "p.html").touch(), (*AVERAGE, "--report", "p.html"), "p.html exists"),
        (nothing, (*AVERAGE, "--report", B), "b.safetensors is a model's own place"),
        (nothing, ("merge", A, A, *OUT, "--method", "average"), "a.safetensors is given twice"),
        (nothing, ("merge", A, B, "--out", "./b.safetensors", "--method", "average", "--force"), "--out ./b.safetensors is, holds or lies in b.safetensors"),
        (nothing, ("merge", A, B, "--out", "m", "--method", "average"), "let its name end in .safetensors"),
        (nothing, ("merge", A, *OUT, "--method", "average"), "average takes two models or more, got 1"),
        (nothing, ("merge", A, B, C, *OUT, "--method", "slerp"), "slerp takes two models, got 3"),
        (nothing, (*MERGE, "--method", "task-arithmetic"), "task-arithmetic needs --base"),
        (nothing, (*AVERAGE, "--base", C), "--base is for task-arithmetic"),
        (nothing, (*MERGE, "--method", "task-arithmetic", "--base", A), "a.safetensors is given twice"),
        (nothing, (*MERGE, "--method", "task-arithmetic", "--base", C, "--scale", "1,2,3"), "one for each of 2 models"),
        (nothing, (*MERGE, "--method", "task-arithmetic", "--base", C, "--weights", "1,2"), "task-arithmetic takes --scale"),
        (nothing, (*AVERAGE, "--scale", "1"), "--scale is for task-arithmetic"),
        (nothing, (*AVERAGE, "--weights", "1,x"), "--weights takes numbers by comma"),
        (nothing, (*AVERAGE, "--weights", "1,2,3"), "3 weights for 2 models"),
        (nothing, (*AVERAGE, "--lam", "2"), "--lam must lie in [0, 1], got 2"),
        (nothing, ("merge", A, B, C, *OUT, "--method", "average", "--lam", "0.5"), "--lam is the second model's share of two"),
        (nothing, (*AVERAGE, "--spec", "spec.json"), "--spec is for weights"),
        (nothing, (*AVERAGE, "--reset-batch-norm"), "--reset-batch-norm runs the network: give --task"),
        (nothing, (*AVERAGE, "--reset-batch-norm", "--model", "net.py:pair"), "--reset-batch-norm needs data"),
        (nothing, (*MERGE, "--method", "weights"), "weights runs the network: give --task, --model"),
        (nothing, (*MERGE, "--method", "weights", "--model", "net.py:build"), "net.py:build comes without an input: give --input-shape"),
        (nothing, (*MERGE, "--method", "weights", "--model", "net.py:number"), "net.py:number gives a int"),
        (nothing, (*MERGE, "--method", "weights", "--model", "net.py:broken"), "net.py:broken: ZeroDivisionError"),
        (nothing, (*MERGE, "--method", "weights", "--model", "net.py:biuld"), "did you mean 'build'"),
        (nothing, (*MERGE, "--method", "weights", "--model", "net"), "neither file.py:object nor a folder"),
        (nothing, (*WEIGHTS[:-1], "2,x"), "--input-shape takes positive integers by comma"),
        (nothing, (*WEIGHTS[:-1], "2,3,4,4"), "cannot run net.py:build: RuntimeError"),
        (nothing, (*MERGE, "--method", "weights", "--task", "digits-mlp"), "a.safetensors is not of the architecture of the model of digits-mlp"),
        (nothing, (*MERGE, "--method", "weights", "--task", "digits"), "did you mean digits-mlp"),
        (nothing, (*AVERAGE, "--data", "net.py:batches"), "give --model file.py:object"),
        (nothing, (*WEIGHTS, "--data", "net.py:number"), "net.py:number: TypeError"),
        (nothing, (*AVERAGE, "--method", "mean"), "mean"),
        (wrong_spec(**{"4.bias": [None]}), SPECIFIED, "--spec spec.json is wrong: the permuted model is another function"),
        (wrong_spec(**{"4.weight": ["h", None]}), SPECIFIED, "--spec spec.json is wrong: the permuted model is another function"),
        (wrong_spec(**{"4.weight": ["h", ["c", 5]]}), SPECIFIED, "4.weight has an axis of length 24"),
        (wrong_spec(**{"7.weight": ["h"]}), SPECIFIED, "names '7.weight', which the parameters do not have"),
        (wrong_spec(**{"4.bias": "h"}), SPECIFIED, "must be an object of lists"),
        (wrong_spec(**{"4.bias": [1.5]}), SPECIFIED, "--spec spec.json: 4.bias has the axis 1.5"),
        (lambda path: (path / "spec.json").write_text("{"), SPECIFIED, "--spec spec.json is no JSON"),
        (lambda path: (path / "spec.json").unlink(), SPECIFIED, "cannot read --spec spec.json"),
        (lambda path: (path / "spec.json").write_text("{}"), SPECIFIED, "no units of net.py:build are free to move, by spec.json"),
    ],
)  # fmt: skip
def test_wrong_requests_are_explained_in_two_lines_and_write_nothing(
    run, tmp_path, prepare, command, message
):
    prepare(tmp_path)
    before = listing(tmp_path)
    code, out, err = run(*command)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2
    assert listing(tmp_path) == before


def test_weights_that_are_not_finite_are_named(run, tmp_path):
    poisoned(tmp_path)
    before = listing(tmp_path)
    for command in (AVERAGE, WEIGHTS):
        code, out, err = run(*command)
        assert (code, out) == (1, "")
        assert "4.weight of b.safetensors has 2 entries that are not finite; nothing was written" in err
        assert listing(tmp_path) == before


def test_force_replaces_files_and_models_and_nothing_else(run, tmp_path):
    folder(tmp_path / "A", 0, 1)
    folder(tmp_path / "B", 1, 1)
    folder(tmp_path / "M", 2, 3)
    command = ("merge", "A", "B", "--out", "M", "--method", "average")
    code, _, err = run(*command)
    assert code == 2
    assert "M exists" in err
    assert run(*command, "--force")[0] == 0
    assert "model-00001-of-00003.safetensors" not in listing(tmp_path / "M")
    assert not [name for name in listing(tmp_path) if name.startswith(".")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code, _, err = run("merge", "A", "B", "--out", "mine", "--method", "average", "--force")
    assert code == 2
    assert "holds no model; --force does not replace it" in err
    for out in ("A/merged", ".", "A"):
        code, _, err = run("merge", "A", "B", "--out", out, "--method", "average", "--force")
        assert code == 2
        assert "is, holds or lies in A" in err
    code, _, err = run("merge", "A", "B", "--out", A, "--method", "average", "--force")
    assert code == 2
    assert "is to be a folder" in err


def test_a_full_disk_leaves_what_was_there(run, tmp_path, monkeypatch):
    big = {"w": torch.zeros(300_000), "v": torch.zeros(300_000)}
    for name in (A, B):
        save_file(big, tmp_path / name)
    (tmp_path / "m.safetensors").write_text("old")
    before = listing(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file larger than this cannot be written, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))
    try:
        code, _, err = run(*AVERAGE, "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "cannot write" in err
    assert "nothing was written" in err
    assert listing(tmp_path) == before
    assert (tmp_path / "m.safetensors").read_text() == "old"
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    code, _, err = run(*AVERAGE, "--force")
    assert code == 1
    assert "takes 2.4 MB, and 1 MB are free" in err
    assert listing(tmp_path) == before


def test_ctrl_c_leaves_nothing(run, tmp_path, monkeypatch):
    before = listing(tmp_path)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    code, out, err = run(*AVERAGE)
    assert (code, out) == (cli.INTERRUPTED, "")
    assert "Stopped; nothing was written." in err
    assert listing(tmp_path) == before


def test_the_method_must_be_named(run):
    code, _, err = run(*MERGE)
    assert code == 2
    assert "Missing option '--method'" in err


def test_help_teaches_with_examples(run):
    code, out, _ = run("merge", "--help")
    assert code == 0
    assert "Examples" in out
    for option in ("--method", "--base", "--reset-batch-norm", "--spec"):
        assert option in out


def test_an_index_cannot_lead_out_of_its_folder(run, tmp_path):
    folder(tmp_path / "A", 0, 1)
    folder(tmp_path / "B", 1, 2)
    index = tmp_path / "B" / "model.safetensors.index.json"
    save_file({"w": torch.zeros(2)}, tmp_path / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {"w": "../outside.safetensors"}}))
    code, _, err = run("merge", "B", "A", "--out", "M", "--method", "average")
    assert code == 2
    assert "does not lie in the folder itself" in err


def test_models_of_another_architecture_than_the_files(run, tmp_path):
    (tmp_path / "net.py").write_text(NET.replace("nn.Linear(8, 3)", "nn.Linear(8, 3), nn.Linear(3, 3)"))
    code, _, err = run(*WEIGHTS)
    assert code == 2
    assert "7.weight, of shape (3, 3), is in the model, and not in the file" in err
    (tmp_path / "net.py").write_text(
        NET.replace("Linear(24, 8)", "Linear(24, 9)").replace("Linear(8, 3)", "Linear(9, 3)")
    )
    code, _, err = run(*WEIGHTS)
    assert code == 2
    assert "has shape (8,) in the file, but (9,) in the model" in err
