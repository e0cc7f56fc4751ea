"""Trained CIFAR-10 ResNets."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from weightlab.exceptions import TaskError, UsageError
from weightlab.tasks.data.hub import model_file
from weightlab.tasks.models.resnet import ResNet


def load_pretrained_resnet(source: str | Path) -> ResNet:
    """Load a trained CIFAR-10 ResNet, in eval mode on the CPU.

    Inputs are normalised as `Cifar10ResNet` does it: mean (0.485, 0.456, 0.406), standard deviation
    (0.229, 0.224, 0.225).

    Args:
        source: `"resnet20"`, `"resnet32"` or `"resnet56"` for the checkpoints of
            `akamaster/pytorch_resnet_cifar10` (repository `akamaster/resnet20-cifar10`, ... under
            `WEIGHTLAB_DATA` or on the Hub); another repository id; or the path of a safetensors file
            or of a folder with a `model.safetensors`.

    Raises:
        UsageError: When `source` is none of these.
        TaskError: When the file is missing or holds other weights.
    """
    text = str(source)
    if Path(source).is_dir():
        path = Path(source) / "model.safetensors"
    elif text.endswith(".safetensors"):
        path = Path(source)
    elif re.fullmatch(r"resnet\d+", text):
        path = model_file(f"akamaster/{text}-cifar10")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        path = model_file(text)
    else:
        raise UsageError(
            f"{text!r} is no checkpoint; give resnet20, resnet32, resnet56, a repository id or a path"
        )
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TaskError(f"cannot read {path}: {error}") from error
    depth = 2 * sum(bool(re.fullmatch(r"layer\d\.\d+\.conv1\.weight", key)) for key in state) + 2
    try:
        with torch.device("meta"):
            model = ResNet(depth, classes=len(state["linear.bias"]))
        model = model.to_empty(device="cpu")
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
        model.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise TaskError(f"{path} does not hold a CIFAR ResNet: {str(error).splitlines()[0]}") from error
    return model.eval()
