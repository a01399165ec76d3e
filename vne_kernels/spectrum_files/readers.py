"""Files of embeddings as streams of rows: one reader for each format.

Memory stays flat: a reader holds one chunk, whatever the size of the file. No file is mapped into
memory (its pages would count as the program's own) and nothing is unpickled (that could run any
code).
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vne_kernels.checks import DTYPES

#: by the names of NumPy and safetensors
_DTYPES = {
    **{str(dtype).removeprefix("torch."): dtype for dtype in DTYPES},
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_PIECE = 1 << 20  # bytes read, unpacked or decoded at once
#: Of a parquet file, whose columns are buffered each for itself.
_BUFFERS = {"pre_buffer": False, "buffer_size": 1 << 16}


class FileError(Exception):
    """A file cannot be used: one line that names it and says why."""

    def __init__(self, name: object, why: str) -> None:
        super().__init__(f"{name}: {why}")


@dataclass(frozen=True)
class Embeddings:
    """A matrix in a file, (rows, features), that is read in chunks."""

    name: str  # as it was given: PATH, or PATH:KEY
    path: Path
    key: str | None  # likewise
    rows: int
    features: int
    dtype: torch.dtype
    #: (start, size) -> tensors of `size` rows each, the last of fewer, from row `start` on. Each is
    #: overwritten by the next: memory taken anew for every one leaves holes between that add up.
    chunks: Callable[[int, int], Iterator[Tensor]]
    ignored: Sequence[str] = ()  # columns beside the matrix


def open_embeddings(text: str) -> Embeddings:
    """The matrix in the file that ``text`` names: PATH, or PATH:KEY for one of several.

    Raises:
        FileError: there is no such file, or no matrix of floating-point rows in it.
        ModuleNotFoundError: the library that reads this format is not installed.
    """
    path, key = Path(text), None
    suffixes = "|".join(re.escape(suffix) for suffix in _READERS)
    if not path.exists() and (named := re.fullmatch(f"(.+?(?:{suffixes})):(.+)", text)):
        path, key = Path(named[1]), named[2]
    if not path.exists():
        raise FileError(path, "there is no such file")
    if path.is_dir():
        raise FileError(path, f"is a folder; give the files in it, such as {path}/*.npy")
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise FileError(path, f"must end in {', '.join(_READERS)}, got {path.suffix!r}")
    with _told(text):
        return reader(text, path, key)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What the libraries raise about a file, as an error that names it."""
    try:
        yield
    except (FileError, ModuleNotFoundError, MemoryError):
        raise
    except OSError as error:
        raise FileError(name, f"cannot be read: {error.strerror or _first_line(error)}") from error
    except Exception as error:
        # zipfile, zlib, NumPy, safetensors and Arrow each have classes of their own for this.
        why = f"cannot be read, it is damaged or cut short: {_first_line(error)}"
        raise FileError(name, why) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _matrix(name: str, shape: Sequence[int], dtype: str) -> tuple[int, int, torch.dtype]:
    """(rows, features, dtype) of an array that has to be a matrix of floating-point numbers."""
    wanted = "must be a matrix (rows, features)"
    if dtype == "object":
        raise FileError(
            name,
            "holds Python objects (a pickle), which are never loaded; save it as "
            "an array of numbers, such as x.astype(numpy.float32)",
        )
    if dtype not in _DTYPES:
        raise FileError(
            name,
            f"must hold float16, bfloat16, float32 or float64, got {dtype}; "
            "convert it, as by x.astype(numpy.float32)",
        )
    if len(shape) == 1:
        raise FileError(
            name,
            f"{wanted}, got shape {tuple(shape)}: one vector; reshape it to "
            f"{(1, *shape)} if it is one row, or to {(*shape, 1)}",
        )
    if len(shape) != 2:
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        raise FileError(
            name,
            f"{wanted}, got shape {tuple(shape)}; choose one vector a sample, or "
            f"reshape it to {(rows, *shape[-1:])}",
        )
    if shape[1] == 0:
        raise FileError(name, f"{wanted} with at least one feature, got shape {tuple(shape)}")
    return shape[0], shape[1], _DTYPES[dtype]


def _choose(name: str, path: Path, key: str | None, found: dict[str, str], what: str) -> str:
    """The key of the only array of a file, or the one that was named."""
    listed = ", ".join(f"{k} {shape}" for k, shape in found.items())
    if not found:
        raise FileError(name, f"holds no {what}")
    if key is None and len(found) > 1:
        example = f"{path}:{next(iter(found))}"
        raise FileError(name, f"holds several {what}s, name one, such as {example}: {listed}")
    if key is not None and key not in found:
        raise FileError(name, f"holds no {what} {key!r}, only {listed}")
    return next(iter(found)) if key is None else key


# ---- NumPy -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    """Of an array in NumPy's format, and where in the stream its numbers begin."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype[Any]
    offset: int

    @property
    def type_name(self) -> str:
        return str(self.dtype.newbyteorder("="))

    @classmethod
    def read(cls, file: IO[bytes]) -> _Header:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(file)
        else:  # (3, 0) is for names of columns alone
            raise ValueError(f"version {version} of NumPy's format")
        return cls(*header, file.tell())


def _open_npy(name: str, path: Path, key: str | None) -> Embeddings:
    if key is not None:
        raise FileError(name, f"a .npy file holds one array and no {key!r}; leave out :{key}")
    with path.open("rb") as file:
        header = _Header.read(file)
    rows, features, dtype = _matrix(name, header.shape, header.type_name)
    there = path.stat().st_size - header.offset
    wanted = rows * features * header.dtype.itemsize
    if there < wanted:
        raise FileError(
            name,
            f"is cut short: {header.shape} {header.type_name} takes {wanted:,} "
            f"bytes, {there:,} are there",
        )

    def chunks(start: int, size: int) -> Iterator[Tensor]:
        with _told(name), path.open("rb") as file:
            yield from _array_chunks(file, header, start, size)

    return Embeddings(name, path, key, rows, features, dtype, chunks)


def _open_npz(name: str, path: Path, key: str | None) -> Embeddings:
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as file:
                    headers[member.removesuffix(".npy")] = _Header.read(file)
    found = {k: f"{header.shape} {header.type_name}" for k, header in headers.items()}
    chosen = _choose(name, path, key, found, "array")
    header = headers[chosen]
    rows, features, dtype = _matrix(name, header.shape, header.type_name)

    def chunks(start: int, size: int) -> Iterator[Tensor]:
        with (
            _told(name),
            zipfile.ZipFile(path) as archive,
            archive.open(f"{chosen}.npy") as member,
            tempfile.TemporaryFile() as unpacked,
        ):
            file: IO[bytes] = member
            if header.by_columns:  # which are read side by side: not possible while unpacking
                copyfileobj(member, unpacked, _PIECE)
                file = unpacked
            yield from _array_chunks(file, header, start, size)

    return Embeddings(name, path, key, rows, features, dtype, chunks)


def _array_chunks(file: IO[bytes], header: _Header, start: int, size: int) -> Iterator[Tensor]:
    (rows, features), item = header.shape, header.dtype.itemsize
    file.seek(header.offset + (0 if header.by_columns else start * features * item))
    block = np.empty((min(size, rows), features), header.dtype)
    column = np.empty(len(block), header.dtype)
    for first in range(start, rows, size):
        block = block[: rows - first]
        if header.by_columns:
            for j in range(features):
                file.seek(header.offset + (j * rows + first) * item)
                _fill(file, column[: len(block)])
                block[:, j] = column[: len(block)]
        else:
            _fill(file, block)
        yield torch.from_numpy(block.astype(header.dtype.newbyteorder("="), copy=False))


def _fill(file: IO[bytes], array: npt.NDArray[Any]) -> None:
    buffer = memoryview(array.view(np.uint8)).cast("B")  # type: ignore[arg-type]  # NumPy 1
    while buffer:
        count = file.readinto(buffer[:_PIECE])  # type: ignore[attr-defined]  # every binary file has it
        if not count:
            raise EOFError("it ends too early")
        buffer = buffer[count:]


# ---- safetensors -------------------------------------------------------------------------------


def _open_safetensors(name: str, path: Path, key: str | None) -> Embeddings:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        slices = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118  (no dict)
        found = {k: f"{tuple(s.get_shape())} {s.get_dtype()}" for k, s in slices.items()}
        chosen = _choose(name, path, key, found, "tensor")
        shape, dtype = slices[chosen].get_shape(), slices[chosen].get_dtype()
    rows, features, torch_dtype = _matrix(name, shape, dtype)

    def chunks(start: int, size: int) -> Iterator[Tensor]:
        for first in range(start, rows, size):
            # Opened for each: it maps the file, and pages once read stay while it is open.
            with _told(name), safe_open(path, framework="pt") as file:
                chunk = file.get_slice(chosen)[first : first + size]
            yield chunk

    return Embeddings(name, path, key, rows, features, torch_dtype, chunks)


# ---- parquet -----------------------------------------------------------------------------------


def _open_parquet(name: str, path: Path, key: str | None) -> Embeddings:
    import pyarrow.types as kinds
    from pyarrow import parquet

    def is_list(kind: Any) -> bool:
        some = kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)
        return bool(some and kinds.is_floating(kind.value_type))

    with parquet.ParquetFile(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    kinds_by_name = {field.name: field.type for field in schema}
    lists = {k: str(kind) for k, kind in kinds_by_name.items() if is_list(kind)}
    numbers = [k for k, kind in kinds_by_name.items() if kinds.is_floating(kind)]
    if key is not None or lists:
        # named, a column of numbers is a matrix of one feature
        named = {} if key is None else {k: "" for k in numbers}
        columns = [_choose(name, path, key, {**lists, **named}, "column of floating-point numbers")]
    else:
        columns = numbers
    if not columns:
        listed = ", ".join(f"{k} {kind}" for k, kind in kinds_by_name.items())
        raise FileError(
            name,
            "holds no floating-point column and no list of such numbers: "
            f"{listed or 'no column at all'}",
        )
    values = [kinds_by_name[k].value_type if k in lists else kinds_by_name[k] for k in columns]
    dtype = np.result_type(*(kind.to_pandas_dtype() for kind in values))
    width = len(columns)
    if columns[0] in lists:
        width = _list_width(name, path, columns[0], kinds_by_name[columns[0]])
    rows, features, torch_dtype = _matrix(name, (rows, width), str(dtype))

    def blocks(skip_groups: int, size: int) -> Iterator[Tensor]:
        with _told(name), parquet.ParquetFile(path, **_BUFFERS) as file:
            row = sum(file.metadata.row_group(i).num_rows for i in range(skip_groups))
            groups = range(skip_groups, file.metadata.num_row_groups)
            rows_at_once = max(1, min(size, _PIECE // (features * dtype.itemsize)))
            for batch in file.iter_batches(rows_at_once, groups, columns, use_threads=False):
                if columns[0] in lists:
                    block = _list_rows(name, batch.column(0), row, features)
                else:
                    block = np.empty((batch.num_rows, features), dtype)
                    for j, column in enumerate(batch.columns):
                        block[:, j] = column.to_numpy(zero_copy_only=False)  # null is NaN
                row += batch.num_rows
                yield torch.from_numpy(np.array(block, dtype))

    def chunks(start: int, size: int) -> Iterator[Tensor]:
        with _told(name), parquet.ParquetFile(path) as file:
            lengths = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = np.cumsum(lengths)
        skip = int(np.searchsorted(ends, start, side="right"))
        before = sum(lengths[:skip])
        yield from _regrouped(blocks(skip, size), start - before, min(size, rows))

    ignored = [f"{k} ({kind})" for k, kind in kinds_by_name.items() if k not in columns]
    return Embeddings(name, path, key, rows, features, torch_dtype, chunks, ignored)


def _list_width(name: str, path: Path, column: str, kind: Any) -> int:
    """How many numbers a list holds: as its type says, or else the first row."""
    from pyarrow import parquet, types

    if types.is_fixed_size_list(kind):
        return int(kind.list_size)
    with parquet.ParquetFile(path, **_BUFFERS) as file:
        for batch in file.iter_batches(1, columns=[column], use_threads=False):
            first = batch.column(0)[0]
            return len(first) if first.is_valid else 0
    raise FileError(name, "no rows, which leaves open how many features they have")


def _list_rows(name: str, lists: Any, row: int, features: int) -> npt.NDArray[Any]:
    """A column of lists as a matrix; ``row`` is the number of its first in the file."""
    import pyarrow.compute as compute

    lengths = compute.fill_null(compute.list_value_length(lists), -1).to_numpy()
    wrong = np.flatnonzero(lengths != features)
    if len(wrong):
        first = int(wrong[0])
        what = f"a list of {lengths[first]}" if lengths[first] >= 0 else "null"
        raise FileError(name, f"row {row + first} is {what}, where the first row has {features}")
    values: npt.NDArray[Any] = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, features)


def _regrouped(blocks: Iterable[Tensor], skip: int, size: int) -> Iterator[Tensor]:
    """The rows of the blocks but for the first ``skip``, in chunks of ``size``."""
    chunk: Tensor | None = None
    filled = 0
    for block in blocks:
        block, skip = block[skip:], max(0, skip - len(block))
        if chunk is None:
            chunk = block.new_empty(size, block.shape[1])
        while len(block):
            count = min(size - filled, len(block))
            chunk[filled : filled + count] = block[:count]
            block, filled = block[count:], filled + count
            if filled == size:
                yield chunk
                filled = 0
    if chunk is not None and filled:
        yield chunk[:filled]


#: suffix -> reader of the format
_READERS: dict[str, Callable[[str, Path, str | None], Embeddings]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".safetensors": _open_safetensors,
    ".parquet": _open_parquet,
}
