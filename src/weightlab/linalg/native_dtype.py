"""Which floating-point types a device multiplies matrices of in hardware."""

from __future__ import annotations

from typing import Literal

import torch

DtypeChoice = torch.dtype | Literal["auto"] | None
"""Type to work in: one, the fastest that the device has (`fastest_dtype`), or that of the data."""


@torch.compiler.assume_constant_result
def has_native_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run on instructions made for them.

    On a CPU: AVX512-BF16 or AMX (x86), BF16 (Arm). On CUDA: compute capability 8.0 or higher. Everywhere
    else False: emulated products can be slower than float32's.

    Args:
        device: The device to ask about.

    Example:
        >>> has_native_bfloat16(torch.device("meta"))
        False
    """
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    return False


def fastest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to multiply matrices in where a loss of precision does no harm.

    Args:
        dtype: Type of the data. float64 is taken as a wish for precision, and kept.
        device: Where the data are.

    Returns:
        bfloat16 where it is native, else float32; float64 for float64.

    Example:
        >>> fastest_dtype(torch.float64, torch.device("cpu"))
        torch.float64
    """
    if dtype == torch.float64:
        return dtype
    return torch.bfloat16 if has_native_bfloat16(device) else torch.float32


def check_dtype(dtype: DtypeChoice, name: str) -> None:
    """Raise ValueError for what is no `DtypeChoice` of a floating-point type."""
    known = dtype is None or dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    if not known:
        raise ValueError(f'{name} must be a floating-point torch.dtype, "auto" or None, got {dtype!r}')
