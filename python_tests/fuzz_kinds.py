"""The kinds of files that fuzz_files.py damages: a valid one of each, and what reads it."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_mutations import Mutation, damage, damage_config, damage_json, damage_saved, damage_text

# ---- what is run, and its numbers --------------------------------------------------------------


def spectrum(*arguments: object) -> int:
    from vne_kernels.spectrum_files.cli import main

    return main([*map(str, arguments), "--no-plot", "--device", "cpu"])


def pretrain(*arguments: object) -> int:
    from vne_kernels.pretrain.cli import main

    return main([str(argument) for argument in arguments])


def as_program(read: Callable[[Path, Path], int]) -> Callable[[Path, Path], int]:
    """What the program makes of an OptionError, for functions called without the program."""

    def run(valid: Path, work: Path) -> int:
        from vne_kernels.pretrain.config import OptionError

        try:
            return read(valid, work)
        except OptionError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def write_numbers(work: Path, value: object) -> None:
    (work / "numbers").write_text(str(value))


def numbers(work: Path) -> str:
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
    write_numbers(work, digest.hexdigest())
    if broken:
        print(f"broken: {broken}", file=sys.stderr)
    return 2 if broken else 0


def read_recipe(valid: Path, work: Path) -> int:
    from vne_kernels.pretrain import recipes

    write_numbers(work, recipes.options({"recipe": str(work / "own.toml")}))
    return 0


def read_classes(valid: Path, work: Path) -> int:
    from vne_kernels.pretrain import data

    images = data.load(str(work / "images"), "", classes=str(work / "list.txt"))
    write_numbers(work, [Path(image).name for image in images.train.images])
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
    held = len(mutant) - file.tell()
    return bool(math.prod(shape) * dtype.itemsize == held and scores(work)["rows"] == shape[0])


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


def members_are_whole(valid: bytes, mutant: bytes, work: Path) -> bool:
    """By the checksums that torch.save writes."""
    with zipfile.ZipFile(io.BytesIO(mutant)) as archive:
        return archive.testzip() is None


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


def run_without_tables(folder: Path) -> None:
    """Its report has no pictures, which take most of the time."""
    run_folder(folder)
    for name in ("metrics", "epochs", "spectrum"):
        (folder / f"run/{name}.csv").unlink()


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
    return Kind(images(suffix), f"images/train/a/0{suffix}", as_program(read_images), numbers)


def report_kind(name: str, mutate: Mutation) -> Kind:
    def run(valid: Path, work: Path) -> int:
        return pretrain("report", work / "run")

    # Pictures are of the tables and of the configuration.
    drawn = name.endswith(".csv") or name == "config.json"
    make = run_folder if drawn else run_without_tables
    return Kind(make, f"run/{name}", run, report_html, mutate=mutate)


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
        write_npz, "tiny.npz", as_program(lambda *folders: read_images(*folders, "tiny.npz")),
        numbers, never,
    ),
    **{name: image_kind(f".{name}") for name in ("png", "jpeg", "bmp", "tiff", "webp", "ppm")},
    "recipe": Kind(recipe, "own.toml", as_program(read_recipe), numbers, mutate=damage_text),
    "class-list": Kind(classes, "list.txt", as_program(read_classes), numbers, mutate=damage_text),
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
        run_without_tables, "run/config.json", export, exported, mutate=damage_config
    ),
    "knn:config": Kind(
        run_without_tables, "run/config.json", knn, accuracy("knn"), mutate=damage_config,
        seconds=20,
    ),
    "encoder.pt": Kind(
        run_without_tables, "run/encoder.pt", export, exported, members_are_whole, damage_saved
    ),
    "linear_eval.ckpt": Kind(
        stopped_probe, "run/linear_eval.ckpt", linear_eval, table_of("linear_eval"),
        members_are_whole, damage_saved, seconds=20,
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
