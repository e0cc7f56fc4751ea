import json
import signal
import sys

import pytest
from tiny_causal_lm import TEXT, save_tiny_llama
from transformers import Trainer, TrainerCallback

from weightlab import cli

# PEFT asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run the command line in a folder with a model and a text; return exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    capfd.readouterr()

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["weightlab", *arguments])
        code = cli.run(list(arguments))
        out, err = capfd.readouterr()
        return code, out, err

    return go


ADAPT = (
    "adapt",
    "model",
    "--data",
    "text.txt",
    "--out",
    "adapter",
    "--cpu",
    "--block-size",
    "32",
    "--rank",
    "4",
)


def test_adapt_prints_one_json_object_and_writes_a_folder(run, tmp_path):
    command = (*ADAPT, "--steps", "3", "--batch-size", "4", "--set", "lora_dropout=0.1", "--json")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads((tmp_path / "adapter" / "weightlab.json").read_text())
    assert report["command"] == " ".join(["weightlab", *command])
    assert report["settings"]["options"] == {"lora_dropout": 0.1}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    assert report["loss"].keys() == {"before", "after", "train"}


def test_adapt_tells_what_it_does_and_what_came_of_it(run):
    code, out, err = run(
        *ADAPT, "--steps", "3", "--lr", "1e-2", "--targets", "q_proj, v_proj", "--method", "pissa"
    )
    assert code == 0
    assert "pissa: 1,024 parameters trained" in out
    assert "loss on held-out text" in out
    assert "adapter: adapter" in out
    assert "starting pissa on 4 layers" in err
    assert "Loading weights" not in err


def test_ctrl_c_says_how_to_go_on(run, monkeypatch):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                signal.raise_signal(signal.SIGINT)

    train = Trainer.train

    def with_interrupt(self, *args, **kwargs):
        self.add_callback(Interrupt())
        return train(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", with_interrupt)
        code, out, err = run(*ADAPT, "--steps", "4")
    assert code == cli.INTERRUPTED
    assert out == ""
    assert "Stopped after step 2, which is kept; the same command with --resume continues." in err
    assert run(*ADAPT, "--steps", "4")[0] == 2
    code, out, _ = run(*ADAPT, "--steps", "4", "--resume")
    assert code == 0
    assert "4 steps" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "pisa"], "did you mean pissa"),
        (["--set", "rho"], "--set 'rho' is not NAME=VALUE"),
        (["--set", "lora_dropuot=1"], "did you mean lora_dropout"),
        (["--targets", "q_prj"], "did you mean q_proj"),
        (["--targets", ""], "no targets given"),
        (["--rank", "400"], "rank 400 is larger than"),
        (["--data", "txet.txt"], "no file or folder txet.txt"),
        (["--steps", "many"], "--steps"),
    ],
)
def test_wrong_requests_are_explained_in_two_lines(run, arguments, message):
    code, out, err = run(*ADAPT, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if not line.startswith(("loading", "reading"))]) <= 2


def test_help_teaches_with_examples(run):
    code, out, _ = run("adapt", "--help")
    assert code == 0
    assert "Examples" in out
    assert "--method" in out
