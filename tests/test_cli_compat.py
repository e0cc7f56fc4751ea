import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from weightlab import cli
from weightlab.merge import CompatibilityAdapter, fit_adapter, retrieval_report


def embeddings(n=240, seed=0):
    """Clustered new embeddings, old ones by a map that bends them, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 6
    centres = torch.randn(6, 12, generator=generator)
    z = centres[y] + 0.5 * torch.randn(n, 12, generator=generator)
    bend = torch.randn(12, 8, generator=generator) * torch.tensor([2.0, 1.5, 1, 1, 0.6, 0.4, 0.2, 0.1])
    return z, z @ bend + 0.2 * torch.randn(n, 8, generator=generator), y


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run the command line in a folder with embeddings; return exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    z, h, y = embeddings()
    np.save("new.npy", z.numpy())
    np.save("old.npy", h.numpy())
    np.save("y.npy", y.numpy())
    capfd.readouterr()

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["weightlab", *arguments])
        code = cli.run(list(arguments))
        out, err = capfd.readouterr()
        return code, out, err

    return go


FIT = ("compat", "new.npy", "old.npy", "--out", "to-old.safetensors")


def test_fits_chooses_and_writes_three_files(run, tmp_path):
    command = (*FIT, "--labels", "y.npy", "--tol", "0.1,0.3", "--json")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert json.loads((tmp_path / "to-old.json").read_text()) == report
    assert report["command"] == " ".join(["weightlab", *command])
    assert report["pairs"] == {"fitted": 192, "held_out": 48}
    assert [row["map"] for row in report["maps"]] == ["orthogonal", "lambda", "lambda", "affine"]
    chosen = report["maps"][report["chosen"]]
    allowed = [row["cross"] for row in report["maps"] if row["drop"] <= 0.005]
    assert chosen["cross"] == max(allowed)
    adapter = CompatibilityAdapter.load("to-old.safetensors")
    assert adapter.deviation == pytest.approx(chosen["deviation"])
    assert adapter.info["measured"]["cross"] == chosen["cross"]
    page = (tmp_path / "to-old.html").read_text()
    assert page.count("<svg role") == 2
    assert "While the gallery is computed anew" in page
    assert f"{100 * chosen['cross']:.1f} %" in page


def test_numbers_are_of_pairs_held_out(run):
    code, out, _ = run(*FIT, "--labels", "y.npy", "--json", "--tol", "0.3", "--seed", "3", "--no-html")
    assert code == 0
    report = json.loads(out)
    z, h, y = embeddings()
    order = torch.randperm(240, generator=torch.Generator().manual_seed(3))
    held, kept = order[:48], order[48:]
    for row, settings in zip(
        report["maps"],
        [{"kind": "orthogonal"}, {"kind": "lambda", "tol": 0.3}, {"kind": "affine"}],
        strict=True,
    ):
        adapter = fit_adapter(z[kept], h[kept], **settings)
        with torch.no_grad():
            cross = retrieval_report(adapter(z[held]), h[kept], y[held], y[kept], k=[1])
            own = retrieval_report(adapter(z[held]), adapter(z[kept]), y[held], y[kept], k=[1])
        assert row["cross"] == cross.cmc[1]
        assert row["cross_map"] == pytest.approx(cross.mean_ap)
        assert row["self"] == own.cmc[1]
    own = retrieval_report(z[held], z[kept], y[held], y[kept], k=[1]).cmc[1]
    assert report["reference"]["new"] == own
    areas = [curve["area"] for curve in report["backfill"].values()]
    assert all(0 < area <= 1 for area in areas)


def test_without_labels_items_find_themselves(run):
    code, out, _ = run(*FIT, "--json", "--tol", "0.1", "--no-html")
    assert code == 0
    report = json.loads(out)
    assert report["reference"] == {"old": None, "new": 1.0}
    assert (report["compatible"], report["backfill"]) == (None, None)
    affine = report["maps"][-1]
    assert affine["cross"] > 0.9
    assert affine["self"] < report["maps"][1]["self"] <= 1
    assert any("without labels" in note for note in report["notes"])


def test_a_rotation_keeps_all_neighbours(run):
    z, _, _ = embeddings()
    np.save("same.npy", (z @ torch.linalg.qr(torch.randn(12, 12)).Q).numpy())
    code, out, _ = run(
        "compat", "new.npy", "same.npy", "--out", "a.safetensors", "--json", "--no-html", "--tol", "0.1"
    )
    assert code == 0
    rotation = json.loads(out)["maps"][0]
    assert (rotation["self"], rotation["cross"]) == (1.0, 1.0)


def test_tells_what_it_found(run):
    code, out, _ = run(*FIT, "--labels", "y.npy", "--tol", "0.1,0.3", "--no-html")
    assert code == 0
    assert "192 pairs fitted, 48 held out; 12 to 8 dimensions" in out
    assert sum(line.startswith("* ") for line in out.splitlines()) == 1
    assert "*: highest cross of the maps that cost at most 0.5 points of self" in out
    assert "area under the backfill curve" in out
    assert "report: to-old.json" in out


def test_safetensors_with_names_and_text_labels(run):
    z, h, y = embeddings()
    save_file({"v2": z.bfloat16(), "v1": h}, "both.safetensors")
    np.save("names.npy", np.array(["ant", "bee", "cat", "dog", "eel", "fox"])[y.numpy()])
    code, out, _ = run(
        "compat", "both.safetensors", "both.safetensors", "--new-tensor", "v2", "--old-tensor", "v1", "--labels",
        "names.npy", "--out", "a.safetensors", "--json", "--no-html", "--tol", "",
    )  # fmt: skip
    assert code == 0
    assert [row["map"] for row in json.loads(out)["maps"]] == ["orthogonal", "affine"]
    code, _, err = run("compat", "both.safetensors", "old.npy", "--out", "b.safetensors")
    assert code == 2
    assert "has 2 tensors that may be the matrix, of v1, v2; choose by --new-tensor or --old-tensor" in err


def test_equal_commands_give_equal_adapters(run, tmp_path):
    files = []
    for _ in range(2):
        assert (
            run(
                *FIT,
                "--labels",
                "y.npy",
                "--contrastive",
                "1",
                "--steps",
                "3",
                "--tol",
                "0.1",
                "--force",
                "--no-html",
            )[0]
            == 0
        )
        files.append((tmp_path / "to-old.safetensors").read_bytes())
    assert files[0] == files[1]


def test_existing_files_are_kept_without_force(run, tmp_path):
    assert run(*FIT, "--tol", "0.2", "--no-html")[0] == 0
    before = (tmp_path / "to-old.safetensors").read_bytes()
    code, _, err = run(*FIT, "--tol", "0.2", "--bias", "--no-html")
    assert code == 2
    assert "to-old.safetensors exists; give another --out, or --force to replace it" in err
    assert (tmp_path / "to-old.safetensors").read_bytes() == before
    assert run(*FIT, "--tol", "0.2", "--bias", "--no-html", "--force")[0] == 0
    assert (tmp_path / "to-old.safetensors").read_bytes() != before


class TestApply:
    def test_maps_a_file(self, run):
        assert run(*FIT, "--tol", "0.2", "--no-html")[0] == 0
        adapter = CompatibilityAdapter.load("to-old.safetensors")
        z, h, _ = embeddings()
        code, out, _ = run("compat", "apply", "to-old.safetensors", "new.npy", "--out", "mapped.npy")
        assert code == 0
        assert "240 embeddings, 12 to 8 dimensions: mapped.npy" in out
        torch.testing.assert_close(torch.from_numpy(np.load("mapped.npy")), adapter.to_old(z).detach())
        code, out, _ = run(
            "compat", "apply", "to-old.safetensors", "old.npy", "--lift", "--out", "l.safetensors", "--json"
        )
        assert code == 0
        assert json.loads(out)["direction"] == "lift"
        torch.testing.assert_close(load_file("l.safetensors")["embeddings"], adapter.lift(h).detach())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["to-old.safetensors", "old.npy", "--out", "x.npy"],
                "old.npy has 8 dimensions, but to-old.safetensors maps new",
            ),
            (["to-old.safetensors", "new.npy", "--lift", "--out", "x.npy"], "--lift is for old ones"),
            (["to-old.safetensors", "new.npy", "--out", "new.npy"], "new.npy exists"),
            (["to-old.safetensors", "new.npy", "--out", "x.pt"], "x.pt may hold pickles"),
            (["none.safetensors", "new.npy", "--out", "x.npy"], "no file none.safetensors"),
            (["plain.safetensors", "new.npy", "--out", "x.npy"], "is no compatibility adapter"),
            (["to-old.safetensors", "new.npy"], "--out"),
        ],
    )
    def test_wrong_requests(self, run, arguments, message, tmp_path):
        save_file({"x": torch.ones(2, 2)}, "plain.safetensors")
        z, h, _ = embeddings()
        fit_adapter(z, h).save("to-old.safetensors")
        code, out, err = run("compat", "apply", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
        assert not (tmp_path / "x.npy").exists()


def bad_files():
    z, _, _ = embeddings()
    zero, holes = z.clone(), z.clone()
    zero[[3, 7]] = 0
    holes[5, 1] = torch.nan
    np.save("short.npy", z[:100].numpy())
    np.save("zero.npy", zero.numpy())
    np.save("holes.npy", holes.numpy())
    np.save("objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save("integers.npy", np.ones((240, 4), dtype=np.int64))
    np.save("alone.npy", np.arange(240))
    np.save("few.npy", z[:5].numpy())
    with open("cut.safetensors", "wb") as file:
        save_file({"x": z}, "whole.safetensors")
        with open("whole.safetensors", "rb") as whole:
            file.write(whole.read()[:500])
    torch.save(z, "new.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["short.npy", "old.npy"], "short.npy has 100 rows and old.npy 240; they must be the same items"),
        (["zero.npy", "old.npy"], "2 rows of zero.npy are zero, and have no direction to compare: 3, 7;"),
        (["new.npy", "holes.npy"], "1 rows of holes.npy are not finite: 5;"),
        (["new.pt", "old.npy"], "new.pt may hold pickles, which can run code when read"),
        (["objects.npy", "old.npy"], "neither is read, as unpickling can run code"),
        (["integers.npy", "old.npy"], "must hold float16, float32 or float64, got int64"),
        (["cut.safetensors", "old.npy"], "cut.safetensors is no whole safetensors file"),
        (["missing.npy", "old.npy"], "no file missing.npy"),
        (["new.npy", "old.csv"], "old.csv must end in .safetensors or .npy"),
        (["few.npy", "few.npy"], "5 pairs are too few"),
        (["new.npy", "old.npy", "--labels", "few.npy"], "labels in few.npy must be integers or text"),
        (["new.npy", "old.npy", "--labels", "alone.npy"], "no class of alone.npy has two items"),
        (["new.npy", "old.npy", "--labels", "missing.npy"], "no file missing.npy"),
        (["new.npy", "old.npy", "--contrastive", "1"], "--contrastive needs --labels"),
        (["new.npy", "old.npy", "--tol", "-0.1"], "--tol takes finite numbers of at least 0, got -0.1"),
        (["new.npy", "old.npy", "--tol", "small"], "--tol takes numbers by comma"),
        (["new.npy", "old.npy", "--held-out", "1.5"], "--held-out must lie between 0 and 1"),
        (["new.npy", "old.npy", "--most-drop", "-1"], "--most-drop must be at least 0"),
        (["new.npy"], "Missing argument 'old'"),
        (["new.npy", "old.npy", "--out", "map.npy"], "--out map.npy must end in .safetensors"),
        (
            ["whole.safetensors", "old.npy", "--new-tensor", "y"],
            "whole.safetensors has no tensor 'y'; it has x",
        ),
    ],
)
def test_wrong_requests_are_explained_in_two_lines(run, tmp_path, arguments, message):
    bad_files()
    out_options = [] if "--out" in arguments else ["--out", "a.safetensors"]
    code, out, err = run("compat", *arguments, *out_options, "--no-html")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2
    assert not (tmp_path / "a.safetensors").exists()


def test_help_teaches_with_examples(run):
    code, out, _ = run("compat", "fit", "--help")
    assert code == 0
    assert "Examples" in out
    assert "--most-drop" in out
    code, out, _ = run("compat", "--help")
    assert code == 0
    assert "apply" in out
