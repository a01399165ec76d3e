"""How the programs read: regular files only, of bounded size, and nothing in them is believed.

A file may come from a stranger, be damaged, or change while it is read. Every reader here checks
before it takes memory, and raises :class:`FileError`: one line that names the file.
"""

from __future__ import annotations

import os
import pickle
import re
import resource
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

Kind = TypeVar("Kind")

MOST_TEXT = 16 << 20  # bytes of a file that is read at once
MOST_MEMORY = 256 << 20  # that a decoder takes beyond what it gives back


class FileError(ValueError):
    """A file or folder cannot be used: one line that names it and says why."""

    def __init__(self, name: object, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.why = why


def printable(text: object, most: int = 1000) -> str:
    r"""Returns ``text`` as one line of at most ``most`` characters that a terminal shows as it is.

    File names, keys and messages of libraries may hold what moves the cursor, sets a title, begins
    a line or reverses the direction of writing: such characters are escaped, as in ``\x1b``.
    """
    begin = str(text)[: most + 1]  # an escape is longer than what it is for
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in begin)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def open_regular(path: Path, most: int | None = None) -> IO[bytes]:
    """Opens a regular file of at most ``most`` bytes for reading.

    A pipe would wait for a writer, and a device may have no end.

    Raises:
        FileError: it is none, or larger.
        OSError: it cannot be opened.
    """
    if "\0" in str(path):
        raise FileError(printable(path), "must be a name without the character NUL")
    _check_regular(path, os.stat(path))  # before it is opened: that alone does something to devices
    # O_NONBLOCK: where a pipe has taken the name in between, opening it does not wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        about = os.fstat(descriptor)
        _check_regular(path, about)
        if most is not None and about.st_size > most:
            raise FileError(path, f"must have at most {most:,} bytes, got {about.st_size:,}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(path: Path, about: os.stat_result) -> None:
    if stat.S_ISREG(about.st_mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(about.st_mode), "a device")
    raise FileError(path, f"must be a regular file, got {kind}")


class Version(NamedTuple):
    """What differs once a file has been written to, or another has taken its name."""

    device: int
    inode: int
    size: int
    modified: int  # in nanoseconds

    @classmethod
    def of(cls, file: IO[bytes]) -> Version:
        about = os.fstat(file.fileno())
        return cls(about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)


def size_of(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


@contextmanager
def unchanged(name: object, file: IO[bytes], version: Version | None = None) -> Iterator[None]:
    """Raises :class:`FileError` where the open file changes meanwhile, or is not ``version``."""
    version = version or Version.of(file)

    def check(cause: Exception | None = None) -> None:
        if Version.of(file) != version:
            raise FileError(name, "changed while it was read") from cause

    check()
    try:
        yield
    except Exception as error:  # of a decoder, which may well come of the change
        check(error)
        raise
    check()


@contextmanager
def decoding(name: object) -> Iterator[None]:
    """Makes whatever a library raises about a file one :class:`FileError` that names it."""
    try:
        yield
    except (FileError, ModuleNotFoundError):
        raise
    except MemoryError as error:
        raise FileError(name, f"takes too much memory: {first_sentence(error)}") from error
    except OSError as error:
        raise FileError(
            name, f"cannot be read: {error.strerror or first_sentence(error)}"
        ) from error
    except Exception as error:
        # zipfile, zlib, NumPy and Arrow each have classes of their own for this.
        why = f"cannot be read, it is damaged or cut short: {first_sentence(error)}"
        raise FileError(name, why) from error


@contextmanager
def bounded_memory(more: int = MOST_MEMORY) -> Iterator[None]:
    """Within it this process takes at most ``more`` bytes beyond what it has: a MemoryError else.

    A small file can describe much: a list of 400 million zeros takes 598 bytes of parquet, and only
    its decoder knows. What takes memory meanwhile must be the decoder alone: the limit is that of
    the process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([_data_bytes() + more, *limits]), hard))
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"more than {more:,} bytes to decode it") from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    """What RLIMIT_DATA limits: the private memory that this process can write to."""
    status = Path("/proc/self/status").read_bytes()
    return int(status.partition(b"VmData:")[2].split()[0]) * 1024


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """Returns the content of a regular file of at most ``most`` bytes.

    Raises:
        FileError: it is none, or larger.
        OSError: it cannot be read.
    """
    with open_regular(path, most) as file:
        # Memory for all that is asked for is taken at once.
        return file.read(min(most, size_of(file)))


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """As :func:`read_bytes`, of text in UTF-8."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise FileError(path, f"must be text in UTF-8 ({error.reason})") from error


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """Returns the content of a JSON file, which must be of the type ``kind``, strictly.

    ``kind`` is a dataclass, a TypedDict or what else msgspec knows: no text counts as a number, and
    a number is finite.

    Raises:
        FileError: it is not JSON, or of another type; the message names the place.
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
    """
    import msgspec

    try:
        return msgspec.json.decode(read_bytes(path), type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FileError(path, f"cannot be used: {printable(error, 200)}") from error


def read_tensors(path: Path) -> Any:
    """Returns what ``torch.save`` wrote: tensors, numbers and text, nothing else is ever loaded.

    The file must be as it was written, by the CRC-32 that ``torch.save`` keeps of each part, which
    ``torch.load`` does not look at. The memory that is taken is that of the file.

    Raises:
        FileError: it is no such file, or damaged.
        OSError: it cannot be opened.
    """
    import torch

    with open_regular(path) as file, decoding(path):
        _check_archive(file)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = first_sentence(error)
            raise FileError(path, f"holds other things than tensors ({reason})") from error


def _check_archive(file: IO[bytes]) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        # torch.save packs nothing: what is unpacked would be larger than the file.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("a part of it is compressed")
        # The mark of a folder (MS-DOS's 0x10), at which torch.load leaves a tensor's memory unset.
        if any(member.external_attr & 0x10 for member in members):
            raise ValueError("a part of it is a folder")
        if sum(member.file_size for member in members) > size_of(file):
            raise ValueError("its parts are larger than itself")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


def first_sentence(error: BaseException) -> str:
    """What a library found, without its advice of how to load it nevertheless."""
    text = " ".join(str(error).split())
    found = re.search(r"Unsupported (?:global: GLOBAL|operand|class) \S+", text)
    return printable((found[0] if found else text[:120]) or type(error).__name__)
