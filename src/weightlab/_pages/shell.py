"""What every page is wrapped in: one file with its style, its script and a policy that admits nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import Any

from weightlab._lazy import require

_MINUS = re.compile(r"(?<![\w.)-])-(?=\d|inf)")
_TIMES = re.compile(r"(?<=\d)x\b")


def render(package: str, template: str, *, title: str, script: str = "", **values: Any) -> str:
    """Fill a Jinja template that extends `base.html.j2` and return the page. Equal arguments give equal text.

    The base has the blocks `content`, and `footer` for a closing sentence. What is filled in is escaped unless it is
    `markup`; names that are missing are errors. The filter `typeset` sets minus and multiplication signs.

    Args:
        package: Package that holds the template, e.g. `"weightlab.inspect"`.
        template: Its file name.
        title: Title of the page.
        script: JavaScript of this page, after that of all pages (buttons with `data-copy`).
        **values: What the template names.

    Raises:
        MissingDependencyError: Without jinja2.
    """
    jinja2 = require("jinja2", "trial")
    here = resources.files("weightlab._pages")
    css, js, base = (
        here.joinpath(file).read_text("utf-8") for file in ("page.css", "page.js", "base.html.j2")
    )
    own = resources.files(package).joinpath(template).read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.DictLoader({"base.html.j2": base, template: own}),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["typeset"] = typeset
    js += script
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    text = environment.get_template(template).render(
        title=title, css=markup(css), js=markup(js), script_hash=f"sha256-{digest}", **values
    )
    return text.lstrip()


def markup(text: str) -> Any:
    """Mark text as HTML already: our own files, and SVG in which matplotlib escaped what it was given."""
    return require("markupsafe", "trial").Markup(text)


def typeset(text: str) -> str:
    """Use the true minus and multiplication signs in numbers.

    Example:
        >>> typeset("muon-2: -0.05 [-0.1, -inf], 1.5x")
        'muon-2: −0.05 [−0.1, −inf], 1.5×'
    """
    return _TIMES.sub("×", _MINUS.sub("−", text))
