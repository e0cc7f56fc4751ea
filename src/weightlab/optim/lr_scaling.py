"""Learning-rate factors that make one learning rate fit matrices of many shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

AdjustLR = Literal["original", "match_rms_adamw"]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter seen as a matrix: trailing dimensions are flattened.

    Example:
        >>> matrix_shape((64, 3, 7, 7)), matrix_shape((10,)), matrix_shape(())
        ((64, 147), (1, 10), (1, 1))
    """
    if len(shape) < 2:
        return 1, shape[0] if shape else 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return shape[0], columns


def check_adjust_lr(adjust_lr: str | None) -> None:
    """Raise ValueError unless `adjust_lr` is one of the values that `lr_factor` knows."""
    if adjust_lr not in (None, "original", "match_rms_adamw"):
        raise ValueError(f'adjust_lr must be None, "original" or "match_rms_adamw", got {adjust_lr!r}')


def lr_factor(shape: Sequence[int], adjust_lr: AdjustLR | None) -> float:
    """Factor on the learning rate of a semi-orthogonal m×n update, as `torch.optim.Muon` has it.

    `"original"` gives `√max(1, m/n)`. `"match_rms_adamw"` gives `0.2·√max(m, n)`: a semi-orthogonal
    update has root mean square `1/√max(m, n)`, and AdamW's is about 0.2 (Muon is Scalable for LLM
    Training, arXiv 2502.16982). `None` gives 1, and so does `"original"` for vectors.

    Raises:
        ValueError: If `adjust_lr` is unknown.

    Example:
        >>> lr_factor((400, 100), "original"), lr_factor((400, 100), "match_rms_adamw")
        (2.0, 4.0)
    """
    check_adjust_lr(adjust_lr)
    rows, columns = matrix_shape(shape)
    if adjust_lr == "original" and columns > 0:
        return max(1.0, rows / columns) ** 0.5
    if adjust_lr == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return 1.0
