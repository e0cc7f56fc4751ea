"""Numbers as tables and JSON show them."""

from __future__ import annotations

import math
from typing import Any


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
