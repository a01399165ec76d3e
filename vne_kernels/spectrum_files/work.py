"""One pass over the rows of all files, which can be interrupted and goes on where it was."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import torch
from torch import Tensor
from tqdm import tqdm

import vne_kernels
from vne_kernels._core.dtypes import compute_dtype
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
#: Of the smaller side in float64 at once: two sums, a chunk's, and what the eigensolver needs; and
#: copies of the rows, which are kept where there are fewer of them than features
_MATRICES, _COPIES = 6, 5


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
    rows, features = sum(embeddings.rows for embeddings in data), first.features
    if rows == 0:
        raise FileError(", ".join(names), "no rows")
    side = min(rows, features)
    needed = 8 * (_MATRICES * side**2 + (_COPIES * rows * features if rows < features else 0))
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > total_memory:
        raise FileError(
            first.name,
            f"{(rows, features)} needs {needed / 1e9:,.0f} GB for its {side} x {side} matrices, "
            f"this machine has {total_memory / 1e9:,.0f} GB; are rows and features the wrong way "
            "round?",
        )
    return data


def default_chunk_rows(data: Sequence[Embeddings]) -> int:
    row_bytes = max(embeddings.dtype.itemsize for embeddings in data) * data[0].features
    return max(1, CHUNK_BYTES // row_bytes)


_Count = Annotated[int, msgspec.Meta(ge=0)]


class Progress(msgspec.Struct, forbid_unknown_fields=True):
    """How far the pass is, as it is saved."""

    identity: dict[str, bool | int | str | list[str]]  # what has to be the same to go on
    sums: dict[str, dict[str, Any]] = {}  # states of the accumulators, only while it is saved
    file: _Count = 0  # with row: the next row to read
    row: _Count = 0
    nonfinite: _Count = 0  # rows with NaN or infinity
    first_nonfinite: str = ""
    #: All rows are divided by 2 to this power, that of the first chunk that is not 0
    exponent: Annotated[int, msgspec.Meta(ge=-1100, le=1100)] | None = None


class Work:
    """What is summed up so far, and how far that is."""

    def __init__(self, data: Sequence[Embeddings], settings: Settings) -> None:
        self.data, self.settings = data, settings
        self.sums = self._new_sums()
        self.progress = Progress(self._identity())  # of the files as they were opened
        #: rows before each file, and of all files
        self.rows_before = [0, *accumulate(embeddings.rows for embeddings in data)]
        #: eps of the dtype that the rows count as
        self.rounding = max(torch.finfo(compute_dtype(x.dtype)).eps for x in data)

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
        return self.rows_before[self.progress.file] + self.progress.row

    def run(self, out: Path, signals: StopSignals) -> None:
        """Read what is left. Saves in ``out`` every minute and when a signal asks to stop.

        Raises:
            Stopped: a signal came; what was read is saved.
            FileError: a file cannot be read on, or rows are not finite.
        """
        begin = saved = time.monotonic()
        signals.defer()
        total, done, at = self.rows_before[-1], self.rows_read, self.progress
        # disable=None: no bar where stderr is no terminal
        with tqdm(total=total, initial=done, unit=" rows", unit_scale=True, disable=None) as bar:
            while True:
                for chunk in self.data[at.file].chunks(at.row, self.settings.chunk_rows):
                    self._add(chunk)
                    bar.update(len(chunk))
                    if signals.received:
                        bar.close()
                        self._stop(out, signals.received)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save(out, GOING_ON)
                        saved = time.monotonic()
                if at.file == len(self.data) - 1:
                    break
                at.file, at.row = at.file + 1, 0
        signals.restore()
        if time.monotonic() - begin > SAVE_SECONDS:
            self._save(out, GOING_ON)  # the eigenvalues can take long too
        self._check_finite()

    def _add(self, chunk: Tensor) -> None:
        finite, largest = _finite_rows(chunk)
        rows, at = chunk, self.progress
        if finite is not None:
            name, first = self.data[at.file].name, int(finite.logical_not().nonzero()[0])
            at.first_nonfinite = at.first_nonfinite or f"row {at.row + first} of {name}"
            at.nonfinite += int(finite.logical_not().sum())
            rows = chunk[finite]
            largest = float(rows.abs().max()) if len(rows) else 0.0
        if len(rows) and (self.settings.skip_nonfinite or not at.nonfinite):
            # else nothing can come of the sums: the others are counted
            if not all(accumulator.normalize for accumulator in self.sums.values()):
                self._choose_exponent(chunk, largest)
            rows, exponent = rows.to(self.settings.device), at.exponent or 0
            scaled = _over_power_of_two(rows, exponent)
            for accumulator in self.sums.values():
                # Normalized, large rows come to the same, and small ones among them are not lost.
                accumulator.update(rows if accumulator.normalize and exponent > 0 else scaled)
        at.row += len(chunk)

    def _choose_exponent(self, chunk: Tensor, largest: float) -> None:
        """By the first chunk that is not 0; it has to do for all others.

        Raises:
            FileError: it does not, or rows that are taken as they are would need one.
        """
        double = self.settings.precision == "float64"
        safe, most = _SAFE_AND_MOST[torch.float64 if double else compute_dtype(chunk.dtype)]
        power, at = math.frexp(largest)[1], self.progress
        is_first = at.exponent is None and largest > 0
        if is_first:
            at.exponent = power if self.settings.normalize and abs(power) > safe else 0
        power -= at.exponent or 0
        if power > most or (is_first and power < -safe):
            row = at.row + int((chunk.abs().amax(-1) == largest).nonzero()[0])
            raise FileError(
                self.data[at.file].name,
                f"row {row} (counted from 0) holds {largest:.3g}: squares of numbers so far from "
                "1, or from those before, cannot be summed up; scale the rows",
            )

    def _check_finite(self) -> None:
        if self.progress.nonfinite and not self.settings.skip_nonfinite:
            raise FileError(
                ", ".join(embeddings.name for embeddings in self.data),
                f"{self.progress.nonfinite:,} of {self.rows_read:,} rows hold NaN or infinity, the "
                f"first is {self.progress.first_nonfinite} (counted from 0): every score would be "
                "NaN; --skip-nonfinite leaves them out",
            )
        if self.sums["rows"].rows == 0:
            raise FileError(self.data[0].name, "every row holds NaN or infinity")

    def spectra(self) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues of the density matrix, and those of the rows as they are, (m,) each.

        The latter only from sums in float64.
        """
        found = {name: accumulator.eigenvalues().cpu() for name, accumulator in self.sums.items()}
        eigenvalues = found["rows"]
        exact = self.settings.precision == "float64"
        return eigenvalues, found.get(RAW, eigenvalues) if exact else None

    # ---- interruptions -------------------------------------------------------------------------

    def _save(self, out: Path, otherwise: str) -> bool:
        """Whether it could be saved in ``out``; a message says so if not."""
        sums = {name: accumulator.state_dict() for name, accumulator in self.sums.items()}
        content = msgspec.structs.asdict(self.progress) | {"sums": sums}
        try:
            with atomic_write(out / UNFINISHED) as temporary:
                torch.save(content, temporary)
        except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
            why = first_sentence(error)
            _print_message(f"cannot write {out / UNFINISHED} ({why}); {otherwise}")
            return False
        return True

    def _stop(self, out: Path, signum: int) -> NoReturn:
        if self._save(out, "what was read is lost"):
            progress = f"{self.rows_read:,} of {self.rows_before[-1]:,} rows are summed up"
            _print_message(f"{progress}, saved in {out}; the same command goes on from there")
        raise Stopped(signum)

    def resume(self, out: Path) -> str | None:
        """Go on from what ``out`` holds; says what it goes on from, or why it cannot."""
        path = out / UNFINISHED
        if not path.exists():
            return None
        try:
            saved = msgspec.convert(read_tensors(path), Progress)
            self._check_identity(saved.identity)
            self.sums = self._sums_of(saved)
        except (msgspec.MsgspecError, OSError, TypeError, ValueError) as error:
            why = error.why if isinstance(error, FileError) else error
            return f"{path} is not used, all rows are read again: {why}"
        saved.sums.clear()
        self.progress = saved
        return f"going on after {self.rows_read:,} rows"

    def _sums_of(self, saved: Progress) -> dict[str, DensityAccumulator]:
        """The sums that were saved, which have to agree with all else that was saved.

        Raises:
            TypeError, ValueError: they do not.
        """
        sums = self._new_sums()
        if sums.keys() != saved.sums.keys():
            raise ValueError("it holds other sums")
        for name, accumulator in sums.items():
            accumulator.load_state_dict(saved.sums[name])
        if saved.file >= len(self.data) or saved.row > self.data[saved.file].rows:
            raise ValueError("it is of rows that are not there")
        read = self.rows_before[saved.file] + saved.row
        left = read - saved.nonfinite
        for accumulator in sums.values():
            rows, weight = accumulator.rows, float(accumulator.weight)
            exact = self.settings.skip_nonfinite or not saved.nonfinite
            if (rows != left if exact else rows > left) or weight != rows:
                raise ValueError(f"{rows:,} rows are summed up, of {read:,} that were read")
            if not accumulator._is_finite():
                raise ValueError("the sums are not finite")
        return sums

    def _identity(self) -> dict[str, bool | int | str | list[str]]:
        """What has to be the same for the sums to be the same, by what messages call it."""
        return {
            "files": [embeddings.name for embeddings in self.data],
            **{f"options: {name}": value for name, value in asdict(self.settings).items()},
            "versions: vne_kernels": vne_kernels.__version__,
            "versions: torch": str(torch.__version__),
            **{f"{x.name}: path": str(x.path.resolve()) for x in self.data},
            **{f"{x.name}: size": x.version.size for x in self.data},
            **{f"{x.name}: modification time": x.version.modified for x in self.data},
        }

    def _check_identity(self, saved: dict[str, bool | int | str | list[str]]) -> None:
        """Raises ValueError, which says all that has changed since it was saved."""
        now = self.progress.identity
        if saved.get("files") != now["files"]:
            raise ValueError("it is of other files")
        changes = [
            f"{name} was {saved.get(name)}, is {value}"
            for name, value in now.items()
            if saved.get(name) != value
        ]
        if changes:
            raise ValueError("; ".join(changes))


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
