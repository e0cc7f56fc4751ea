import csv
import json
import sys

import numpy as np
import pytest
import torch

from weightlab import cli
from weightlab.inspect import data_scores
from weightlab.tasks import registry

QUICK = ("--runs", "2", "--epochs", "1")
WHOLE = ("data-scores", "--task", "digits-mlp", "--out", "scores")
TASK = (*WHOLE, "--limit", "200")


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run the command line in an empty folder; return exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["weightlab", *arguments])
        code = cli.run(list(arguments))
        out, err = capfd.readouterr()
        return code, out, err

    return go


def rows(path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_scores_a_task(run, tmp_path):
    code, out, _ = run(*WHOLE, *QUICK)
    assert code == 0
    assert "hardest of 1,085 examples by el2n" in out
    assert "scores.csv" in out
    table = rows(tmp_path / "scores" / "scores.csv")
    assert list(table[0]) == ["index", "score", "rank", "label", "predicted", "margin", "suspicion"]
    assert sorted(int(row["index"]) for row in table) == list(range(1085))
    values = [float(row["score"]) for row in table]
    assert values == sorted(values, reverse=True)
    task = registry.get("digits-mlp")
    pixels, labels = task.images("train")
    for row in table[:20]:
        assert int(row["label"]) == labels[int(row["index"])]

    def model():
        seed = int(torch.randint(2**62, ()))
        built = task.build(torch.Generator().manual_seed(seed))
        return torch.nn.Sequential(Divided(), built)

    expected = data_scores(model, (pixels, labels), runs=2, epochs=1, batch_size=task.batch_size)
    assert [int(row["index"]) for row in table] == expected.order().tolist()


class Divided(torch.nn.Module):
    def forward(self, pixels):
        return pixels.float() / 16.0


def test_page_shows_the_images_and_the_command(run, tmp_path):
    run(*TASK, *QUICK, "--show", "3")
    text = (tmp_path / "scores" / "data-scores.html").read_text()
    assert text.count("data:image/png;base64,") == 9
    assert " ".join(["weightlab", *TASK, *QUICK, "--show", "3"]) in text


def test_json_is_the_report(run, tmp_path):
    code, out, err = run(*TASK, *QUICK, "--score", "el2n,loss", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads((tmp_path / "scores" / "data-scores.json").read_text())
    assert report["examples"] == 200
    assert report["correlations"]["el2n loss"] > 0.8
    first = rows(tmp_path / "scores" / "scores.csv")
    assert report["hardest"][0] == int(first[0]["index"])
    assert len(rows(tmp_path / "scores" / "scores-loss.csv")) == 200


def test_retrains_at_several_fractions(run):
    command = (
        *TASK,
        *QUICK,
        "--retrain",
        "0.5,0.3",
        "--seeds",
        "2",
        "--retrain-epochs",
        "1",
        "--offset",
        "0.1",
    )
    code, out, _ = run(*command, "--json")
    assert code == 0
    found = json.loads(out)["retraining"]
    assert [row["name"] for row in found][:3] == ["all", "hardest, 30 % pruned", "random, 30 % pruned"]
    assert [row["examples"] for row in found] == [200, 140, 140, 140, 100, 100, 100]
    assert all(len(row["errors"]) == 2 for row in found)
    code, out, _ = run(*command, "--resume")
    assert code == 0
    assert "trained on hardest, 50 % pruned: test error" in out


def test_ctrl_c_keeps_runs_and_says_how_to_go_on(run, tmp_path, monkeypatch):
    run(*TASK, "--runs", "3", "--epochs", "1", "--force")
    whole = (tmp_path / "scores" / "scores.csv").read_text()
    from weightlab._progress import WorkBar

    def stop(self, message, done, total):
        if message == "run 3 of 3":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkBar, "tell", stop)
        code, out, err = run(*TASK, "--runs", "3", "--epochs", "1", "--force")
    assert (code, out) == (cli.INTERRUPTED, "")
    assert "2 of 3 runs are kept in scores; the same command with --resume goes on." in err
    assert not (tmp_path / "scores" / "scores.csv").exists()
    code, _, err = run(*TASK, "--runs", "3", "--epochs", "1")
    assert code == 2
    assert "--resume goes on with them, --force starts over" in err
    assert run(*TASK, "--runs", "3", "--epochs", "1", "--resume")[0] == 0
    assert (tmp_path / "scores" / "scores.csv").read_text() == whole


def test_resume_adds_runs_and_refuses_other_settings(run, tmp_path):
    assert run(*TASK, *QUICK)[0] == 0
    first = sorted(path.stat().st_mtime_ns for path in (tmp_path / "scores" / "runs").iterdir())
    assert run(*TASK, "--runs", "3", "--epochs", "1", "--resume")[0] == 0
    again = sorted(path.stat().st_mtime_ns for path in (tmp_path / "scores" / "runs").iterdir())
    assert again[:2] == first
    code, _, err = run(*TASK, "--runs", "3", "--epochs", "2", "--resume")
    assert code == 2
    assert "made with another --epochs" in err
    code, _, err = run(*TASK, *QUICK, "--limit", "100", "--resume")
    assert code == 2
    assert "made with other data or another model" in err


def test_stopped_at_once_leaves_nothing(run, tmp_path, monkeypatch):
    from weightlab._progress import WorkBar

    def stop(self, *what):
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkBar, "tell", stop)
    code, _, err = run(*TASK, *QUICK)
    assert code == cli.INTERRUPTED
    assert "nothing is kept" in err
    assert not (tmp_path / "scores").exists()


def test_files_with_vectors(run, tmp_path):
    generator = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = 4 * np.eye(3)[y] + generator.normal(size=(60, 3))
    y[:3] = (y[:3] + 1) % 3
    np.savez(tmp_path / "points.npz", x=x, y=y)
    code, out, _ = run(
        "data-scores",
        "--data",
        "points.npz",
        "--out",
        "s",
        "--runs",
        "3",
        "--epochs",
        "8",
        "--batch-size",
        "8",
        "--json",
    )
    assert code == 0
    assert {row["index"] for row in json.loads(out)["likely_mislabelled"][:3]} == {0, 1, 2}
    assert "<img" not in (tmp_path / "s" / "data-scores.html").read_text()


def test_ones_own_task(run, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    code, out, err = run(
        "data-scores", "--task", "mine.py:Points", "--out", "s", "--runs", "2", "--epochs", "1", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["data"] == "points"
    code, _, err = run(
        "data-scores", "--task", "mine.py:Points", "--out", "s", "--runs", "3", "--epochs", "1", "--resume"
    )
    assert code == 0, err
    (tmp_path / "mine.py").write_text(OWN + "# changed\n")
    code, _, err = run(
        "data-scores", "--task", "mine.py:Points", "--out", "s", "--runs", "3", "--epochs", "1", "--resume"
    )
    assert code == 2
    assert "made with other data or another model" in err


OWN = """
import torch
from torch import nn
from weightlab.tasks.classification import Classification

class Points(Classification):
    name, batch_size = "points", 8

    def build(self, generator):
        model = nn.Linear(2, 2)
        nn.init.normal_(model.weight, generator=generator)
        return model

    def images(self, split):
        return torch.eye(2).repeat(10, 1), torch.tensor([0, 1]).repeat(10)

    def prepare(self, pixels):
        return pixels

    def augment(self, pixels, generator):
        return pixels + torch.rand(pixels.shape, generator=generator)
"""


def test_untrained_and_weak_models_are_pointed_out(run):
    code, out, _ = run(*TASK, "--runs", "1", "--epochs", "0")
    assert code == 0
    assert "scores of untrained networks" in out
    code, out, _ = run(*TASK, "--runs", "1", "--epochs", "1", "--lr", "0.0001", "--force")
    assert code == 0
    assert "they have learned too little to judge labels by" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --task or --data"),
        (("--task", "digits-mlp", "--data", "x.npz"), "give either --task or --data"),
        (("--task", "digits-mpl"), "did you mean digits-mlp"),
        (("--task", "docs-gpt"), "no labelled examples by index"),
        (("--data", "nowhere.npz"), "no file or folder nowhere.npz"),
        (("--task", "digits-mlp", "--score", "el3n"), "unknown score 'el3n'; there are el2n, grand"),
        (("--task", "digits-mlp", "--score", ","), "--score names none"),
        (("--task", "digits-mlp", "--runs", "0"), "--runs must be at least 1; got 0"),
        (("--task", "digits-mlp", "--lr", "0"), "--lr must be above 0"),
        (("--task", "digits-mlp", "--model", "mlp"), "--model goes with --data"),
        (("--task", "digits-mlp", "--retrain", "half"), "--retrain takes shares by comma"),
        (("--task", "digits-mlp", "--retrain", "30"), "above 0 and below 1"),
        (("--task", "digits-mlp", "--offset", "0.1"), "--offset goes with --retrain"),
        (("--task", "digits-mlp", "--device", "gpu"), "--device gpu cannot be used"),
        (("--task", "digits-mlp", "--limit", "0"), "--limit must be at least 1"),
    ],
)
def test_wrong_requests_are_explained(run, arguments, message):
    code, out, err = run("data-scores", "--out", "scores", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2


def test_foreign_folders_are_left_alone(run, tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "mine.txt").write_text("mine")
    code, _, err = run(*TASK, *QUICK, "--force")
    assert code == 2
    assert "is not a folder of data-scores" in err
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("mine")
    code, _, err = run("data-scores", "--task", "digits-mlp", "--out", "file", *QUICK)
    assert (code, (tmp_path / "file").read_text()) == (2, "mine")


def test_training_that_blows_up_is_told(run):
    code, _, err = run(*TASK, *QUICK, "--lr", "1e30")
    assert code == 1
    assert "not finite within" in err


def test_help_teaches_with_examples(run):
    code, out, _ = run("data-scores", "--help")
    assert code == 0
    assert "Examples" in out
    assert "--retrain" in out
