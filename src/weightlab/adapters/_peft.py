"""Everything that the room takes from PEFT and transformers, imported in one place.

Adding a method from outside means leaning on PEFT's internals. When one has moved, the import fails here, with one
message that names the version found and those tested.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import version

from weightlab._lazy import require
from weightlab.exceptions import MissingDependencyError

OLDEST, NEWEST = "0.21.0", "0.21.2"

peft = require("peft", "adapters")
require("transformers", "adapters")


@contextlib.contextmanager
def internals() -> Iterator[None]:
    """Turn any error of the block into one that tells which PEFT was found and which is known to work.

    Raises:
        MissingDependencyError: Also an `ImportError`.

    Example:
        >>> with internals():
        ...     raise AttributeError("no such map")
        Traceback (most recent call last):
        weightlab.exceptions.MissingDependencyError: weightlab.adapters cannot work with PEFT ...
    """
    try:
        yield
    except Exception as error:
        raise MissingDependencyError(
            f"weightlab.adapters cannot work with PEFT {version('peft')}, whose internals differ from those of "
            f"{OLDEST} to {NEWEST}, with which it was tested ({type(error).__name__}: {error}); install it with: "
            f"pip install 'peft=={NEWEST}'"
        ) from error


with internals():
    from peft import LoraConfig, PeftConfig, PeftModel
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import (
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        get_peft_model_state_dict,
        register_peft_method,
    )
    from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
    from peft.utils.error import NoMatchingPeftModuleError
    from peft.utils.other import get_pattern_key
    from peft.utils.peft_types import PeftType
    from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
    from transformers import TrainerCallback
    from transformers.pytorch_utils import Conv1D

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "Conv1D",
    "LoraConfig",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "TrainerCallback",
    "check_adapters_to_merge",
    "get_pattern_key",
    "get_peft_model_state_dict",
    "get_quantization_kwargs",
    "internals",
    "peft",
    "register_peft_method",
    "resolve_quantization_backend",
]
