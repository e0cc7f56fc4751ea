"""What came of a merge of files, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightlab.merge.stored_weights import file_size


def summary(result: Mapping[str, Any]) -> str:
    """Return what `merge_checkpoints` did as a few lines of text."""
    parts = [f"{model['weight']:.4g} × {model['path']}" for model in result["models"]]
    start = "" if result["base"] is None else f"{result['base']} + "
    lines = [f"{result['method']}: {start}{' + '.join(parts)}", *_matching(result), *_losses(result)]
    if layers := result.get("batch_norm"):
        lines.append(f"statistics of {len(layers)} batch norm layers taken anew")
    lines += [f"note: {note}" for note in result["notes"]]
    where = "" if result["report"] is None else f", report: {result['report']}"
    size = f"{result['tensors']} tensors, {result['parameters']:,} parameters, {file_size(result['bytes'])}"
    return "\n".join([*lines, f"{size}, {result['seconds']:.1f} s: {result['out']}{where}"])


def _matching(result: Mapping[str, Any]) -> list[str]:
    if "matching" not in result:
        return []
    matching = result["matching"]
    moved = "; ".join(f"{count:,}" for count in matching["moved"])
    before, after = (_each(matching["distance"][key]) for key in ("before", "after"))
    return [
        f"moved {moved} of {matching['units']:,} units in {matching['groups']} groups; distance {before} before, {after} after"
    ]


def _losses(result: Mapping[str, Any]) -> list[str]:
    lines = []
    if "losses" in result:
        losses = result["losses"]
        lines.append(
            f"loss on {losses['data']}: models {_each(losses['models'])}; merged {losses['merged']:.4g}"
        )
        barriers = [
            f"{losses[key]['barrier']:.4g} {label}"
            for key, label in (
                ("before", "as they are"),
                ("after", "matched"),
                ("reset", "with new statistics"),
            )
            if key in losses
        ]
        if barriers:
            lines.append(f"barrier: {', '.join(barriers)}")
    if "scores" in result:
        scores = result["scores"]
        for name, merged in scores["merged"].items():
            lines.append(f"{name}: models {_each([s[name] for s in scores['models']])}; merged {merged:.4g}")
    return lines


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
