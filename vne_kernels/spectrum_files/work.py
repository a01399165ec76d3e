"""One pass over the rows of all files, which can be interrupted and goes on where it was."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
from torch import Tensor
from tqdm import tqdm

import vne_kernels
from vne_kernels._core.ops import compute_dtype
from vne_kernels.accumulator import DensityAccumulator
from vne_kernels.common.files import atomic_write
from vne_kernels.common.reading import FileError, first_sentence, printable, read_tensors
from vne_kernels.common.stopping import Stopped, StopSignals
from vne_kernels.spectrum_files.outputs import UNFINISHED
from vne_kernels.spectrum_files.readers import Embeddings, open_embeddings

RAW = "raw rows"
GOING_ON = "going on"
CHUNK_BYTES = 16 << 20
SAVE_SECONDS = 60.0
#: Powers of two of the largest entry, by the dtype of the products: down to -safe and up to safe,
#: squares and those of far smaller ones can be summed up; up to most, squares can.
_SAFE_AND_MOST = {torch.float64: (300, 480), torch.float32: (40, 56)}
_MATRICES = 6  # d x d in float64 at once: two sums, a chunk's, and what the eigensolver needs


@dataclass(frozen=True)
class Settings:
    """What decides the numbers that come out."""

    normalize: bool
    precision: str  # "float64" or "float32"
    device: str
    chunk_rows: int
    skip_nonfinite: bool


def open_all(names: Sequence[str]) -> list[Embeddings]:
    """The files as one data set.

    Raises:
        FileError: one cannot be used, they differ in their number of features, or hold no row.
    """
    data = [open_embeddings(name) for name in names]
    first = data[0]
    for embeddings in data:
        if embeddings.features != first.features:
            raise FileError(
                embeddings.name,
                f"has {embeddings.features} features, where {first.name} has {first.features}",
            )
    if sum(embeddings.rows for embeddings in data) == 0:
        raise FileError(", ".join(names), "no rows")
    _check_memory(first)
    return data


def _check_memory(embeddings: Embeddings) -> None:
    d = embeddings.features
    needed = _MATRICES * 8 * d * d
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > total_memory:
        shape = (embeddings.rows, d)
        raise FileError(
            embeddings.name,
            f"{shape} needs {needed / 1e9:,.0f} GB for its {d} x {d} matrices, this machine has "
            f"{total_memory / 1e9:,.0f} GB; are rows and features the wrong way round?",
        )


def default_chunk_rows(data: Sequence[Embeddings]) -> int:
    row_bytes = max(embeddings.matrix.dtype.itemsize for embeddings in data) * data[0].features
    return max(1, CHUNK_BYTES // row_bytes)


class _Progress(msgspec.Struct, forbid_unknown_fields=True):
    """What is summed up so far, and how far that is, as it is saved."""

    identity: dict[str, dict[str, Any]]
    file: int
    row: int
    nonfinite: int
    first_nonfinite: str
    exponent: int | None
    sums: dict[str, dict[str, Any]]


class Work:
    """What is summed up so far, and how far that is."""

    def __init__(self, data: Sequence[Embeddings], settings: Settings) -> None:
        self.data, self.settings = data, settings
        self.sums = self._new_sums()
        self.file, self.row = 0, 0  # the next row to read
        self.nonfinite = 0
        self.first_nonfinite = ""
        #: All rows are divided by 2 to this power, that of the first chunk that is not 0
        self.exponent: int | None = None

        self.rows_in_all = sum(embeddings.rows for embeddings in data)
        self.identity = self._identity()  # of the files as they were opened
        #: eps of the dtype that the rows count as
        self.rounding = max(torch.finfo(compute_dtype(x.matrix.dtype)).eps for x in data)

    def _new_sums(self) -> dict[str, DensityAccumulator]:
        s = self.settings
        double = s.precision == "float64"
        kinds = {"rows": s.normalize}
        if double and s.normalize:
            kinds[RAW] = False  # RankMe and the rank are those of the rows as they are
        features, device = self.data[0].features, torch.device(s.device)
        return {  # eps = 0: a row of 1e-200 has a direction as any other
            name: DensityAccumulator(features, normalize=x, eps=0.0, double=double, device=device)
            for name, x in kinds.items()
        }

    @property
    def rows_read(self) -> int:
        return sum(embeddings.rows for embeddings in self.data[: self.file]) + self.row

    def run(self, out: Path, signals: StopSignals) -> None:
        """Read what is left. Saves in ``out`` every minute and when a signal asks to stop.

        Raises:
            Stopped: a signal came; what was read is saved.
            FileError: a file cannot be read on, or rows are not finite.
        """
        begin = saved = time.monotonic()
        signals.defer()
        total, done = self.rows_in_all, self.rows_read
        # disable=None: no bar where stderr is no terminal
        with tqdm(total=total, initial=done, unit=" rows", unit_scale=True, disable=None) as bar:
            while True:
                for chunk in self.data[self.file].chunks(self.row, self.settings.chunk_rows):
                    self._add(chunk)
                    bar.update(len(chunk))
                    if signals.received:
                        bar.close()
                        self._stop(out, signals.received)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._try_to_save(out, GOING_ON)
                        saved = time.monotonic()
                if self.file == len(self.data) - 1:
                    break
                self.file, self.row = self.file + 1, 0
        signals.restore()
        if time.monotonic() - begin > SAVE_SECONDS:
            self._try_to_save(out, GOING_ON)  # the eigenvalues can take long too
        self._check_finite()

    def _add(self, chunk: Tensor) -> None:
        finite, largest = _finite_rows(chunk)
        rows = chunk
        if finite is not None:
            name, first = self.data[self.file].name, int(finite.logical_not().nonzero()[0])
            self.first_nonfinite = self.first_nonfinite or f"row {self.row + first} of {name}"
            self.nonfinite += int(finite.logical_not().sum())
            rows = chunk[finite]
            largest = float(rows.abs().max()) if len(rows) else 0.0
        if len(rows) and (self.settings.skip_nonfinite or not self.nonfinite):
            # else nothing can come of the sums: the others are counted
            if not all(accumulator.normalize for accumulator in self.sums.values()):
                self._choose_exponent(chunk, largest)
            rows = rows.to(self.settings.device)
            scaled = _over_power_of_two(rows, self.exponent or 0)
            for accumulator in self.sums.values():
                # Normalized, large rows come to the same, and small ones among them are not lost.
                as_is = accumulator.normalize and (self.exponent or 0) > 0
                accumulator.update(rows if as_is else scaled)
        self.row += len(chunk)

    def _choose_exponent(self, chunk: Tensor, largest: float) -> None:
        """By the first chunk that is not 0; it has to do for all others.

        Raises:
            FileError: it does not, or rows that are taken as they are would need one.
        """
        double = self.settings.precision == "float64"
        safe, most = _SAFE_AND_MOST[torch.float64 if double else compute_dtype(chunk.dtype)]
        power = math.frexp(largest)[1]
        is_first = self.exponent is None and largest > 0
        if is_first:
            self.exponent = power if self.settings.normalize and abs(power) > safe else 0
        power -= self.exponent or 0
        if power > most or (is_first and power < -safe):
            row = self.row + int((chunk.abs().amax(-1) == largest).nonzero()[0])
            raise FileError(
                self.data[self.file].name,
                f"row {row} (counted from 0) holds {largest:.3g}: squares of numbers so far from "
                "1, or from those before, cannot be summed up; scale the rows",
            )

    def _check_finite(self) -> None:
        if self.nonfinite and not self.settings.skip_nonfinite:
            raise FileError(
                ", ".join(embeddings.name for embeddings in self.data),
                f"{self.nonfinite:,} of {self.rows_read:,} rows hold NaN or infinity, the first is "
                f"{self.first_nonfinite} (counted from 0): every score would be NaN; "
                "--skip-nonfinite leaves them out",
            )
        if self.sums["rows"].rows == 0:
            raise FileError(self.data[0].name, "every row holds NaN or infinity")

    def spectra(self) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues of the density matrix, and those of the rows as they are, (m,) each.

        The latter only from sums in float64.
        """
        eigenvalues = self.sums["rows"].eigenvalues().cpu()
        if self.settings.precision == "float32":
            return eigenvalues, None
        raw = self.sums.get(RAW)
        return eigenvalues, eigenvalues if raw is None else raw.eigenvalues().cpu()

    # ---- interruptions -------------------------------------------------------------------------

    def save(self, out: Path) -> None:
        content = {name: getattr(self, name) for name in _Progress.__struct_fields__}
        content["sums"] = {name: sums.state_dict() for name, sums in self.sums.items()}
        with atomic_write(out / UNFINISHED) as temporary:
            torch.save(content, temporary)

    def _stop(self, out: Path, signum: int) -> NoReturn:
        if self._try_to_save(out, "what was read is lost"):
            progress = f"{self.rows_read:,} of {self.rows_in_all:,} rows are summed up"
            _print_message(f"{progress}, saved in {out}; the same command goes on from there")
        raise Stopped(signum)

    def _try_to_save(self, out: Path, otherwise: str) -> bool:
        try:
            self.save(out)
        except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
            _print_message(
                f"cannot write {out / UNFINISHED} ({first_sentence(error)}); {otherwise}"
            )
            return False
        return True

    def resume(self, out: Path) -> str | None:
        """Go on from what ``out`` holds; says what it goes on from, or why it cannot."""
        path = out / UNFINISHED
        if not path.exists():
            return None
        try:
            saved = msgspec.convert(read_tensors(path), _Progress)
            if changes := _changes(saved.identity, self.identity):
                raise FileError(path, "; ".join(changes))
            sums = self._sums_of(saved)
        except (msgspec.MsgspecError, OSError, TypeError, ValueError) as error:
            why = error.why if isinstance(error, FileError) else error
            return f"{path} is not used, all rows are read again: {why}"
        self.sums = sums
        for name in ("file", "row", "nonfinite", "first_nonfinite", "exponent"):
            setattr(self, name, getattr(saved, name))
        return f"going on after {self.rows_read:,} rows"

    def _sums_of(self, saved: _Progress) -> dict[str, DensityAccumulator]:
        """The sums that were saved, which have to agree with all else that was saved.

        Raises:
            TypeError, ValueError: they do not.
        """
        sums = self._new_sums()
        if sums.keys() != saved.sums.keys():
            raise ValueError("it holds other sums")
        for name, accumulator in sums.items():
            accumulator.load_state_dict(saved.sums[name])
        if not (
            0 <= saved.file < len(self.data)
            and 0 <= saved.row <= self.data[saved.file].rows
            and saved.nonfinite >= 0
            and abs(saved.exponent or 0) <= 1100
        ):
            raise ValueError("it is of rows that are not there")
        read = sum(embeddings.rows for embeddings in self.data[: saved.file]) + saved.row
        left = read - saved.nonfinite
        for accumulator in sums.values():
            rows, weight = accumulator.rows, float(accumulator.weight)
            exact = self.settings.skip_nonfinite or not saved.nonfinite
            if (rows != left if exact else rows > left) or weight != rows:
                raise ValueError(f"{rows:,} rows are summed up, of {read:,} that were read")
            if rows and not bool(accumulator.density().isfinite().all()):
                raise ValueError("the sums are not finite")
        return sums

    def _identity(self) -> dict[str, dict[str, Any]]:
        """What has to be the same for the sums to be the same, part by part."""
        identity: dict[str, dict[str, Any]] = {
            "files": {"number": len(self.data), "names": [x.name for x in self.data]},
            "options": asdict(self.settings),
            "versions": {"vne_kernels": vne_kernels.__version__, "torch": str(torch.__version__)},
        }
        for embeddings in self.data:
            identity[embeddings.name] = {
                "path": str(embeddings.path.resolve()),
                "size": embeddings.version.size,
                "modification time": embeddings.version.modified,
            }
        return identity


def _print_message(message: str) -> None:
    tqdm.write(printable(message), file=sys.stderr)  # above the bar, where there is one


def _finite_rows(chunk: Tensor) -> tuple[Tensor | None, float]:
    """Which rows are finite, (n,), None if all are; and the largest entry, by its size."""
    least, most = (float(x) for x in chunk.aminmax())  # NaN where an entry is
    largest = max(-least, most)
    return (None if math.isfinite(largest) else chunk.isfinite().all(-1)), largest


def _over_power_of_two(chunk: Tensor, exponent: int) -> Tensor:
    if exponent == 0:
        return chunk
    half = exponent // 2  # 2 ** 1074 is no number of float64
    return chunk * 2.0**-half * 2.0 ** (half - exponent)


def _changes(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    if before.get("files") != now["files"]:
        return ["it is of other files"]
    return [
        f"{part}: {name} was {before.get(part, {}).get(name)}, is {value}"
        for part in now
        for name, value in now[part].items()
        if before.get(part, {}).get(name) != value
    ]
