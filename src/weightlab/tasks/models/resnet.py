"""CIFAR ResNets: "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A: subsample, pad with zero channels)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch + shortcut)."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(branch + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet(nn.Module):
    """ResNet-20, 32, 44, 56, 110, ... for 32x32 images, `[batch, 3, 32, 32] -> [batch, classes]` logits.

    Three stages of (depth - 2) / 6 blocks with 16, 32 and 64 channels. Convolutions and the head
    start Kaiming-normal (fan in). The keys of its state are those of the `akamaster/*` checkpoints.

    Args:
        depth: 6 n + 2.
        classes: Outputs.

    Raises:
        ValueError: When `depth` is not 6 n + 2 with n >= 1.

    Example:
        >>> import torch
        >>> ResNet(8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        blocks, remainder = divmod(depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth must be 6 n + 2 (20, 32, 44, 56, 110, ...), not {depth}")
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
