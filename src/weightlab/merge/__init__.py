"""Joining separately trained networks: matching their hidden units, and what lies between them."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.merge.permutation import Permutation, apply_permutation, check_equivalence
    from weightlab.merge.permutation_spec import PermutationSpec
    from weightlab.merge.weight_matching import WeightMatching, weight_matching

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Permutation": ".permutation",
        "PermutationSpec": ".permutation_spec",
        "WeightMatching": ".weight_matching",
        "apply_permutation": ".permutation",
        "check_equivalence": ".permutation",
        "weight_matching": ".weight_matching",
    },
)
