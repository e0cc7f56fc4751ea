"""What a trial shows: a live display while it runs; a table, an HTML page, JSON and CSV at its end."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.trial.report import export, html, live, plots, terminal
    from weightlab.trial.report.live import LiveDisplay

__getattr__, __dir__, __all__ = exports(
    __name__,
    {"LiveDisplay": ".live", **dict.fromkeys(["export", "html", "live", "plots", "terminal"], "")},
)
