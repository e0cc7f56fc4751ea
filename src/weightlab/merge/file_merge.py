"""Merging networks that lie in safetensors files or folders, and telling what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weightlab.merge.batch_norm_statistics import reset_batch_norm_
from weightlab.merge.bench import Bench, line_losses, load_into, running
from weightlab.merge.file_checks import (
    compare_architectures,
    finite_tensor,
    floating_tensors,
    refuse_quantized,
)
from weightlab.merge.file_matching import match_states
from weightlab.merge.merge_settings import Settings, check_settings, free_place
from weightlab.merge.permutation import evaluating
from weightlab.merge.stored_weights import Stored, StoredWeights, replacing
from weightlab.merge.weight_arithmetic import add_differences, average_tensors, slerp_tensors, wide

_BLOCK = 1 << 19

Tell = Callable[[str, int, int], None]


@dataclass
class _Merge:
    """Tensors as they will be written, and what is known about them."""

    value: Callable[[str], Tensor | None]
    facts: dict[str, Any] = field(default_factory=dict)
    aligned: Sequence[Mapping[str, Tensor]] | None = None


@torch.no_grad()
def merge_checkpoints(
    paths: Sequence[str],
    out: str,
    settings: Settings,
    *,
    bench: Bench | None = None,
    tell: Tell = lambda what, done, total: None,
    command: str = "",
) -> dict[str, Any]:
    """Merge networks in safetensors files or Hub-like folders into another of the same layout.

    The first one gives names, dtypes, metadata, shards, and the files beside the weights. `average`, `slerp` and `task-arithmetic` hold
    one tensor of each network at a time; `weights`, and whatever runs the network, holds all of them. What is written
    appears under its name only when it is complete.

    Args:
        paths: Two or more files or folders.
        out: File or folder to write, whichever the first is.
        settings: What to do.
        bench: How to run the networks: needed for `weights`, for batch norm's statistics, and for losses.
        tell: Called with what is being done, how many steps of it are done, and of how many.
        command: The command, for the report.

    Returns:
        What was done, in JSON types.

    Raises:
        UsageError: For files that are missing, damaged, pickles, given twice, or of other architectures; for settings that
            do not fit the method or number of networks; a specification under which the permuted network is another
            function; an `out` that exists or is an input.
        WeightlabError: If weights are not finite, or the disk is full.
    """
    started = time.monotonic()
    weights = check_settings(paths, settings, bench)
    models = [StoredWeights(path) for path in paths]
    base = None if settings.base is None else StoredWeights(settings.base)
    first = models[0] if base is None else base
    target = free_place(out, [*models, *([] if base is None else [base])], settings)
    if settings.report is not None:
        _importable()
    notes = compare_architectures([first, *(m for m in models if m is not first)])
    merge = _plan(models, base, weights, settings, bench, tell)
    if bench is not None:
        merge = _run(models, merge, weights, settings, bench, tell)
    count = len(first.tensors)
    written = iter(range(count))

    def value(stored: Stored) -> Tensor | None:
        tell("writing", next(written, count), count)
        return merge.value(stored.name)

    with replacing(target, first.bytes) as new:
        if first.is_folder:
            new.mkdir()
        first.write_like(new, value)
    result = {
        "out": out,
        "method": settings.method,
        "models": [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)],
        "base": settings.base,
        "tensors": count,
        "parameters": sum(math.prod(info.shape) for info in first.tensors.infos.values()),
        "bytes": first.bytes,
        "seed": settings.seed,
        **merge.facts,
        "notes": [*notes, *merge.facts.get("notes", []), *_nothing_to_merge(merge.facts)],
        "command": command,
        "report": settings.report,
        "seconds": round(time.monotonic() - started, 3),
    }
    if settings.report is not None:
        from weightlab.merge import merge_page

        merge_page.write(result, settings.report)
    return result


def _nothing_to_merge(facts: Mapping[str, Any]) -> list[str]:
    changes = [change for _, change in facts.get("differences", {}).values()]
    if "matching" in facts:
        changes += facts["matching"]["distance"]["before"][:1]
    return [] if any(changes) else ["the first two networks have the same weights"]


def _importable() -> None:
    """Find out whether a page can be drawn before the work."""
    from weightlab._lazy import require

    require("jinja2", "trial")
    require("matplotlib", "trial")


def _plan(
    models: Sequence[StoredWeights],
    base: StoredWeights | None,
    weights: Sequence[float],
    settings: Settings,
    bench: Bench | None,
    tell: Tell,
) -> _Merge:
    if settings.method == "weights":
        assert bench is not None
        states = _read(models, tell)
        aligned, facts = match_states(states, [model.path for model in models], settings, bench, tell)

        def mean(name: str) -> Tensor | None:
            tensors = [state[name] for state in aligned]
            return average_tensors(tensors, weights) if tensors[0].is_floating_point() else None

        return _Merge(mean, facts, aligned)
    all_models = [*([] if base is None else [base]), *models]
    infos = all_models[0].tensors.infos
    norms: dict[str, list[float]] = {}

    def value(name: str) -> Tensor | None:
        dtype = infos[name].dtype
        if dtype is not None and not dtype.is_floating_point:
            refuse_quantized(name, all_models)
            return None
        tensors = floating_tensors(all_models, name)
        if tensors is None:
            return None
        sums = [0.0, 0.0]

        def combine(parts: list[Tensor]) -> Tensor:
            x, y = (wide(part) for part in parts[:2])
            sums[0] += float(x.square().sum())
            sums[1] += float((y - x).square().sum())
            if settings.method == "average":
                return average_tensors(parts, weights)
            return add_differences(parts, weights) if settings.method == "task-arithmetic" else parts[0]

        merged = _in_blocks(tensors, combine)
        norms[name] = [math.sqrt(total) for total in sums]
        return slerp_tensors(tensors, weights[1]) if settings.method == "slerp" else merged

    return _Merge(value, {"differences": norms})


def _in_blocks(tensors: Sequence[Tensor], combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Apply an operation on entries to pieces that stay in cache."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    merged = torch.empty_like(flat[0])
    for start in range(0, len(merged), _BLOCK):
        merged[start : start + _BLOCK] = combine([part[start : start + _BLOCK] for part in flat])
    return merged.reshape(tensors[0].shape)


def _run(
    models: Sequence[StoredWeights],
    merge: _Merge,
    weights: Sequence[float],
    settings: Settings,
    bench: Bench,
    tell: Tell,
) -> _Merge:
    """Take batch norm's statistics anew, and losses on the line between two models."""
    if not settings.reset_batch_norm and not (bench.loss and bench.held_out) and not bench.evaluate:
        return merge
    states = _read(models, tell)
    first = states[0]
    merged: dict[str, Tensor] = {}
    for name, tensor in first.items():
        value = merge.value(name)
        merged[name] = tensor if value is None else value
    facts = dict(merge.facts)
    overridden: dict[str, Tensor] = {}
    load_into(bench, merged, "the merged model")
    if settings.reset_batch_norm:
        tell("taking batch norm statistics", 0, 1)
        with running(bench):
            layers = reset_batch_norm_(bench.model, bench.train, forward=bench.forward)
        if not layers:
            facts["notes"] = [
                "--reset-batch-norm changed nothing: the model has no batch norm with running statistics"
            ]
        facts["batch_norm"] = layers
        own = bench.model.state_dict()
        for name, tensor in merged.items():
            layer, _, key = bench.name(name).rpartition(".")
            if layer in layers and key in ("running_mean", "running_var"):
                overridden[name] = own[bench.name(name)].detach().to(tensor.dtype, copy=True)
        merged |= overridden
    if bench.evaluate is not None:
        scores = []
        for state in (*states, merged):
            load_into(bench, state, "the model")
            with running(bench), evaluating(bench.model):
                scores.append({key: float(x) for key, x in bench.evaluate(bench.model).items()})
        facts["scores"] = {"models": scores[:-1], "merged": scores[-1], "data": bench.data}
    if bench.loss is not None and bench.held_out:
        facts["losses"] = line_losses(
            states,
            merged,
            merge.aligned,
            bench,
            points=settings.points,
            with_reset=settings.reset_batch_norm,
            tell=tell,
        )
    value = merge.value
    return _Merge(lambda name: overridden[name] if name in overridden else value(name), facts, merge.aligned)


def _read(models: Sequence[StoredWeights], tell: Tell) -> list[Mapping[str, Tensor]]:
    """All tensors of all models, in the order of the first's."""
    states: list[Mapping[str, Tensor]] = []
    for index, model in enumerate(models):
        tell("reading", index, len(models))
        for name, info in model.tensors.infos.items():
            if info.dtype is not None and not info.dtype.is_floating_point:
                refuse_quantized(name, [models[0], model])
        states.append({name: finite_tensor(model, name) for name in models[0].tensors})
    return states
