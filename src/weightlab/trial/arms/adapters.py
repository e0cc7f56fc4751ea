"""Ways to adapt a pre-trained model, and the controls that tell what in them matters.

They are made for the tasks `adapt-*`. Each trains few parameters beside frozen ones: an adapter on every
`nn.Linear` but the output head, which stays as it is (`train_head` thaws it). Ranks and the like are defaults, to be
overridden by a claim that compares at equal numbers of parameters. Low-rank updates have alpha equal to r, so
that they are scaled by 1 (by √r in rsLoRA).

AdamW's learning rate and weight decay are tuned for all. What trains differs from a whole matrix to a few singular
values, and the best learning rate with it by two orders of magnitude; so each kind has a range of its own, all of them a
hundredfold wide. They lie about what was best on tuning seeds of `adapt-digits`, 400 steps: 0.01 for whole matrices, 0.01
(final error) to 0.1 (early loss) for low ranks and Bone, 0.03 to 0.1 for biases and for LoRA-XS, 1 for singular values.
Decay pulls what trains to zero. That is back to the pre-trained weight where zero is
the start, and away from it in full fine-tuning, and for PiSSA and SORSA, whose factors start at the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import Tensor, nn
from torch.optim import Optimizer

from weightlab.trial.arm import Arm, Hyperparameters
from weightlab.trial.arms._adaptation import (
    adamw_on_trained,
    by_peft,
    hidden_linears,
    thawing,
    with_factors,
)
from weightlab.trial.arms.torch_optimizers import WEIGHT_DECAY

WIDTH = 100.0
"""Ratio of the ends of every range of learning rates."""


def _space(lowest: float) -> dict[str, BaseDistribution]:
    return {"lr": FloatDistribution(lowest, WIDTH * lowest, log=True), "weight_decay": WEIGHT_DECAY}


WHOLE = LOW_RANK = _space(1e-3)
VECTORS = _space(3e-3)
SINGULAR_VALUES = _space(3e-2)
FIXED = {"weight_decay": 0.01, "train_head": False}


def _lora(**settings: Any) -> Callable[[nn.Module, Hyperparameters], nn.Module]:
    return by_peft(lambda peft, h: peft.LoraConfig(r=h["r"], lora_alpha=h["r"], **settings))


def _bone(variant: str) -> Callable[[nn.Module, Hyperparameters], nn.Module]:
    def config(peft: Any, h: Hyperparameters) -> Any:
        from weightlab.adapters import BoneConfig

        return BoneConfig(r=h["r"], variant=variant)

    return by_peft(config)


def _svfit(peft: Any, h: Hyperparameters) -> Any:
    from weightlab.adapters import SvfitConfig

    return SvfitConfig(r=h["r"])


def _sorsa(peft: Any, h: Hyperparameters) -> Any:
    from weightlab.adapters import SorsaConfig

    return SorsaConfig(r=h["r"], gamma=h["gamma"])


def adamw_with_regularizer(model: nn.Module, hyperparameters: Hyperparameters) -> Optimizer:
    """Build AdamW that applies SORSA's regulariser at each step; gamma belongs to the peak learning rate."""
    from weightlab.adapters.sorsa import regularize_sorsa

    optimizer = adamw_on_trained(model, hyperparameters)
    regularize_sorsa(optimizer, model, peak_lr=hyperparameters["lr"])
    return optimizer


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _lora_rows(model: nn.Module) -> Iterator[Tensor]:
    """The matrices A of a model's LoRA layers, (r, in)."""
    for layer in _lora_layers(model).values():
        yield layer.lora_A["default"].weight


@torch.no_grad()
def unit_rows(model: nn.Module, hyperparameters: Hyperparameters, generator: torch.Generator) -> None:
    """Scale every row of A to norm 1, as EVA's have; PEFT's start has about 0.58."""
    for rows in _lora_rows(model):
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


@torch.no_grad()
def orthonormal_rows(model: nn.Module, hyperparameters: Hyperparameters, generator: torch.Generator) -> None:
    """Draw A anew, with orthonormal rows."""
    for rows in _lora_rows(model):
        drawn = nn.init.orthogonal_(torch.empty(rows.shape), generator=generator)
        rows.copy_(drawn)


def orthogonal_slot(model: nn.Module, hyperparameters: Hyperparameters, generator: torch.Generator) -> None:
    """Freeze A to one slot of a shared basis that the seed chooses."""
    from weightlab.adapters import orthogonal_lora_

    basis_seed = int(torch.randint(2**31, (), generator=generator))
    orthogonal_lora_(model, slot=hyperparameters["slot"], basis_seed=basis_seed)


def eva_start(
    model: Any,
    hyperparameters: Hyperparameters,
    batches: Iterator[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> None:
    """Start A from the principal components of its inputs."""
    from weightlab.adapters import eva_init_

    eva_init_(
        model,
        batches,
        rho=hyperparameters["rho"],
        max_batches=hyperparameters["batches"],
        label_mask=None,
        forward_fn=loss,
        progress=False,
    )


@torch.no_grad()
def bottom_start(
    model: nn.Module,
    hyperparameters: Hyperparameters,
    batches: Iterator[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> None:
    """Start A from the last principal components of its inputs, where EVA takes the first."""
    from weightlab.adapters import ActivationPCA

    layers = _lora_layers(model)
    all_of_them = max(layer.in_features for layer in layers.values())
    pca = ActivationPCA(model, all_of_them, list(layers), progress=False)
    pca.fit(islice(batches, hyperparameters["batches"]), forward_fn=loss, tau=1.0)
    for name, components in pca.components().items():
        rows = layers[name].lora_A["default"].weight
        rows.copy_(components.directions[-len(rows) :])


def random_vectors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Draw orthonormal columns and rows that know nothing of the weight."""
    left, right = weight.new_empty(len(weight), r), weight.new_empty(r, weight.shape[1])
    return nn.init.orthogonal_(left), nn.init.orthogonal_(right)


def scaled_singular_vectors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the r leading left singular vectors, scaled by their values, and the right ones."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :r] * values[:r], right[:r]


def _biases(model: nn.Module) -> Iterator[nn.Parameter]:
    hidden = hidden_linears(model).values()
    for module in model.modules():
        bias = getattr(module, "bias", None)
        is_head = isinstance(module, nn.Linear) and not any(module is layer for layer in hidden)
        if isinstance(bias, nn.Parameter) and not is_head:
            yield bias


def _norms(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            yield from module.parameters(recurse=False)


ARMS = (
    Arm(
        name="full-finetune",
        optimizer=adamw_on_trained,
        search_space=WHOLE,
        defaults={"lr": 5e-3, "weight_decay": 0.01},
        description="All parameters trained, head and embeddings too",
    ),
    Arm(
        name="lora",
        optimizer=adamw_on_trained,
        transform=_lora(),
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8},
        requires=("peft",),
        description="PEFT's LoRA, rank 8",
    ),
    Arm(
        name="rslora",
        optimizer=adamw_on_trained,
        transform=_lora(use_rslora=True),
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8},
        requires=("peft",),
        description="PEFT's LoRA, rank 8, scaled by alpha over the rank's root",
    ),
    Arm(
        name="pissa",
        optimizer=adamw_on_trained,
        transform=_lora(init_lora_weights="pissa"),
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8},
        requires=("peft",),
        description="PEFT's PiSSA, rank 8: the leading singular triples, as two factors",
    ),
    Arm(
        name="bitfit",
        optimizer=adamw_on_trained,
        transform=thawing(_biases),
        search_space=VECTORS,
        defaults={**FIXED, "lr": 0.03},
        description="Biases alone, the head's not",
    ),
    Arm(
        name="norm-tuning",
        optimizer=adamw_on_trained,
        transform=thawing(_norms),
        search_space=VECTORS,
        defaults={**FIXED, "lr": 0.03},
        description="Scales and shifts of LayerNorm and RMSNorm alone",
    ),
    Arm(
        name="lora-unit-rows",
        optimizer=adamw_on_trained,
        transform=_lora(),
        init=unit_rows,
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8},
        requires=("peft",),
        paper="eva",
        description="LoRA, rank 8, rows of A scaled to norm 1",
    ),
    Arm(
        name="lora-orthonormal",
        optimizer=adamw_on_trained,
        transform=_lora(),
        init=orthonormal_rows,
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8},
        requires=("peft",),
        paper="eva",
        description="LoRA, rank 8, rows of A orthonormal at random",
    ),
    Arm(
        name="lora-bottom",
        optimizer=adamw_on_trained,
        transform=_lora(),
        prepare=bottom_start,
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8, "batches": 16},
        requires=("peft",),
        paper="eva",
        description="LoRA, rank 8, rows of A the last principal components of the inputs",
    ),
    Arm(
        name="eva",
        optimizer=adamw_on_trained,
        transform=_lora(),
        prepare=eva_start,
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8, "rho": 2.0, "batches": 16},
        requires=("peft",),
        paper="eva",
        description="LoRA started from the inputs' principal components, rank 8 on average, at most 16",
    ),
    Arm(
        name="eva-rho1",
        optimizer=adamw_on_trained,
        transform=_lora(),
        prepare=eva_start,
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8, "rho": 1.0, "batches": 16},
        requires=("peft",),
        paper="eva",
        description="LoRA started from the inputs' principal components, rank 8 everywhere",
    ),
    Arm(
        name="orthogonal-lora",
        optimizer=adamw_on_trained,
        transform=_lora(),
        init=orthogonal_slot,
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8, "slot": 0},
        requires=("peft",),
        paper="orthogonal-adaptation",
        description="LoRA, rank 8, A frozen to columns of a shared orthogonal basis",
    ),
    Arm(
        name="bone-affine",
        optimizer=adamw_on_trained,
        transform=_bone("affine"),
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8},
        requires=("peft",),
        paper="bone",
        description="Bone: blocks of side 8 become W + W D + D, D shared along a block row",
    ),
    Arm(
        name="bone-affine-row",
        optimizer=adamw_on_trained,
        transform=_bone("affine_row"),
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8},
        requires=("peft",),
        paper="bone",
        description="Bone: blocks of side 8 become W + W D + D, D shared along a block column",
    ),
    Arm(
        name="bone-additive",
        optimizer=adamw_on_trained,
        transform=_bone("additive"),
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8},
        requires=("peft",),
        paper="bone",
        description="Bone without the weight's guidance: blocks of side 8 become W + D",
    ),
    Arm(
        name="svfit",
        optimizer=adamw_on_trained,
        transform=by_peft(_svfit),
        search_space=SINGULAR_VALUES,
        defaults={**FIXED, "lr": 0.3, "r": "all"},
        requires=("peft",),
        paper="svfit",
        description="SVFit: all singular values, their vectors frozen",
    ),
    Arm(
        name="random-diagonal",
        optimizer=adamw_on_trained,
        transform=with_factors(random_vectors, diagonal=True),
        search_space=SINGULAR_VALUES,
        defaults={**FIXED, "lr": 0.3, "r": 1024},
        paper="svfit",
        description="SVFit with random orthonormal vectors for the weight's own",
    ),
    Arm(
        name="lora-xs",
        optimizer=adamw_on_trained,
        transform=with_factors(scaled_singular_vectors, diagonal=False),
        search_space=VECTORS,
        defaults={**FIXED, "lr": 0.03, "r": 8},
        paper="svfit",
        description="LoRA-XS: a core of 8 × 8 between the leading singular vectors",
    ),
    Arm(
        name="sorsa",
        optimizer=adamw_with_regularizer,
        transform=by_peft(_sorsa),
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8, "gamma": 4e-4},
        requires=("peft",),
        paper="sorsa",
        description="SORSA, rank 8: the leading singular triples, kept nearly orthonormal",
    ),
    Arm(
        name="sorsa-no-reg",
        optimizer=adamw_on_trained,
        transform=by_peft(_sorsa),
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 0.01, "r": 8, "gamma": 0.0},
        requires=("peft",),
        paper="sorsa",
        description="SORSA, rank 8, without its regulariser",
    ),
)
