"""Recipes for whole training procedures."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.train.distance_from_init import DistanceFromInit, Law, fit_laws
    from weightlab.train.large_batch import MultiplicativeGradientNoise, Regime, adapt_regime, scale_lr

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "DistanceFromInit": ".distance_from_init",
        "Law": ".distance_from_init",
        "MultiplicativeGradientNoise": ".large_batch",
        "Regime": ".large_batch",
        "adapt_regime": ".large_batch",
        "fit_laws": ".distance_from_init",
        "scale_lr": ".large_batch",
    },
)
