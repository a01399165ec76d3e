"""The image sets, and a loader whose every batch is a function of (seed, epoch, position).

Nothing random hangs on what was drawn before: a run stopped after any step goes on with exactly
the batches and views that it would have seen. A file that cannot be read does not end a run:
another image takes its place.
"""

from __future__ import annotations

import os
import signal
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vne_kernels.pretrain.config import DOWNLOADS, Config, OptionError

Views = Callable[[Sequence[Image.Image]], tuple[Tensor, Tensor]]
TEST_SHARE = 0.2
SPLIT_SEED = 0

#: What Pillow raises for a file that is missing, cut short, no image, or a decompression bomb.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
UNREADABLE_IN_A_ROW = 100  # more are not the files' fault: a disk that is gone

#: Lists of class folders that come with the package: the paper's Table 6.
CLASS_LISTS = ("imagenet10", "imagenet100")


class UnreadableImages(OptionError):
    """More than :data:`UNREADABLE_IN_A_ROW` images in a row cannot be read.

    Made from its message alone: a loading process hands an exception over as its type and the text
    of its traceback, which ends in the message.
    """

    def __init__(self, message: str) -> None:
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        ValueError.__init__(self, message.rstrip().rpartition(name)[2])


class ViewBatch(NamedTuple):
    """Two views of a batch of n images, those included that took the places of broken files."""

    first: Tensor  # (n, 3, size, size)
    second: Tensor
    labels: Tensor  # (n,), int64: for the online probe alone
    indices: Tensor  # (n,), int64: which images of the training set they are
    broken: Sequence[str]  # files that could not be read; a list where torch has pinned the batch


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, in memory as (N, H, W) or (N, H, W, 3) uint8, or as paths of files."""

    images: npt.NDArray[np.uint8] | Sequence[str]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:
        """The image in RGB; a file that cannot be read raises one of :data:`UNREADABLE`."""
        image = self.images[index]
        if not isinstance(image, str):
            return Image.fromarray(image).convert("RGB")
        with Image.open(image) as file:
            rgb: Image.Image = file.convert("RGB")
        return rgb

    def readable(self, index: int) -> tuple[int, Image.Image, list[str]]:
        """The first image from ``index`` on that can be read (after the last comes the first).

        Returns its index, the image in RGB, and the files passed over.

        Raises:
            UnreadableImages: more than :data:`UNREADABLE_IN_A_ROW` were passed over, or all.
        """
        broken: list[str] = []
        reason = ""
        for step in range(min(UNREADABLE_IN_A_ROW + 1, len(self))):
            place = (index + step) % len(self)
            try:
                return place, self[place], broken
            except UNREADABLE as error:
                broken.append(str(self.images[place]))
                reason = " ".join(str(error).split())
        got = f"{len(broken)} in a row that cannot, from {broken[0]} on ({reason})"
        wanted = "a set of images that can be read"
        raise UnreadableImages(str(OptionError("data", wanted, got)))

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
        """How many there are, if not an image of each among the training images."""
        return int(max(self.train.labels.max(), self.test.labels.max())) + 1


def load_for(config: Config) -> ImageData:
    """The images of a run."""
    return load(
        config.data,
        config.download_dir,
        classes=config.classes,
        train_images=config.train_images,
    )


def load(
    data: str, download_dir: str, *, classes: str | None = None, train_images: int | None = None
) -> ImageData:
    """Read what ``--data`` names; labels are 0, 1, ... in the order of the data's own.

    Args:
        data: "digits", "cifar10", "cifar100", an .npz file or a folder.
        download_dir: where the CIFAR sets are, or come to.
        classes: of a folder: a list of :data:`CLASS_LISTS`, or a file with a folder's name in each
            line; the other folders are left out.
        train_images: so many of the training images, every class in proportion, always the same.

    Raises:
        OptionError: it cannot be used.
    """
    path = Path(data)
    named = data in ("digits", *DOWNLOADS)  # even where a folder has that name
    if classes is not None and (named or not path.is_dir()):
        raise OptionError("classes", "left out where --data is not an image folder", classes)
    if data == "digits":
        train, test = _digits()
    elif data in DOWNLOADS:
        train, test = _cifar(data, download_dir)
    elif path.is_file() and path.suffix == ".npz":
        train, test = _npz(path)
    elif path.is_dir():
        train, test = _folder(path, None if classes is None else class_list(classes))
    else:
        wanted = f"'digits', {', '.join(map(repr, DOWNLOADS))}, an .npz file or an image folder"
        raise OptionError("data", f"{wanted} that exists", data)
    if len(train) < 2 or len(test) < 1:
        got = f"{data} with {len(train)} and {len(test)}"
        raise OptionError("data", "a set of at least 2 training images and 1 test image", got)
    if len(np.unique(train.labels)) < 2:
        raise OptionError("data", "a set of at least 2 classes", f"{data} with 1")
    train, test = _with_contiguous_labels(train, test)
    statistics = _statistics(train)
    if train_images is not None and train_images < len(train):
        train = train.take(stratified(train.labels, train_images))
    return ImageData(train, test, _native_size(train), *statistics)


def class_list(name: str) -> list[str]:
    """The class folders of a list that comes with the package, or of a file, sorted.

    A file names one in each line; lines that begin with # are comments.

    Raises:
        OptionError: there is none, or it names fewer than two.
    """
    known = name in CLASS_LISTS
    path = files("vne_kernels.pretrain") / f"classes/{name}.txt" if known else Path(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        wanted = f"one of {', '.join(CLASS_LISTS)}, or a file with a folder's name in each line"
        raise OptionError("classes", wanted, name) from error
    names = sorted({line.strip() for line in lines if not line.startswith("#")} - {""})
    if len(names) < 2:
        raise OptionError("classes", "a list of at least 2 folders", f"{name} with {names}")
    return names


def stratified(labels: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """``count`` indices, ascending, of every class in proportion to its size; always the same."""
    order = np.random.default_rng(0).permutation(len(labels))
    place = np.empty(len(labels))  # of an image in its class, between 0 and 1
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(order[np.argsort(place[order], kind="stable")[:count]])


def _with_contiguous_labels(train: ImageSet, test: ImageSet) -> tuple[ImageSet, ImageSet]:
    """The same images, labels numbered from 0 in the order of the training set's labels."""
    names = np.unique(train.labels)
    unknown = np.setdiff1d(test.labels, names)
    if len(unknown):
        wanted = "a set whose test labels all occur among the training labels"
        raise OptionError("data", wanted, f"{unknown[:10].tolist()} in the test labels alone")
    one, two = (
        replace(images, labels=np.searchsorted(names, images.labels)) for images in (train, test)
    )
    return one, two


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
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive")
        with np.load(path, allow_pickle=False) as file:
            return _npz_part(file, "train", path), _npz_part(file, "test", path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
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


def _folder(path: Path, chosen: list[str] | None) -> tuple[ImageSet, ImageSet]:
    """``train/`` with ``test/`` or ``val/``, or class folders alone, which are split here.

    ``chosen``: the class folders to use; None: all.
    """
    try:
        parts = _parts(path)
        if parts is None:
            whole, _ = _class_folders(path, chosen)
            return _split(whole)
        (train, classes), (test, test_classes) = (_class_folders(part, chosen) for part in parts)
    except OSError as error:
        raise OptionError("data", "a folder that can be read", f"{path} ({error})") from error
    except ValueError as error:
        if isinstance(error, OptionError):
            raise
        # scikit-learn says which class is too small to split
        wanted = "a folder with train/ and test/, or with enough images per class to split"
        raise OptionError("data", wanted, f"{path} ({error})") from error
    if classes != test_classes:
        wanted = f"a folder whose train/ and {parts[1].name}/ have the same class folders"
        got = f"{path} with {_listed(set(classes) ^ set(test_classes))} in one alone"
        raise OptionError("data", wanted, got)
    return train, test


def _parts(path: Path) -> tuple[Path, Path] | None:
    """The folders of the training and the test set; None where ``path`` holds the classes."""
    train = path / "train"
    tests = [path / name for name in ("test", "val") if (path / name).is_dir()]
    if train.is_dir() and tests:
        # ImageNet's test/ has no labels: then it is val/
        return train, next(filter(_folders_in, tests), tests[-1])
    for part in (train, *tests):
        if part.is_dir() and _folders_in(part):  # without folders it may be a class of that name
            wanted = "a folder with train/ and, beside it, test/ or val/"
            raise OptionError("data", wanted, f"{path} with {part.name}/ alone")
    return None


def _class_folders(path: Path, chosen: list[str] | None) -> tuple[ImageSet, list[str]]:
    """The images of the ``chosen`` (None: all) folders in ``path``, and these folders' names."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    found = _folders_in(path)
    if not found:
        loose = sum(item.suffix.lower() in IMG_EXTENSIONS for item in path.iterdir())
        wanted = "a folder that sorts its images into a folder per class, for the probes' labels"
        raise OptionError("data", wanted, f"{path} with {loose} images and no folders")
    names = found if chosen is None else chosen
    if missing := set(names).difference(found):
        raise OptionError("classes", f"class folders of {path}", f"{_listed(missing)} (missing)")
    labels = {name: label for label, name in enumerate(names)}
    samples = make_dataset(str(path), labels, IMG_EXTENSIONS, allow_empty=True)
    if empty := set(labels.values()).difference(label for _, label in samples):
        wanted = "a folder whose class folders all hold images"
        raise OptionError("data", wanted, f"{path} with none in {_listed(names[i] for i in empty)}")
    images, numbers = zip(*samples, strict=True)
    return ImageSet(images, np.array(numbers, np.int64)), names


def _folders_in(path: Path) -> list[str]:
    """Their names, sorted; not the hidden ones, which file managers and notebooks leave behind."""
    return sorted(x.name for x in path.iterdir() if x.is_dir() and not x.name.startswith("."))


def _listed(names: Iterable[str], shown: int = 5) -> str:
    """The first names in alphabetical order, and how many more there are."""
    first, others = (ordered := sorted(names))[:shown], len(ordered) - shown
    return ", ".join(first) + (f" and {others} more" if others > 0 else "")


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

    An epoch has as many images as fill whole optimiser steps, of ``accumulate`` batches each.
    ``steps_done`` counts the steps already taken: the first pass goes on from there.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        seed: int,
        *,
        accumulate: int = 1,
        steps_done: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.batch, self.seed = images, batch, seed
        self.rank, self.world = rank, world
        self.step = batch * accumulate  # images of this process
        self.epoch, self.skip = divmod(steps_done, len(self) // self.step)

    def __len__(self) -> int:
        return self.images // self.world // self.step * self.step

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning as each epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.images)
        mine = order[self.rank :: self.world][self.skip * self.step : len(self)]
        self.skip = 0
        return iter([(self.epoch, int(image)) for image in mine])


class TwoViews(Dataset[ViewBatch]):
    """Batches of two views; the randomness is seeded by (seed, epoch, first image) per batch.

    ``views`` draws from torch's default generator and from nothing else.
    """

    def __init__(self, images: ImageSet, views: Views, seed: int) -> None:
        self.images, self.views, self.seed = images, views, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> ViewBatch:
        """The batch of the (epoch, image) pairs ``keys``; the first one seeds it."""
        read = [self.images.readable(index) for _, index in keys]
        places, images, broken = zip(*read, strict=True)
        (seed,) = np.random.SeedSequence((self.seed, *keys[0])).generate_state(1)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            first, second = self.views(images)
        indices = torch.tensor(places)
        labels = torch.from_numpy(self.images.labels[list(places)])
        return ViewBatch(first, second, labels, indices, tuple(chain.from_iterable(broken)))


def view_loader(
    images: ImageSet, views: Views, sampler: EpochSampler, *, workers: int, pin_memory: bool
) -> DataLoader[ViewBatch]:
    """The sampler's batches as two views each."""
    return DataLoader(
        TwoViews(images, views, sampler.seed),
        batch_size=sampler.batch,
        sampler=sampler,
        collate_fn=as_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        # its own, so that beginning an epoch anew draws nothing from what is resumed
        generator=torch.Generator().manual_seed(sampler.seed),
        worker_init_fn=leave_interrupts_to_the_main_process,
    )


def as_is(batch: Any) -> Any:
    return batch


def leave_interrupts_to_the_main_process(_: int) -> None:
    """Signals that reach all processes: the main one still needs its loaders to end its step."""
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_the_main_process_to_end_this_one, daemon=True).start()


def _wait_for_the_main_process_to_end_this_one() -> None:
    # by SIGTERM too, as torch and multiprocessing do with a loader that does not end
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os.kill(os.getpid(), signal.SIGKILL)
