"""How the programs write: a file appears whole or not at all, and a folder has one writer.

Unfinished files are in a hidden folder, ``.vne_kernels``, next to their destination, and nowhere
else: nothing but our own files is ever deleted. The folder is removed when it is empty.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vne_kernels.common.reading import FileError

HIDDEN = ".vne_kernels"
_TEMPORARY = re.compile(r"unfinished-[0-9a-f]{8}(\.[^.]*)?")
#: Filesystems that have no locks answer a lock with one of these.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path; renames it to ``path`` when the block succeeds.

    The content is on the disk before it gets the name, and the name before the block is left: a
    power cut leaves the old file or the new one.
    """
    # The same suffix: matplotlib and others choose the format by it.
    temporary, descriptor = _create_temporary(path.parent, path.suffix)
    try:
        yield temporary
        synchronize(temporary)
        os.replace(temporary, path)
        synchronize(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)
        _remove_if_empty(path.parent / HIDDEN)


def _create_temporary(folder: Path, suffix: str) -> tuple[Path, int]:
    """A new file in the hidden folder, and a descriptor whose lock says that its writer lives."""
    while True:
        hidden = _hidden_folder(folder)
        path = hidden / f"unfinished-{secrets.token_hex(4)}{suffix}"
        # Another process may remove the hidden folder, or a file that is not yet locked.
        with suppress(FileNotFoundError, FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            _lock(descriptor)
            if _is_still(path, descriptor):
                return path, descriptor
            os.close(descriptor)


def _hidden_folder(folder: Path) -> Path:
    hidden = folder / HIDDEN
    with suppress(FileExistsError):
        hidden.mkdir()
    if hidden.is_symlink() or not hidden.is_dir():
        raise FileError(hidden, "must be a folder of this program, or not be there")
    return hidden


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _lock(descriptor: int) -> bool:
    """Whether this process has the file now; so it is where the filesystem has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the open file has this name, and was not removed while its lock was waited for."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def synchronize(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Deletes what writers that were killed have left in ``folder``; those at work keep theirs."""
    hidden = folder / HIDDEN
    if hidden.is_symlink() or not hidden.is_dir():
        return
    for name in os.listdir(hidden):
        if not _TEMPORARY.fullmatch(name):
            continue
        with suppress(OSError):
            descriptor = os.open(hidden / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _lock(descriptor):
                    os.unlink(hidden / name)
            finally:
                os.close(descriptor)
    _remove_if_empty(hidden)


#: Descriptors of locks, which a forked process must not hold when this one has died.
_held: set[int] = set()


def _let_go_after_fork() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_after_fork)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[int]:
    """Makes ``folder`` where it is not there, and holds it: one process does ``what`` in it.

    Yields the descriptor that holds the lock. A program that inherits it (``pass_fds``) holds the
    lock too. What killed writers have left in the folder is removed.

    Raises:
        FileError: another process holds it.
        OSError: the folder cannot be made or written to.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        path = _hidden_folder(folder) / f"{what}.lock"
        with suppress(FileNotFoundError):  # another process has just removed the hidden folder
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            if not _lock(descriptor):
                os.close(descriptor)
                raise FileError(folder, f"another process is at work in this folder ({what})")
            if _is_still(path, descriptor):
                break
            os.close(descriptor)
    _held.add(descriptor)
    try:
        remove_temporaries(folder)
        yield descriptor
    finally:
        path.unlink(missing_ok=True)  # before the lock goes: who waits for it sees that it is gone
        _held.discard(descriptor)
        os.close(descriptor)
        _remove_if_empty(path.parent)
        if made:
            _remove_if_empty(folder)


def spare(folder: Path, names: Iterable[str], advice: str) -> None:
    """Refuses a folder that holds one of the files ``names``, which this program did not write.

    Raises:
        FileError: there is one; the message ends in ``advice``.
    """
    if foreign := [name for name in names if os.path.lexists(folder / name)]:
        raise FileError(
            folder, f"holds {', '.join(foreign)}, which this program has not written; {advice}"
        )


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, which has no NaN: a number that is not finite is an error of the caller's."""
    with atomic_write(path) as temporary:
        text = json.dumps(content, indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
