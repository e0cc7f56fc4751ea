"""The examples of adapters do what their first lines say."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
# PEFT asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def run(name, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("method", ["bone", "sorsa", "svfit"])
def test_the_plain_loop_adapts_saves_loads_and_merges(tmp_path, monkeypatch, capsys, method):
    out = tmp_path / "out"
    told = run("adapt_causal_lm.py", monkeypatch, capsys, "--method", method, "--steps", 15, "--out", out)
    loss = {name: float(value) for name, value in re.findall(r"^(.*?): +loss ([\d.]+)$", told, re.MULTILINE)}
    assert loss["capitals after"] < loss["capitals before"]
    assert loss["adapter off"] == loss["capitals before"]
    assert loss["loaded again"] == loss["capitals after"]
    assert loss["merged"] == pytest.approx(loss["capitals after"], abs=2e-4)


@pytest.mark.parametrize(
    ("method", "kind"), [("eva", "LORA"), ("orthogonal", "LORA"), ("sorsa", "WEIGHTLAB_SORSA")]
)
def test_the_trainer_adapts_and_saves(tmp_path, monkeypatch, capsys, method, kind):
    out = tmp_path / "out"
    told = run("adapt_with_trainer.py", monkeypatch, capsys, "--method", method, "--steps", 10, "--out", out)
    before, after = map(float, re.search(r"loss: ([\d.]+) before, ([\d.]+) after", told).groups())
    assert after < before
    assert PeftConfig.from_pretrained(out).peft_type.value == kind


def test_the_method_on_the_rooms_page_works(tmp_path):
    page = (EXAMPLES.parent / "docs" / "rooms" / "adapters.md").read_text()
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "BottomConfig" in block
    ]
    check = f"""
import sys
{code}
from peft import get_peft_model
from weightlab.adapters import registration

sys.modules["weightlab.adapters.bottom"] = sys.modules["__main__"]
registration.METHODS = (registration.Method("bottom", "BottomConfig", "BottomModel"),)
registration.register()
base = torch.nn.Sequential(torch.nn.Linear(8, 6))
x = torch.randn(3, 8)
y = base(x)
model = get_peft_model(base, BottomConfig(r=2, target_modules=["0"]))
assert torch.equal(model(x), y)
assert [p.numel() for p in model.parameters() if p.requires_grad] == [2]
"""
    file = tmp_path / "check.py"
    file.write_text(check)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
