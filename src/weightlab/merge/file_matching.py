"""Matching the units of networks that lie in files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlab.exceptions import UsageError
from weightlab.merge.bench import Bench, load_into, running
from weightlab.merge.many_models import merge_many
from weightlab.merge.merge_settings import Settings
from weightlab.merge.permutation import Permutation, apply_permutation, check_equivalence
from weightlab.merge.permutation_spec import PermutationSpec
from weightlab.merge.singular_vectors import singular_alignment
from weightlab.merge.weight_descent import weight_matching

# Alignments need singular vectors, whose cost grows like the cube.
_WIDEST_ALIGNED = 2048


def match_states(
    states: Sequence[Mapping[str, Tensor]],
    paths: Sequence[str],
    settings: Settings,
    bench: Bench,
    tell: Callable[[str, int, int], None],
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Permute networks to match the first.

    Nothing is taken on trust: each network must stay the same function on the bench's example under a random permutation by the
    specification, which moves all there is to move, and under the one that was found.

    Args:
        states: The networks.
        paths: Where they are from, for messages.
        settings: Specification, scheme, restarts, seed, and whether there is a report.
        bench: Runs the networks.
        tell: As in `merge_checkpoints`.

    Returns:
        The permuted networks, and facts for the report.

    Raises:
        UsageError: If a network is not of the bench's architecture, or the specification is wrong or moves nothing.
    """
    tell("finding what moves together", 0, 1)
    spec, whole = _specification(states, paths[0], settings, bench)
    generator = torch.Generator().manual_seed(settings.seed)
    sizes = spec.group_sizes(states[0])
    if not sizes:
        raise UsageError(
            f"no units of {bench.where} are free to move, by "
            f"{'its forward pass' if settings.spec is None else settings.spec}; use --method average"
        )
    for path, state in zip(paths, states, strict=True):
        load_into(bench, state, path)
        # A random permutation moves all there is; the one that will be found may move little.
        _check_function(bench, whole, Permutation.random(sizes, generator=generator), path, settings)
    tell("matching", 0, 1)
    permutations: Sequence[Permutation]
    if len(states) == 2:
        found = weight_matching(states[0], states[1], spec, n_restarts=settings.restarts, generator=generator)
        permutations, rounds = (Permutation.identity(sizes), Permutation(found.indices)), found.sweeps
    else:
        many = merge_many(
            states, spec, scheme=settings.scheme, n_restarts=settings.restarts, generator=generator
        )
        permutations, rounds = many.permutations, many.rounds
    for path, state, permutation in zip(paths[1:], states[1:], permutations[1:], strict=True):
        load_into(bench, state, path)
        _check_function(bench, whole, permutation, path, settings)
    aligned = [apply_permutation(spec, p, state) for p, state in zip(permutations, states, strict=True)]
    facts: dict[str, Any] = {
        "matching": {
            "groups": len(sizes),
            "units": sum(sizes.values()),
            "moved": [
                sum(int((index != torch.arange(len(index))).sum()) for index in p.indices.values())
                for p in permutations[1:]
            ],
            "rounds": rounds,
            "distance": {
                "norm": _distance(states[0]),
                "before": [_distance(states[0], state) for state in states[1:]],
                "after": [_distance(states[0], state) for state in aligned[1:]],
            },
        }
    }
    if settings.report is not None:
        tell("comparing singular vectors", 0, 1)
        facts["alignment"] = _alignments(states, aligned)

    return aligned, facts


def _specification(
    states: Sequence[Mapping[str, Tensor]], path: str, settings: Settings, bench: Bench
) -> tuple[PermutationSpec, PermutationSpec]:
    """The specification of what is stored, and of all that the model has, which may be more names of tied weights."""
    load_into(bench, states[0], path)
    model = bench.model.state_dict()
    if settings.spec is not None:
        given = read_spec(settings.spec)
        whole = PermutationSpec({bench.name(name): axes for name, axes in given.axes.items()})
        owners = {(x.data_ptr(), x.shape): name for name, x in model.items() if name in whole.axes}
        tied = {
            name: whole.axes[owners[x.data_ptr(), x.shape]]
            for name, x in model.items()
            if name not in whole.axes and (x.data_ptr(), x.shape) in owners
        }
        whole = PermutationSpec({**whole.axes, **tied})
    else:
        with running(bench):
            whole = PermutationSpec.from_model(bench.model, *bench.example)
    try:
        sizes = whole.group_sizes(model)
        stored = {n: whole.axes[bench.name(n)] for n in states[0] if bench.name(n) in whole.axes}
        groups = PermutationSpec(stored).groups
        spec = PermutationSpec(stored, sizes={g: sizes[g] for g in groups})
        spec.factors(states[0])
    except ValueError as error:
        raise UsageError(f"{settings.spec or bench.where}: {error}") from error
    return spec, whole


def read_spec(path: str) -> PermutationSpec:
    """Read a specification from a JSON file ``{tensor: [axis, ...]}``.

    Each axis is null, the name of a group, or a list of names and integers, outermost first.

    Raises:
        UsageError: If the file cannot be read or holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "spec.json").write_text('{"0.weight": ["h", null], "2.weight": [null, ["h", 49]]}')
        ...     read_spec(f"{folder}/spec.json").axes
        {'0.weight': ('h', None), '2.weight': (None, ('h', 49))}
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read --spec {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"--spec {path} is no JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(axes, list) for axes in content.values()):
        raise UsageError(
            f'--spec {path} must be an object of lists, e.g. {{"0.weight": ["hidden", null], "2.weight": [null, "hidden"]}}'
        )
    try:
        return PermutationSpec(
            {
                name: [tuple(axis) if isinstance(axis, list) else axis for axis in axes]
                for name, axes in content.items()
            }
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"--spec {path}: {error}") from error


def _check_function(
    bench: Bench, spec: PermutationSpec, permutation: Permutation, path: str, settings: Settings
) -> None:
    try:
        with running(bench):
            check_equivalence(bench.model, permutation, bench.example, spec=spec)
    except UsageError as error:
        source = error.__cause__
        if isinstance(source, ValueError) and settings.spec is not None:
            raise UsageError(f"--spec {settings.spec} is wrong: {source}; nothing was written") from source
        raise UsageError(f"{path}: {source or error}; nothing was written") from error


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor] | None = None) -> float:
    total = 0.0
    for name, x in a.items():
        if x.is_floating_point() and not name.endswith(("running_mean", "running_var")):
            total += float((x.double() - (0 if b is None else b[name].double())).square().sum())
    return math.sqrt(total)


def _alignments(
    states: Sequence[Mapping[str, Tensor]], aligned: Sequence[Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Singular alignment of the first two before and after, of layers that are not too wide."""
    names = [
        name
        for name, x in states[0].items()
        if x.is_floating_point() and x.ndim >= 2 and min(len(x), x[0].numel()) <= _WIDEST_ALIGNED
    ]
    try:
        before, after = (
            singular_alignment(
                {name: pair[0][name].float() for name in names},
                {name: pair[1][name].float() for name in names},
            )
            for pair in (states, aligned)
        )
    except ValueError:
        return {}
    return {"before": before, "after": after}
