"""Readers: what the weights of a model are like, and which examples of a data set matter."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.inspect.area_under_margin import AreaUnderMargin
    from weightlab.inspect.checkpoint import Checkpoint, TensorInfo
    from weightlab.inspect.comparison import Comparison, compare_checkpoints, make_comparison
    from weightlab.inspect.erg import ErgCount, erg_count
    from weightlab.inspect.example_scores import el2n, example_loss, logit_margin, prediction_margin
    from weightlab.inspect.forgetting import ForgettingTracker
    from weightlab.inspect.fused_projections import FusedProjection, fused_projection
    from weightlab.inspect.gradient_norms import grad_norm_methods, grad_norms
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
    from weightlab.inspect.report_page import report_html
    from weightlab.inspect.scored_data import DataScores, rank_correlation
    from weightlab.inspect.scoring import SCORES, data_scores, score_examples
    from weightlab.inspect.selection import select
    from weightlab.inspect.spectrum import esd

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "AreaUnderMargin": ".area_under_margin",
        "Change": ".layer_changes",
        "ChangeRow": ".layer_changes",
        "Checkpoint": ".checkpoint",
        "Comparison": ".comparison",
        "DataScores": ".scored_data",
        "ErgCount": ".erg",
        "FLAGS": ".report",
        "ForgettingTracker": ".forgetting",
        "FusedProjection": ".fused_projections",
        "Layer": ".layers",
        "LayerRow": ".report",
        "Pair": ".layer_pairs",
        "Pairing": ".layer_pairs",
        "PowerLawFit": ".power_law",
        "RandomizedControl": ".randomized",
        "Report": ".report",
        "SCORES": ".scoring",
        "TensorInfo": ".checkpoint",
        "change_rows": ".layer_changes",
        "compare_checkpoints": ".comparison",
        "data_scores": ".scoring",
        "el2n": ".example_scores",
        "erg_count": ".erg",
        "esd": ".spectrum",
        "example_loss": ".example_scores",
        "fit_power_law": ".power_law",
        "fused_projection": ".fused_projections",
        "grad_norm_methods": ".gradient_norms",
        "grad_norms": ".gradient_norms",
        "inspect_layer": ".report",
        "layer_report": ".report",
        "layer_rows": ".report",
        "logit_margin": ".example_scores",
        "make_comparison": ".comparison",
        "make_report": ".report",
        "pair_layers": ".layer_pairs",
        "prediction_margin": ".example_scores",
        "randomized_control": ".randomized",
        "rank_correlation": ".scored_data",
        "report_html": ".report_page",
        "score_examples": ".scoring",
        "select": ".selection",
        "walk_layers": ".layers",
    },
)
