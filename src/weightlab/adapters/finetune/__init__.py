"""Fine-tuning a causal language model on a text: what `weightlab adapt` does."""

from weightlab.adapters.finetune.display import Display
from weightlab.adapters.finetune.run import Settings, finetune, summary

__all__ = ["Display", "Settings", "finetune", "summary"]
