import json
import re
import sys

import pytest

from weightlab import cli

TASK = """
import torch
from torch import nn

class Line:
    name, metric, mode, batch_size, steps, minimal_effect = "line", "loss", "min", 4, 8, 0.01
    def build(self, generator):
        return nn.Linear(3, 1)
    def batches(self, split, generator):
        while True:
            x = torch.randn(4, 3, generator=generator)
            yield x, x.sum(1, keepdim=True)
    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()
    def evaluate(self, model, split):
        x = torch.eye(3)
        return {"loss": (model(x) - 1).square().mean().item()}

task = Line()
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder; return exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "line.py").write_text(TASK)

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["weightlab", *arguments])
        code = cli.run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return go


@pytest.mark.parametrize(
    "verb", [[], ["trial"], ["report"], ["papers"], ["papers", "search"], ["papers", "show"], ["reproduce"]]
)
def test_help_teaches_with_an_example(run, verb):
    code, out, _ = run(*verb, "--help")
    assert code == 0
    if verb:
        assert "Example" in out


def test_trial_prints_one_json_object_and_writes_reports(run, tmp_path):
    arguments = [
        "trial",
        "--task",
        "line.py:task",
        "--arms",
        "adamw,sgd",
        "--tune",
        "2",
        "--seeds",
        "3",
        "--json",
    ]
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert (data["task"], data["baseline"]) == ("line", "adamw")
    assert data["budget"]["tune"] == 2
    adamw, sgd = data["arms"]
    assert sgd["metric"]["name"] == "loss"
    assert len(sgd["metric"]["per_seed"]) == 3
    assert adamw["versus"] is None
    assert sgd["versus"]["verdict"] in ("held", "not held", "inconclusive")
    assert len(sgd["versus"]["interval"]) == 2
    folder = tmp_path / "weightlab-out" / "line"
    assert json.loads((folder / "report.json").read_text()) == data
    assert (folder / "runs.csv").read_text().count("\n") == 1 + 2 * (2 + 3)
    page = (folder / "report.html").read_text()
    assert "weightlab trial --task line.py:task" in page
    assert json.loads(run(*arguments)[1]) == data


def test_trial_table_names_arms_verdicts_and_the_report(run):
    code, out, _ = run(
        "trial", "--task", "line.py:task", "--arms", "adamw,sgd", "--tune", "1", "--seeds", "2"
    )
    assert code == 0
    for text in ("adamw", "sgd", "baseline", "report.html"):
        assert text in out


def test_several_tasks_give_a_profile(run):
    code, out, _ = run(
        "trial", "--task", "line.py:task,digits-mlp", "--arms", "adamw,sgd", "--steps", "5", "--tune", "1", "--seeds", "2", "--json"
    )  # fmt: skip
    assert code == 0
    data = json.loads(out)
    assert [trial["task"] for trial in data["trials"]] == ["line", "digits-mlp"]
    assert set(data["profile"]["scores"]) == {"adamw", "sgd"}


def test_report_lists_what_a_store_holds(run):
    assert run("report")[0] == 2
    run("trial", "--task", "line.py:task", "--arms", "adamw,sgd", "--tune", "1", "--seeds", "2", "--json")
    code, out, _ = run("report", "--json")
    assert code == 0
    (kept,) = json.loads(out)
    assert kept["task"] == "line"
    assert "--arms adamw,sgd" in kept["command"]
    assert run("report")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trial"], "--task"),
        (["trail"], "trail"),
        (["trial", "--task", "docs-gtp", "--arms", "adamw"], "docs-gpt"),
        (["trial", "--task", "digits-mlp", "--arms", "adamv"], "adamw"),
        (["trial", "--task", "digits-mlp", "--arms", ""], "no arms given"),
        (["trial", "--task", "", "--arms", "adamw"], "no task given"),
        (
            ["trial", "--task", "digits-mlp", "--arms", "adamw", "--seeds", "0"],
            "seeds must be at least 1; got 0",
        ),
        (
            ["trial", "--task", "digits-mlp", "--arms", "adamw", "--steps", "-5"],
            "steps must be at least 1; got -5",
        ),
        (["trial", "--task", "digits-mlp", "--arms", "adamw", "--steps", "many"], "--steps"),
        (["trial", "--task", "digits-mlp", "--arms", "adamw", "--engine", "cloud"], "cloud"),
        (["trial", "--task", "nowhere.py:task", "--arms", "adamw"], "nowhere.py"),
        (["papers", "show", "auom"], "auon"),
        (["reproduce", "auom"], "auon"),
    ],
)
def test_wrong_requests_are_explained_in_two_lines(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2


def test_debug_lets_the_exception_through(run):
    with pytest.raises(Exception, match="unknown arm"):
        run("trial", "--task", "digits-mlp", "--arms", "adamv", "--debug")


def test_papers_json_has_the_promised_fields(run):
    code, out, _ = run("papers", "--json")
    assert code == 0
    papers = json.loads(out)
    assert len(papers) == 40
    for paper in papers:
        assert {"slug", "title", "date", "status", "verdict", "parts"} <= paper.keys()
        assert paper["status"] in ("planned", "implemented", "measured")


def test_papers_can_be_listed_searched_and_shown(run):
    for order in ("date", "room", "status"):
        code, out, _ = run("papers", "--by", order)
        assert code == 0
        assert "auon" in out
    assert "s4d" in run("papers", "search", "S4D", "diagonal", "state", "space")[1].splitlines()[0]
    shown = run("papers", "show", "auon")[1]
    assert "2509.24320" in shown
    assert re.search(r"weightlab reproduce auon", shown)
    assert json.loads(run("papers", "search", "ghost", "--json")[1])[0]["slug"] == "ghost-batch-norm"
    assert json.loads(run("papers", "show", "auon", "--json")[1])["slug"] == "auon"


def test_interrupt_says_how_to_go_on(run, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("weightlab.trial.trial.run_trial", stop)
    code, _, err = run("trial", "--task", "line.py:task", "--arms", "adamw", "--json")
    assert code == cli.INTERRUPTED
    assert "the same command continues" in err


def test_a_failing_arm_is_an_error_after_the_table(run, tmp_path):
    (tmp_path / "arm.py").write_text(
        "from weightlab.trial import Arm\n"
        "def boom(model, h):\n    raise ValueError('boom')\n"
        "arm = Arm(name='boom', optimizer=boom)\n"
    )
    code, out, err = run(
        "trial",
        "--task",
        "line.py:task",
        "--arms",
        "adamw,arm.py:arm",
        "--steps",
        "100",
        "--tune",
        "1",
        "--seeds",
        "6",
    )
    assert code == 1
    assert "not held" in out
    assert "boom on line" in err
    assert "ValueError: boom" in err
