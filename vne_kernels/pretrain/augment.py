"""Two random views of each image of a batch, and the plain view that the probes see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightly.transforms.simclr_transform import SimCLRViewTransform
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from vne_kernels.pretrain.data import ImageData, Views

#: Up to this size SimCLR's recipe for CIFAR holds: no blur, half the colour strength.
SMALL = 64


def plain_view(data: ImageData, size: int) -> v2.Compose:
    """Resize (and crop to a square), scale, normalise: nothing random."""
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(size, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.mean, data.std),
        ]
    )


def make_views(name: str, data: ImageData, size: int) -> Views:
    return AffineViews(data, size) if name == "affine" else SimCLRViews(data, size)


class SimCLRViews:
    """SimCLR's augmentations (lightly's): crop, flip, colour jitter, grey, blur if not small."""

    def __init__(self, data: ImageData, size: int) -> None:
        small = size <= SMALL
        self.view = SimCLRViewTransform(
            input_size=size,
            cj_strength=0.5 if small else 1.0,
            gaussian_blur=0.0 if small else 0.5,
            normalize={"mean": list(data.mean), "std": list(data.std)},
        )

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        first, second = (torch.stack([self.view(image) for image in images]) for _ in range(2))
        return first, second


@dataclass(frozen=True)
class AffineRange:
    """Half-widths of the uniform distributions that :class:`AffineViews` draws from."""

    degrees: float = 15.0
    shift: float = 0.12  # of the image's side
    log_scale: float = 0.2
    log_aspect: float = 0.1
    shear_degrees: float = 10.0


class AffineViews:
    """For digits: each image its own small rotation, shift, scale, aspect and shear.

    SimCLR's other steps change what a digit is (a flipped 2, half a cropped 8) or do nothing to a
    grey image (hue, saturation), so they are left out. The maps of a whole batch are one call.
    """

    def __init__(self, data: ImageData, size: int, amount: AffineRange | None = None) -> None:
        self.plain = plain_view(data, size)
        self.amount = amount or AffineRange()
        # What lies outside the image is black.
        self.outside = -torch.tensor(data.mean).div(torch.tensor(data.std)).view(1, 3, 1, 1)

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        batch = torch.stack([self.plain(image) for image in images]) - self.outside
        return self._moved(batch), self._moved(batch)

    def _moved(self, batch: Tensor) -> Tensor:
        grid = F.affine_grid(
            random_maps(len(batch), self.amount), list(batch.shape), align_corners=False
        )
        return F.grid_sample(batch, grid, align_corners=False) + self.outside


def random_maps(count: int, amount: AffineRange) -> Tensor:
    """(count, 2, 3): rotation times stretch, and shift, in ``affine_grid``'s coordinates."""

    def draw(half_width: float) -> Tensor:
        return (torch.rand(count) * 2 - 1) * half_width

    angle = draw(math.radians(amount.degrees))
    scale, aspect = draw(amount.log_scale), draw(amount.log_aspect)
    shear = torch.tan(draw(math.radians(amount.shear_degrees)))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(count)
    rotation = torch.stack([cos, -sin, sin, cos], -1).view(-1, 2, 2)
    stretch = torch.stack([(scale + aspect).exp(), shear, zero, (scale - aspect).exp()], -1)
    # Coordinates run from -1 to 1: the side is 2.
    shift = torch.stack([draw(2 * amount.shift), draw(2 * amount.shift)], -1)
    return torch.cat([rotation @ stretch.view(-1, 2, 2), shift.unsqueeze(-1)], -1)
