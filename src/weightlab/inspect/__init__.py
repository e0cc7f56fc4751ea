"""Readers: what the weights of a model are like."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.inspect.checkpoint import Checkpoint, TensorInfo
    from weightlab.inspect.erg import ErgCount, erg_count
    from weightlab.inspect.layers import Layer, walk_layers
    from weightlab.inspect.power_law import PowerLawFit, fit_power_law
    from weightlab.inspect.randomized import RandomizedControl, randomized_control
    from weightlab.inspect.report import (
        FLAGS,
        LayerRow,
        Report,
        inspect_layer,
        layer_report,
        layer_rows,
        make_report,
    )
    from weightlab.inspect.spectrum import esd

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Checkpoint": ".checkpoint",
        "ErgCount": ".erg",
        "FLAGS": ".report",
        "Layer": ".layers",
        "LayerRow": ".report",
        "PowerLawFit": ".power_law",
        "RandomizedControl": ".randomized",
        "Report": ".report",
        "TensorInfo": ".checkpoint",
        "erg_count": ".erg",
        "esd": ".spectrum",
        "fit_power_law": ".power_law",
        "inspect_layer": ".report",
        "layer_report": ".report",
        "layer_rows": ".report",
        "make_report": ".report",
        "randomized_control": ".randomized",
        "walk_layers": ".layers",
    },
)
