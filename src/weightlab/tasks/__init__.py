"""Tasks: bundles of data, model, loss and metric that trials run on.

`get("docs-gpt")` builds a registered task, `get("my_task.py:task")` one from a user's file, `names()`
lists the registered ones. See `weightlab.tasks.base.Task` for what a task is.
"""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.tasks import data, models
    from weightlab.tasks.adapt_code import AdaptCode
    from weightlab.tasks.adapt_digits import AdaptDigits, AdaptDigitsContrast
    from weightlab.tasks.adapt_gpt import AdaptGPT
    from weightlab.tasks.adapt_text import AdaptText
    from weightlab.tasks.base import Split, Task
    from weightlab.tasks.checks import as_task
    from weightlab.tasks.cifar10_resnet import Cifar10ResNet
    from weightlab.tasks.classification import Classification
    from weightlab.tasks.digits_mlp import DigitsMLP
    from weightlab.tasks.docs_gpt import DocsGPT
    from weightlab.tasks.english_gpt import EnglishGPT
    from weightlab.tasks.files import load_object, source_fingerprint
    from weightlab.tasks.mnist_mlp import MnistMLP
    from weightlab.tasks.pretraining import pretrained
    from weightlab.tasks.registry import get, load, names
    from weightlab.tasks.shakespeare_gpt import ShakespeareGPT
    from weightlab.tasks.text_gpt import TextGPT

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "AdaptCode": ".adapt_code",
        "AdaptDigits": ".adapt_digits",
        "AdaptDigitsContrast": ".adapt_digits",
        "AdaptGPT": ".adapt_gpt",
        "AdaptText": ".adapt_text",
        "Cifar10ResNet": ".cifar10_resnet",
        "Classification": ".classification",
        "DigitsMLP": ".digits_mlp",
        "DocsGPT": ".docs_gpt",
        "EnglishGPT": ".english_gpt",
        "MnistMLP": ".mnist_mlp",
        "ShakespeareGPT": ".shakespeare_gpt",
        "Split": ".base",
        "Task": ".base",
        "TextGPT": ".text_gpt",
        "as_task": ".checks",
        "data": "",
        "get": ".registry",
        "load": ".registry",
        "load_object": ".files",
        "models": "",
        "names": ".registry",
        "pretrained": ".pretraining",
        "source_fingerprint": ".files",
    },
)
