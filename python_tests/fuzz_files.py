"""Fuzz the files that the programs read: damaged copies of small valid files, of every format.

    python fuzz_files.py --mutants 300 --out table.md --keep failures
    python fuzz_files.py --kinds npy,safetensors
    python fuzz_files.py --only npy:17

Each row of the table is a kind of file. Each mutant of it is read by the program in a child process
with limits, and ends in one class:

    refused     exit code 1, 2 or 3 with a message
    same        exit code 0 and the numbers of the valid file
    other       exit code 0 and other numbers, which nothing in the file could have shown
    WRONG       exit code 0 and other numbers, though a checksum or a declared count shows the
                damage; or numbers that cannot be read, such as NaN in JSON
    traceback   an exception that nothing caught, or an exit code without a message
    hang        still running after the time limit
    crash       ended by a signal, or more than 50 processes
    memory      more than 300 MB above the peak of the valid file

The mutants are a function of the seed, the kind and the index, and of the valid file's bytes.
Peak memory is the largest of the child and of the processes that it starts, beyond the resident
memory that it has after the imports. Exit code 1: a mutant ended in one of the last five classes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import functools
import gc
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

CLASSES = ("refused", "same", "other", "WRONG", "traceback", "hang", "crash", "memory")
BAD = CLASSES[3:]
HEADER = ("file", "mutants", *CLASSES, "peak (MB)")
MEMORY_MB = 300  # more is the class "memory"
CEILING_MB = 2048  # more ends the child at once
PROCESSES = 50  # likewise
FILE_BYTES = 512 << 20  # the largest file that a child can write
UNCAUGHT = 120  # exit code of a child whose program raised
VALID = -1  # the index of the file without damage
KEPT_BYTES = 1 << 20  # larger mutants are not kept: --only makes them again

# ---- mutations of bytes ------------------------------------------------------------------------

Random = random.Random
Mutation = Callable[[bytes, Random], bytes]


def place(size: int, rng: Random) -> int:
    """An offset in a file: half of them in the first 128 or last 512 bytes."""
    match rng.randrange(4):
        case 0:
            return rng.randrange(min(size, 128))
        case 1:
            return size - 1 - rng.randrange(min(size, 512))
        case 2:  # headers and directories of large files: any scale of distance from an end
            distance = min(size - 1, int(size ** rng.random()))
            return rng.choice((distance, size - 1 - distance))
    return rng.randrange(size)


def span(data: bytes, rng: Random) -> tuple[int, int]:
    start = place(len(data), rng)
    return start, min(len(data), start + rng.randint(1, 64))


def flip_bits(data: bytes, rng: Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        out[place(len(data), rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(data: bytes, rng: Random) -> bytes:
    start, end = span(data, rng)
    new = rng.choice((rng.randbytes(end - start), bytes(end - start), b"\xff" * (end - start)))
    return data[:start] + new + data[end:]


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: place(len(data), rng)]


def append(data: bytes, rng: Random) -> bytes:
    return data + rng.choice((rng.randbytes(rng.randint(1, 64)), bytes(1 << 20), data))


def duplicate(data: bytes, rng: Random) -> bytes:
    start, end = span(data, rng)
    return data[:end] + data[start:]


def delete(data: bytes, rng: Random) -> bytes:
    start, end = span(data, rng)
    return data[:start] + data[end:]


def swap(data: bytes, rng: Random) -> bytes:
    (a, b), (c, d) = sorted((span(data, rng), span(data, rng)))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:] if b <= c else data


def set_integer(data: bytes, rng: Random) -> bytes:
    """Lengths, offsets and counts are such integers."""
    size = rng.choice((2, 4, 8))
    start = place(len(data), rng) // size * size
    value = rng.choice((0, 1, -1, 2 ** (8 * size - 1) - 1, 2**31, 2**32))
    new = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return data[:start] + new + data[start + size :]


BYTES = (flip_bits, overwrite, truncate, append, duplicate, delete, swap, set_integer)


def damage(data: bytes, rng: Random) -> bytes:
    """One to three of these mutations."""
    out = data
    while out == data:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            out = rng.choice(BYTES)(out, rng) if out else data
    return out


# ---- mutations of text and of content ----------------------------------------------------------

NESTED = 100_000
VALUES = (
    *("-1", "0", "100000", "1" + 30 * "0", 5000 * "9", "1e308", "NaN", "Infinity", "nan"),
    *("null", "true", '""', '"x"', f'"{(1 << 20) * "x"}"', "[]", '{"a": {}}', "[1, [2]]"),
    *(NESTED * "[" + NESTED * "]", r'"\u001b[2J\n\u0007"', r'"a $\\frac{$ b $"', '"<script>"'),
)


def damage_json(data: bytes, rng: Random) -> bytes:
    """Half of the time as bytes, half as a document: a leaf replaced, a key removed or added."""
    if rng.random() < 0.5:
        return damage(data, rng)
    document, mark = json.loads(data), "@MARK@"
    path = rng.choice(list(leaves(document)))
    parent, key = holder(document, path), path[-1]
    what = rng.choice(("replace",) * 5 + ("whole", "remove", "add", "twice"))
    if what == "twice":
        return data + data
    if what == "whole":
        document = mark
    elif what == "remove":
        del parent[key]
    elif what == "replace":
        parent[key] = mark
    else:
        document[rng.choice(("new", "\x1b[2J", "x" * 5000, ""))] = mark
    return json.dumps(document).replace(f'"{mark}"', rng.choice(VALUES)).encode()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all leaves and of what holds them."""
    if path:
        yield path
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))


def holder(content: Any, path: tuple[Any, ...]) -> Any:
    """What holds the leaf of this path."""
    return functools.reduce(lambda inner, key: inner[key], path[:-1], content)


def damage_config(data: bytes, rng: Random) -> bytes:
    """As JSON, and one in eight with a size that no machine has."""
    if rng.random() < 7 / 8:
        return damage_json(data, rng)
    huge = {"workers": 100_000, "batch_size": 10**9, "image_size": 10**6, "projector_dim": 10**9}
    name = rng.choice(list(huge))
    return json.dumps(json.loads(data) | {name: huge[name]}).encode()


def damage_text(data: bytes, rng: Random) -> bytes:
    """Half of the time as bytes, half a word or number replaced, or a line doubled or removed."""
    if rng.random() < 0.5:
        return damage(data, rng)
    text = data.decode()
    if rng.random() < 0.3:
        lines = text.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        lines[at : at + 1] = rng.choice(([], 2 * [lines[at]], 20_000 * [lines[at]]))
        return "".join(lines).encode()
    found = rng.choice(list(re.finditer(r'"[^"\n]*"|[\w.+-]+', text)))
    return (text[: found.start()] + rng.choice(VALUES) + text[found.end() :]).encode()


def change_content(data: bytes, rng: Random) -> bytes:
    """One leaf of what torch.load gives is changed, and all is saved anew."""
    import torch

    content = torch.load(io.BytesIO(data), weights_only=True)
    paths = [path for path in leaves(content) if not isinstance(holder(content, path), tuple)]
    path = rng.choice(paths)
    parent, key = holder(content, path), path[-1]
    if rng.random() < 0.2:
        del parent[key]
    elif isinstance(value := parent[key], torch.Tensor):
        parent[key] = rng.choice((value.new_zeros(3, 5), value * math.nan, 7))
    else:
        parent[key] = rng.choice((-7, 10**30, math.nan, "x", None, []))
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def damage_saved(data: bytes, rng: Random) -> bytes:
    """Half of the time as bytes, half the content, where it is still torch.save's."""
    if rng.random() < 0.5:
        with contextlib.suppress(Exception):
            return change_content(data, rng)
    return damage(data, rng)


# ---- what is run, and its numbers --------------------------------------------------------------


def spectrum(*arguments: object) -> int:
    from vne_kernels.spectrum_files.cli import main

    return main([*map(str, arguments), "--no-plot", "--device", "cpu"])


def pretrain(*arguments: object) -> int:
    from vne_kernels.pretrain.cli import main

    return main([str(argument) for argument in arguments])


def told(read: Callable[[Path, Path], int]) -> Callable[[Path, Path], int]:
    """What the program makes of an OptionError, for functions called without the program."""

    def run(valid: Path, work: Path) -> int:
        from vne_kernels.pretrain.config import OptionError

        try:
            return read(valid, work)
        except OptionError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def keep(work: Path, value: object) -> None:
    (work / "numbers").write_text(str(value))


def kept(work: Path) -> str:
    return (work / "numbers").read_text()


def read_images(valid: Path, work: Path, name: str = "images") -> int:
    """Every image of a set; a broken one, whose place another takes, counts as refused."""
    from vne_kernels.pretrain import data

    images = data.load(str(work / name), "")
    digest, broken = hashlib.sha256(), []
    for part in (images.train, images.test):
        digest.update(part.labels.tobytes())
        for index in range(len(part)):
            _, image, missed = part.readable(index)
            digest.update(repr(image.size).encode() + image.tobytes())
            broken += missed
    keep(work, digest.hexdigest())
    if broken:
        print(f"broken: {broken}", file=sys.stderr)
    return 2 if broken else 0


def read_recipe(valid: Path, work: Path) -> int:
    from vne_kernels.pretrain import recipes

    keep(work, recipes.options({"recipe": str(work / "own.toml")}))
    return 0


def read_classes(valid: Path, work: Path) -> int:
    from vne_kernels.pretrain import data

    images = data.load(str(work / "images"), "", classes=str(work / "list.txt"))
    keep(work, [Path(image).name for image in images.train.images])
    return 0


def scores(work: Path) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} in scores.json")

    found = json.loads((work / "out/scores.json").read_text(), parse_constant=refuse)
    return {name: found[name] for name in found if name not in ("files", "vne_kernels")}


def report_html(work: Path) -> str:
    """The report without its pictures, its date and its place."""
    html = (work / "run/report.html").read_text(encoding="utf-8", errors="replace")
    html = re.sub(r"base64,[\w+/=]+|\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", html)
    return hashlib.sha256(html.replace(str(work), "").encode(errors="replace")).hexdigest()


def exported(work: Path) -> str:
    import torch

    digest = hashlib.sha256()
    for name, value in torch.load(work / "exported.pth", weights_only=True).items():
        digest.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def accuracy(name: str) -> Callable[[Path], Any]:
    return lambda work: json.loads((work / f"run/{name}.json").read_text())["accuracy"]


def table_of(name: str) -> Callable[[Path], list[list[str]]]:
    """The rows of a table, each number to five digits."""

    def read(work: Path) -> list[list[str]]:
        with (work / f"run/{name}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        return [header, *([f"{float(x):.5g}" for x in row] for row in rows)]

    return read


# ---- which other numbers nothing could have shown ----------------------------------------------

Excuse = Callable[[bytes, bytes, Path], bool]  # the valid file, the mutant, the working folder


def always(valid: bytes, mutant: bytes, work: Path) -> bool:
    return True


def never(valid: bytes, mutant: bytes, work: Path) -> bool:
    return False


def npy_is_whole(valid: bytes, mutant: bytes, work: Path) -> bool:
    from numpy.lib import format as npy

    file = io.BytesIO(mutant)
    read = (npy.read_array_header_1_0, npy.read_array_header_2_0)[npy.read_magic(file)[0] - 1]
    shape, _, dtype = read(file)
    there = len(mutant) - file.tell()
    return bool(math.prod(shape) * dtype.itemsize == there and scores(work)["rows"] == shape[0])


def safetensors_is_whole(valid: bytes, mutant: bytes, work: Path) -> bool:
    size = int.from_bytes(mutant[:8], "little")
    (tensor,) = (x for k, x in json.loads(mutant[8 : 8 + size]).items() if k != "__metadata__")
    whole = tensor["data_offsets"][1] + 8 + size == len(mutant)
    return bool(whole and scores(work)["rows"] == tensor["shape"][0])


def parquet_is_whole(valid: bytes, mutant: bytes, work: Path) -> bool:
    """Pages have checksums, the footer has none but the counts of rows."""
    from pyarrow import parquet

    pages = len(valid) - 8 - int.from_bytes(valid[-8:-4], "little")
    about = parquet.read_metadata(io.BytesIO(mutant))
    groups = sum(about.row_group(i).num_rows for i in range(about.num_row_groups))
    return mutant[:pages] == valid[:pages] and scores(work)["rows"] == about.num_rows == groups


def steps_are_counted(valid: bytes, mutant: bytes, work: Path) -> bool:
    _, *rows = table_of("metrics")(work)
    return [row[0] for row in rows] == ["1", "2", "3", "4", "5"]


# ---- the valid files ---------------------------------------------------------------------------

ROWS, FEATURES = 57, 6


def matrix() -> Any:
    import numpy as np

    values = np.random.default_rng(0).standard_normal((ROWS, FEATURES))
    return (values * 2.0 ** -np.arange(FEATURES)).astype(np.float32)


def write_matrix(path: Path) -> None:
    """In the format that the name tells."""
    import numpy as np
    import pyarrow as pa
    import torch
    from pyarrow import parquet
    from safetensors.torch import save_file

    z = matrix()
    columns = {f"f{j}": z[:, j] for j in range(FEATURES)}
    tables = {
        "fixed": {"z": pa.FixedSizeListArray.from_arrays(z.ravel(), FEATURES)},
        "lists": {"z": list(z)},
        "columns": {"label": ["x"] * ROWS, **columns},
    }
    match path.suffix:
        case ".npy":
            np.save(path, np.asfortranarray(z) if path.stem == "columns" else z)
        case ".npz":
            (np.savez_compressed if path.stem == "deflated" else np.savez)(path, z=z)
        case ".safetensors":
            save_file({"z": torch.from_numpy(z)}, path)
        case ".parquet":
            table = pa.table(tables[path.stem])
            parquet.write_table(table, path, row_group_size=25, write_page_checksum=True)


def write_npz(folder: Path) -> None:
    import tiny_run

    tiny_run.write_npz(folder / "tiny.npz")


def images(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import numpy as np
        from PIL import Image

        rng = np.random.default_rng(0)
        for name in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "test/a/0", "test/b/0"):
            path = (folder / "images" / name).with_suffix(suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)

    return make


def recipe(folder: Path) -> None:
    (folder / "own.toml").write_text(
        'description = "a recipe"\nsource = "nowhere"\nnot_stated = "all"\n'
        '[options]\ndata = "digits"\nloss = "vn-doe"\nepochs = 3\nlr = 0.5\ncompile = false\n'
        "[batch_size.64]\nlr = 0.25\n[batch_size.128]\nlr = 0.5\nwarmup_epochs = 1\n"
    )


def classes(folder: Path) -> None:
    images(".png")(folder)
    (folder / "list.txt").write_text("# two\na\nb\n")


@contextlib.contextmanager
def signal_after(owner: object, method: str, calls: int, signum: int) -> Iterator[None]:
    """The process gets a signal when a public method is called so many times."""
    original, count = getattr(owner, method), 0

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), signum)
        return original(*arguments, **named)

    setattr(owner, method, counting)
    try:
        yield
    finally:
        setattr(owner, method, original)


def wanted(code: int, *of: int) -> None:
    if code not in of:
        raise RuntimeError(f"exit code {code}, wanted {of}")


def unfinished(folder: Path) -> None:
    """A sum over the rows that was stopped half-way."""
    from vne_kernels import DensityAccumulator

    write_matrix(folder / "rows.npy")
    with signal_after(DensityAccumulator, "update", 5, signal.SIGTERM):
        wanted(go_on_summing(folder, folder), 75)


def go_on_summing(valid: Path, work: Path) -> int:
    return spectrum(valid / "rows.npy", "--chunk-rows", 10, "--out", work / "out")


def train(folder: Path, *options: object) -> int:
    from tiny_run import SMALL

    write_npz(folder)
    run = ("--workers", 0, "--epochs", 1, "--out", folder / "run", *options)
    return pretrain("train", "--data", folder / "tiny.npz", *SMALL, *run)


def run_folder(folder: Path) -> None:
    wanted(train(folder), 0)
    shutil.rmtree(folder / "run/checkpoints")
    shutil.rmtree(folder / "run/tensorboard", ignore_errors=True)
    wanted(linear_eval(folder, folder), 0)
    wanted(pretrain("knn", folder / "run"), 0)


def linear_eval(valid: Path, work: Path) -> int:
    return pretrain("linear-eval", work / "run", "--epochs", 2, "--batch-size", 16)


def stopped_probe(folder: Path) -> None:
    from torch.optim import SGD

    run_folder(folder)
    with signal_after(SGD, "step", 4, signal.SIGINT):
        wanted(linear_eval(folder, folder), 130)


def stopped_run(folder: Path) -> None:
    from torch.optim.lr_scheduler import LRScheduler

    with signal_after(LRScheduler, "step", 4, signal.SIGTERM):
        wanted(train(folder, "--no-evaluation"), 75)


# ---- the kinds ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A format, or a file of a folder: how a valid one is made, and what reads it."""

    make: Callable[[Path], None]  # fills a folder; kinds of the same function share it
    file: str  # the pattern of the file in it
    run: Callable[[Path, Path], int]  # the valid folder, a copy with the mutant -> exit code
    numbers: Callable[[Path], Any]
    excuse: Excuse = always
    mutate: Mutation = damage
    seconds: float = 10
    share: float = 1  # of the mutants
    forged: bool = False  # the checksum in the name becomes the mutant's own


def matrix_kind(name: str, excuse: Excuse) -> Kind:
    def run(valid: Path, work: Path) -> int:
        return spectrum(work / name, "--out", work / "out")

    return Kind(lambda folder: write_matrix(folder / name), name, run, scores, excuse)


def image_kind(suffix: str) -> Kind:
    return Kind(images(suffix), f"images/train/a/0{suffix}", told(read_images), kept)


def report_kind(name: str, mutate: Mutation) -> Kind:
    def run(valid: Path, work: Path) -> int:
        return pretrain("report", work / "run")

    return Kind(run_folder, f"run/{name}", run, report_html, mutate=mutate)


def export(valid: Path, work: Path) -> int:
    target = ("--format", "torchvision", "--to", work / "exported.pth")
    return pretrain("export", work / "run", *target)


def knn(valid: Path, work: Path) -> int:
    return pretrain("knn", work / "run")


def go_on_training(valid: Path, work: Path) -> int:
    return pretrain("train", "--resume", "--out", work / "run")


KINDS = {
    "npy": matrix_kind("rows.npy", npy_is_whole),
    "npy-columns": matrix_kind("columns.npy", npy_is_whole),
    "npz": matrix_kind("stored.npz", never),
    "npz-deflated": matrix_kind("deflated.npz", never),
    "safetensors": matrix_kind("rows.safetensors", safetensors_is_whole),
    "parquet-fixed": matrix_kind("fixed.parquet", parquet_is_whole),
    "parquet-lists": matrix_kind("lists.parquet", parquet_is_whole),
    "parquet-columns": matrix_kind("columns.parquet", parquet_is_whole),
    "training-npz": Kind(
        write_npz, "tiny.npz", told(lambda *folders: read_images(*folders, "tiny.npz")), kept, never
    ),
    **{name: image_kind(f".{name}") for name in ("png", "jpeg", "bmp", "tiff", "webp", "ppm")},
    "recipe": Kind(recipe, "own.toml", told(read_recipe), kept, mutate=damage_text),
    "class-list": Kind(classes, "list.txt", told(read_classes), kept, mutate=damage_text),
    "unfinished.pt": Kind(
        unfinished, "out/unfinished.pt", go_on_summing, scores, never, damage_saved
    ),
    **{
        f"report:{name}": report_kind(f"{name}.json", damage_json)
        for name in ("results", "environment", "linear_eval", "knn")
    },
    "report:config": report_kind("config.json", damage_config),
    **{
        f"report:{name}": report_kind(f"{name}.csv", damage_text)
        for name in ("metrics", "epochs", "spectrum", "events")
    },
    "export:config": Kind(
        run_folder, "run/config.json", export, exported, mutate=damage_config
    ),
    "knn:config": Kind(
        run_folder, "run/config.json", knn, accuracy("knn"), mutate=damage_config, seconds=20
    ),
    "encoder.pt": Kind(run_folder, "run/encoder.pt", export, exported, never, damage_saved),
    "linear_eval.ckpt": Kind(
        stopped_probe, "run/linear_eval.ckpt", linear_eval, table_of("linear_eval"), never,
        damage_saved, seconds=20,
    ),
    "checkpoint": Kind(
        stopped_run, "run/checkpoints/*.ckpt", go_on_training, table_of("metrics"), never,
        seconds=60, share=0.5,
    ),
    "checkpoint-forged": Kind(
        stopped_run, "run/checkpoints/*.ckpt", go_on_training, table_of("metrics"),
        steps_are_counted, damage_saved, seconds=60, share=0.5, forged=True,
    ),
}  # fmt: skip

# ---- a child: one mutant through the program ---------------------------------------------------


def memory_mb(name: str, process: int | str = "self") -> float:
    """A line of /proc/PID/status, 0 where the process is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/status") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    return 0


def child(act: Callable[[Path], dict[str, Any]], slot: Path) -> NoReturn:
    """Do something in this process, a fork, and end it; ``slot`` is where all of it goes."""
    code, about = UNCAUGHT, {}
    try:
        os.setsid()
        for number, name, mode in ((0, os.devnull, "rb"), (1, "out", "wb"), (2, "err", "wb")):
            with open(slot / name, mode) as file:
                os.dup2(file.fileno(), number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tempfile.tempdir = str(slot)
        os.chdir(slot)
        about = act(slot)
        code = about["code"]
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    peak = memory_mb("VmHWM")
    with contextlib.suppress(BaseException):
        (slot / "about.json").write_text(json.dumps(about | {"peak": peak}))
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)


def read_mutant(kind: Kind, valid: Path, index: int, rng: Random, slot: Path) -> dict[str, Any]:
    work = slot / "work"
    # Large files are links: the programs replace files and append to small tables alone.
    shutil.copytree(valid, work, copy_function=link_if_large)
    (path,) = work.glob(kind.file)
    before = after = path.read_bytes()
    if index != VALID:
        after = kind.mutate(before, rng)
        path.unlink()
        if kind.forged:
            digest = hashlib.sha256(after).hexdigest()
            named = re.sub(r"[0-9a-f]{16,64}$", lambda found: digest[: len(found[0])], path.stem)
            path = path.with_stem(named)
        path.write_bytes(after)
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    (slot / "base").write_text(str(memory_mb("VmRSS")))
    code = kind.run(valid, work)
    about: dict[str, Any] = {"code": code}
    if code == 0:
        try:
            about["numbers"] = json.loads(json.dumps(kind.numbers(work)))
            about["excused"] = after == before or kind.excuse(before, after, work)
        except Exception as error:
            about |= {"numbers": f"{type(error).__name__}: {error}", "excused": False}
    return about


def link_if_large(source: str, target: str) -> None:
    (os.link if os.path.getsize(source) > 1 << 20 else shutil.copy2)(source, target)


# ---- the parent: limits and classes ------------------------------------------------------------


@dataclass
class End:
    """How a mutant ended."""

    kind: str
    index: int
    what: str = ""
    detail: str = ""
    peak_mb: float = 0
    numbers: Any = None
    stderr: str = ""


@dataclass
class Child:
    kind: str
    index: int
    slot: Path
    pid: int
    deadline: float
    peak: float = 0  # as far as it was seen from outside
    killed: str = ""  # why, where it was killed


@dataclass
class Tally:
    """A row of the table."""

    counts: Counter[str] = field(default_factory=Counter)
    peak_mb: float = 0

    def add(self, end: End) -> None:
        self.counts[end.what] += 1
        self.peak_mb = max(self.peak_mb, end.peak_mb)


def session_of(pid: int) -> list[int]:
    """The processes of the session that ``pid`` leads."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[3]) == pid:
                    found.append(int(name))
    return found


class Fuzzer:
    """Valid folders, children, and their ends."""

    def __init__(self, root: Path, seed: int, kinds: dict[str, Kind] | None = None) -> None:
        self.root, self.seed, self.kinds = root, seed, kinds or KINDS
        self.valid: dict[Callable[[Path], None], Path] = {}
        self.expected: dict[str, End] = {}

    def prepare(self, name: str) -> None:
        """Make the valid file of a kind and read it: what its mutants are compared with."""
        kind = self.kinds[name]
        if kind.make not in self.valid:
            folder = self.root / f"valid-{len(self.valid)}"
            folder.mkdir()
            self.valid[kind.make] = folder
            slot = self.root / "make"
            slot.mkdir()
            pid = os.fork()
            if not pid:
                child(lambda slot: {"code": kind.make(folder) or 0}, slot)
            if os.waitpid(pid, 0)[1]:
                raise RuntimeError(f"{name} cannot be made: {(slot / 'err').read_text()}")
            shutil.rmtree(slot)
        (end,) = self.ends([(name, VALID)], 1)
        if end.what not in ("same", "memory"):
            raise RuntimeError(f"the valid file of {name} ends in {end}")
        self.expected[name] = end

    def ends(self, mutants: Sequence[tuple[str, int]], jobs: int) -> Iterator[End]:
        """Run them, so many side by side."""
        waiting, running = list(reversed(mutants)), list[Child]()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(self._start(*waiting.pop()))
                for one in list(running):
                    status = self._poll(one)
                    if status is not None:
                        running.remove(one)
                        yield self._judge(one, status)
                        shutil.rmtree(one.slot, ignore_errors=True)
                time.sleep(0.01)
        finally:
            for one in running:
                self._kill(one)
                os.kill(one.pid, signal.SIGKILL)
                os.waitpid(one.pid, 0)
                shutil.rmtree(one.slot, ignore_errors=True)

    def _start(self, name: str, index: int) -> Child:
        kind, slot = self.kinds[name], self.root / f"{name}-{index}".replace(":", "-")
        slot.mkdir()
        pid = os.fork()
        if not pid:
            rng = Random(f"{self.seed}:{name}:{index}")
            child(lambda slot: read_mutant(kind, self.valid[kind.make], index, rng, slot), slot)
        return Child(name, index, slot, pid, time.monotonic() + kind.seconds)

    def _poll(self, one: Child) -> int | None:
        """The status of a child that has ended."""
        pid, status = os.waitpid(one.pid, os.WNOHANG)
        if pid:
            self._kill(one)  # what it has left behind
            return status
        session = session_of(one.pid)
        base = one.slot / "base"
        if base.exists() and (text := base.read_text()):
            for process in session:
                one.peak = max(one.peak, memory_mb("VmRSS", process) - float(text))
        for reason, exceeded in (
            ("memory", one.peak > CEILING_MB),
            ("crash", len(session) > PROCESSES),
            ("hang", time.monotonic() > one.deadline),
        ):
            if exceeded and not one.killed:
                one.killed = reason
                self._kill(one)
        return None

    def _kill(self, one: Child) -> None:
        for _ in range(5):  # a process may start another meanwhile
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
            for process in session_of(one.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _judge(self, one: Child, status: int) -> End:
        end = End(one.kind, one.index, peak_mb=one.peak)
        about: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            about = json.loads((one.slot / "about.json").read_text())
            end.peak_mb = max(one.peak, about["peak"] - float((one.slot / "base").read_text()))
        with contextlib.suppress(OSError):
            end.stderr = (one.slot / "err").read_text(errors="replace")
        if not (one.slot / "base").exists():
            raise RuntimeError(f"{one.kind}:{one.index} cannot be made: {end.stderr}")
        end.numbers = about.get("numbers")
        expected = self.expected.get(one.kind, end)
        code = os.waitstatus_to_exitcode(status)
        if one.killed:
            end.what = one.killed
            end.detail = {"crash": "too many processes"}.get(one.killed, one.killed)
        elif code < 0:
            end.what, end.detail = "crash", signal.Signals(-code).name
        elif end.peak_mb - expected.peak_mb > MEMORY_MB:
            end.what, end.detail = "memory", f"{end.peak_mb:.0f} MB"
        elif "Traceback (most recent call last)" in end.stderr or code == UNCAUGHT:
            end.what, end.detail = "traceback", where(end.stderr)
        elif code in (1, 2, 3) and end.stderr.strip():
            end.what = "refused"
        elif code != 0:
            end.what, end.detail = "traceback", f"exit code {code} without a message"
        elif end.numbers == expected.numbers:
            end.what = "same"
        else:
            end.what = "other" if about["excused"] else "WRONG"
            end.detail = str(end.numbers)[:200]
        return end


def where(stderr: str) -> str:
    """The exception, the last function of ours and the last of all that it came through."""
    frames = re.findall(r'File "([^"]+)", line \d+, in (\S+)', stderr)
    ours = [frame for frame in frames if "vne_kernels/" in frame[0]]
    last = dict.fromkeys([*ours[-1:], *frames[-1:]])
    places = [f"{re.sub('.*(site-packages|python[^/]*)/', '', path)}:{name}" for path, name in last]
    raised = re.findall(r"^([A-Za-z_][\w.]*)(?:: |$)", stderr, re.M)
    return f"{raised[-1] if raised else '?'} in {', '.join(places)}"


# ---- the command -------------------------------------------------------------------------------


def import_everything() -> None:
    """Once, before the forks. torch and its threads must not have been used by then."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["MPLBACKEND"] = "agg"
    import pyarrow.parquet
    import safetensors.torch
    import sklearn.datasets
    import torch
    import torchvision.datasets.folder
    import tqdm
    from matplotlib.figure import Figure
    from PIL import Image

    from vne_kernels.pretrain import export, knn, linear_eval, report, run
    from vne_kernels.spectrum_files import readers, work

    del sklearn, torchvision, pyarrow, safetensors, export, knn, linear_eval, report, run
    del readers, work
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # or it starts a thread
    Image.init()
    # Both take most of the time, and no part in the reading of files.
    os.fsync = lambda descriptor: None
    savefig = Figure.savefig
    Figure.savefig = lambda self, *rest, **named: savefig(self, *rest, **named | {"dpi": 20})
    gc.collect()
    gc.freeze()


def markdown(tallies: dict[str, Tally]) -> str:
    def cells(name: str, counts: Counter[str], peak: float) -> list[str]:
        numbers = [sum(counts.values()), *(counts[what] for what in CLASSES)]
        return [name, *map(str, numbers), f"{peak:.0f}"]

    every = sum((tally.counts for tally in tallies.values()), Counter[str]())
    rows = [cells(name, tally.counts, tally.peak_mb) for name, tally in tallies.items()]
    rows.append(cells("all", every, max((t.peak_mb for t in tallies.values()), default=0)))
    widths = [max(len(row[i]) for row in (HEADER, *rows)) for i in range(len(HEADER))]
    lines = [[name.ljust(width) for name, width in zip(HEADER, widths, strict=True)]]
    lines.append(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for first, *rest in rows:
        numbers = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append([first.ljust(widths[0]), *numbers])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep_failure(folder: Path, end: End, slot: Path, pattern: str) -> None:
    """A line of JSON, and the mutant itself where it is small."""
    line = {"kind": end.kind, "index": end.index, "what": end.what, "detail": end.detail}
    line |= {"peak_mb": round(end.peak_mb), "stderr": end.stderr[-2000:].splitlines()[-12:]}
    with (folder / "failures.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    for path in (slot / "work").glob(pattern):
        if path.stat().st_size <= KEPT_BYTES:
            shutil.copy(path, folder / f"{slot.name}{path.suffix}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mutants", type=int, default=300, metavar="N", help="of each kind (default: 300)")
    add("--kinds", type=lambda text: text.split(","), default=list(KINDS), metavar="A,B")
    add("--only", metavar="KIND:INDEX", help="this mutant alone, and what its program said")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=2, help="children side by side (default: 2)")
    add("--out", type=Path, metavar="FILE", help="where the table goes too")
    add("--keep", type=Path, metavar="FOLDER", help="where mutants that fail are kept")
    options = parser.parse_args(arguments)
    if options.only:
        options.kinds = [options.only.rpartition(":")[0]]
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"argument --kinds: must be of {', '.join(KINDS)}, got {', '.join(unknown)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    import_everything()
    from tqdm import tqdm

    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        (options.keep / "failures.jsonl").write_text("")
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    fuzzer = Fuzzer(root, options.seed)
    tallies: dict[str, Tally] = {}
    failures: Counter[str] = Counter()
    counts = {name: math.ceil(options.mutants * KINDS[name].share) for name in options.kinds}
    try:
        with tqdm(total=sum(counts.values()), unit=" mutants", disable=bool(options.only)) as bar:
            for name in options.kinds:
                bar.set_description(name)
                fuzzer.prepare(name)
                tally = tallies[name] = Tally()
                mutants = [(name, index) for index in range(counts[name])]
                if options.only:
                    mutants = [(name, int(options.only.rpartition(":")[2]))]
                for end in fuzzer.ends(mutants, options.jobs):
                    tally.add(end)
                    bar.update()
                    if options.only:
                        print(f"{end.what} {end.detail}\n{end.stderr}")
                    if end.what in BAD:
                        failures[f"{end.kind}: {end.what}: {end.detail[:100]}"] += 1
                        if options.keep:
                            slot = root / f"{name}-{end.index}".replace(":", "-")
                            keep_failure(options.keep, end, slot, KINDS[name].file)
    except KeyboardInterrupt:
        print("\ninterrupted: the table is of what was done", file=sys.stderr)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    table = markdown(tallies)
    print(table)
    for what, count in sorted(failures.items()):
        print(f"{count:5d}  {what}")
    if options.out:
        write_whole(options.out, table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
