"""`cifar10-resnet`: a ResNet on CIFAR-10."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from weightlab.tasks.base import Split
from weightlab.tasks.classification import Classification
from weightlab.tasks.data.images import images_fingerprint, load_images
from weightlab.tasks.digest import code_digest, digest
from weightlab.tasks.models.resnet import ResNet
from weightlab.tasks.models.seeding import seeded_by

VALIDATION_IMAGES = 5000
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Cifar10ResNet(Classification):
    """CIFAR-10's 32x32 colour images with a ResNet-20, random shifts by up to 4 pixels and mirroring.

    Training images but the last 5,000 are trained on, those are for validation; test is the data
    set's own. An evaluation goes over the first `eval_images` of the split.

    Args:
        depth: Of the ResNet, 6 n + 2.
        batch_size: Images in a batch.
        steps: Default training steps.
        eval_images: Images classified in one evaluation; `None` for the whole split.
    """

    name = "cifar10-resnet"
    minimal_effect = 0.01
    description = "ResNet-20 on CIFAR-10 (uoft-cs/cifar10)"

    def __init__(
        self, *, depth: int = 20, batch_size: int = 128, steps: int = 1000, eval_images: int | None = 2000
    ) -> None:
        self.depth = depth
        self.batch_size = batch_size
        self.steps = steps
        self.eval_images = eval_images

    def build(self, generator: torch.Generator) -> ResNet:
        """Return a ResNet with weights drawn from `generator`."""
        with seeded_by(generator):
            return ResNet(self.depth)

    def images(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the split's images, uint8 `[n, 3, 32, 32]`."""
        limit = self.eval_images if split == "test" else None
        pixels, labels = load_images(
            "uoft-cs/cifar10", "plain_text", "test" if split == "test" else "train", column="img", limit=limit
        )
        if split == "train":
            return pixels[:-VALIDATION_IMAGES], labels[:-VALIDATION_IMAGES]
        if split == "validation":
            return pixels[-VALIDATION_IMAGES:], labels[-VALIDATION_IMAGES:]
        return pixels, labels

    def evaluated(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the first `eval_images` of the split."""
        pixels, labels = self.images(split)
        return pixels[: self.eval_images], labels[: self.eval_images]

    def augment(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Shift each image by up to 4 pixels (black beyond the border) and mirror every other one."""
        count, _, height, width = pixels.shape
        shift = torch.randint(9, (2, count, 1), generator=generator)
        mirrored = torch.randint(2, (count, 1), generator=generator, dtype=torch.bool)
        columns = torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))
        rows = (torch.arange(height) + shift[0])[:, None, :, None]
        columns = (columns + shift[1])[:, None, None, :]
        image, channel = (
            torch.arange(count)[:, None, None, None],
            torch.arange(pixels.shape[1])[:, None, None],
        )
        return F.pad(pixels, (4, 4, 4, 4))[image, channel, rows, columns]

    def prepare(self, pixels: Tensor) -> Tensor:
        """Normalise each channel by ImageNet's mean and standard deviation."""
        mean = torch.tensor(MEAN, device=pixels.device)[:, None, None]
        std = torch.tensor(STD, device=pixels.device)[:, None, None]
        return (pixels.float() / 255.0 - mean) / std

    def fingerprint(self) -> str:
        """Hash of all images, of the task's settings and of its code."""
        return digest(
            code_digest(),
            self.depth,
            self.eval_images,
            *(
                images_fingerprint("uoft-cs/cifar10", "plain_text", split, column="img")
                for split in ("train", "test")
            ),
        )
