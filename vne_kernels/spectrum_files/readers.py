"""Files of embeddings as streams of rows: one reader for each format.

Memory stays flat: a reader holds one chunk, whatever the size of the file. No file is mapped into
memory (its pages would count as the program's own, and one that is cut short meanwhile would end
the program) and nothing is unpickled (that could run any code). Nothing that a file declares is
believed: `Embeddings.chunks` counts the rows, for every format.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vne_kernels._core.checks import DTYPES
from vne_kernels.common.arrays import PIECE, Header, Npz, fill
from vne_kernels.common.reading import (
    MOST_MEMORY,
    MOST_TEXT,
    FileError,
    Version,
    bounded_memory,
    decoding,
    open_regular,
    printable,
    size_of,
    unchanged,
)

#: by the names of NumPy and safetensors
_DTYPES = {
    **{str(dtype).removeprefix("torch."): dtype for dtype in DTYPES},
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
#: Rows of a file that is open, (file, start, size) -> tensors of `size` rows each, the last of
#: fewer, from row `start` on. Each is overwritten by the next: new memory for every one
#: leaves holes between that add up.
Read = Callable[[IO[bytes], int, int], Iterator[Tensor]]


@dataclass(frozen=True)
class Matrix:
    """What a reader finds in a file: (rows, features), and how to read it."""

    rows: int
    features: int
    dtype: torch.dtype
    read: Read
    ignored: str = ""  # columns that are not in the matrix


@dataclass(frozen=True)
class Embeddings(Matrix):
    """A matrix in a file, that is read in chunks."""

    _: KW_ONLY
    name: str  # as it was given: PATH, or PATH:KEY
    path: Path
    key: str | None  # likewise
    version: Version  # of the file when it was opened

    def chunks(self, start: int, size: int) -> Iterator[Tensor]:
        """The rows from ``start`` on, as `Read` yields them.

        Raises:
            FileError: it cannot be read, holds more or fewer rows than it declares, or has changed
                since it was opened.
        """
        with (
            decoding(self.name),
            open_regular(self.path) as file,
            unchanged(self.name, file, self.version),
        ):
            row = start
            for chunk in self.read(file, start, size):
                row += len(chunk)
                if row > self.rows:
                    break
                yield chunk
            if row != self.rows:
                more = f"more than {self.rows:,}" if row > self.rows else f"{row:,}"
                raise FileError(self.name, f"declares {self.rows:,} rows and holds {more}")


def open_embeddings(text: str) -> Embeddings:
    """The matrix in the file that ``text`` names: PATH, or PATH:KEY for one of several.

    Raises:
        FileError: there is no such file, or no matrix of floating-point rows in it.
        ModuleNotFoundError: the library that reads this format is not installed.
    """
    with decoding(text):
        path, key = _path_and_key(text)
        reader = _READERS.get(path.suffix)
        if reader is None:
            got = repr(path.suffix)
            raise FileError(path, f"must end in {', '.join(_READERS)}, got {got}")
        with open_regular(path) as file, unchanged(text, file):
            found = vars(reader(text, path, key, file))
            return Embeddings(**found, name=text, path=path, key=key, version=Version.of(file))


def _path_and_key(text: str) -> tuple[Path, str | None]:
    path, key = Path(text), None
    suffixes = "|".join(re.escape(suffix) for suffix in _READERS)
    if not path.exists() and (named := re.fullmatch(f"(.+?(?:{suffixes})):(.+)", text, re.DOTALL)):
        path, key = Path(named[1]), named[2]
    if not path.exists():
        raise FileError(path, "there is no such file")
    if path.is_dir():
        raise FileError(path, f"is a folder; give the files in it, such as {path}/*.npy")
    return path, key


def _matrix(name: str, shape: Sequence[int], dtype: str) -> tuple[int, int, torch.dtype]:
    """(rows, features, dtype) of an array that has to be a matrix of floating-point numbers."""
    wrong_shape = f"must be a matrix (rows, features >= 1), got shape {tuple(shape)}"
    if dtype == "object":
        why = "holds Python objects (a pickle), which are never loaded; save it as an array of "
        why += "numbers, such as x.astype(numpy.float32)"
    elif dtype not in _DTYPES:
        why = f"must hold float16, bfloat16, float32 or float64, got {dtype}; convert it, as by "
        why += "x.astype(numpy.float32)"
    elif len(shape) == 1:
        why = f"{wrong_shape}: one vector; reshape it to {(1, *shape)} if it is one row, or to "
        why += f"{(*shape, 1)}"
    elif len(shape) != 2:
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        why = f"{wrong_shape}; choose one vector a sample, or reshape it to {(rows, *shape[-1:])}"
    elif shape[1] == 0:
        why = wrong_shape
    else:
        return shape[0], shape[1], _DTYPES[dtype]
    raise FileError(name, why)


def _choose(
    name: str,
    path: Path,
    key: str | None,
    keys: Sequence[str],
    what: str,
    describe: Callable[[str], object],
) -> str:
    """The key of the only array of a file, or the one that was named."""
    if not keys:
        raise FileError(name, f"holds no {what}")
    if key is None and len(keys) == 1:
        return keys[0]
    if key is not None and key in keys:
        return key
    listed = _listed(keys, describe)
    if key is not None:
        raise FileError(name, f"holds no {what} {printable(key, 60)!r}, only {listed}")
    example = f"{path}:{printable(keys[0], 60)}"
    raise FileError(name, f"holds several {what}s, name one, such as {example}: {listed}")


def _listed(keys: Sequence[str], describe: Callable[[str], object]) -> str:
    """Some of the keys, each with what it is."""
    first = [f"{printable(key, 60)} {printable(describe(key), 100)}" for key in keys[:5]]
    return ", ".join([*first, *([f"{len(keys) - 5:,} more"] if len(keys) > 5 else [])])


# ---- NumPy -------------------------------------------------------------------------------------


def _open_npy(name: str, path: Path, key: str | None, file: IO[bytes]) -> Matrix:
    if key is not None:
        raise FileError(name, f"a .npy file holds one array and no {key!r}; leave out :{key}")
    header = Header.read(name, file, size_of(file))
    rows, features, dtype = _matrix(name, header.shape, header.type_name)
    return Matrix(rows, features, dtype, partial(_array_chunks, header))


def _open_npz(name: str, path: Path, key: str | None, file: IO[bytes]) -> Matrix:
    npz = Npz(path, file)
    chosen = _choose(name, path, key, npz.keys, "array", npz.header)
    header = npz.header(chosen)
    rows, features, dtype = _matrix(name, header.shape, header.type_name)
    if header.by_columns and header.nbytes > npz.most:
        raise FileError(
            name,
            f"is stored by columns and would have to be unpacked as a whole, to "
            f"{header.nbytes:,} bytes, for which the file is too small to be believed; "
            "save it by rows, as numpy.ascontiguousarray(x)",
        )

    def read(file: IO[bytes], start: int, size: int) -> Iterator[Tensor]:
        with Npz(path, file).open(chosen) as member, tempfile.TemporaryFile() as unpacked:
            if header.by_columns:  # which are read side by side: not possible while unpacking
                copyfileobj(member, unpacked, PIECE)
            source = unpacked if header.by_columns else member
            yield from _array_chunks(header, source, start, size)

    return Matrix(rows, features, dtype, read)


def _array_chunks(header: Header, file: IO[bytes], start: int, size: int) -> Iterator[Tensor]:
    rows, features = header.shape
    begin = header.offset + start * features * header.dtype.itemsize
    if isinstance(file, zipfile.ZipExtFile):
        # Read rather than skipped, which would leave the checksum out.
        while file.tell() < begin and file.read(min(begin - file.tell(), PIECE)):
            pass
    elif not header.by_columns:
        file.seek(begin)
    block = np.empty((min(size, rows), features), header.dtype)
    column = np.empty(len(block), header.dtype)
    for first in range(start, rows, size):
        block, column = block[: rows - first], column[: rows - first]
        if header.by_columns:
            for j in range(features):
                file.seek(header.offset + (j * rows + first) * header.dtype.itemsize)
                fill(file, column)
                block[:, j] = column
        else:
            fill(file, block)
        yield torch.from_numpy(block.astype(block.dtype.newbyteorder("="), copy=False))


# ---- safetensors -------------------------------------------------------------------------------

_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: Annotated[list[_Size], msgspec.Meta(max_length=64)]
    data_offsets: tuple[_Size, _Size]

    def __str__(self) -> str:
        return f"{tuple(self.shape)} {self.dtype}"


def _open_safetensors(name: str, path: Path, key: str | None, file: IO[bytes]) -> Matrix:
    with bounded_memory():  # an entry takes far more than its bytes
        entries, begin = _safetensors_header(name, file)
    chosen = _choose(name, path, key, list(entries), "tensor", entries.__getitem__)
    entry = entries[chosen]
    rows, features, dtype = _matrix(name, entry.shape, entry.dtype)
    first, last = entry.data_offsets
    if rows * features * dtype.itemsize != last - first:
        raise FileError(name, f"is damaged: {entry} does not take {last - first:,} bytes")
    # NumPy has no bfloat16: two bytes are two bytes until torch has them.
    numbers = np.dtype("<i2" if dtype == torch.bfloat16 else f"<f{dtype.itemsize}")
    header = Header((rows, features), False, numbers, begin + first)

    def read(file: IO[bytes], start: int, size: int) -> Iterator[Tensor]:
        return (chunk.view(dtype) for chunk in _array_chunks(header, file, start, size))

    return Matrix(rows, features, dtype, read)


def _safetensors_header(name: str, file: IO[bytes]) -> tuple[dict[str, _Entry], int]:
    """The tensors, and where the first begins; they fill the file without a hole, by the format."""
    size, begin = size_of(file), 8 + int.from_bytes(file.read(8), "little")
    if begin > min(size, 8 + MOST_TEXT):
        raise FileError(name, f"is damaged or cut short: its header takes {begin - 8:,} bytes")
    raw = msgspec.json.decode(file.read(begin - 8), type=dict[str, msgspec.Raw])
    raw.pop("__metadata__", None)
    entries = {key: msgspec.json.decode(text, type=_Entry) for key, text in raw.items()}
    end = begin
    for first, last in sorted(entry.data_offsets for entry in entries.values()):
        if begin + first != end or last < first:
            raise FileError(name, "is damaged: its tensors overlap or leave a hole")
        end = begin + last
    if end != size:
        what = "is cut short" if end > size else "holds more than its tensors"
        raise FileError(name, f"{what}: they end at byte {end:,}, it has {size:,}")
    return entries, begin


# ---- parquet -----------------------------------------------------------------------------------


def _open_parquet(name: str, path: Path, key: str | None, file: IO[bytes]) -> Matrix:
    import pyarrow.types as types

    content = _parquet(file)
    schema, groups = content.schema_arrow, content.metadata
    kinds = {field.name: field.type for field in schema}
    if len(kinds) < len(schema):
        raise FileError(name, "holds several columns of one name")
    #: column -> the type of its numbers, where they are floating-point
    numbers = {k: kind for k, kind in kinds.items() if types.is_floating(kind)}
    is_list = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    lists = {k: kind.value_type for k, kind in kinds.items() if any(of(kind) for of in is_list)}
    lists = {k: kind for k, kind in lists.items() if types.is_floating(kind)}
    describe = kinds.__getitem__
    columns = list(numbers)
    if key is not None or lists:
        # named, a column of numbers is a matrix of one feature
        keys = [*lists, *([] if key is None else numbers)]
        what = "column of floating-point numbers"
        columns = [_choose(name, path, key, keys, what, describe)]
    if not columns:
        listed = _listed(list(kinds), describe) or "no column at all"
        raise FileError(
            name, f"holds no floating-point column and no list of such numbers: {listed}"
        )
    of_lists = columns[0] in lists
    dtype = np.result_type(*((lists | numbers)[k].to_pandas_dtype() for k in columns))
    width = _list_width(name, file, columns[0], kinds[columns[0]]) if of_lists else len(columns)
    rows, features, torch_dtype = _matrix(name, (groups.num_rows, width), str(dtype))

    def blocks(file: IO[bytes], skip_groups: int, row: int, size: int) -> Iterator[Tensor]:
        at_once = max(1, min(size, PIECE // (features * dtype.itemsize)))
        for batch in _batches(file, columns, at_once, skip_groups):
            if of_lists:
                block = _list_rows(name, batch.column(0), row, features)
            else:  # null is NaN
                block = np.stack([x.to_numpy(zero_copy_only=False) for x in batch.columns], 1)
            row += batch.num_rows
            yield torch.from_numpy(np.array(block, dtype))

    def read(file: IO[bytes], start: int, size: int) -> Iterator[Tensor]:
        lengths = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        skip = int(np.searchsorted(np.cumsum(lengths), start, side="right"))
        before = sum(lengths[:skip])
        return _regrouped(blocks(file, skip, before, size), start - before, min(size, rows))

    ignored = [k for k in kinds if k not in columns]
    left_out = _listed(ignored, lambda k: f"({describe(k)})")
    return Matrix(rows, features, torch_dtype, read, left_out)


def _parquet(file: IO[bytes]) -> Any:
    """The open file as Arrow's, whose columns are buffered each for itself."""
    from pyarrow import parquet

    with _bounded_by(file):
        return parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=1 << 16, page_checksum_verification=True
        )


def _bounded_by(file: IO[bytes]) -> AbstractContextManager[None]:
    """What Arrow decodes at once: columns side by side take a page each, as large as the file."""
    return bounded_memory(max(MOST_MEMORY, 4 * size_of(file)))


def _batches(file: IO[bytes], columns: list[str], rows: int, skip_groups: int = 0) -> Iterator[Any]:
    content = _parquet(file)
    groups = range(skip_groups, content.num_row_groups)
    with _bounded_by(file):
        batches = content.iter_batches(rows, groups, columns, use_threads=False)
    while True:
        with _bounded_by(file):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _list_width(name: str, file: IO[bytes], column: str, kind: Any) -> int:
    """How many numbers a list holds: as its type says, or else the first row."""
    import pyarrow.types as types

    if types.is_fixed_size_list(kind):
        return int(kind.list_size)
    for batch in _batches(file, [column], 1):
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
_READERS: dict[str, Callable[[str, Path, str | None, IO[bytes]], Matrix]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".safetensors": _open_safetensors,
    ".parquet": _open_parquet,
}
