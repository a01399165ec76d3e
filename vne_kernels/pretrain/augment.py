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


@dataclass(frozen=True)
class Jitter:
    """Colour jitter, applied with probability ``p``; the others as torchvision's ColorJitter."""

    p: float
    brightness: float
    contrast: float
    saturation: float
    hue: float


@dataclass(frozen=True)
class Policy:
    """What is done to an image to make one view, in this order; ``p`` stands for probability."""

    crop_scale: tuple[float, float]  # share of the image's area
    jitter: Jitter
    blur_p: float
    solarise_p: float = 0.0
    flip_p: float = 0.5
    grey_p: float = 0.2
    blur_kernel: int = 23  # pixels
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels


_SIMCLR = Policy((0.08, 1.0), Jitter(0.8, 0.8, 0.8, 0.8, 0.2), blur_p=0.5)
_SIMSIAM = Policy((0.2, 1.0), Jitter(0.8, 0.4, 0.4, 0.4, 0.1), blur_p=0.5)
_BYOL = Policy((0.08, 1.0), Jitter(0.8, 0.4, 0.4, 0.2, 0.1), blur_p=1.0)

#: First and second view: the paper's Table 5. It leaves out the crops' scales, which are those of
#: Chen et al. 2020 (appendix A), Chen and He 2020 (their code) and Grill et al. 2020 (appendix B).
POLICIES = {
    "simclr": (_SIMCLR, _SIMCLR),
    "simsiam": (_SIMSIAM, _SIMSIAM),
    "byol": (_BYOL, dataclasses.replace(_BYOL, blur_p=0.1, solarise_p=0.2)),
}

#: The paper's Table 4, for CIFAR-10 and CIFAR-100; there is no blur then.
SMALL_JITTER = Jitter(0.8, 0.4, 0.4, 0.4, 0.1)


def policies(name: str, size: int) -> tuple[Policy, Policy]:
    """The :data:`POLICIES` of that name, with Table 4's changes for images of up to 64 pixels."""
    first, second = POLICIES[name]
    if size > SMALL:
        return first, second
    first, second = (
        dataclasses.replace(policy, jitter=SMALL_JITTER, blur_p=0.0) for policy in (first, second)
    )
    return first, second


def make_views(name: str, data: ImageData, size: int) -> Views:
    """What makes the two views of ``--augment name``, (n, 3, size, size) each."""
    return AffineViews(data, size) if name == "affine" else PolicyViews(name, data, size)


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


class PolicyViews:
    """Two views of each image, by the :data:`POLICIES` of that name.

    Crop to grey are done by Pillow, twice as fast here as tensors of one image; the rest in float.
    """

    def __init__(self, name: str, data: ImageData, size: int) -> None:
        self.first, self.second = (_transform(policy, size) for policy in policies(name, size))
        self.normalise = v2.Normalize(data.mean, data.std, inplace=True)

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        first, second = (
            self.normalise(torch.stack([transform(image) for image in images]))
            for transform in (self.first, self.second)
        )
        return first, second


def _transform(policy: Policy, size: int) -> v2.Compose:
    """An RGB image -> (3, size, size) float32 in 0..1."""
    jitter = dataclasses.asdict(policy.jitter)
    p = jitter.pop("p")
    steps = [
        v2.RandomResizedCrop(size, scale=policy.crop_scale, antialias=True),
        v2.RandomHorizontalFlip(policy.flip_p),
        v2.RandomApply([v2.ColorJitter(**jitter)], p),
        v2.RandomGrayscale(policy.grey_p),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
    ]
    if policy.blur_p:
        steps += [v2.RandomApply([Blur(policy.blur_kernel, policy.blur_sigma)], policy.blur_p)]
    if policy.solarise_p:
        steps += [v2.RandomSolarize(threshold=0.5, p=policy.solarise_p)]
    return v2.Compose(steps)


class Blur:
    """torchvision's GaussianBlur by columns, then by rows: equal, and in a third of the time."""

    def __init__(self, kernel: int, sigma: tuple[float, float]) -> None:
        self.kernel, self.sigma = kernel, sigma

    def __call__(self, image: Tensor) -> Tensor:
        sigma = torch.empty(()).uniform_(*self.sigma).item()
        columns = v2.functional.gaussian_blur(image, [1, self.kernel], [sigma, sigma])
        blurred: Tensor = v2.functional.gaussian_blur(columns, [self.kernel, 1], [sigma, sigma])
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
