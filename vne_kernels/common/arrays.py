"""NumPy's formats, .npy and .npz, of which nothing is believed: no size, no length, no method.

Nothing is unpickled, which could run any code, and no file is mapped into memory, where its pages
would count as the program's own. Memory is taken after the file has been found to hold as many
bytes as it declares.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vne_kernels.common.reading import (
    FileError,
    bounded_memory,
    decoding,
    first_sentence,
    printable,
    size_of,
)

PIECE = 1 << 20  # bytes read or unpacked at once
MOST_HEADER = 1 << 16
#: What is unpacked at once is at most so much larger than its file, or as large as this.
MOST_TIMES, MOST_UNPACKED = 20, 64 << 20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1


@dataclass(frozen=True)
class Header:
    """Of an array in NumPy's format, and where in the stream its numbers begin."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype[Any]
    offset: int

    def __str__(self) -> str:
        return f"{self.shape} {self.type_name}"

    @property
    def type_name(self) -> str:
        return str(self.dtype.newbyteorder("="))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def read(cls, name: object, file: IO[bytes], size: int) -> Header:
        """The header at the begin of ``file``, whose array fills the ``size`` bytes of the file.

        Raises:
            FileError: there is none, or the array does not.
        """
        start = io.BytesIO(file.read(MOST_HEADER))  # the length that a header declares is a claim
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                shape, by_columns, dtype = _parse(start)
        except Exception as error:  # whatever the first wrong character leads NumPy's parser to
            raise FileError(name, f"has no header of NumPy's: {first_sentence(error)}") from error
        if len(shape) > 64 or any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape):
            got = printable(shape, 100)
            raise FileError(name, f"must have a shape of sizes from 0 on, got {got}")
        header = cls(shape, by_columns, dtype, start.tell())
        held = size - header.offset
        if held != header.nbytes and not dtype.hasobject:
            what = "is cut short" if held < header.nbytes else "holds more than one array"
            takes = f"{header} takes {header.nbytes:,} bytes"
            raise FileError(name, f"{what}: {takes}, {held:,} are there")
        return header


def _parse(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of NumPy's format")  # (3, 0) is for names of columns alone


class Npz:
    """The arrays of an .npz that is open.

    Args:
        name: what errors call it.
        file: the open file, a regular one.
        times: an array that is unpacked at once is at most so much larger than the file.

    Raises:
        FileError: it is no archive.
    """

    def __init__(self, name: object, file: IO[bytes], times: int = MOST_TIMES) -> None:
        self.name = name
        self.times = times
        self.size = size_of(file)
        with decoding(name), bounded_memory():  # a list of members takes far more than its bytes
            self._archive = zipfile.ZipFile(file)
        #: keys to members, in the file's order
        self._members = {
            member.filename.removesuffix(".npy"): member
            for member in self._archive.infolist()
            if member.filename.endswith(".npy")
        }

    @property
    def keys(self) -> list[str]:
        return list(self._members)

    @property
    def most(self) -> int:
        """Bytes that may be unpacked at once."""
        return max(MOST_UNPACKED, self.times * self.size)

    def header(self, key: str) -> Header:
        """
        Raises:
            FileError: there is no array ``key``, or it cannot be read.
        """
        name = self._name(key)
        with self.open(key) as file, decoding(name):
            return Header.read(name, file, self._members[key].file_size)

    def open(self, key: str) -> IO[bytes]:
        """The bytes of the member, header included. Read to its end, its checksum is compared.

        Raises:
            FileError: there is no array ``key``, it is encrypted, or packed by another method.
        """
        name = self._name(key)
        if key not in self._members:
            raise FileError(name, "there is no such array in it")
        member = self._members[key]
        if member.flag_bits & _ENCRYPTED:
            raise FileError(name, "is encrypted")
        if member.compress_type not in _METHODS:
            got = f"method {member.compress_type}"
            raise FileError(name, f"must be stored or deflated, got {got}")
        with decoding(name):
            return self._archive.open(member)

    def array(self, key: str) -> npt.NDArray[Any]:
        """The whole array, which has to hold numbers.

        Raises:
            FileError: there is no array ``key``; it holds other things than numbers; it is damaged;
                or it takes more bytes than :attr:`most`.
        """
        name, header = self._name(key), self.header(key)
        if header.dtype.kind not in "biuf":
            raise FileError(name, f"must hold numbers, got {header.type_name}")
        if header.nbytes > self.most:
            raise FileError(
                name, f"must take at most {self.most:,} bytes, as its file is small; got {header}"
            )
        with self.open(key) as file, decoding(name):
            file.read(header.offset)
            array = np.empty(math.prod(header.shape), header.dtype)
            fill(file, array)
            return array.reshape(header.shape, order="F" if header.by_columns else "C")

    def _name(self, key: str) -> str:
        return f"{self.name}:{printable(key, 60)}"


def fill(file: IO[bytes], array: npt.NDArray[Any]) -> None:
    """Reads the whole of a contiguous array from ``file``."""
    buffer = memoryview(array.view(np.uint8)).cast("B")  # type: ignore[arg-type]  # NumPy 1
    while buffer:
        count = file.readinto(buffer[:PIECE])  # type: ignore[attr-defined]  # every binary file has it
        if not count:
            raise EOFError("it ends too early")
        buffer = buffer[count:]
