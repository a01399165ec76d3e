"""``vne-spectrum``: files of every format, the scores against other packages, interruptions."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from naming import exit_code, last_error, naming
from programs import run_python
from pyarrow import parquet
from safetensors.torch import save_file

from vne_kernels import reference
from vne_kernels.spectrum_files import work
from vne_kernels.spectrum_files.cli import main
from vne_kernels.spectrum_files.readers import open_embeddings

ROWS, D = 57, 6
PNG = b"\x89PNG\r\n\x1a\n"
NOT_RESULTS = ("files", "vne_kernels")  # keys of scores.json

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
Numbers = np.ndarray[Any, np.dtype[Any]]


def matrix(rows: int = ROWS, d: int = D, seed: int = 0) -> Numbers:
    """Rows whose spectrum decays, exact in bfloat16, so that all formats hold the same."""
    values = np.random.default_rng(seed).standard_normal((rows, d)) * 2.0 ** -np.arange(d)
    return torch.from_numpy(values).bfloat16().float().numpy()


def lists(values: Numbers) -> Any:
    return pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])


FORMATS: dict[str, Callable[[Path, Numbers], None]] = {
    "rows.npy": np.save,
    "columns.npy": lambda path, z: np.save(path, np.asfortranarray(z)),
    "bigendian.npy": lambda path, z: np.save(path, z.astype(">f8")),
    "one.npz": lambda path, z: np.savez(path, z=z),
    "deflated.npz:train": lambda path, z: np.savez_compressed(path, train=z, y=np.arange(ROWS)),
    "columns.npz": lambda path, z: np.savez_compressed(path, z=np.asfortranarray(z)),
    "half.safetensors": lambda path, z: save_file({"z": torch.from_numpy(z).bfloat16()}, path),
    "two.safetensors:b": lambda path, z: save_file(
        {"a": torch.zeros(3, 2), "b": torch.from_numpy(z)}, path
    ),
    "fixed.parquet": lambda path, z: parquet.write_table(
        pa.table({"id": np.arange(ROWS), "z": lists(z)}), path, row_group_size=10
    ),
    "lists.parquet:z": lambda path, z: parquet.write_table(
        pa.table({"z": list(z), "other": lists(z)}), path
    ),
    "columns.parquet": lambda path, z: parquet.write_table(
        pa.table({"label": ["x"] * ROWS, **{f"f{j}": z[:, j] for j in range(D)}}), path,
        row_group_size=25,
    ),
}  # fmt: skip


def write(folder: Path, name: str, z: Numbers) -> str:
    """Write the matrix in this format; returns what to give the program."""
    FORMATS[name](folder / name.split(":")[0], z)
    return str(folder / name)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def results(out: Path) -> tuple[Numbers, dict[str, Any]]:
    with (out / "spectrum.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["index", "eigenvalue", "share", "cumulative_share"]
    scores: dict[str, Any] = json.loads((out / "scores.json").read_text())
    return np.array(rows, np.float64), scores


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_format(tmp_path: Path, name: str) -> None:
    z = matrix()
    embeddings = open_embeddings(write(tmp_path, name, z))
    assert (embeddings.rows, embeddings.features) == (ROWS, D)
    for start, size in ((0, 7), (0, 100), (28, 7), (30, 15), (57, 3)):
        chunks = [chunk.clone() for chunk in embeddings.chunks(start, size)]
        assert [len(chunk) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
        assert all(chunk.dtype == embeddings.dtype for chunk in chunks)
        read = torch.cat(chunks) if chunks else torch.empty(0, D)
        assert np.array_equal(read.double().numpy(), z[start:].astype(np.float64))


def parquet_of(**columns: Any) -> Callable[[Path], None]:
    return lambda path: parquet.write_table(pa.table(columns), path)


def npy_of(array: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, array)


def cut(name: str, share: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        FORMATS[name](path, matrix())
        os.truncate(path, int(share * path.stat().st_size))

    return make


def claim(*shape: int) -> Callable[[Path], None]:
    """Zeros that take no room on the disk."""

    def make(path: Path) -> None:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 2 * math.prod(shape))

    return make


def flip(path: Path) -> None:
    """An archive whose numbers are not those of its checksum."""
    FORMATS["one.npz"](path, matrix())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("z.npy").header_offset
    with path.open("r+b") as file:
        file.seek(offset + 400)
        file.write(b"\x01\x02\x03")


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], tuple[object, ...]]] = {
    "no file": ("a.npy", lambda path: None, ()),
    "folder": ("a.npy", Path.mkdir, ("*.npy",)),
    "suffix": ("a.txt", Path.touch, (".npy", ".npz", "'.txt'")),
    "pickle": ("a.npy", npy_of(np.array([None])), ("pickle",)),
    "1-D": ("a.npy", npy_of(np.ones(5)), ((5,), (1, 5))),
    "3-D": ("a.npy", npy_of(np.ones((2, 3, 4))), ((2, 3, 4), (6, 4))),
    "integers": ("a.npy", npy_of(np.ones((2, 3), int)), ("float16", "int64")),
    "no feature": ("a.npy", npy_of(np.ones((2, 0))), ((2, 0),)),
    "no row": ("a.npy", npy_of(np.ones((0, 2))), ()),
    "too large": ("a.npy", claim(100_000, 100_000), ("480 GB",)),
    "short npy": ("a.npy", cut("rows.npy", 0.5), ((57, 6), "1,368")),
    "short npz": ("a.npz", cut("one.npz", 0.5), ("damaged",)),
    "crc": ("a.npz", flip, ("damaged",)),
    "short safetensors": ("a.safetensors", cut("half.safetensors", 0.9), ()),
    "short parquet": ("a.parquet", cut("fixed.parquet", 0.5), ()),
    "no npy": ("a.npy", lambda path: path.write_bytes(b"x" * 99), ()),
    "keys": (
        "a.npz",
        lambda path: FORMATS["deflated.npz:train"](path, matrix()),
        ("a.npz:train", (57, 6), "y"),
    ),
    "key": ("a.npz:x", lambda path: FORMATS["one.npz"](path, matrix()), ("'x'", "z")),
    "npy key": ("a.npy:x", npy_of(np.ones((2, 3))), ("'x'",)),
    "no column": ("a.parquet", parquet_of(id=[1, 2]), ("id int64",)),
    "ragged": ("a.parquet", parquet_of(z=[[1.0, 2.0], [3.0, 4.0], [5.0]]), ("row 2", 1)),
    "null list": ("a.parquet", parquet_of(z=[[1.0, 2.0], None]), ("row 1",)),
    "null": ("a.parquet", parquet_of(z=[1.0, None]), ("row 1",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_in_one_line(case: str, tmp_path: Path, capsys: Capture) -> None:
    name, make, named = BAD_FILES[case]
    make(tmp_path / name.split(":")[0])
    assert run(tmp_path / name, "--out", tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vne-spectrum: error: ")
    assert re.search(naming(name.split(":")[0], *named), line)
    assert not (tmp_path / "out" / "scores.json").exists()


def test_features_differ(tmp_path: Path, capsys: Capture) -> None:
    for d in (3, 4):
        np.save(tmp_path / f"{d}.npy", np.ones((2, d)))
    assert run(tmp_path / "3.npy", tmp_path / "4.npy") == 1
    assert re.search(naming("4.npy", "3.npy", 4, 3), last_error(capsys))


def test_library_not_installed(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    given = write(tmp_path, "fixed.parquet", matrix())
    monkeypatch.setitem(sys.modules, "pyarrow.types", None)
    assert run(given) == 1
    assert re.search("pyarrow.*pip install", last_error(capsys))


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: Capture) -> None:
    given = write(tmp_path, "rows.npy", matrix())
    assert run(given, "--out", given) == 1
    assert re.search(r"rows\.npy.*File exists", last_error(capsys))


@pytest.mark.parametrize(
    "option", [("--chunk-rows", "0"), ("--device", "tpu"), ("--precision", "float16")]
)
def test_bad_option(option: tuple[str, str], capsys: Capture) -> None:
    assert exit_code(main, ["a.npy", *option]) == 2
    assert re.search(naming(*option), last_error(capsys))


# ---- scores ------------------------------------------------------------------------------------


def test_scores_are_those_of_other_packages(
    tmp_path: Path, capsys: Capture, vendi: ModuleType
) -> None:
    """Two files of different formats and dtypes as one data set."""
    first, second = matrix(), matrix(40, seed=1)
    given = [write(tmp_path, "half.safetensors", first), write(tmp_path, "rows.npy", second)]
    assert run(*given, "--chunk-rows", "16") == 0
    table, scores = results(tmp_path / "half-and-1-more-spectrum")

    z = np.concatenate([first, second]).astype(np.float64)
    u = z / np.linalg.norm(z, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(u.T @ u / len(u))[::-1]
    assert np.array_equal(table[:, 0], np.arange(1, D + 1))
    np.testing.assert_allclose(table[:, 1], eigenvalues, rtol=1e-11)
    np.testing.assert_allclose(table[:, 2], eigenvalues, rtol=1e-11)
    np.testing.assert_allclose(table[:, 3], np.cumsum(eigenvalues), rtol=1e-12)

    singular = np.linalg.svd(z, compute_uv=False)
    p = singular / singular.sum() + 1e-7
    shares = np.cumsum(eigenvalues)
    wanted = {
        "entropy": -np.sum(eigenvalues * np.log(eigenvalues)),
        "entropy_bound": math.log(D),
        "effective_rank": vendi.score_dual(u),
        "participation_ratio": 1 / np.sum(eigenvalues**2),
        "rankme": np.exp(-np.sum(p * np.log(p))),
        "largest_eigenvalue": eigenvalues[0],
    }
    for name, value in wanted.items():
        assert scores[name] == pytest.approx(value, rel=1e-11), name
    for q in (0.5, 1, 2, "inf"):  # score_X takes q = 1 whatever it is given
        assert scores["vendi_score"][str(q)] == pytest.approx(vendi.score_dual(u, q=q), rel=1e-9)
    assert scores["rank"] == D
    assert scores["rows"] == 97
    assert scores["share_of_largest"] == {"1": pytest.approx(shares[0])}
    counts = {f"{x:g}": int(np.searchsorted(shares, x)) + 1 for x in (0.9, 0.99)}
    assert scores["eigenvalues_for_share"] == counts

    assert (tmp_path / "half-and-1-more-spectrum/spectrum.png").read_bytes().startswith(PNG)
    printed = capsys.readouterr()
    assert printed.err == ""
    named = (
        97,
        6,
        f"{scores['effective_rank']:.5g}",
        "spectrum.csv",
        "scores.json",
        "spectrum.png",
    )
    assert re.search(naming(*named), printed.out)


def test_every_format_gives_the_same_numbers(tmp_path: Path) -> None:
    z = matrix()
    found = []
    for i, name in enumerate(FORMATS):
        given = write(tmp_path, name, z)
        assert run(given, "--out", tmp_path / str(i), "--chunk-rows", 10, "--no-plot") == 0
        table, scores = results(tmp_path / str(i))
        found.append((table.tolist(), [scores[key] for key in scores if key not in NOT_RESULTS]))
    assert all(one == found[0] for one in found)


def test_few_rows_of_many_features(tmp_path: Path) -> None:
    """No matrix of features x features, which would be 29 GB."""
    z = np.random.default_rng(0).normal(size=(50, 60_000)).astype(np.float32)
    np.save(tmp_path / "a.npy", z)
    assert run(tmp_path / "a.npy", "--no-plot", "--out", tmp_path / "out", "--chunk-rows", 20) == 0
    table, scores = results(tmp_path / "out")
    assert len(table) == scores["rank"] == 50
    entropy = float(reference.oracle(torch.from_numpy(z)))
    assert scores["entropy"] == pytest.approx(entropy, rel=1e-12)


def test_low_rank_rows_as_they_are(tmp_path: Path, vendi: ModuleType) -> None:
    """Fewer rows than features, rank 3, norms that differ by 1e3."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 20))
    z *= np.geomspace(1, 1e3, 12)[:, None]
    np.save(tmp_path / "z.npy", z)
    for options in (["--no-normalize"], []):
        assert run(tmp_path / "z.npy", "--out", tmp_path, "--no-plot", *options) == 0
        table, scores = results(tmp_path)
        assert len(table) == 12
        assert scores["rank"] == 3
        singular = np.linalg.svd(z, compute_uv=False)
        p = singular / singular.sum() + 1e-7
        assert scores["rankme"] == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-6)
    np.testing.assert_allclose(table[:, 2].sum(), 1)
    assert scores["effective_rank"] == pytest.approx(
        vendi.score_X(z / np.linalg.norm(z, axis=1, keepdims=True)), rel=1e-9
    )


def test_float32_leaves_out_what_rounding_hides(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", matrix())
    exact, fast = tmp_path / "exact", tmp_path / "fast"
    assert run(tmp_path / "z.npy", "--out", exact, "--no-plot") == 0
    assert run(tmp_path / "z.npy", "--out", fast, "--no-plot", "--precision", "float32") == 0
    (_, wanted), (_, scores) = results(exact), results(fast)
    assert wanted.keys() - scores.keys() == {"rank", "rankme"}
    assert list(scores["vendi_score"]) == ["1", "2", "inf"]
    assert scores["entropy"] != wanted["entropy"]
    assert scores["entropy"] == pytest.approx(wanted["entropy"], rel=1e-5)


def test_rows_that_are_not_finite(tmp_path: Path, capsys: Capture) -> None:
    z = matrix()
    finite = np.ones(ROWS, bool)
    finite[[3, 12, 56]] = False
    bad = z.copy()
    bad[3, 1], bad[12], bad[56, 0] = np.nan, np.inf, -np.inf
    np.save(tmp_path / "good.npy", z[finite])
    np.save(tmp_path / "bad.npy", bad)
    assert run(tmp_path / "bad.npy", "--chunk-rows", 10) == 1
    assert re.search(naming(57, "row 3", "bad.npy"), last_error(capsys))
    assert not (tmp_path / "bad-spectrum/scores.json").exists()
    assert run(tmp_path / "bad.npy", "--skip-nonfinite", "--no-plot") == 0
    assert run(tmp_path / "good.npy", "--no-plot") == 0
    (got, scores), (wanted, _) = (results(tmp_path / f"{x}-spectrum") for x in ("bad", "good"))
    assert np.array_equal(got, wanted)
    assert (scores["rows"], scores["rows_left_out"]) == (54, 3)


# ---- interruptions -----------------------------------------------------------------------------


@pytest.fixture
def two_files(tmp_path: Path) -> list[str]:
    return [
        write(tmp_path, "fixed.parquet", matrix()),
        write(tmp_path, "columns.npy", matrix(seed=1)),
    ]


def chunks_until(monkeypatch: Patch, last: int, act: Callable[[], object]) -> None:
    """Have ``act`` called in the midst of the chunk of this number."""
    add, count = work.Work._add, 0

    def counting(self: work.Work, chunk: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == last:
            act()
        add(self, chunk)

    monkeypatch.setattr(work.Work, "_add", counting)


@pytest.mark.parametrize("last", [1, 4, 6, 9])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_goes_on_to_the_same_bits(
    two_files: list[str],
    last: int,
    signum: int,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: Patch,
) -> None:
    options = ["--chunk-rows", 11, "--no-plot"]  # six chunks a file
    assert run(*two_files, *options, "--out", tmp_path / "whole") == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        chunks_until(patch, last, lambda: os.kill(os.getpid(), signum))
        assert run(*two_files, *options, "--out", out) == (130 if signum == signal.SIGINT else 75)
    read = min(11 * last, 57) if last <= 6 else 57 + 11 * (last - 6)
    assert re.search(naming(read, 114), capsys.readouterr().err)
    assert os.listdir(out) == [work.UNFINISHED]
    assert run(*two_files, *options, "--out", out) == 0
    assert re.search(naming(read), capsys.readouterr().err)
    for name in ("spectrum.csv", "scores.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(os.listdir(out)) == ["scores.json", "spectrum.csv"]


def test_killed_run_goes_on_from_what_was_saved(
    two_files: list[str], tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    out = tmp_path / "out"

    class Killed(Exception):
        pass

    def die() -> None:
        raise Killed

    command = [*two_files, "--chunk-rows", 11, "--no-plot", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(work, "SAVE_SECONDS", 0)
        chunks_until(patch, 8, die)
        with pytest.raises(Killed):
            run(*command, out)
    assert run(*command, out) == 0
    assert re.search(naming(68), capsys.readouterr().err)
    assert run(*command, tmp_path / "whole") == 0
    for name in ("spectrum.csv", "scores.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_full_disk_ends_no_pass(
    two_files: list[str], tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def save(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(work.torch, "save", save)
    command = [*two_files, "--chunk-rows", 100, "--no-plot", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(work, "SAVE_SECONDS", 0)
        assert run(*command) == 0
    assert re.search(r"unfinished\.pt.*No space left", capsys.readouterr().err)
    chunks_until(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(*command) == 75
    assert "No space left" in capsys.readouterr().err


def test_what_was_saved_is_used_for_the_same_work_alone(
    two_files: list[str], tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    out, state = tmp_path / "out", tmp_path / "out" / work.UNFINISHED
    command = [*two_files, "--out", out, "--no-plot"]
    with monkeypatch.context() as patch:
        chunks_until(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(*command, "--chunk-rows", 11) == 75
    saved = state.read_bytes()
    os.utime(two_files[1], ns=(0, 0))
    for options, named, content in (
        (["--chunk-rows", 11], "columns.npy", saved),
        (["--chunk-rows", 7, "--no-normalize"], "normalize", saved),
        ([two_files[0]], "files", saved),
        ([], "unfinished.pt", saved[:-300]),
        ([], "unfinished.pt", b"cbuiltins\nprint\n."),
    ):
        state.write_bytes(content)
        capsys.readouterr()
        assert run(*options, *command) == 0
        assert re.search(naming("unfinished.pt", named), capsys.readouterr().err)
        assert not state.exists()


def test_memory_stays_flat(tmp_path: Path) -> None:
    """200 MB of rows (a hole in the file) through the whole program, in a process of its own."""
    d, rows = 64, 819_200
    small, large = tmp_path / "small.npy", tmp_path / "large.npy"
    np.save(small, np.ones((20_000, d), np.float32))
    with large.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, d)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 4 * rows * d)
    script = """
import resource, sys
from vne_kernels.spectrum_files.cli import main
peaks = []
for name in sys.argv[1:]:
    assert main([name, "--no-plot"]) == 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
print(peaks[1] - peaks[0])
"""
    done = run_python(script, small, large, cwd=tmp_path)
    assert "819,200" in done.stdout
    assert int(done.stdout.splitlines()[-1]) < 60
