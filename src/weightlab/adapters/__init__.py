"""Adapters: ways to fine-tune a frozen network by few parameters, registered with Hugging Face PEFT."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.adapters.activation_pca import ActivationPCA
    from weightlab.adapters.basis import shared_basis
    from weightlab.adapters.block_affine import BlockAffine, bone_linear, bone_weight
    from weightlab.adapters.bone import BoneConfig
    from weightlab.adapters.eva import EvaReport, eva_init_
    from weightlab.adapters.interference import crosstalk
    from weightlab.adapters.lora_export import to_lora
    from weightlab.adapters.merging import merge_adapters
    from weightlab.adapters.orthogonal import freeze_basis_, orthogonal_lora_
    from weightlab.adapters.rank_allocation import allocate_ranks
    from weightlab.adapters.registration import register
    from weightlab.adapters.singular_values import SingularValues
    from weightlab.adapters.sorsa import SorsaCallback, SorsaConfig, regularize_sorsa, sorsa_regularizer
    from weightlab.adapters.svfit import SvfitConfig

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "ActivationPCA": ".activation_pca",
        "BlockAffine": ".block_affine",
        "BoneConfig": ".bone",
        "EvaReport": ".eva",
        "SingularValues": ".singular_values",
        "SorsaCallback": ".sorsa",
        "SorsaConfig": ".sorsa",
        "SvfitConfig": ".svfit",
        "allocate_ranks": ".rank_allocation",
        "bone_linear": ".block_affine",
        "bone_weight": ".block_affine",
        "crosstalk": ".interference",
        "eva_init_": ".eva",
        "freeze_basis_": ".orthogonal",
        "merge_adapters": ".merging",
        "orthogonal_lora_": ".orthogonal",
        "register": ".registration",
        "regularize_sorsa": ".sorsa",
        "shared_basis": ".basis",
        "sorsa_regularizer": ".sorsa",
        "to_lora": ".lora_export",
    },
)
