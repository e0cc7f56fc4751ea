"""A rival of SVFit's size: LoRA of the lowest rank."""

from __future__ import annotations

from weightlab.trial.arm import Arm
from weightlab.trial.arms._adaptation import adamw_on_trained, by_peft
from weightlab.trial.arms.adapters import FIXED, LOW_RANK

ARMS = (
    Arm(
        name="lora-rank-1",
        optimizer=adamw_on_trained,
        transform=by_peft(lambda peft, h: peft.LoraConfig(r=1, lora_alpha=1)),
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 3e-3},
        requires=("peft",),
        paper="svfit",
        description="PEFT's LoRA, rank 1",
    ),
)
