"""Images, folders, .npz files and recipes of strangers: refused in one line, or read as they are.

Nothing in them is executed, makes the program wait, or takes memory that their size does not show.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import socket
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features
from programs import run_python
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from vne_kernels.common.reading import FileError
from vne_kernels.pretrain import recipes
from vne_kernels.pretrain.config import OptionError
from vne_kernels.pretrain.data import EXTENSIONS, ImageSet, class_list, load, read_image
from vne_kernels.pretrain.evaluate import PlainImages

MOST_MEMORY = 300e6  # bytes beyond those of the process


def picture(mode: str = "RGB", size: tuple[int, int] = (37, 29)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def write_classes(folder: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(size=(8, 8)).save(folder / name / f"{i}.png")


# ---- images: the same pixels as ever -----------------------------------------------------------

VALID: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("jpg", "RGB", {}),
    "progressive": ("JPEG", "RGB", {"progressive": True}),
    "grey jpeg": ("jpg", "L", {}),
    "cmyk": ("jpg", "CMYK", {}),
    "two pictures": ("jpg", "RGB", {"format": "MPO", "save_all": True}),
    "png": ("png", "RGB", {}),
    "transparent": ("png", "RGBA", {}),
    "palette": ("png", "P", {"transparency": 3}),
    "bits": ("png", "1", {}),
    "16 bits": ("png", "I;16", {}),
    "ppm": ("ppm", "RGB", {}),
    "pgm": ("pgm", "L", {}),
    "bmp": ("bmp", "RGB", {}),
    "tiff": ("tif", "RGB", {}),
    "float tiff": ("tif", "F", {}),
    "lzw": ("tiff", "RGB", {"compression": "tiff_lzw"}),
    "jpeg in tiff": ("tiff", "RGB", {"compression": "jpeg"}),
    "webp": ("webp", "RGB", {}),
    "lossless webp": ("webp", "RGBA", {"lossless": True}),
    "gif": ("png", "P", {"format": "GIF"}),  # ImageNet has files of another format than their name
}


@pytest.mark.parametrize("kind", VALID)
def test_pixels_are_those_of_pillow(kind: str, tmp_path: Path) -> None:
    suffix, mode, options = VALID[kind]
    path = tmp_path / f"a.{suffix}"
    image = picture("L").convert("I").convert(mode) if mode == "I;16" else picture(mode)
    if "save_all" in options:
        options = options | {"append_images": [picture().rotate(90)]}
    image.save(path, **options)
    with Image.open(path) as file:
        expected = np.asarray(file.convert("RGB"))
    read = read_image(str(path))
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read), expected)
    np.testing.assert_array_equal(np.asarray(read.resize((9, 9))).shape, (9, 9, 3))


# ---- images that cannot be read ----------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """One that says its size, and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + end

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def many_scans() -> bytes:
    """A progressive JPEG of 4 million pixels whose last scan comes 3000 times."""
    content = saved(Image.new("L", (2048, 2048)), "JPEG", progressive=True)
    last = content[content.rfind(b"\xff\xda") : -2]
    return content[:-2] + 3000 * last + content[-2:]


REFUSED_IMAGES = {
    "of 177 megapixels": lambda: png(13_304, 13_304),
    "beyond Pillow's own limit": lambda: png(2**31 - 1, 2**31 - 1),
    "of many scans": many_scans,
    "a webp": lambda: saved(
        Image.new("RGB", (16_383, 2_100)), "WEBP", lossless=True, quality=0, method=0
    ),
    "postscript": lambda: saved(picture(), "EPS"),
    "an icon": lambda: saved(picture(), "ICO"),
    "a line": lambda: saved(Image.new("L", (100_000, 1)), "PNG"),  # scaled to 256 rows, 20 GB
    "nothing": lambda: b"",
    "its begin": lambda: saved(picture(), "PNG")[:200],
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", REFUSED_IMAGES)
def test_image_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript, executed = tmp_path / "gs", tmp_path / "executed"
    ghostscript.write_text(f"#!/bin/sh\ntouch '{executed}'\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "x.png"
    path.write_bytes(REFUSED_IMAGES[kind]())
    with pytest.raises(FileError, match=re.escape(str(path))) as caught:
        read_image(str(path))
    assert "\n" not in str(caught.value)
    if kind == "of 177 megapixels":
        assert "13,304" in str(caught.value)
    assert not executed.exists()


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device", "a folder", "a loop"])
def test_what_is_no_file_is_no_image(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x.png")
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else path)
    with pytest.raises(FileError):
        read_image(str(path))


@pytest.mark.parametrize("error", [RuntimeError("a\x1b[2J\nb"), MemoryError(), KeyError(1)])
def test_whatever_a_decoder_raises_is_one_error(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> None:
        raise error

    path = tmp_path / "\x1b]0;x.png"
    picture().save(path)
    monkeypatch.setattr(Image, "open", decode)
    with pytest.raises(FileError) as caught:
        ImageSet([str(path)], np.zeros(1, np.int64))[0]
    assert str(caught.value).isprintable()
    assert PlainImages(ImageSet([str(path)], np.zeros(1, np.int64)), None)[0] is None  # type: ignore[arg-type]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_broken_avif_takes_no_run_with_it(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 5, "dog": 5})
    content = saved(picture(), "AVIF")
    data = load(str(tmp_path), "unused")
    broken = Path(data.train.images[0])
    start = content.index(b"mdat") + 4
    broken.write_bytes(content[:start] + bytes(len(content) - start))  # a RuntimeError of Pillow's
    place, _, passed_over = data.train.readable(0)
    assert (place, passed_over) == (1, [str(broken)])


def big_tile() -> bytes:
    """A TIFF of one pixel, whose tile has 2**30."""
    entries = [(256, 1), (257, 1), (258, 8), (259, 8), (262, 1), (277, 1)]
    entries += [(322, 2**15), (323, 2**15), (324, 200), (325, 20)]
    parts = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries]
    head = b"II*\0" + struct.pack("<IH", 8, len(parts)) + b"".join(parts) + bytes(4)
    return head.ljust(200, b"\0") + zlib.compress(bytes(1000))


MEASURE = """
import resource, sys
from vne_kernels.pretrain.data import read_image
from vne_kernels.common.reading import FileError

def most():  # of the memory in use, in kB; ru_maxrss begins with the parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

read_image(sys.argv[1])  # Pillow's decoders are loaded
before = most()
for path in sys.argv[2:]:
    try:
        print(path, read_image(path).size)
    except FileError as error:
        print(error)
    print(most() - before, resource.getrlimit(resource.RLIMIT_DATA)[0])
"""


@pytest.mark.slow
def test_memory_of_images_is_bounded(tmp_path: Path) -> None:
    largest = Image.new("RGBA", (8192, 4096))
    contents = {
        "small.png": saved(picture(), "PNG"),
        "tile.tif": big_tile(),
        "177.png": png(13_304, 13_304),
        "wide.webp": REFUSED_IMAGES["a webp"](),
        "largest.png": saved(largest, "PNG", compress_level=1),
        "progressive.jpg": saved(
            largest.convert("RGB"), "JPEG", progressive=True, subsampling=0, quality=1
        ),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    ran = run_python(MEASURE, *contents, cwd=tmp_path)
    lines = ran.stdout.splitlines()
    outcomes, taken = lines[::2], [line.split() for line in lines[1::2]]
    assert len(outcomes) == len(contents) - 1
    assert outcomes[3] == "largest.png (8192, 4096)"
    assert max(int(kilobytes) for kilobytes, _ in taken) * 1024 < MOST_MEMORY
    assert len({limit for _, limit in taken}) == 1  # as it was before


# ---- folders -----------------------------------------------------------------------------------


def test_images_are_found_in_torchvisions_order(tmp_path: Path) -> None:
    assert EXTENSIONS == IMG_EXTENSIONS
    write_classes(tmp_path / "data", {"b": 3, "a/z": 2, "a/z.x": 2, "a/Z/deep": 2, "a/.hidden": 1})
    picture().save(tmp_path / "data/a/10.JPEG", "JPEG")
    (tmp_path / "data/a/notes.txt").write_text("no image")
    (tmp_path / "data/a/folder.png").mkdir()
    write_classes(tmp_path, {"elsewhere": 2})
    (tmp_path / "data/b/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/b/link.png").symlink_to(tmp_path / "elsewhere/0.png")
    (tmp_path / "data/b/gone.png").symlink_to("nowhere")
    expected = make_dataset(tmp_path / "data", {"a": 0, "b": 1}, IMG_EXTENSIONS)
    for part in ("train", "test"):
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / "both" / part).symlink_to(tmp_path / "data")
    data = load(str(tmp_path / "both"), "unused")
    got = [name.replace("both/train", "data") for name in data.train.images]
    assert list(zip(got, data.train.labels.tolist(), strict=True)) == expected
    assert len(expected) == 3 + 2 + 2 + 2 + 1 + 1 + 2 + 2


@pytest.mark.parametrize("split", [True, False], ids=["train and val", "classes alone"])
@pytest.mark.parametrize(
    "target", [".", "..", "../..", "../dog", "../../val/cat", "inner", "/"], ids=str
)
def test_no_image_is_read_twice(target: str, split: bool, tmp_path: Path) -> None:
    root = tmp_path / "data"
    parts = [root / "train", root / "val"] if split else [root]
    for part in parts:
        write_classes(part, {"cat": 10, "cat/inner": 2, "dog": 12})
        for name in ("a", "b"):
            if target != "../../val/cat" or split:
                (part / "cat" / name).symlink_to(target)
    data = load(str(root), "unused")
    read = [os.path.realpath(path) for images in (data.train, data.test) for path in images.images]
    assert len(read) == len(set(read)) == 24 * len(parts)


def test_class_that_is_a_link_to_another_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 10, "dog": 10})
    (tmp_path / "kitty").symlink_to("cat")
    with pytest.raises(OptionError, match="--data"):
        load(str(tmp_path), "unused")


def test_deep_folders(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 5, "dog": 5})
    here = os.open(tmp_path / "cat", os.O_RDONLY)
    for _ in range(1500):  # more than Python's calls may be nested
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    try:
        assert len(load(str(tmp_path), "unused").train) == 8
    finally:
        subprocess.run(["rm", "-r", "d"], cwd=tmp_path / "cat", check=True)  # pytest cannot


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"c\xff\x1bt")
    write_classes(tmp_path / "data", {name: 6, "dog": 6})
    data = load(str(tmp_path / "data"), "unused")
    path = next(path for path in data.train.images if "dog" not in path)
    Path(path).write_bytes(b"")
    with pytest.raises(FileError) as caught:
        read_image(path)
    assert str(caught.value).isprintable()
    (tmp_path / "list").write_text("dog\ncow")
    with pytest.raises(OptionError) as refused:
        load(str(tmp_path / "data"), "unused", classes=str(tmp_path / "list"))
    (tmp_path / "data" / os.fsdecode(b"\xff")).mkdir()
    with pytest.raises(OptionError) as empty:
        load(str(tmp_path / "data"), "unused")
    assert "\\udcff" in str(empty.value)
    for error in (refused, empty):
        assert str(error.value).isprintable()
    with pytest.raises(OptionError) as long:
        load("a" * 5000, "unused")
    assert "--data" in str(long.value)


@pytest.mark.parametrize("name", ["..", "../outside", "{tmp}/outside", "cat/inner", ".", "a\0b"])
def test_class_list_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    write_classes(tmp_path, {"data/cat": 5, "data/cat/inner": 5, "data/dog": 5, "outside": 5})
    path = tmp_path / "list"
    path.write_text("cat\n" + name.format(tmp=tmp_path))
    with pytest.raises(OptionError, match="--classes"):
        load(str(tmp_path / "data"), "unused", classes=str(path))


def write_special_file(path: Path, kind: str) -> None:
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe\x00")


SPECIAL_FILES = ("a pipe", "a device", "huge", "a folder", "not UTF-8")


@pytest.mark.parametrize("kind", SPECIAL_FILES)
@pytest.mark.parametrize(
    ("name", "option", "read"),
    [
        ("list", "--classes", class_list),
        ("a.npz", "--data", lambda path: load(path, "unused")),
        ("a.toml", "--recipe", lambda path: recipes.options({"recipe": path, "data": "digits"})),
    ],
)
def test_what_is_no_file_of_ours(
    name: str, option: str, read: Callable[[str], object], kind: str, tmp_path: Path
) -> None:
    write_special_file(tmp_path / name, kind)
    with pytest.raises(OptionError, match=option):
        read(str(tmp_path / name))


# ---- .npz --------------------------------------------------------------------------------------


def member(array: np.ndarray, **header: Any) -> bytes:
    """The array in NumPy's format; its header says ``header`` in place of what it is."""
    file = io.BytesIO()
    said = {"descr": "|u1", "fortran_order": False, "shape": array.shape} | header
    np.lib.format.write_array_header_1_0(file, said)
    return file.getvalue() + array.tobytes()


IMAGES = np.zeros((6, 4, 4), np.uint8)
LABELS = np.arange(6) % 2


def write_npz(path: Path, method: int = zipfile.ZIP_DEFLATED, **contents: Any) -> None:
    whole: dict[str, Any] = {"train_images": IMAGES, "train_labels": LABELS}
    whole |= {"test_images": IMAGES, "test_labels": LABELS} | contents
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in whole.items():
            if isinstance(content, np.ndarray):
                file = io.BytesIO()
                np.save(file, content)
                content = file.getvalue()
            archive.writestr(f"{name}.npy", content)


def patched(path: Path, local: int, central: int, value: int) -> None:
    """Sets a 16-bit field of every member, in both of its headers."""
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        at = content.find(mark)
        while at >= 0:
            content[at + offset : at + offset + 2] = struct.pack("<H", value)
            at = content.find(mark, at + 1)
    path.write_bytes(content)


def write_flagged(path: Path, local: int, central: int, value: int) -> None:
    write_npz(path)
    patched(path, local, central, value)


def write_broken_lzma(path: Path) -> None:
    write_npz(path, zipfile.ZIP_LZMA)
    content = path.read_bytes()
    path.write_bytes(content.replace(content[50:80], bytes(30)))


def write_many_keys(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(3000):
            archive.writestr(f"\x1b[2J{i}.npy", b"")


LARGE_LABELS = LABELS.astype(np.uint64) + np.uint64(2**63)
LONG_HEADER = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + bytes(100_000)
REFUSED_NPZ: dict[str, Callable[[Path], object]] = {
    "encrypted": lambda path: write_flagged(path, 6, 8, 1),
    "unknown method": lambda path: write_flagged(path, 8, 10, 99),
    "lzma": lambda path: write_npz(path, zipfile.ZIP_LZMA),
    "broken lzma": write_broken_lzma,
    "many keys": write_many_keys,
    "beyond int64": lambda path: write_npz(
        path, train_labels=LARGE_LABELS, test_labels=LARGE_LABELS
    ),
    **{
        kind: partial(write_npz, **{f"train_{part}": content})
        for kind, part, content in (
            ("10 TB", "images", member(IMAGES, shape=(10**13, 1, 1))),
            ("zip bomb", "images", np.zeros((6, 4000, 4000), np.uint8)),
            ("header of 4 GB", "images", LONG_HEADER),
            ("pickled", "labels", member(LABELS, descr="|O")),
            ("negative shape", "images", member(IMAGES, shape=(-6, 4, -4))),
            ("durations", "labels", LABELS.astype("m8[s]")),
            ("without pixels", "images", np.zeros((6, 0, 4), np.uint8)),
            ("lines", "images", np.zeros((6, 1, 1000), np.uint8)),
        )
    },
}


@pytest.mark.parametrize("kind", REFUSED_NPZ)
def test_npz_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    REFUSED_NPZ[kind](path)
    with pytest.raises(OptionError, match="--data") as caught:
        load(str(path), "unused")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000


def test_npz_of_drawings_is_read(tmp_path: Path) -> None:
    """Black and white ones, which deflate to a sixtieth."""
    drawings = np.zeros((60, 1100, 1100), np.uint8)  # more than 64 MiB
    drawings[:, 0] = np.random.default_rng(0).integers(0, 256, (60, 1100))
    drawings[:, 1:121] = np.random.default_rng(1).integers(0, 2, (60, 120, 1100)) * 255
    path = tmp_path / "a.npz"
    write_npz(path, train_images=drawings, train_labels=np.arange(60) % 2)
    assert 20 < drawings.size / path.stat().st_size < 100
    assert load(str(path), "unused").train.images.shape == drawings.shape


def test_labels_may_be_any_integers(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_npz(path, train_labels=LABELS * (2**63 - 1), test_labels=LABELS * (2**63 - 1))
    assert load(str(path), "unused").train.labels.tolist() == LABELS.tolist()
    write_npz(path, train_labels=-LABELS * 2**62, test_labels=np.zeros(6, np.uint64))
    assert load(str(path), "unused").train.labels.tolist() == (1 - LABELS).tolist()


# ---- CIFAR -------------------------------------------------------------------------------------


class Touch:
    """Pickled, it is an order to make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_planted_batches_are_not_unpickled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    folder = tmp_path / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    for batch in ("test_batch", "batches.meta", "train", "test", "meta"):
        (folder / batch).write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(OptionError, match="--data"):
        load(name, str(tmp_path))
    # A download that leaves them as they are.
    monkeypatch.setattr(
        "torchvision.datasets.cifar.download_and_extract_archive", lambda *_, **__: None
    )
    with pytest.raises(OptionError, match="--data"):
        load(name, str(tmp_path))
    assert not (tmp_path / "executed").exists()


# ---- recipes -----------------------------------------------------------------------------------

REFUSED_RECIPES = {
    "a list": "options = [1]",
    "batch sizes that are a list": "batch_size = [1]",
    "a batch size that is a number": "[batch_size]\n64 = 3",
    "nested": "options = " + 20_000 * "[",
    "nested tables": "[" + ".".join(["options"] * 20_000) + "]",
    "5,000 digits": f"[options]\nepochs = {'9' * 5000}",
    "hexadecimal": f"[options]\nepochs = 0x{'f' * 20_000}",
    "a size of 5,000 digits": f"[batch_size.{'9' * 5000}]\nlr = 1.0",
    "a size with a zero": "[batch_size.064]\nlr = 1.0",
    "other digits": '[batch_size."٦٤"]\nlr = 1.0',
    "a key with an escape": '[options]\n"\\u001b[2J" = 1',
    "long": "#" * 10**6,
    "a date": "[options]\nlr = 2020-01-01",
}


@pytest.mark.parametrize("kind", REFUSED_RECIPES)
def test_recipe_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(REFUSED_RECIPES[kind], encoding="utf-8")
    with pytest.raises(OptionError, match="--recipe") as caught:
        recipes.options({"recipe": str(path), "data": "digits"})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "name", ["../../x", "../recipes/imagenet10", "a\0b", "a\0.toml", "a" * 999]
)
def test_recipe_is_known_or_a_path(name: str) -> None:
    with pytest.raises(OptionError, match="--recipe"):
        recipes.text(name)
