"""Joining separately trained networks: matching their hidden units, and what lies between them."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.merge.activation_assignment import activation_matching
    from weightlab.merge.activation_repair import repair_
    from weightlab.merge.backfilling import BackfillCurve, backfill_curve, backfill_order
    from weightlab.merge.batch_norm_statistics import reset_batch_norm_
    from weightlab.merge.compatibility import CompatibilityAdapter, fit_adapter
    from weightlab.merge.compatibility_criterion import CompatibilityReport, compatibility_report
    from weightlab.merge.interpolation import LossBarrier, interpolate, loss_barrier
    from weightlab.merge.many_models import ManyMerge, merge_many
    from weightlab.merge.permutation import Permutation, apply_permutation, check_equivalence
    from weightlab.merge.permutation_spec import PermutationSpec
    from weightlab.merge.retrieval import RetrievalReport, retrieval_report
    from weightlab.merge.singular_vectors import SingularAlignment, singular_alignment
    from weightlab.merge.straight_through import StraightThroughMatching, ste_matching
    from weightlab.merge.trained_maps import LossWeights
    from weightlab.merge.weight_arithmetic import average, slerp, task_arithmetic
    from weightlab.merge.weight_descent import WeightMatching, weight_matching

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "BackfillCurve": ".backfilling",
        "CompatibilityAdapter": ".compatibility",
        "CompatibilityReport": ".compatibility_criterion",
        "LossBarrier": ".interpolation",
        "LossWeights": ".trained_maps",
        "ManyMerge": ".many_models",
        "Permutation": ".permutation",
        "PermutationSpec": ".permutation_spec",
        "RetrievalReport": ".retrieval",
        "SingularAlignment": ".singular_vectors",
        "StraightThroughMatching": ".straight_through",
        "WeightMatching": ".weight_descent",
        "activation_matching": ".activation_assignment",
        "apply_permutation": ".permutation",
        "average": ".weight_arithmetic",
        "backfill_curve": ".backfilling",
        "backfill_order": ".backfilling",
        "check_equivalence": ".permutation",
        "compatibility_report": ".compatibility_criterion",
        "fit_adapter": ".compatibility",
        "interpolate": ".interpolation",
        "loss_barrier": ".interpolation",
        "merge_many": ".many_models",
        "repair_": ".activation_repair",
        "reset_batch_norm_": ".batch_norm_statistics",
        "retrieval_report": ".retrieval",
        "singular_alignment": ".singular_vectors",
        "slerp": ".weight_arithmetic",
        "task_arithmetic": ".weight_arithmetic",
        "ste_matching": ".straight_through",
        "weight_matching": ".weight_descent",
    },
)
