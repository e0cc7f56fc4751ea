"""The alphabet of the character models: newline, printable ASCII, and one symbol for the rest."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ALPHABET_SIZE = 97

_SYMBOLS = "\ufffd\n" + "".join(map(chr, range(32, 127)))
_TABLE = np.zeros(128, dtype=np.uint8)
_TABLE[[ord(symbol) for symbol in _SYMBOLS[1:]]] = range(1, ALPHABET_SIZE)
_TABLE[ord("\t")] = _TABLE[ord(" ")]


def encode(text: str) -> Tensor:
    """Turn text into symbols, one a character.

    A tab counts as a space; whatever is neither newline nor printable ASCII becomes symbol 0.

    Returns:
        uint8 tensor `[len(text)]` with values below `ALPHABET_SIZE`. Time and memory are linear.

    Example:
        >>> encode("Hi\\n…")
        tensor([42, 75,  1,  0], dtype=torch.uint8)
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return torch.from_numpy(_TABLE[np.where(points < 128, points, 0)])


def decode(symbols: Tensor) -> str:
    """Turn symbols back into text; symbol 0 becomes U+FFFD.

    Example:
        >>> decode(encode("f(x)\\n"))
        'f(x)\\n'
    """
    return "".join(_SYMBOLS[symbol] for symbol in symbols.tolist())
