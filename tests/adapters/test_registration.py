"""Registration with PEFT: lazy, all or none, and clear when PEFT is missing or has changed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from weightlab.adapters import SorsaConfig, registration
from weightlab.exceptions import MissingDependencyError

NAMES = [f"WEIGHTLAB_{method.module.upper()}" for method in registration.METHODS]


def python(code: str, *paths: Path) -> str:
    preamble = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_room_imports_neither_torch_nor_peft() -> None:
    code = (
        "import weightlab.adapters; print([m for m in ('torch', 'peft', 'transformers') if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_any_config_registers_all_methods() -> None:
    code = (
        "from weightlab.adapters import SorsaConfig\n"
        "from peft import PeftType\n"
        f"print(all(name in PeftType.__members__ for name in {NAMES}))"
    )
    assert python(code) == "True"


def test_types_are_members_like_others(tmp_path: Path) -> None:
    for name in NAMES:
        member = PeftType[name]
        assert member is PeftType(name) is getattr(PeftType, name)
        assert isinstance(member, PeftType)
        assert member.value == member == name
        assert member in list(PeftType)
        assert copy.deepcopy(member) is member
        assert pickle.loads(pickle.dumps(member)) is member
        assert {
            PEFT_TYPE_TO_CONFIG_MAPPING[member].method,
            PEFT_TYPE_TO_PREFIX_MAPPING[member].rstrip("_"),
        } == {name.removeprefix("WEIGHTLAB_").lower()}
    SorsaConfig(target_modules=["x"]).save_pretrained(str(tmp_path))
    assert isinstance(PeftConfig.from_pretrained(str(tmp_path)), SorsaConfig)


def test_registering_again_does_nothing() -> None:
    before = list(PeftType)
    registration.register()
    assert list(PeftType) == before


def state() -> tuple[object, ...]:
    mappings = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    return (
        list(PeftType),
        dict(PeftType._value2member_map_),
        *(dict(mapping) for mapping in mappings),
        [name for name in vars(PeftType) if name.startswith("WEIGHTLAB")],
    )


def test_a_failure_leaves_nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightlab.adapters import _peft

    real, calls = _peft.register_peft_method, []

    def second_fails(**settings: object) -> None:
        calls.append(settings["name"])
        if len(calls) == 2:
            raise TypeError("got an unexpected keyword argument 'prefix'")
        real(**settings)  # type: ignore[arg-type]

    members = [PeftType[name] for name in NAMES]
    kept = [(mapping, {m: mapping.pop(m) for m in members}) for mapping in (
        PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
    )]  # fmt: skip
    for name in NAMES:
        PeftType._member_map_.pop(name)
        PeftType._value2member_map_.pop(name)
        PeftType._member_names_.remove(name)
        type.__delattr__(PeftType, name)
    monkeypatch.setitem(registration._state, "begun", False)
    monkeypatch.setitem(registration._state, "done", False)
    before = state()
    try:
        monkeypatch.setattr(_peft, "register_peft_method", second_fails)
        with pytest.raises(
            MissingDependencyError, match=r"PEFT \d+\.\d+.*tested \(TypeError: got an unexpected"
        ):
            registration.register()
        assert state() == before
    finally:
        for name, member in zip(NAMES, members, strict=True):
            type.__setattr__(PeftType, name, member)
            PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
            PeftType._member_names_.append(name)
        for mapping, items in kept:
            mapping.update(items)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType["WEIGHTLAB_SORSA"]] is SorsaConfig


CATCH = """
try:
    from weightlab.adapters import SorsaConfig
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_without_peft_the_extra_is_named() -> None:
    code = "sys.modules['peft'] = None\n" + CATCH
    assert python(code) == (
        "MissingDependencyError peft is not installed; install it with: pip install 'weightlab[adapters]'"
    )


def test_a_peft_with_other_internals_is_named(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("class LoraConfig: pass\n")
    assert "cannot work with PEFT" in (message := python(CATCH, tmp_path))
    assert "0.21.2" in message
    assert "cannot import name 'PeftConfig'" in message
