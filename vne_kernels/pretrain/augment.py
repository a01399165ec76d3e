"""Two random views of each image of a batch, and the plain view that the probes see.

Everything random is drawn from torch's generator, which the loader seeds for each batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from vne_kernels.pretrain.config import SMALL
from vne_kernels.pretrain.data import ImageData, Views

BLUR_KERNEL = 23  # pixels
BLUR_SIGMA = (0.1, 2.0)  # pixels


@dataclass(frozen=True)
class Policy:
    """What is done to an image to make one view, in the order of the paper's Table 5.

    The strengths of the colour jitter are those of torchvision's ColorJitter.
    """

    crop_scale: tuple[float, float]  # share of the image's area
    brightness: float
    contrast: float
    saturation: float
    hue: float
    # probabilities
    blur: float
    solarize: float = 0.0
    flip: float = 0.5
    jitter: float = 0.8
    grey: float = 0.2

    def for_tiny_images(self) -> Policy:
        """Table 4's: no blur, and no jitter stronger than (0.4, 0.4, 0.4, 0.1)."""
        return dataclasses.replace(
            self,
            brightness=min(self.brightness, 0.4),
            contrast=min(self.contrast, 0.4),
            saturation=min(self.saturation, 0.4),
            hue=min(self.hue, 0.1),
            blur=0.0,
        )


_SIMCLR = Policy((0.08, 1.0), 0.8, 0.8, 0.8, 0.2, blur=0.5)
_SIMSIAM = Policy((0.2, 1.0), 0.4, 0.4, 0.4, 0.1, blur=0.5)
_BYOL = Policy((0.08, 1.0), 0.4, 0.4, 0.2, 0.1, blur=1.0)

#: First and second view: the paper's Table 5. It leaves out the crops' scales, which are those of
#: Chen et al. 2020 (appendix A), Chen and He 2020 (their code) and Grill et al. 2020 (appendix B).
POLICIES = {
    "simclr": (_SIMCLR, _SIMCLR),
    "simsiam": (_SIMSIAM, _SIMSIAM),
    "byol": (_BYOL, dataclasses.replace(_BYOL, blur=0.1, solarize=0.2)),
}


def make_views(name: str, data: ImageData, size: int) -> Views:
    """What makes the two views of ``--augment name``, (n, 3, size, size) each."""
    return AffineViews(data, size) if name == "affine" else RandomViews(name, data, size)


def plain_view(data: ImageData, size: int) -> v2.Compose:
    """Resize and crop to a square, scale, normalise: nothing random.

    Tiny images are shown whole. Of larger ones the rim is cut off, 256 pixels to 224, as linear
    evaluations on ImageNet do.
    """
    shorter_side = size if size <= SMALL else round(size * 8 / 7)
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(shorter_side, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.mean, data.std),
        ]
    )


class RandomViews:
    """Two views of each image, by the :data:`POLICIES` of that name.

    Crop, flip, jitter and grey are done by Pillow: tensors of one image take 1.4 times as long, at
    32 pixels as at 224. What follows is done in float.
    """

    def __init__(self, name: str, data: ImageData, size: int) -> None:
        policies = POLICIES[name]
        if size <= SMALL:
            policies = policies[0].for_tiny_images(), policies[1].for_tiny_images()
        self.views = tuple(_transform(policy, size) for policy in policies)
        self.normalise = v2.Normalize(data.mean, data.std, inplace=True)

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        first, second = (
            self.normalise(torch.stack([view(image) for image in images])) for view in self.views
        )
        return first, second


def _transform(policy: Policy, size: int) -> v2.Compose:
    """An RGB image -> (3, size, size) float32 in 0..1."""
    jitter = v2.ColorJitter(policy.brightness, policy.contrast, policy.saturation, policy.hue)
    steps = [
        v2.RandomResizedCrop(size, scale=policy.crop_scale, antialias=True),
        v2.RandomHorizontalFlip(policy.flip),
        v2.RandomApply([jitter], policy.jitter),
        v2.RandomGrayscale(policy.grey),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
    ]
    if policy.blur:
        steps.append(v2.RandomApply([blur], policy.blur))
    if policy.solarize:
        steps.append(v2.RandomSolarize(threshold=0.5, p=policy.solarize))
    return v2.Compose(steps)


def blur(image: Tensor) -> Tensor:
    """torchvision's GaussianBlur, by rows and then by columns: equal, and in 0.4 of the time."""
    sigma = [torch.empty(()).uniform_(*BLUR_SIGMA).item()] * 2
    rows = v2.functional.gaussian_blur(image, [BLUR_KERNEL, 1], sigma)
    blurred: Tensor = v2.functional.gaussian_blur(rows, [1, BLUR_KERNEL], sigma)
    return blurred


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
