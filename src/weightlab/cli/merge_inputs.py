"""What a merge may run networks with: a user's model, a folder of transformers, a task, a user's data."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.exceptions import UsageError
from weightlab.inspect import Checkpoint
from weightlab.merge.bench import Bench
from weightlab.tasks import Task, registry
from weightlab.tasks.files import is_file_ref, load_object, summary

# Numbers in place of tensors start where no initial value is.
_FIRST = 1000


def bench(
    *,
    model: str | None,
    input_shape: str | None,
    task: str | None,
    data: str | None,
    first: str,
    batches: int,
    seed: int,
) -> Bench | None:
    """Gather what was given into something that runs; None if nothing was.

    Args:
        model: `file.py:object` (a module, a function that makes one, or a pair of module and example input), or a folder with a
            `config.json` of transformers. None: the task's model, or `first` if it is such a folder.
        input_shape: Shape of a random example input, e.g. `1,3,32,32`.
        task: Name or `file.py:object` of a task.
        data: `file.py:object`: batches (inputs, targets), or a function that makes them.
        first: The first model to merge.
        batches: How many batches to use, for each purpose.
        seed: Of data order and random inputs.
    """
    if task is not None and data is not None:
        raise UsageError("--task and --data both give data; choose one")
    if task is None and model is None and not (Path(first).expanduser() / "config.json").is_file():
        if data is not None or input_shape is not None:
            raise UsageError("--data and --input-shape are for a model; give --model file.py:object")
        return None
    generator = torch.Generator().manual_seed(seed)
    chosen = None if task is None else registry.get(task)
    module, example, where, renamed = _model(model, chosen, first, generator)
    if input_shape is not None:
        example = (torch.randn(_shape(input_shape), generator=generator),)
    if chosen is not None:
        made = _with_task(chosen, module, example, where, batches, generator)
        return dataclasses.replace(made, names=renamed)
    found = [] if data is None else _batches(data, batches)
    if example is None:
        if not found:
            raise UsageError(
                f"{where} comes without an input: give --input-shape, e.g. 1,3,32,32, or let the object be (module, input)"
            )
        example = (found[0][0][:2],)
    return Bench(
        module,
        example,
        where,
        train=found,
        held_out=found,
        loss=_cross_entropy if found else None,
        data=data or "",
        names=renamed,
    )


def _model(
    ref: str | None, task: Task | None, first: str, generator: torch.Generator
) -> tuple[nn.Module, tuple[Any, ...] | None, str, dict[str, str]]:
    if ref is None and task is not None:
        return task.build(generator), None, f"the model of {task.name}", {}
    if ref is None or (Path(ref).expanduser() / "config.json").is_file():
        folder = Path(ref or first).expanduser()
        module, inputs, renamed = _transformers(folder, generator)
        return module, inputs, str(ref or first), renamed
    if not is_file_ref(ref):
        raise UsageError(f"--model {ref} is neither file.py:object nor a folder with a config.json")
    found: Any = load_object(ref)
    if not isinstance(found, nn.Module | tuple) and callable(found):
        try:
            found = found()
        except Exception as error:  # It is the user's code.
            raise UsageError(f"{ref}: {summary(error)}") from error
    example = None
    if isinstance(found, tuple) and len(found) == 2:
        found, given = found
        example = given if isinstance(given, tuple) else (given,)
    if not isinstance(found, nn.Module):
        raise UsageError(
            f"{ref} gives a {type(found).__name__}; it must give a module, or a pair (module, input)"
        )
    return found.float(), example, ref, {}


def _transformers(
    folder: Path, generator: torch.Generator
) -> tuple[nn.Module, tuple[Any, ...], dict[str, str]]:
    """A model of the architecture in a folder, an input, and its names for tensors that have others in the folder."""
    from weightlab._lazy import require
    from weightlab.adapters.finetune.model import quiet_libraries

    transformers = require("transformers", "adapters")
    infos = Checkpoint(folder).infos
    try:
        with quiet_libraries():
            config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
            config.use_cache = False
            kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
            make = kind.from_config if kind is transformers.AutoModel else kind._from_config
            model = make(config).float()
            renamed = {}
            if not infos.keys() <= model.state_dict().keys() and kind is not transformers.AutoModel:
                renamed = _renamed(kind, config, {name: info.shape for name, info in infos.items()})
    except Exception as error:  # Whatever lies beneath: OSError, ValueError, AttributeError, ...
        raise UsageError(
            f"transformers cannot make the model in {folder}: {summary(error)}; give --model file.py:object"
        ) from error
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 32)
        shape = (1, getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size))
        return model, (torch.randn(shape, generator=generator),), renamed
    words = torch.randint(config.get_text_config().vocab_size, (2, 8), generator=generator)
    given = {"input_ids": words, **({"decoder_input_ids": words} if config.is_encoder_decoder else {})}
    order = list(inspect.signature(model.forward).parameters)
    example = tuple(given.get(name) for name in order[: 1 + max(map(order.index, given))])
    return model, example, renamed


def _renamed(kind: Any, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Names that transformers gives to tensors as it loads them, found by loading numbers in their place."""
    numbers = {
        name: torch.full((1,), float(i)).expand(shape)
        for i, (name, shape) in enumerate(shapes.items(), start=_FIRST)
    }
    loaded = kind.from_pretrained(None, config=config, state_dict=numbers, dtype=torch.float32).state_dict()
    names = dict(enumerate(shapes, start=_FIRST))
    found = {}
    for name, tensor in loaded.items():
        stored = names.get(int(tensor.min())) if tensor.numel() else None
        # What was made of several tensors, or of none, has no name in the file.
        if stored is not None and shapes[stored] == tensor.shape and tensor.min() == tensor.max():
            found[stored] = name
    return found


def _with_task(
    task: Task,
    module: nn.Module,
    example: tuple[Any, ...] | None,
    where: str,
    batches: int,
    generator: torch.Generator,
) -> Bench:
    train = list(itertools.islice(task.batches("train", generator), batches))
    held_out = list(itertools.islice(task.batches("validation", generator), batches))
    if not train:
        raise UsageError(f"{task.name} has no training batches")
    if example is None:
        example = _arguments(module, lambda: task.loss(module, train[0]), where)
    return Bench(
        module,
        example,
        where,
        train=train,
        held_out=held_out,
        forward=task.loss,
        loss=task.loss,
        evaluate=lambda model: task.evaluate(model, "test"),
        data=task.name,
    )


@torch.no_grad()
def _arguments(module: nn.Module, run: Callable[[], Any], where: str) -> tuple[Any, ...]:
    """What a module is called with while something runs."""
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True
    )
    try:
        run()
    except Exception as error:  # It may be the user's code.
        raise UsageError(f"cannot run {where} on the task's data: {summary(error)}") from error
    finally:
        handle.remove()
    if not caught or caught[0][1]:
        raise UsageError(
            f"the task calls {where} by keyword or not at all; give --model with an input of its own"
        )
    return caught[0][0]


def _batches(ref: str, count: int) -> list[Any]:
    found: Any = load_object(ref)
    try:
        made: Any = found() if callable(found) else found
        batches = list(itertools.islice(made, count))
    except Exception as error:  # It is the user's code.
        raise UsageError(f"{ref}: {summary(error)}") from error
    if not batches:
        raise UsageError(f"{ref} has no batches")
    for batch in batches:
        if not (
            isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)
        ):
            raise UsageError(
                f"{ref} must give pairs (inputs, targets) of tensors, got {type(batch).__name__}"
            )
    return batches


def _cross_entropy(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input-shape takes positive integers by comma, e.g. 1,3,32,32, not {text!r}")
    return shape
