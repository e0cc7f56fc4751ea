"""Readers: what the weights of a model are like."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.inspect.checkpoint import Checkpoint, TensorInfo
    from weightlab.inspect.comparison import Comparison, compare_checkpoints, make_comparison
    from weightlab.inspect.erg import ErgCount, erg_count
    from weightlab.inspect.layer_changes import Change, ChangeRow, change_rows
    from weightlab.inspect.layer_pairs import Pair, Pairing, pair_layers
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
        "Change": ".layer_changes",
        "ChangeRow": ".layer_changes",
        "Checkpoint": ".checkpoint",
        "Comparison": ".comparison",
        "ErgCount": ".erg",
        "FLAGS": ".report",
        "Layer": ".layers",
        "LayerRow": ".report",
        "Pair": ".layer_pairs",
        "Pairing": ".layer_pairs",
        "PowerLawFit": ".power_law",
        "RandomizedControl": ".randomized",
        "Report": ".report",
        "TensorInfo": ".checkpoint",
        "change_rows": ".layer_changes",
        "compare_checkpoints": ".comparison",
        "erg_count": ".erg",
        "esd": ".spectrum",
        "fit_power_law": ".power_law",
        "inspect_layer": ".report",
        "layer_report": ".report",
        "layer_rows": ".report",
        "make_comparison": ".comparison",
        "make_report": ".report",
        "pair_layers": ".layer_pairs",
        "randomized_control": ".randomized",
        "walk_layers": ".layers",
    },
)
