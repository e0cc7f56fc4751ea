"""Registering weightlab's methods with PEFT, all or none."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple


class Method(NamedTuple):
    """Where a method lives.

    Attributes:
        module: Module in this package that defines both classes, and calls `register()` at its end.
        config: Name of the `AdapterConfig`.
        model: Name of the `AdapterModel`.
    """

    module: str
    config: str
    model: str


METHODS = (
    Method("bone", "BoneConfig", "BoneModel"),
    Method("sorsa", "SorsaConfig", "SorsaModel"),
    Method("svfit", "SvfitConfig", "SvfitModel"),
)

_lock = threading.RLock()
_state = {"begun": False, "done": False}


def register() -> None:
    """Make PEFT know the methods, so that their adapters load: `PeftModel.from_pretrained`, `model.load_adapter`.

    Importing any config from `weightlab.adapters` does the same. Further calls do nothing. The methods' types are
    called `WEIGHTLAB_SORSA` and so on, which no method of PEFT's own can clash with.

    Raises:
        MissingDependencyError: If PEFT is missing, or its internals are not those known. Then nothing is registered.

    Example:
        >>> register()
        >>> from peft import PeftType
        >>> PeftType.WEIGHTLAB_SORSA.value
        'WEIGHTLAB_SORSA'
    """
    with _lock:
        if _state["begun"]:
            return
        _state["begun"] = True
        try:
            _register_all()
            _state["done"] = True
        finally:
            _state["begun"] = _state["done"]


def _register_all() -> None:
    from weightlab.adapters import _peft

    undo: list[Callable[[], object]] = []
    modules = [importlib.import_module(f"weightlab.adapters.{method.module}") for method in METHODS]
    try:
        with _peft.internals():
            for method, module in zip(METHODS, modules, strict=True):
                config, model = getattr(module, method.config), getattr(module, method.model)
                member = _add_member(_peft.PeftType, config.type_name(), undo)
                for mapping in (
                    _peft.PEFT_TYPE_TO_CONFIG_MAPPING,
                    _peft.PEFT_TYPE_TO_TUNER_MAPPING,
                    _peft.PEFT_TYPE_TO_PREFIX_MAPPING,
                ):
                    undo.append(lambda mapping=mapping, member=member: mapping.pop(member, None))
                _peft.register_peft_method(
                    name=config.type_name().lower(), config_cls=config, model_cls=model, prefix=model.prefix
                )
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _add_member(enum: Any, name: str, undo: list[Callable[[], object]]) -> Any:
    """Add a member to a string enum in place, as PEFT offers no other way in."""
    members, values, names = enum._member_map_, enum._value2member_map_, enum._member_names_
    if name in members:
        raise ValueError(f"there is already a PEFT type {name}")
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enum
    member._sort_order_ = len(names)
    undo.append(
        lambda: (members.pop(name, None), values.pop(name, None), name in names and names.remove(name))
    )
    type.__setattr__(enum, name, member)
    undo.append(lambda: type.__delattr__(enum, name))
    members[name] = values[name] = member
    names.append(name)
    return member
