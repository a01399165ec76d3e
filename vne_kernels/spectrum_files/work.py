"""One pass over the rows of all files, which can be interrupted and goes on where it was."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

import vne_kernels
from vne_kernels.accumulate import DensityAccumulator
from vne_kernels.common.files import replacing
from vne_kernels.common.reading import first_sentence
from vne_kernels.common.stopping import Stopped, StopSignals
from vne_kernels.ops import compute_dtype
from vne_kernels.spectrum_files.readers import Embeddings, FileError, open_embeddings

UNFINISHED = "unfinished.pt"  # in the output folder, while there is something to go on from
RAW = "raw rows"
GOING_ON = "going on"
CHUNK_BYTES = 16 << 20
SAVE_SECONDS = 60.0
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
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        shape = (embeddings.rows, d)
        raise FileError(
            embeddings.name,
            f"{shape} needs {needed / 1e9:,.0f} GB for its {d} x {d} matrices, this machine has "
            f"{there / 1e9:,.0f} GB; are rows and features the wrong way round?",
        )


def default_chunk_rows(data: Sequence[Embeddings]) -> int:
    row_bytes = max(embeddings.dtype.itemsize for embeddings in data) * data[0].features
    return max(1, CHUNK_BYTES // row_bytes)


class Work:
    """What is summed up so far, and how far that is."""

    def __init__(self, data: Sequence[Embeddings], settings: Settings) -> None:
        self.data, self.settings = data, settings
        double = settings.precision == "float64"
        d, device = data[0].features, torch.device(settings.device)
        self.sums = {
            "rows": DensityAccumulator(
                d, normalize=settings.normalize, double=double, device=device
            )
        }
        if double and settings.normalize:
            # RankMe and the rank are those of the rows as they are.
            self.sums[RAW] = DensityAccumulator(d, normalize=False, double=True, device=device)
        self.file, self.row = 0, 0  # the next row to read
        self.nonfinite = 0
        self.first_nonfinite = ""

        self.rows_in_all = sum(embeddings.rows for embeddings in data)
        self.identity = self._identity()  # of the files as they were opened
        #: eps of the dtype that the rows count as
        self.rounding = max(torch.finfo(compute_dtype(x.dtype)).eps for x in data)

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
        signals.hold()
        bar = tqdm(
            total=self.rows_in_all,
            initial=self.rows_read,
            unit=" rows",
            unit_scale=True,
            disable=None,  # where stderr is no terminal
        )
        with bar:
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
        signals.release()
        if time.monotonic() - begin > SAVE_SECONDS:
            self._try_to_save(out, GOING_ON)  # the eigenvalues can take long too
        self._check_finite()

    def _add(self, chunk: Tensor) -> None:
        finite = _finite_rows(chunk)
        if finite is not None:
            name, first = self.data[self.file].name, int(finite.logical_not().nonzero()[0])
            self.first_nonfinite = self.first_nonfinite or f"row {self.row + first} of {name}"
            self.nonfinite += int(finite.logical_not().sum())
        self.row += len(chunk)
        if finite is not None and self.settings.skip_nonfinite:
            chunk = chunk[finite]
        if self.nonfinite and not self.settings.skip_nonfinite:
            return  # nothing can come of the sums: the others are counted
        if len(chunk):
            chunk = chunk.to(self.settings.device)
            for accumulator in self.sums.values():
                accumulator.update(chunk)

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
        content = {
            "identity": self.identity,
            "file": self.file,
            "row": self.row,
            "nonfinite": self.nonfinite,
            "first_nonfinite": self.first_nonfinite,
            "sums": {name: sums.state_dict() for name, sums in self.sums.items()},
        }
        with replacing(out / UNFINISHED) as temporary:
            torch.save(content, temporary)

    def _stop(self, out: Path, signum: int) -> NoReturn:
        if self._try_to_save(out, "what was read is lost"):
            progress = f"{self.rows_read:,} of {self.rows_in_all:,} rows are summed up"
            _tell(f"{progress}, saved in {out}; the same command goes on from there")
        raise Stopped(signum)

    def _try_to_save(self, out: Path, otherwise: str) -> bool:
        try:
            self.save(out)
        except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
            _tell(f"cannot write {out / UNFINISHED} ({first_sentence(error)}); {otherwise}")
            return False
        return True

    def resume(self, out: Path) -> str | None:
        """Go on from what ``out`` holds; says what it goes on from, or why it cannot."""
        path = out / UNFINISHED
        if not path.exists():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if changes := _changes(content["identity"], self.identity):
                return f"{path} is not used, this begins anew: {'; '.join(changes)}"
            for name, sums in self.sums.items():
                sums.load_state_dict(content["sums"][name])
            self.file, self.row = content["file"], content["row"]
            self.nonfinite = content["nonfinite"]
            self.first_nonfinite = content["first_nonfinite"]
        except Exception as error:  # whatever the first wrong byte leads torch's reader to
            why = first_sentence(error)
            return f"{path} is not used, this begins anew: it cannot be read ({why})"
        return f"going on after {self.rows_read:,} rows"

    def _identity(self) -> dict[str, dict[str, Any]]:
        """What has to be the same for the sums to be the same, part by part."""
        s = self.settings
        identity: dict[str, dict[str, Any]] = {
            "files": {"number": len(self.data), "names": [x.name for x in self.data]},
            "options": {
                "normalize": s.normalize,
                "precision": s.precision,
                "device": s.device,
                "chunk rows": s.chunk_rows,
                "skip nonfinite": s.skip_nonfinite,
            },
            "versions": {"vne_kernels": vne_kernels.__version__, "torch": str(torch.__version__)},
        }
        for embeddings in self.data:
            about = embeddings.path.stat()
            identity[embeddings.name] = {
                "path": str(embeddings.path.resolve()),
                "size": about.st_size,
                "modification time": about.st_mtime_ns,
            }
        return identity


def _tell(message: str) -> None:
    tqdm.write(message, file=sys.stderr)  # above the bar, where there is one


def _finite_rows(chunk: Tensor) -> Tensor | None:
    """Which rows are finite, (n,); None if all are, which one sum tells nearly always."""
    if bool(chunk.sum(dtype=torch.float64).isfinite()):
        return None
    finite = chunk.isfinite().all(-1)
    return None if bool(finite.all()) else finite


def _changes(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    if before["files"] != now["files"]:
        return ["it is of other files"]
    return [
        f"{part}: {name} was {before[part].get(name)}, is {value}"
        for part in now
        for name, value in now[part].items()
        if before[part].get(name) != value
    ]
