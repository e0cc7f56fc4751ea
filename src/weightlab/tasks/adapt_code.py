"""`adapt-code`: a character GPT that knows Python's documentation, to be adapted to Python code."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from weightlab.exceptions import TaskError
from weightlab.tasks.adapt_text import AdaptText
from weightlab.tasks.base import Split
from weightlab.tasks.data.alphabet import encode
from weightlab.tasks.docs_gpt import DocsGPT

MODULES: dict[Split, tuple[str, ...]] = {
    "train": (
        "argparse", "ast", "dataclasses", "difflib", "doctest", "enum", "functools", "heapq", "inspect", "ipaddress",
        "locale", "pickle", "random", "shutil", "subprocess", "tarfile", "threading", "typing",
    ),
    "validation": ("fractions", "optparse", "textwrap"),
    "test": ("configparser", "statistics", "traceback"),
}  # fmt: skip


@functools.cache
def module_text(split: Split) -> Tensor:
    """Return the source of a split's standard modules as symbols.

    Raises:
        TaskError: When this Python comes without a module's source.
    """
    texts = []
    for name in MODULES[split]:
        spec = find_spec(name)
        path = Path(spec.origin) if spec is not None and spec.origin else None
        if path is None or path.suffix != ".py" or not path.is_file():
            raise TaskError(
                f"adapt-code: this Python has no source of its module {name}; use one that has, e.g. python.org's"
            )
        texts.append(path.read_text(encoding="utf-8"))
    return encode("\n\n".join(texts))


class AdaptCode(AdaptText):
    """Character GPT trained on the text of `docs-gpt`, adapted to code of the standard library.

    Both texts come with Python, so nothing is downloaded; they differ between Python versions. The code
    is split by module. Arguments are those of `AdaptText`.
    """

    name = "adapt-code"
    minimal_effect = 0.02
    description = "character GPT trained on Python's language reference, adapted to Python code (embedded)"
    source_class = DocsGPT

    def text(self, split: Split) -> Tensor:
        """Return the split's symbols."""
        return module_text(split)
