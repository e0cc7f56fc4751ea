"""Griffe extension: what our docstrings hold and Markdown or griffe do not know, put into their terms."""

from __future__ import annotations

import re
from textwrap import dedent, indent
from typing import Any

from griffe import Extension, Object

PROSE = re.compile(r"^(Complexity|References):\n((?:[ ]{4}.*\n?|\n)+)", re.MULTILINE)
FORMULA = re.compile(r"^\.\. math::\n((?:[ ]{4}.*\n?|\n)+)", re.MULTILINE)


class Sections(Extension):
    """Shows `Example:` as a Python session, other sections as paragraphs, formulas as they are written."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = PROSE.sub(lambda found: f"**{found[1]}:** {dedent(found[2])}", text)
        text = FORMULA.sub(lambda found: "\n" + indent(dedent(found[1]), " " * 4), text)
        obj.docstring.value = re.sub(r":math:(`[^`]+`)", r"\1", text)
