"""The image sets, and a loader whose every batch is a function of (seed, epoch, position).

Nothing random hangs on what was drawn before: a run stopped after any step goes on with exactly
the batches and views that it would have seen.
"""

from __future__ import annotations

import signal
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vne_kernels.pretrain.config import DOWNLOADS, OptionError

Views = Callable[[Sequence[Image.Image]], tuple[Tensor, Tensor]]
TEST_SHARE = 0.2
SPLIT_SEED = 0


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, in memory as (N, H, W) or (N, H, W, 3) uint8, or as paths of files."""

    images: npt.NDArray[np.uint8] | Sequence[str]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:
        image = self.images[index]
        return (Image.open(image) if isinstance(image, str) else Image.fromarray(image)).convert(
            "RGB"
        )

    def take(self, indices: npt.NDArray[np.int64]) -> ImageSet:
        if isinstance(self.images, np.ndarray):
            return ImageSet(self.images[indices], self.labels[indices])
        return ImageSet([self.images[i] for i in indices], self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A training and a test set. The labels serve the probes alone, never the pretraining."""

    train: ImageSet
    test: ImageSet
    native_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def classes(self) -> int:
        return len(np.unique(self.train.labels))


def load(data: str, download_dir: str) -> ImageData:
    """Read what ``--data`` names; raises :class:`OptionError` where that cannot be used."""
    path = Path(data)
    if data == "digits":
        train, test = _digits()
    elif data in DOWNLOADS:
        train, test = _cifar(data, download_dir)
    elif path.is_file() and path.suffix == ".npz":
        train, test = _npz(path)
    elif path.is_dir():
        train, test = _folder(path)
    else:
        wanted = f"'digits', {', '.join(map(repr, DOWNLOADS))}, an .npz file or an image folder"
        raise OptionError("data", f"{wanted} that exists", data)
    if len(train) < 2 or len(test) < 1:
        got = f"{data} with {len(train)} and {len(test)}"
        raise OptionError("data", "a set of at least 2 training images and 1 test image", got)
    if len(np.unique(train.labels)) < 2:
        raise OptionError("data", "a set of at least 2 classes", f"{data} with 1")
    return ImageData(train, test, _native_size(train), *_statistics(train))


def _digits() -> tuple[ImageSet, ImageSet]:
    """1797 handwritten digits, 8 x 8, grey values 0 to 16 (scikit-learn's ``load_digits``)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    whole = ImageSet(
        np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels.astype(np.int64)
    )
    return _split(whole)


def _split(whole: ImageSet) -> tuple[ImageSet, ImageSet]:
    """The same stratified split whatever the run's seed, so that runs can be compared."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(whole)),
        test_size=TEST_SHARE,
        stratify=whole.labels,
        random_state=SPLIT_SEED,
    )
    return whole.take(train), whole.take(test)


def _cifar(name: str, download_dir: str) -> tuple[ImageSet, ImageSet]:
    from torchvision.datasets import CIFAR10, CIFAR100

    def subset(train: bool) -> ImageSet:
        source = (CIFAR10 if name == "cifar10" else CIFAR100)(download_dir, train, download=True)
        return ImageSet(source.data, np.asarray(source.targets, np.int64))

    try:
        return subset(True), subset(False)
    except (OSError, RuntimeError) as error:
        raise OptionError(
            "data", f"a set that can be downloaded to {download_dir}", f"{name} ({error})"
        ) from error


def _npz(path: Path) -> tuple[ImageSet, ImageSet]:
    """MedMNIST's keys. ``val_*``, where present, is left aside: nothing is tuned on it here."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return _npz_part(file, "train", path), _npz_part(file, "test", path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError("data", "a readable .npz file", f"{path} ({error})") from error


def _npz_part(file: np.lib.npyio.NpzFile, part: str, path: Path) -> ImageSet:
    names = f"{part}_images", f"{part}_labels"
    for name in names:
        if name not in file:
            got = f"{path} with {', '.join(file.files)}"
            raise OptionError("data", f"an .npz with the key {name}", got)
    images, labels = (file[name] for name in names)
    shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))
    if images.dtype != np.uint8 or not shaped:
        got = f"{images.dtype} {images.shape} in {path}"
        raise OptionError("data", f"an .npz whose {names[0]} is uint8 (N, H, W[, 1 or 3])", got)
    if labels.size != len(images) or not np.issubdtype(labels.dtype, np.integer):
        got = f"{labels.dtype} {labels.shape} in {path}"
        raise OptionError("data", f"an .npz whose {names[1]} has one integer per image", got)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    return ImageSet(images, labels.reshape(-1).astype(np.int64))


def _folder(path: Path) -> tuple[ImageSet, ImageSet]:
    """``train/`` with ``test/`` or ``val/``, or class folders alone, which are split here."""
    parts = [name for name in ("test", "val") if (path / name).is_dir()]
    try:
        if (path / "train").is_dir() and parts:
            train, classes = _class_folders(path / "train")
            test, test_classes = _class_folders(path / parts[0])
            if classes != test_classes:
                got = f"{path} with {sorted(set(classes) ^ set(test_classes))} in one alone"
                raise OptionError("data", f"a folder whose train and {parts[0]} agree", got)
            return train, test
        return _split(_class_folders(path)[0])
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        wanted = "a folder of class folders, or with train/ and test/ or val/ of class folders"
        raise OptionError("data", wanted, f"{path} ({error})") from error


def _class_folders(path: Path) -> tuple[ImageSet, list[str]]:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(path))
    names = [name for name, _ in folder.samples]
    return ImageSet(names, np.asarray(folder.targets, np.int64)), folder.classes


def _native_size(images: ImageSet) -> int:
    """The shorter side of images in memory; files differ and take the usual 224."""
    if isinstance(images.images, np.ndarray):
        height, width = images.images.shape[1:3]
        return int(min(height, width))
    return 224


def _statistics(
    images: ImageSet,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation per channel of images in memory, ImageNet's for files."""
    if not isinstance(images.images, np.ndarray):
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = images.images.reshape(-1, images.images.shape[3] if images.images.ndim == 4 else 1)
    # From histograms: exact, and without a float copy of the images.
    counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels.T])
    values = np.arange(256) / 255
    mean = counts @ values / len(pixels)
    std = np.sqrt(np.maximum(counts @ values**2 / len(pixels) - mean**2, 1e-12))
    red, green, blue = np.broadcast_to(np.stack([mean, std], 1), (3, 2)).tolist()
    return (red[0], green[0], blue[0]), (red[1], green[1], blue[1])


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, image) pairs: a permutation per epoch, the share of one process.

    ``steps_done`` counts the optimiser steps already taken: the first pass goes on from there.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        seed: int,
        *,
        steps_done: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.batch, self.seed = images, batch, seed
        self.rank, self.world = rank, world
        self.epoch, self.skip = divmod(steps_done, len(self) // batch)

    def __len__(self) -> int:
        return self.images // self.world

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning as each epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.images)
        mine = order[self.rank :: self.world][self.skip * self.batch : len(self)]
        self.skip = 0
        return iter([(self.epoch, int(image)) for image in mine])


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Batches of two views; the randomness is seeded by (seed, epoch, first image) per batch."""

    def __init__(self, images: ImageSet, views: Views, seed: int) -> None:
        self.images, self.views, self.seed = images, views, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        entropy = np.random.SeedSequence((self.seed, *keys[0])).generate_state(2)
        # torchvision draws from torch, lightly's blur from numpy.
        with isolate_rng(include_cuda=False):
            torch.default_generator.manual_seed(int(entropy[0]))
            np.random.seed(int(entropy[1]))  # noqa: NPY002
            return self.views([self.images[image] for _, image in keys])


def view_loader(
    images: ImageSet, views: Views, sampler: EpochSampler, *, workers: int, pin_memory: bool
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of two views; a last batch that is not full is dropped."""
    return DataLoader(
        TwoViews(images, views, sampler.seed),
        batch_size=sampler.batch,
        sampler=sampler,
        drop_last=True,
        collate_fn=_as_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interrupts_to_the_main_process,
    )


def _as_is(batch: Any) -> Any:
    return batch


def _leave_interrupts_to_the_main_process(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
