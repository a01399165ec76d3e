"""How the programs read and write: whole files, one writer a folder, and nothing believed."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pytest
import torch

from vne_kernels.common import files, reading, terminal
from vne_kernels.common.reading import FileError
from vne_kernels.pretrain import tables

# ---- temporaries ---------------------------------------------------------------------------------

OF_A_USER = (".env.tmp", ".bashrc.tmpl", ".npmrc.tmpfiles", ".x.tmpvault", ".loss.7.tmp.png")


def test_only_what_dead_writers_left_is_removed(tmp_path: Path) -> None:
    hidden = tmp_path / files.HIDDEN
    hidden.mkdir()
    left, foreign = hidden / "unfinished-0123abcd.png", hidden / "unfinished-of-a-user.png"
    for path in (left, foreign, *(tmp_path / name for name in OF_A_USER)):
        path.touch()
    with files.atomic_write(tmp_path / "a.json") as at_work:
        at_work.write_text("half")
        files.remove_temporaries(tmp_path)
        assert not left.exists()
        assert at_work.read_text() == "half"
    assert (tmp_path / "a.json").read_text() == "half"
    assert {path.name for path in tmp_path.iterdir()} == {*OF_A_USER, "a.json", files.HIDDEN}
    assert list(hidden.iterdir()) == [foreign]


def test_a_link_in_place_of_the_hidden_folder_is_not_followed(tmp_path: Path) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    (elsewhere / "unfinished-0123abcd.png").touch()
    (out / files.HIDDEN).symlink_to(elsewhere)
    files.remove_temporaries(out)
    with pytest.raises(FileError), files.atomic_write(out / "a"):
        pass
    with pytest.raises(FileError), files.locked(out, "work"):
        pass
    assert [path.name for path in elsewhere.iterdir()] == ["unfinished-0123abcd.png"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(OSError, match="folder"), files.atomic_write(path) as temporary:
        temporary.rename(tmp_path / "no" / "folder")
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".csv")
    files.write_table(path, ["a"], [[1]])
    assert tables.read_table(path) == (["a"], [[1.0]])


# ---- locks ---------------------------------------------------------------------------------------


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    with files.locked(out, "train"):
        with pytest.raises(FileError), files.locked(out, "train"):
            pass
        with files.locked(out, "report"):  # another piece of work
            pass
    assert not out.exists()  # made for the lock, and nothing was written
    out.mkdir()
    with files.locked(out, "train"):
        pass
    assert list(out.iterdir()) == []


HOLD = """
import os, sys, time
from pathlib import Path
from vne_kernels.common import files
with files.locked(Path(sys.argv[1]), "train"):
    if os.fork() == 0:  # as a loading process, which may live on for some seconds
        time.sleep(30)
        os._exit(0)
    print(flush=True)
    time.sleep(30)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        with pytest.raises(FileError), files.locked(tmp_path, "train"):
            pass
        holder.kill()
        holder.wait()
        with files.locked(tmp_path, "train"):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


# ---- regular files -------------------------------------------------------------------------------


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    begin = time.monotonic()
    for name in ("pipe", "zero", "folder"):
        for read in (reading.read_bytes, reading.read_text, tables.read_table):
            with pytest.raises(FileError, match=name):
                read(tmp_path / name)
        with pytest.raises(FileError, match=name):
            reading.read_json(tmp_path / name, dict)
        with pytest.raises(FileError, match=name):
            reading.read_tensors(tmp_path / name)
    assert time.monotonic() - begin < 5


def test_a_file_larger_than_allowed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FileError, match="sparse"):
        reading.read_bytes(path)
    with pytest.raises(FileError):
        reading.read_bytes(Path("a\0b"))


def test_names_are_shown_on_one_line_without_control() -> None:
    name = "a\x1b]0;title\x07\n\u202egnp\udcff é 漢"
    shown = reading.printable(name)
    assert shown == "a\\x1b]0;title\\x07\\n\\u202egnp\\udcff é 漢"
    assert len(reading.printable("x" * 5000)) == 1000


def test_a_stream_shows_what_its_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, "latin-1"))
    terminal.show_any_text()
    print("q = ∞ \udcff", flush=True)
    assert buffer.getvalue() == b"q = \\u221e \\udcff\n"


def test_message_of_an_error_that_is_not_ours() -> None:
    assert terminal.reason(MemoryError()) is not None
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert terminal.reason(of_torch.value) is not None
    with pytest.raises(OSError) as of_system:  # noqa: PT011  (the number follows)
        Path("/" + "n" * 256).touch()
    assert "n" * 256 in str(terminal.reason(of_system.value))
    assert terminal.reason(ValueError("a bug")) is None


def test_memory_is_bounded_and_given_back() -> None:
    with pytest.raises(MemoryError), reading.bounded_memory(64 << 20):
        np.ones(32 << 20)
    with reading.bounded_memory(64 << 20):
        np.ones(1 << 20)
    np.ones(32 << 20)


# ---- our own files -------------------------------------------------------------------------------


@dataclass
class Of:
    count: int
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count must be at least 0")


class Record(TypedDict):
    of: Of
    names: list[str]


BAD_JSON = {
    "no JSON": "{",
    "empty": "",
    "a list": "[]",
    "lacks a field": '{"names": []}',
    "text for a number": '{"of": {"count": "1"}, "names": []}',
    "truth for a number": '{"of": {"count": true}, "names": []}',
    "float for an integer": '{"of": {"count": 1.5}, "names": []}',
    "NaN": '{"of": {"count": 1, "share": NaN}, "names": []}',
    "infinity": '{"of": {"count": 1, "share": 1e999}, "names": []}',
    "a number in a list of text": '{"of": {"count": 1}, "names": [1]}',
    "depth": "[" * 100_000,
    "digits": '{"of": {"count": 1, "share": ' + "9" * 5000 + '}, "names": []}',
    "not UTF-8": '{"of": {"count": 1}, "names": ["\udcff"]}',
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_of_another_type_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(BAD_JSON[case], errors="surrogateescape")
    with pytest.raises(FileError, match=r"record\.json"):
        reading.read_json(path, Record)


def test_json_of_its_type(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"of": {"count": 1}, "names": ["a"], "of a later version": 1}')
    assert reading.read_json(path, Record) == {"of": Of(1), "names": ["a"]}
    path.write_text('{"of": {"count": -1}, "names": []}')
    with pytest.raises(FileError, match="count"):
        reading.read_json(path, Record)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("a,b\r\n1,2\r\n", [[1, 2]]),
        ("a,b\r\n1,2\r\n3,4", [[1, 2]]),  # cut short: the number may have had more digits
        ("a,b\r\n1,2\r\n3", [[1, 2]]),
        ("a,b\r\n", []),
        ("a,b\r\n1\r\n3,4\r\n", None),
        ("a,b\r\n1,x\r\n3,4\r\n", None),
        ("a,b\r\n1,2,3\r\n", None),
        ("", None),
        ('a,b\r\n1,"' + "x" * 200_000 + '"\r\n', None),
        ("a,b\r\n1,\0\r\n", None),
        ("a,c\r\n1,2\r\n", None),
    ],
)
def test_tables(content: str, rows: list[list[float]] | None, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content, newline="")
    if rows is None:
        with pytest.raises(FileError, match=r"table\.csv"):
            tables.read_table(path, ("b",))
    else:
        assert tables.read_table(path, ("b",)) == (["a", "b"], rows)


def test_no_damaged_byte_of_tensors_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    content: dict[str, Any] = {"a": torch.arange(3.0), "b": [1, "x"]}
    torch.save(content, path)
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for place in range(0, len(whole), 2):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            read = reading.read_tensors(path)
        except FileError:
            refused += 1
        else:
            assert torch.equal(read["a"], content["a"])
            assert read["b"] == content["b"]
    assert refused > len(whole) // 6  # the others are padding, and what no reader looks at


def test_tensors_that_a_stranger_made(tmp_path: Path) -> None:
    """Torch leaves the memory of a part that is marked a folder unset, and unpacks others."""
    import zipfile

    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    for change in ("folder", "packed"):
        path = tmp_path / f"{change}.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                part = zipfile.ZipInfo(name)
                part.external_attr = 0x10 if change == "folder" else 0
                part.compress_type = zipfile.ZIP_DEFLATED if change == "packed" else 0
                archive.writestr(part, data)
        with pytest.raises(FileError, match=change):
            reading.read_tensors(path)
    (tmp_path / "old.pt").write_bytes(b"\x80\x02.")  # a bare pickle, as torch.save once wrote
    with pytest.raises(FileError, match=r"old\.pt"):
        reading.read_tensors(tmp_path / "old.pt")
