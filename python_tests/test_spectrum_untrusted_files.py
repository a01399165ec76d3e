"""``vne-spectrum`` and files that are damaged, forged, or change while they are read."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from programs import run_python
from pyarrow import parquet
from safetensors.torch import save_file
from test_spectrum_files import ROWS, D, Numbers, chunks_until, lists, run

from vne_kernels.common.files import locked
from vne_kernels.spectrum_files import cli, work
from vne_kernels.spectrum_files.outputs import ALL, SCORES, UNFINISHED

Capture = pytest.CaptureFixture[str]


def matrix(rows: int = ROWS, d: int = D, seed: int = 0) -> Numbers:
    return np.random.default_rng(seed).standard_normal((rows, d))


#: suffix -> writes a matrix
WRITE: dict[str, Callable[[Path, Numbers], object]] = {
    ".npy": np.save,
    ".npz": lambda path, z: np.savez(path, z=z),
    ".safetensors": lambda path, z: save_file({"z": torch.from_numpy(z)}, path),
    ".parquet": lambda path, z: parquet.write_table(
        pa.table({"z": lists(z)}), path, row_group_size=10, compression="none", use_dictionary=False
    ),
}


def refusal(capsys: Capture, *arguments: object) -> str:
    """The one line in which the program refuses, without an escape sequence."""
    capsys.readouterr()
    assert run(*arguments, "--no-plot") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vne-spectrum: error: ")
    assert line.isprintable()
    assert len(line) < 1100
    return line


def scores_in(out: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((out / SCORES).read_text())
    return {name: value for name, value in scores.items() if name != "files"}


def scores_of(path: Path, *options: object) -> dict[str, Any]:
    out = path.with_name(f"{path.name}-out")
    assert run(path, "--out", out, "--no-plot", *options) == 0
    return scores_in(out)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", matrix())
    return tmp_path / "rows.npy"


# ---- what is the user's ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_files_of_others_are_spared(rows: Path, name: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"files": "mine"}')
    (out / ".env.tmp").write_text("mine")
    assert name in refusal(capsys, rows, "--out", out)
    assert (out / name).read_text() == '{"files": "mine"}'
    assert sorted(os.listdir(out)) == sorted([".env.tmp", name])
    assert run(rows, "--out", out, "--no-plot", "--overwrite") == 0
    assert run(rows, "--out", out) == 0  # now it is known
    assert (out / ".env.tmp").read_text() == "mine"


def test_folder_is_known_from_the_first_file_on(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cli, "write_table", full)
        assert run(rows, "--out", tmp_path / "out", "--no-plot") == 1
    assert run(rows, "--out", tmp_path / "out", "--no-plot") == 0


def test_folder_has_one_writer(rows: Path, tmp_path: Path, capsys: Capture) -> None:
    with locked(tmp_path / "out", "spectrum"):
        refusal(capsys, rows, "--out", tmp_path / "out")
    assert run(rows, "--out", tmp_path / "out", "--no-plot") == 0


# ---- what was saved ----------------------------------------------------------------------------


def interrupted(rows: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A command that was interrupted after 22 rows."""
    command: list[object] = [rows, "--out", out, "--no-plot", "--chunk-rows", 11]
    with monkeypatch.context() as patch:
        chunks_until(patch, 2, lambda: os.kill(os.getpid(), 15))
        assert run(*command) == 75
    return command


def changed(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(values)


def changed_sums(name: str, **values: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["sums"][name].update(values)


SAVED: dict[str, Callable[[dict[str, Any]], object]] = {
    "row before the first": changed(row=-5),
    "row after the last": changed(row=10**9),
    "row that is none": changed(row=True),
    "file before the first": changed(file=-1),
    "file after the last": changed(file=1),
    "rows left out": changed(nonfinite=3),
    "negative rows left out": changed(nonfinite=-3),
    "exponent": changed(exponent=10**6),
    "other entry": changed(more=1),
    "identity": changed(identity={"files": 1}),
    "no identity": changed(identity={}),
    "sums that are none": changed(sums={"rows": 1}),
    "one of the sums": lambda content: content["sums"].pop(work.RAW),
    "rows": changed_sums("rows", rows=21),
    "half of it": changed_sums(work.RAW, rows=21),
    "weight": changed_sums("rows", weight=torch.tensor(21.0, dtype=torch.float64)),
    "total of NaN": changed_sums(work.RAW, total=torch.full((D, D), torch.nan).double()),
    "total of another shape": changed_sums(work.RAW, total=torch.zeros(D, 1).double()),
    "total that is none": changed_sums(work.RAW, total=[[0.0] * D] * D),
    "total of integers": changed_sums(work.RAW, total=torch.zeros(D, D, dtype=torch.int64)),
}


@pytest.mark.parametrize("case", SAVED)
def test_what_was_saved_is_believed_whole_or_not_at_all(
    case: str, rows: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = interrupted(rows, out, monkeypatch)
    content = torch.load(out / UNFINISHED)
    SAVED[case](content)
    torch.save(content, tmp_path / "unfinished-00000000.pt")
    os.replace(tmp_path / "unfinished-00000000.pt", out / UNFINISHED)
    capsys.readouterr()
    assert run(*command) == 0
    assert UNFINISHED in capsys.readouterr().err
    assert scores_in(out) == scores_of(rows, "--chunk-rows", 11)


def test_damaged_bytes_of_what_was_saved(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = interrupted(rows, out, monkeypatch)
    saved = (out / UNFINISHED).read_bytes()
    wanted = scores_of(rows, "--chunk-rows", 11)
    rng = np.random.default_rng(0)
    for place in rng.integers(100, len(saved), 40):
        mutant = bytearray(saved)
        mutant[place] ^= int(rng.integers(1, 256))
        (out / UNFINISHED).write_bytes(mutant)
        assert run(*command) == 0
        assert scores_in(out) == wanted


# ---- rows that are not what is declared, or not what they were ---------------------------------


def test_rows_that_a_footer_declares(tmp_path: Path, capsys: Capture) -> None:
    """Each count of 57 rows in the footer becomes one of 56 or 58: never a number of other rows."""
    path = tmp_path / "z.parquet"
    z = matrix(ROWS, 1)
    parquet.write_table(pa.table({"z": z[:, 0]}), path, compression="none")
    content = path.read_bytes()
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    wanted, refused = scores_of(path), 0
    for place in [begin + m.start() for m in re.finditer(b"\x72", content[begin:])]:  # zigzag 57
        for other in (b"\x70", b"\x74"):
            path.write_bytes(content[:place] + other + content[place + 1 :])
            if run(path, "--out", tmp_path / "out", "--no-plot") == 0:
                assert scores_in(tmp_path / "out") == wanted
            else:
                refused += 1
    assert refused >= 3


@pytest.mark.parametrize("how", ["overwritten", "cut short"])
@pytest.mark.parametrize("suffix", WRITE)
def test_file_that_changes_while_it_is_read(
    suffix: str, how: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / f"z{suffix}", tmp_path / f"other{suffix}"
    WRITE[suffix](path, matrix(5000))
    WRITE[suffix](other, matrix(5000, seed=1))
    os.utime(path, ns=(0, 0))

    def act() -> None:
        if how == "overwritten":
            path.write_bytes(other.read_bytes())
        else:
            os.truncate(path, path.stat().st_size // 3)

    chunks_until(monkeypatch, 2, act)
    assert path.name in refusal(capsys, path, "--chunk-rows", 700, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / SCORES).exists()


def test_file_that_is_replaced_before_it_is_read(
    rows: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    second, new = tmp_path / "second.npy", tmp_path / "new.npy"
    np.save(second, matrix(seed=1))
    np.save(new, matrix(seed=2))
    chunks_until(monkeypatch, 2, lambda: os.replace(new, second))
    assert "second.npy" in refusal(capsys, rows, second, "--chunk-rows", 30)


def npy(header: str, data: bytes = b"", length: int | None = None) -> bytes:
    """An array of version 2.0 with this header."""
    text = header.encode()
    length = len(text) if length is None else length
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", length) + text + data


def shaped(shape: str, data: bytes = b"") -> bytes:
    return npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}", data)


def tensors(header: object, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(first: int, last: int, shape: object = (2, 3), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def two_arrays() -> bytes:
    file = io.BytesIO()
    for _ in range(2):
        np.save(file, matrix())
    return file.getvalue()


def member(content: bytes, name: str = "z.npy", method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def encrypted() -> bytes:
    content = bytearray(member(two_arrays()))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


FLOATS = bytes(24)
DAMAGED: dict[str, tuple[str, bytes]] = {
    "two arrays": ("a.npy", two_arrays()),
    "negative size": ("a.npy", shaped("(-2, -3)", FLOATS)),
    "size that is a truth": ("a.npy", shaped("(True, 6)", FLOATS)),
    "huge size": ("a.npy", shaped(f"({'9' * 4000}, 6)", FLOATS)),
    "many sizes": ("a.npy", shaped(f"({'9, ' * 1000})", FLOATS)),
    "deep header": ("a.npy", npy("(" * 9000)),
    "deep minus": ("a.npy", npy("-" * 9000 + "1")),
    "keys of other types": ("a.npy", npy("{1: 2, 'a': 3}")),
    "escape in the header": ("a.npy", npy("{'\\d\x1b[2J': 2}")),
    "two arrays in a member": ("a.npz", member(two_arrays())),
    "encrypted": ("a.npz", encrypted()),
    "bzip2": ("a.npz", member(two_arrays(), method=zipfile.ZIP_BZIP2)),
    "key": ("a.npz", member(two_arrays(), "a\x1b]0;title\x07\n.npy")),
    "no header": ("a.safetensors", b""),
    "length of the header": ("a.safetensors", tensors({}, b"", 1 << 62)),
    "header of another type": ("a.safetensors", tensors([1], FLOATS)),
    "size of a tensor": ("a.safetensors", tensors({"z": entry(0, 24, (2, -3))}, FLOATS)),
    "true size": ("a.safetensors", tensors({"z": entry(0, 24, (True, 6))}, FLOATS)),
    "rows of a tensor": ("a.safetensors", tensors({"z": entry(0, 24, (1, 3))}, FLOATS)),
    "hole": ("a.safetensors", tensors({"z": entry(4, 28)}, bytes(28))),
    "overlap": ("a.safetensors:a", tensors({"a": entry(0, 24), "z": entry(20, 44)}, bytes(44))),
    "more bytes": ("a.safetensors", tensors({"z": entry(0, 24)}, bytes(28))),
    "dtype": ("a.safetensors", tensors({"z": entry(0, 24, dtype="\x1b[2J")}, FLOATS)),
    "no parquet": ("a.parquet", b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file(case: str, tmp_path: Path, capsys: Capture) -> None:
    name, content = DAMAGED[case]
    path = tmp_path / name.split(":")[0]
    path.write_bytes(content)
    assert path.name in refusal(capsys, tmp_path / name)


# ---- numbers of every size ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e-13, 1e155, 1e200, 1e300])
def test_scores_do_not_depend_on_the_scale(scale: float, tmp_path: Path, capsys: Capture) -> None:
    z = matrix()
    np.save(tmp_path / "one.npy", z)
    np.save(tmp_path / "scaled.npy", z * scale)
    wanted, scores = scores_of(tmp_path / "one.npy"), scores_of(tmp_path / "scaled.npy")
    for name in ("entropy", "effective_rank", "rankme", "rank", "participation_ratio"):
        assert scores[name] == pytest.approx(wanted[name], rel=1e-12 if scale > 1e-300 else 1e-3)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("power", [-500, -250, -100, -35, 35, 54, 100, 250, 450, 500])
def test_rows_as_they_are(power: int, precision: str, tmp_path: Path, capsys: Capture) -> None:
    z = matrix().astype(np.float64 if abs(power) > 100 else np.float32)
    np.save(tmp_path / "one.npy", z)
    np.save(tmp_path / "scaled.npy", z * 2.0**power)
    options = ["--no-normalize", "--precision", precision]
    exact = z.dtype == np.float64 or precision == "float64"
    if (-300 if exact else -40) < power < (480 if exact else 56):
        wanted = scores_of(tmp_path / "one.npy", *options)
        scores = scores_of(tmp_path / "scaled.npy", *options)
        for name in ("entropy", "effective_rank", "participation_ratio"):
            assert scores[name] == pytest.approx(wanted[name], rel=1e-12)
        largest = wanted["largest_eigenvalue"] * 4.0**power
        assert scores["largest_eigenvalue"] == pytest.approx(largest, rel=1e-12)
    else:
        assert "row 50 " in refusal(capsys, tmp_path / "scaled.npy", *options)


def test_rows_too_far_from_those_before(tmp_path: Path, capsys: Capture) -> None:
    z = matrix()
    z[3] = 0
    z[17, 2], z[16, 0] = 1e200, np.nan
    np.save(tmp_path / "z.npy", z)
    command = [tmp_path / "z.npy", "--skip-nonfinite"]
    assert "row 17 " in refusal(capsys, *command, "--chunk-rows", 10)
    assert run(*command, "--no-plot") == 0  # of one chunk the largest decides


# ---- memory and files that are none ------------------------------------------------------------

#: A list of 400 million zeros of float32: to write it takes 1.6 GB.
LIST_OF_ZEROS = """
UEFSMRUEFQgVGkwVAhUAEgAAKLUv/SAEIQAAAAAAABUAFToVTCwVgJC8/QIVEBUGFQYcGAQAAAAAGAQAAACAFgAo
BAAAAAAYBAAAAIAREQAAACi1L/0gHekAAAgAAAAD/vCPvP0CAQYAAACAkLz9AgMBgJC8/QIAFQQZTDUAGAZzY2hl
bWEVAgA1AhgBehUCFQZMPAAAADUEGARsaXN0FQIAFQglAhgHZWxlbWVudAAWAhkcGRwmABwVCBk1AAYQGTgBegRs
aXN0B2VsZW1lbnQVDBaAkLz9AhbEARboASY+JggcGAQAAAAAGAQAAACAFgAoBAAAAAAYBAAAAIAREQAZLBUEFQAV
AgAVABUQFQIAPCkmAv6PvP0CGUYAAACAkLz9AgAAABbEARYCJggW6AEAKCBwYXJxdWV0LWNwcC1hcnJvdyB2ZXJz
aW9uIDI2LjAuMRkcHAAAAOIAAABQQVIx
"""

PEAK = """
import re, sys, torch
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
before = status("VmRSS")
from vne_kernels.spectrum_files.cli import main
for name in sys.argv[1:]:
    assert main([name, "--no-plot"]) == 1, name
print(status("VmHWM") - before)
"""


def deflated(path: Path, begin: bytes, zeros: int) -> None:
    """A .npz whose member is ``begin`` and so many zeros."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("z.npy", "w", force_zip64=True) as file,
    ):
        file.write(begin)
        for _ in range(zeros >> 20):
            file.write(bytes(1 << 20))


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "list.parquet").write_bytes(base64.b64decode(LIST_OF_ZEROS))
    deflated(tmp_path / "header.npz", npy("", length=(1 << 32) - 1), 3 << 27)
    rows = (1 << 27) // 4 // 64
    columns = f"{{'descr': '<f4', 'fortran_order': True, 'shape': ({rows}, 64)}}"
    deflated(tmp_path / "columns.npz", npy(columns), 1 << 27)
    many = {str(i): entry(0, 0, (0, 1)) for i in range(100_000)}
    (tmp_path / "many.safetensors").write_bytes(tensors(many, b""))
    (tmp_path / "long.safetensors").write_bytes(tensors({"z": entry(0, 0, [0] * (5 << 20))}, b""))
    with zipfile.ZipFile(tmp_path / "many.npz", "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i}\x1b.npy", b"")
    files = sorted(path for path in tmp_path.iterdir())
    done = run_python(PEAK, *files, cwd=tmp_path)
    assert len(done.stderr.splitlines()) == len(files)
    assert all(len(line) < 1100 for line in done.stderr.splitlines())
    assert int(done.stdout) <= 300


@pytest.mark.parametrize("suffix", WRITE)
def test_pipe_and_device(suffix: str, tmp_path: Path, capsys: Capture) -> None:
    path, link = tmp_path / f"x{suffix}", tmp_path / f"link{suffix}"
    os.mkfifo(path)
    link.symlink_to("/dev/zero")
    for name in (path, link):
        assert str(name) in refusal(capsys, name)


# ---- names and messages ------------------------------------------------------------------------


def test_many_keys_and_columns(tmp_path: Path, capsys: Capture) -> None:
    np.savez(tmp_path / "a.npz", **{f"key{i}\x1b[2J": np.ones((2, 3)) for i in range(100)})
    np.savez(tmp_path / "b.npz", **{"k" * 30_000: np.ones(3)})
    parquet.write_table(
        pa.table({f"c{i}\n\x1b[2J": [1] for i in range(999)}), tmp_path / "c.parquet"
    )
    for name, more in (("a.npz", "95"), ("a.npz:x", "95"), ("c.parquet", "994")):
        assert more in refusal(capsys, tmp_path / name)
    refusal(capsys, tmp_path / "b.npz")


NAMES = ["a$b$.npy", "a$\\frac$.npy", os.fsdecode(b"a\xff.npy"), "a\n\x1b[2J.npy", "é∞.npy"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a terminal of latin-1, twice, with a picture."""
    np.save(io.FileIO(tmp_path / name, "w"), matrix())
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "latin-1"))
    assert run(tmp_path / name, "--out", tmp_path / "out") == 0
    for out in ("out", name.replace("npy", "out")):
        assert run(tmp_path / name, "--out", tmp_path / out, "--no-plot") == 0
    sys.stdout.seek(0)
    assert all(line.isprintable() for line in sys.stdout.read().splitlines())


@pytest.mark.parametrize("name", ["x" * 256, "x" * 5000])
def test_name_that_is_too_long(name: str, rows: Path, tmp_path: Path, capsys: Capture) -> None:
    refusal(capsys, rows, "--out", tmp_path / name)
    refusal(capsys, tmp_path / f"{name}.npy")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_out_of_memory(
    error: Exception, rows: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(work.DensityAccumulator, "eigenvalues", fail)
    refusal(capsys, rows)
