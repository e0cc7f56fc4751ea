"""Choosing a map between two embedding models from files of paired embeddings."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from weightlab._lazy import require
from weightlab._pages.files import write_text
from weightlab.exceptions import UsageError
from weightlab.merge.backfilling import BackfillCurve, backfill_curve, backfill_order
from weightlab.merge.compatibility import CompatibilityAdapter, MapKind, fit_adapter
from weightlab.merge.compatibility_criterion import compatibility_report
from weightlab.merge.embedding_files import read_embeddings, read_labels, tensor_name, write_embeddings
from weightlab.merge.retrieval import retrieval_report
from weightlab.merge.stored_weights import replacing

Tell = Callable[[str, int, int], None]

# Items searched, and searched for, at most: enough to tell maps apart, and seconds on any machine.
MOST_QUERIES, MOST_ITEMS = 1000, 10_000
_NEIGHBOURS = 10
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Settings:
    """What to do.

    Attributes:
        out: Adapter to write, a safetensors file; report and page take its name with other endings.
        labels: File of classes, or None.
        new_tensor: Name of the tensor in the file of new embeddings, where it must be chosen.
        old_tensor: The same of old ones.
        label_tensor: The same of labels.
        tols: Tolerances λ/√d to try, beside a rotation and an affine map.
        bias: Whether maps have biases.
        held_out: Share of the pairs that maps are measured on, and not fitted to.
        most_drop: Loss of self, as a share, that the chosen map may cost. None: 0.005, and 0.1 without labels.
        contrastive: Weight of the contrastive term, which needs labels.
        steps: Training steps, where that term calls for them.
        seed: Draws what is held out, and batches.
        html: Whether to write a page.
        force: Whether to replace what is there.
    """

    out: str
    labels: str | None = None
    new_tensor: str | None = None
    old_tensor: str | None = None
    label_tensor: str | None = None
    tols: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)
    bias: bool = False
    held_out: float = 0.2
    most_drop: float | None = None
    contrastive: float = 0.0
    steps: int = 600
    seed: int = 0
    html: bool = True
    force: bool = False


@dataclass(frozen=True)
class _Data:
    """Pairs to fit to and pairs to measure on; labels of both, where there are any."""

    new: Tensor
    old: Tensor
    labels: Tensor | None
    new_query: Tensor
    old_query: Tensor
    query_labels: Tensor | None


def fit_files(
    new: str,
    old: str,
    settings: Settings,
    *,
    tell: Tell = lambda what, done, total: None,
    command: str = "",
) -> dict[str, Any]:
    """Fit maps of several kinds to paired embeddings, choose one on pairs held out, and write it with its report.

    With labels, maps are judged by top-1: of mapped queries in the old gallery (cross), and of mapped queries in a mapped gallery (self).
    Without, each item is a class of its own: cross is how many held-out items find themselves among the old embeddings
    of all those held out, and self is the share of a query's 10 nearest new embeddings that the map keeps. Chosen is, of the
    maps that cost at most `most_drop` of self, the one with the highest cross; the nearer to a rotation of equal ones.

    Args:
        new: File of embeddings by the new model.
        old: File of embeddings of the same items, in the same order, by the old one.
        settings: What to do.
        tell: Called with what is being done, how many steps of it are done, and of how many.
        command: The command, for the report.

    Returns:
        What was found, in JSON types.

    Raises:
        UsageError: For unusable files, pairs that do not fit, settings out of range, and files that exist.
        WeightlabError: If a file cannot be written.
    """
    started = time.monotonic()
    places = _places(settings)
    _check(settings)
    if settings.html:
        require("matplotlib", "trial")
        require("jinja2", "trial")
    tell("reading", 0, 1)
    notes: list[str] = []
    data = _split(new, old, settings, notes)
    generator = torch.Generator().manual_seed(settings.seed)
    root = min(data.new.size(1), data.old.size(1)) ** 0.5
    plans: list[tuple[MapKind, float]] = [("orthogonal", 0.0), *(("lambda", tol) for tol in settings.tols)]
    plans.append(("affine", math.inf))

    reference, rows, adapters = _reference(data), [], []
    for number, (kind, tol) in enumerate(plans):
        tell(f"fitting and measuring: {kind}", number, len(plans))
        adapter = fit_adapter(
            data.new, data.old, data.labels, kind=kind, tol=0.0 if math.isinf(tol) else tol, bias=settings.bias,
            weights=(1.0, 0.0, settings.contrastive), steps=settings.steps, generator=generator,
        )  # fmt: skip
        adapters.append(adapter)
        rows.append(
            {
                "map": kind,
                "tol": None if math.isinf(tol) else tol,
                "lambda": None if math.isinf(tol) else tol * root,
                "deviation": adapter.deviation,
                **_measure(adapter, data, reference),
            }
        )
    most_drop = settings.most_drop
    if most_drop is None:
        most_drop = 0.1 if data.labels is None else 0.005
    allowed = [row for row in rows if row["drop"] <= most_drop + 1e-12]
    if not allowed:
        notes.append(f"no map costs at most {100 * most_drop:g} points; chosen is the one that costs least")
        allowed = [min(rows, key=lambda row: row["drop"])]
    chosen = max(allowed, key=lambda row: (row["cross"], row["cross_map"], -row["deviation"]))
    adapter = adapters[rows.index(chosen)]
    curves = None
    if data.labels is None:
        notes.append("without labels there are no classes to search for, and no backfill curve")
    else:
        tell("backfilling", 0, 1)
        curves = _curves(adapter, data, generator)
    result = {
        "new": {"path": new, "dimensions": data.new.size(1)},
        "old": {"path": old, "dimensions": data.old.size(1)},
        "labels": settings.labels,
        "pairs": {"fitted": len(data.new), "held_out": len(data.new_query)},
        "rule": f"highest cross of the maps that cost at most {100 * most_drop:g} points of self",
        "reference": reference,
        "maps": rows,
        "chosen": rows.index(chosen),
        "compatible": None if reference["old"] is None else chosen["cross"] > reference["old"],
        "backfill": curves,
        "bias": settings.bias,
        "seed": settings.seed,
        "notes": notes,
        "files": {name: os.fspath(place) for name, place in places.items()},
        "command": command,
    }
    tell("writing", 0, 1)
    adapter.info["measured"] = {key: chosen[key] for key in ("cross", "self", "drop", "deviation")}
    packed = safetensors.torch.save(adapter.state_dict(), adapter.metadata())
    with replacing(places["adapter"], len(packed)) as file:
        file.write_bytes(packed)
    result["seconds"] = time.monotonic() - started
    write_text(places["report"], json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if settings.html:
        from weightlab.merge import compat_page

        write_text(places["page"], compat_page.page(result))
    return result


def apply_file(
    adapter: str,
    embeddings: str,
    out: str,
    *,
    lift: bool = False,
    tensor: str | None = None,
    force: bool = False,
    tell: Tell = lambda what, done, total: None,
) -> dict[str, Any]:
    """Map the embeddings of a file by an adapter of another.

    Args:
        adapter: What `fit_files` wrote.
        embeddings: New embeddings, or old ones with `lift`.
        out: File to write, `.safetensors` or `.npy`.
        lift: Whether to lift old embeddings instead of taking new ones to the old space.
        tensor: Name of the tensor in the file of embeddings, where it must be chosen.
        force: Whether to replace `out`.
        tell: As in `fit_files`.

    Returns:
        What was done, in JSON types.

    Raises:
        UsageError: For unusable files, dimensions that do not fit, an adapter without the map, and an `out` that exists.
        WeightlabError: If the file cannot be written.
    """
    _free(Path(out), force)
    try:
        maps = CompatibilityAdapter.load(adapter)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error) if isinstance(error, ValueError) else f"no file {adapter}") from error
    layer = maps.forward_map if lift else maps.backward_map
    if layer is None:
        raise UsageError(f"{adapter} has no map for old embeddings; fit one with a forward map")
    tell("reading", 0, 1)
    x = read_embeddings(embeddings, tensor)
    if x.size(1) != layer.in_features:
        raise UsageError(
            f"{embeddings} has {x.size(1)} dimensions, but {adapter} maps {'old' if lift else 'new'} embeddings of "
            f"{layer.in_features}; --lift is for old ones"
        )
    blocks = x.split(_BLOCK)
    mapped = []
    with torch.no_grad():
        for number, block in enumerate(blocks):
            tell("mapping", number, len(blocks))
            block = block.to(layer.weight.dtype)
            mapped.append(maps.lift(block) if lift else maps.to_old(block))
    write_embeddings(out, torch.cat(mapped), tensor_name(embeddings, tensor))
    return {
        "out": out,
        "adapter": adapter,
        "embeddings": embeddings,
        "direction": "lift" if lift else "to old",
        "items": len(x),
        "dimensions": [x.size(1), layer.out_features],
    }


def _places(settings: Settings) -> dict[str, Path]:
    out = Path(settings.out).expanduser()
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {settings.out} must end in .safetensors")
    places = {"adapter": out, "report": out.with_suffix(".json")}
    if settings.html:
        places["page"] = out.with_suffix(".html")
    for place in places.values():
        _free(place, settings.force)
    return places


def _free(place: Path, force: bool) -> None:
    if place.is_dir():
        raise UsageError(f"{place} is a folder; give a file")
    if place.exists() and not force:
        raise UsageError(f"{place} exists; give another --out, or --force to replace it")


def _check(settings: Settings) -> None:
    for tol in settings.tols:
        if not (math.isfinite(tol) and tol >= 0):
            raise UsageError(f"--tol takes finite numbers of at least 0, got {tol:g}")
    if not 0 < settings.held_out < 1:
        raise UsageError(f"--held-out must lie between 0 and 1, got {settings.held_out:g}")
    if settings.most_drop is not None and not settings.most_drop >= 0:
        raise UsageError(f"--most-drop must be at least 0, got {settings.most_drop:g}")
    if not (math.isfinite(settings.contrastive) and settings.contrastive >= 0):
        raise UsageError(f"--contrastive must be at least 0, got {settings.contrastive:g}")
    if settings.contrastive and settings.labels is None:
        raise UsageError("--contrastive needs --labels")


def _split(new: str, old: str, settings: Settings, notes: list[str]) -> _Data:
    z, h = read_embeddings(new, settings.new_tensor), read_embeddings(old, settings.old_tensor)
    if len(z) != len(h):
        raise UsageError(
            f"{new} has {len(z)} rows and {old} {len(h)}; they must be the same items in the same order"
        )
    labels = None if settings.labels is None else read_labels(settings.labels, settings.label_tensor)
    if labels is not None and len(labels) != len(z):
        raise UsageError(f"{settings.labels} has {len(labels)} labels for {len(z)} pairs")
    count = round(settings.held_out * len(z))
    if count < 2 or len(z) - count < 2:
        raise UsageError(f"{len(z)} pairs are too few to hold out {settings.held_out:g} of them")
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(settings.seed))
    queries, fitted = order[: min(count, MOST_QUERIES)], order[count:]
    if count > MOST_QUERIES or (labels is not None and len(fitted) > MOST_ITEMS):
        notes.append(f"measured with at most {MOST_QUERIES} queries and {MOST_ITEMS} items")
    if labels is not None and not bool(torch.isin(labels[queries], labels[fitted[:MOST_ITEMS]]).any()):
        raise UsageError(
            f"no class of {settings.labels} has two items; labels are to be shared between items"
        )
    h = h.to(z.dtype)
    return _Data(
        z[fitted], h[fitted], None if labels is None else labels[fitted],
        z[queries], h[queries], None if labels is None else labels[queries],
    )  # fmt: skip


def _gallery(data: _Data) -> tuple[Tensor, Tensor, Tensor]:
    """New and old embeddings to search, and their classes."""
    if data.labels is None:
        return data.new_query, data.old_query, torch.arange(len(data.new_query))
    return data.new[:MOST_ITEMS], data.old[:MOST_ITEMS], data.labels[:MOST_ITEMS]


def _reference(data: _Data) -> dict[str, float | None]:
    """What searches give without any map: old in old, and new in new embeddings."""
    if data.query_labels is None:
        return {"old": None, "new": 1.0}
    new, old, labels = _gallery(data)
    searches = [(data.old_query, old), (data.new_query, new)]
    found = [
        retrieval_report(query, items, data.query_labels, labels, k=[1]).cmc[1] for query, items in searches
    ]
    return {"old": found[0], "new": found[1]}


@torch.no_grad()
def _measure(
    adapter: CompatibilityAdapter, data: _Data, reference: dict[str, float | None]
) -> dict[str, Any]:
    new, old, labels = _gallery(data)
    if data.query_labels is not None:
        report = compatibility_report(
            adapter, data.new_query, data.old_query, data.query_labels, new, old, labels, k=[1]
        )
        cross, own = report.searches["mapped / old"], report.searches["mapped / mapped"].cmc[1]
    else:
        cross = retrieval_report(adapter.to_old(data.new_query), old, labels, labels, k=[1])
        own = _kept_neighbours(adapter, data)
    assert reference["new"] is not None
    return {"cross": cross.cmc[1], "cross_map": cross.mean_ap, "self": own, "drop": reference["new"] - own}


def _kept_neighbours(adapter: CompatibilityAdapter, data: _Data) -> float:
    """Share of queries' nearest new embeddings that are still among the nearest once all are mapped."""
    items = data.new[:MOST_ITEMS]
    k = min(_NEIGHBOURS, len(items))
    near = [
        (F.normalize(q, dim=1) @ F.normalize(g, dim=1).T).topk(k, dim=1).indices
        for q, g in ((data.new_query, items), (adapter.to_old(data.new_query), adapter.to_old(items)))
    ]
    return float((near[0].unsqueeze(2) == near[1].unsqueeze(1)).any(2).double().mean())


@torch.no_grad()
def _curves(adapter: CompatibilityAdapter, data: _Data, generator: torch.Generator) -> dict[str, Any]:
    new, old, labels = _gallery(data)
    assert data.query_labels is not None
    query, lifted, recomputed = adapter.to_old(data.new_query), adapter.lift(old), adapter.to_old(new)
    orders: dict[str, Sequence[int] | Tensor] = {
        "hardest first": backfill_order(lifted, labels),
        "at random": torch.randperm(len(labels), generator=generator),
    }
    curves: dict[str, BackfillCurve] = {
        name: backfill_curve(query, lifted, recomputed, data.query_labels, labels, torch.as_tensor(order))
        for name, order in orders.items()
    }
    return {name: asdict(curve) for name, curve in curves.items()}


def summary(result: dict[str, Any]) -> str:
    """What `fit_files` found, as lines of text."""
    pairs, reference = result["pairs"], result["reference"]
    labelled = result["labels"] is not None
    own = "self" if labelled else "kept"
    lines = [
        f"{pairs['fitted']:,} pairs fitted, {pairs['held_out']:,} held out; {result['new']['dimensions']} to "
        f"{result['old']['dimensions']} dimensions",
        f"  {'map':<12}{'λ/√d':>7}{'D':>9}{'cross':>9}{own:>9}{'drop':>9}",
    ]
    for number, row in enumerate(result["maps"]):
        mark = "*" if number == result["chosen"] else " "
        tol = "-" if row["tol"] is None else f"{row['tol']:g}"
        lines.append(
            f"{mark} {row['map']:<12}{tol:>7}{row['deviation']:>9.3g}{100 * row['cross']:>8.1f}%{100 * row['self']:>8.1f}%"
            f"{100 * row['drop']:>8.2f} "
        )
    if labelled:
        lines.append(
            f"without a map: old in old {100 * reference['old']:.1f} %, new in new {100 * reference['new']:.1f} %"
        )
        lines.append(
            "the chosen map makes the new model compatible: its queries find more in the old gallery than old ones do"
            if result["compatible"]
            else "not compatible by the usual criterion: mapped queries find no more in the old gallery than old ones do"
        )
    if result["backfill"]:
        areas = ", ".join(f"{curve['area']:.3f} {name}" for name, curve in result["backfill"].items())
        lines.append(f"area under the backfill curve: {areas}")
    lines += [f"note: {note}" for note in result["notes"]]
    lines.append(f"*: {result['rule']}")
    lines.append(", ".join(f"{name}: {path}" for name, path in result["files"].items()))
    return "\n".join(lines)
