"""Griffe extension: sections of our docstrings that griffe does not know, put into its terms."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

PROSE = re.compile(r"^(Complexity|References):\n((?:[ ]{4}.*\n?|\n)+)", re.MULTILINE)


class Sections(Extension):
    """Shows `Example:` as a Python session, `Complexity:` and `References:` as paragraphs."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = PROSE.sub(lambda found: f"**{found[1]}:** {dedent(found[2])}", text)
