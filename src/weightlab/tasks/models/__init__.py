"""Small, plain models that the built-in tasks train."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.tasks.models.gpt import GPT, GPTConfig
    from weightlab.tasks.models.mlp import MLP
    from weightlab.tasks.models.pretrained import load_pretrained_resnet
    from weightlab.tasks.models.resnet import ResNet
    from weightlab.tasks.models.seeding import seeded_by

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "GPT": ".gpt",
        "GPTConfig": ".gpt",
        "MLP": ".mlp",
        "ResNet": ".resnet",
        "load_pretrained_resnet": ".pretrained",
        "seeded_by": ".seeding",
    },
)
