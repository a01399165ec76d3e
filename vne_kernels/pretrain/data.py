"""The image sets, and a loader whose every batch is a function of (seed, epoch, position).

Nothing random hangs on what was drawn before: a run stopped after any step goes on with exactly
the batches and views that it would have seen. A file that cannot be read does not end a run:
another image takes its place.
"""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vne_kernels.common.arrays import Npz
from vne_kernels.common.reading import (
    FileError,
    bounded_memory,
    decoding,
    open_regular,
    printable,
    read_bytes,
    read_text,
    unchanged,
)
from vne_kernels.pretrain.config import DOWNLOADS, Config, OptionError

Views = Callable[[Sequence[Image.Image]], tuple[Tensor, Tensor]]
Identity = tuple[int, int]  # device and inode: of a folder, whatever it is called
TEST_SHARE = 0.2
SPLIT_SEED = 0
STATISTICS_PIXELS = 2**22  # counted at once: a count takes 8 bytes a pixel

#: torchvision's extensions of images, and the formats that they stand for. Pillow would open other
#: formats under these names too, and start Ghostscript for one of them.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MOST_PIXELS = 2**25
MOST_RATIO = 100  # of an image's sides: a view that scales the shorter one to its own scales both
MOST_IMAGE = 2**27  # bytes of an image's file
MOST_DECODING = 280 << 20  # bytes of memory: an image of the most pixels in RGBA and in RGB
MOST_SCANNED = 2**33  # pixels times scans of a JPEG: about ten seconds
MOST_LIST = 1 << 20  # bytes of a list of classes
MOST_TIMES = 100  # of a file's bytes, in memory: drawings in black and white take less

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
        """The image in RGB; a file that cannot be read raises :class:`FileError`."""
        image = self.images[index]
        if not isinstance(image, str):
            return Image.fromarray(image).convert("RGB")
        return read_image(image)

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
            except FileError as error:
                broken.append(str(self.images[place]))
                reason = printable(error, 300)
        got = f"{len(broken)} in a row that cannot, from {broken[0]} on ({reason})"
        wanted = "a set of images that can be read"
        raise UnreadableImages(str(OptionError("data", wanted, got)))

    def take(self, indices: npt.NDArray[np.int64]) -> ImageSet:
        if isinstance(self.images, np.ndarray):
            return ImageSet(self.images[indices], self.labels[indices])
        return ImageSet([self.images[i] for i in indices], self.labels[indices])


def read_image(path: str) -> Image.Image:
    """Returns the image in a file, in RGB.

    The pixels are counted before they are decoded, and what the decoder takes is bounded. The file
    is read at once: libtiff would map it, and a file cut short meanwhile would end the process.

    Raises:
        FileError: it cannot be read, whatever the decoder found.
    """
    name = printable(path, 300)
    with decoding(name), bounded_memory(MOST_DECODING):
        content = read_bytes(Path(path), MOST_IMAGE)
        scans = content.count(b"\xff\xda")  # of a JPEG
        with io.BytesIO(content) as stream:
            del content
            try:
                image = Image.open(stream, formats=FORMATS)
            except UnidentifiedImageError as error:
                raise FileError(name, f"must be an image ({', '.join(FORMATS)})") from error
            width, height = image.size
            if width * height > MOST_PIXELS:
                got = f"{width:,} x {height:,}"
                raise FileError(name, f"must have at most {MOST_PIXELS:,} pixels, got {got}")
            if max(width, height) > MOST_RATIO * min(width, height):
                got = f"{width:,} x {height:,}"
                raise FileError(name, f"must have sides of a ratio up to {MOST_RATIO}, got {got}")
            # A scan goes over every pixel, and 50 bytes are enough to write one.
            if image.format in ("JPEG", "MPO") and width * height * scans > MOST_SCANNED:
                raise FileError(name, f"must have fewer scans, got {scans:,}")
            image.load()
        # Not copied where that is not needed; but Pillow's WebP images keep their decoder.
        return image if image.mode == "RGB" and image.format != "WEBP" else image.convert("RGB")


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
    if classes is not None and (named or not os.path.isdir(path)):
        raise OptionError("classes", "left out where --data is not an image folder", classes)
    if data == "digits":
        train, test = _digits()
    elif data in DOWNLOADS:
        train, test = _cifar(data, download_dir)
    elif os.path.isfile(path) and path.suffix == ".npz":
        train, test = _npz(path)
    elif os.path.isdir(path):  # other than pathlib's it is False for a name that is too long
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
    path = Path(f"{files('vne_kernels.pretrain')}/classes/{name}.txt" if known else name)
    try:
        lines = read_text(path, MOST_LIST).splitlines()
    except (OSError, ValueError) as error:
        wanted = f"one of {', '.join(CLASS_LISTS)}, or a file with a folder's name in each line"
        raise OptionError("classes", wanted, f"{name} ({error})") from error
    names = sorted({line.strip() for line in lines if not line.startswith("#")} - {""})
    if len(names) < 2:
        got = f"{name} with {_listed(names) or 'none'}"
        raise OptionError("classes", "a list of at least 2 folders", got)
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
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        wanted = f"a set that can be downloaded to {printable(download_dir, 300)}"
        raise OptionError("data", wanted, f"{name} ({error})") from error


def _npz(path: Path) -> tuple[ImageSet, ImageSet]:
    """MedMNIST's keys. ``val_*``, where present, is left aside: nothing is tuned on it here."""
    try:
        with open_regular(path) as file, unchanged(path, file):
            npz = Npz(path, file, MOST_TIMES)
            return _npz_part(npz, "train", path), _npz_part(npz, "test", path)
    except (OSError, FileError) as error:
        raise OptionError("data", "a readable .npz file", str(error)) from error


def _npz_part(file: Npz, part: str, path: Path) -> ImageSet:
    names = f"{part}_images", f"{part}_labels"
    for name in names:
        if name not in file.keys:
            got = f"{path} with {_listed(file.keys)}"
            raise OptionError("data", f"an .npz with the key {name}", got)
    images, labels = (file.array(name) for name in names)
    shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))
    sides = images.shape[1:3] if shaped else ()
    if images.dtype != np.uint8 or not shaped or not 0 < max(sides) <= MOST_RATIO * min(sides):
        got = f"{images.dtype} {images.shape} in {path}"
        raise OptionError("data", f"an .npz whose {names[0]} is uint8 (N, H, W[, 1 or 3])", got)
    if labels.size != len(images) or labels.dtype.kind not in "iu":
        got = f"{labels.dtype} {labels.shape} in {path}"
        raise OptionError("data", f"an .npz whose {names[1]} has one integer per image", got)
    numbers = labels.reshape(-1).astype(np.int64)
    if labels.dtype.kind == "u" and (numbers < 0).any():
        got = f"{labels.max()} in {path}"
        raise OptionError("data", f"an .npz whose {names[1]} are less than 2**63", got)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    return ImageSet(images, numbers)


def _folder(path: Path, chosen: list[str] | None) -> tuple[ImageSet, ImageSet]:
    """``train/`` with ``test/`` or ``val/``, or class folders alone, which are split here.

    ``chosen``: the class folders to use; None: all.
    """
    try:
        parts = _parts(path)
        # A link to one of these folders shows images that are read in their own place.
        elsewhere = {*map(_identity, (path, *path.resolve().parents, *(parts or ())))}
        for part in parts or (path,):
            elsewhere |= {_identity(part / name) for name in _folders_in(part)}
        if parts is None:
            whole, _ = _class_folders(path, chosen, elsewhere)
            return _split(whole)
        (train, classes), (test, test_classes) = (
            _class_folders(part, chosen, elsewhere) for part in parts
        )
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
            wanted = "a folder with train/ and test/ or val/"
            raise OptionError("data", wanted, f"{path} with {part.name}/ alone")
    return None


def _class_folders(
    path: Path, chosen: list[str] | None, elsewhere: set[Identity]
) -> tuple[ImageSet, list[str]]:
    """The images of the ``chosen`` (None: all) folders in ``path``, and these folders' names."""
    found = _folders_in(path)
    if not found:
        loose = sum(name.lower().endswith(EXTENSIONS) for name in os.listdir(path))
        wanted = "a folder that sorts its images into a folder per class, for the probes' labels"
        raise OptionError("data", wanted, f"{path} with {loose} images and no folders")
    names = found if chosen is None else chosen
    if missing := set(names).difference(found):
        wanted = f"class folders of {printable(path, 300)}"
        raise OptionError("classes", wanted, f"{_listed(missing)} (missing)")
    if len({_identity(path / name) for name in names}) < len(names):
        wanted = "a folder whose class folders differ"
        raise OptionError("data", wanted, f"{path} with links from one to another")
    images = [_images_in(os.path.join(path, name), elsewhere) for name in names]
    if empty := [name for name, its in zip(names, images, strict=True) if not its]:
        wanted = "a folder whose class folders all hold images"
        raise OptionError("data", wanted, f"{path} with none in {_listed(empty)}")
    labels = np.repeat(np.arange(len(names)), [len(its) for its in images])
    return ImageSet(list(chain.from_iterable(images)), labels), names


def _images_in(folder: str, elsewhere: set[Identity]) -> list[str]:
    """The files with :data:`EXTENSIONS` in ``folder`` and below, in the order of torchvision's.

    Links are followed, but to no folder of ``elsewhere``, and to no folder twice.
    """
    found: list[tuple[str, list[str]]] = []
    read: set[Identity] = set()
    real, links = [folder], list[str]()
    behind_link = False
    while real or links:
        behind_link = behind_link or not real  # the others come first
        here = (real or links).pop()
        identity = _identity(here)
        if behind_link and (identity in read or identity in elsewhere):
            continue
        read.add(identity)
        names: list[str] = []
        folders: list[tuple[str, bool]] = []
        with os.scandir(here) as entries:
            for entry in entries:
                if _is_folder(entry):
                    folders.append((entry.path, entry.is_symlink()))
                elif entry.name.lower().endswith(EXTENSIONS):
                    names.append(entry.name)
        for inner, is_link in sorted(folders):
            (links if is_link else real).append(inner)
        found.append((here, sorted(names)))
    return [f"{here}/{name}" for here, names in sorted(found) for name in names]


def _identity(folder: str | Path) -> Identity:
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False


def _folders_in(path: Path) -> list[str]:
    """Their names, sorted; not the hidden ones, which file managers and notebooks leave behind."""
    with os.scandir(path) as entries:
        return sorted(x.name for x in entries if not x.name.startswith(".") and _is_folder(x))


def _listed(names: Iterable[str], shown: int = 5) -> str:
    """The first names in alphabetical order, and how many more there are."""
    first, others = (ordered := sorted(names))[:shown], len(ordered) - shown
    shown_names = ", ".join(printable(name, 100) for name in first)
    return shown_names + (f" and {others} more" if others > 0 else "")


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
    # From histograms: exact, and without a float copy of the images.
    channels = images.images.shape[3] if images.images.ndim == 4 else 1
    counts = np.zeros((channels, 256), np.int64)
    some = max(1, STATISTICS_PIXELS // images.images[0].size)
    for first in range(0, len(images), some):
        pixels = images.images[first : first + some].reshape(-1, channels)
        counts += np.stack([np.bincount(channel, minlength=256) for channel in pixels.T])
    total = counts[0].sum()
    values = np.arange(256) / 255
    mean = counts @ values / total
    std = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 1e-12))
    red, green, blue = np.broadcast_to(np.stack([mean, std], 1), (3, 2)).tolist()
    return (red[0], green[0], blue[0]), (red[1], green[1], blue[1])


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, image) pairs: a permutation per epoch, the part of one process.

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
        # A separate one: starting an epoch again draws no number from the generators of a resume.
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
