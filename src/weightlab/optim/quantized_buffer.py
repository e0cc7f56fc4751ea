"""Error feedback kept in few bits: float32, or 8 or 4 bits an entry with a range for each row."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Storage = Literal["fp32", "int8", "int4"]
Buffer = dict[str, Tensor]
_LEVELS = {"int8": 255, "int4": 15}


def check_storage(storage: str | None) -> None:
    """Raise ValueError unless `storage` is None or known."""
    if storage is not None and storage not in get_args(Storage):
        raise ValueError(f"error_feedback must be None, {', '.join(get_args(Storage))}, got {storage!r}")


def encode(values: Tensor, storage: Storage) -> Buffer:
    """Store a matrix; `decode` gives it back.

    Each row is quantised between its smallest entry and its largest in equal steps u, 255 for int8 and 15
    for int4; what comes back is off by at most u/2. Two 4-bit entries share a byte, the first in the
    lower half. A constant row comes back exactly; a row that holds NaN or infinity as NaN.

    Args:
        values: Shape `(m, n)`, floating point.
        storage: `"fp32"`, `"int8"` or `"int4"`.

    Returns:
        Tensors by name. `fp32`: `error`, in float32 (float64 for float64). Else `codes`, uint8 of shape
        `(m, n)` or `(m, ⌈n/2⌉)`, and `low` and `unit`, float32 of shape `(m, 1)`.

    Example:
        >>> buffer = encode(torch.tensor([[0.0, 1.0, 15.0], [2.0, 2.0, 2.0]]), "int4")
        >>> buffer["codes"].shape, decode(buffer, 3)
        (torch.Size([2, 2]), tensor([[ 0.,  1., 15.],
                [ 2.,  2.,  2.]]))
    """
    check_storage(storage)
    if storage == "fp32":
        return {"error": values.to(torch.promote_types(values.dtype, torch.float32))}
    values = values.float()
    if values.shape[-1] == 0:
        low = unit = values.new_zeros(*values.shape[:-1], 1)
    else:
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        # Halved first: the range of a row may exceed the largest number.
        unit = (high / 2 - low / 2) / (_LEVELS[storage] / 2)
    steps = ((values - low) / torch.where(unit == 0, 1.0, unit)).round_()
    codes = torch.nan_to_num_(steps, nan=0.0).clamp_(0, _LEVELS[storage]).to(torch.uint8)
    if storage == "int4":
        if codes.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    return {"codes": codes, "low": low, "unit": unit}


def decode(buffer: Buffer, columns: int) -> Tensor:
    """Give back what `encode` stored.

    Args:
        buffer: As `encode` returned it.
        columns: Columns of the matrix; tells apart 8 and 4 bits, and an odd count from the next even one.

    Returns:
        Shape `(m, columns)`, float32, or float64 where that was stored. Not to be written to.
    """
    if "error" in buffer:
        return buffer["error"]
    codes = buffer["codes"]
    if codes.shape[-1] < columns:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :columns]
    return torch.addcmul(buffer["low"], codes.float(), buffer["unit"])
