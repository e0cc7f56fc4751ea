"""Optimizers: `torch.optim.Optimizer` subclasses that treat weights as matrices."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.optim.aro import ARO, aro_alignment, aro_direction, aro_rotation, row_normalize
    from weightlab.optim.auon import AuON, HybridAuON, auon_update
    from weightlab.optim.dct_adamw import DCTAdamW
    from weightlab.optim.distributed import consolidate, distribute
    from weightlab.optim.lr_scaling import lr_factor
    from weightlab.optim.matrix_optimizer import (
        AdamWOptions,
        MatrixOptimizer,
        MatrixOptions,
    )
    from weightlab.optim.parameter_split import (
        is_matrix_name,
        split_named_parameters,
    )
    from weightlab.optim.robust_recovery import (
        RecoveryResult,
        SensingOperator,
        robust_recover,
        sign_correlation,
        small_spectral_,
    )
    from weightlab.optim.root import ROOT, RootOptions, root_update
    from weightlab.optim.sgld import SGLD
    from weightlab.optim.subgm import SubGM
    from weightlab.optim.trion import Trion

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "ARO": ".aro",
        "AdamWOptions": ".matrix_optimizer",
        "AuON": ".auon",
        "DCTAdamW": ".dct_adamw",
        "HybridAuON": ".auon",
        "MatrixOptimizer": ".matrix_optimizer",
        "MatrixOptions": ".matrix_optimizer",
        "ROOT": ".root",
        "RecoveryResult": ".robust_recovery",
        "RootOptions": ".root",
        "SGLD": ".sgld",
        "SensingOperator": ".robust_recovery",
        "SubGM": ".subgm",
        "Trion": ".trion",
        "aro_alignment": ".aro",
        "aro_direction": ".aro",
        "aro_rotation": ".aro",
        "auon_update": ".auon",
        "consolidate": ".distributed",
        "distribute": ".distributed",
        "is_matrix_name": ".parameter_split",
        "lr_factor": ".lr_scaling",
        "robust_recover": ".robust_recovery",
        "root_update": ".root",
        "row_normalize": ".aro",
        "sign_correlation": ".robust_recovery",
        "small_spectral_": ".robust_recovery",
        "split_named_parameters": ".parameter_split",
    },
)
