"""Numbers as tables, JSON and CSV show them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightlab._pages.files import write_text


def shown(value: float | None) -> str:
    """Write a number in three digits, a count whole, and what could not be had as a dash.

    Example:
        >>> shown(1234.5), shown(12345), shown(float("nan")), shown(None)
        ('1.23e+03', '12345', '-', '-')
    """
    if value is None or math.isnan(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def plain(value: Any) -> Any:
    """Return JSON types, with null for numbers that JSON does not have.

    Example:
        >>> plain({"a": (1, float("inf"))})
        {'a': [1, None]}
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(content: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> str:
    """Write content as JSON, NaN and infinity as null; to `path` as well, if given.

    Example:
        >>> print(json_text({"alpha": float("nan")}), end="")
        {
          "alpha": null
        }
    """
    return _kept(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", path)


def csv_text(
    columns: Sequence[str], rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str] | None = None
) -> str:
    """Write rows as CSV, empty where there is no number; to `path` as well, if given.

    Example:
        >>> csv_text(["name", "alpha"], [{"name": "w", "alpha": float("nan")}])
        'name,alpha\\nw,\\n'
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in plain(dict(row)).items()})
    return _kept(text.getvalue(), path)


def _kept(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        write_text(path, text)
    return text
