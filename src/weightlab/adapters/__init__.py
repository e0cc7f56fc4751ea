"""Adapters: ways to fine-tune a frozen network by few parameters, registered with Hugging Face PEFT."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.adapters.activation_pca import ActivationPCA
    from weightlab.adapters.bone import BlockAffine, BoneConfig, bone_linear, bone_weight
    from weightlab.adapters.crosstalk import crosstalk
    from weightlab.adapters.eva import eva_init_
    from weightlab.adapters.merging import merge_adapters
    from weightlab.adapters.orthogonal import orthogonal_lora_
    from weightlab.adapters.rank_allocation import allocate_ranks
    from weightlab.adapters.registration import register
    from weightlab.adapters.shared_basis import shared_basis
    from weightlab.adapters.sorsa import SorsaCallback, SorsaConfig, sorsa_regularizer
    from weightlab.adapters.svfit import SingularValues, SvfitConfig

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "ActivationPCA": ".activation_pca",
        "BlockAffine": ".bone",
        "BoneConfig": ".bone",
        "SingularValues": ".svfit",
        "SorsaCallback": ".sorsa",
        "SorsaConfig": ".sorsa",
        "SvfitConfig": ".svfit",
        "allocate_ranks": ".rank_allocation",
        "bone_linear": ".bone",
        "bone_weight": ".bone",
        "crosstalk": ".crosstalk",
        "eva_init_": ".eva",
        "merge_adapters": ".merging",
        "orthogonal_lora_": ".orthogonal",
        "register": ".registration",
        "shared_basis": ".shared_basis",
        "sorsa_regularizer": ".sorsa",
    },
)
