"""The command line of ``vne-spectrum``, and how it ends.

Exit codes: 0 done, 1 a file cannot be used or written, 2 a bad option, 75 preempted (SIGTERM,
SIGUSR1): the same command goes on, 130 Ctrl-C: likewise.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import vne_kernels
from vne_kernels import available_backends
from vne_kernels._core import spectra
from vne_kernels.common.extras import needed_by
from vne_kernels.common.files import locked, spare, write_json, write_table
from vne_kernels.common.reading import FileError, printable
from vne_kernels.common.stopping import REQUEUE, Stopped, StopSignals
from vne_kernels.common.terminal import reason, show_any_text

if TYPE_CHECKING:
    from vne_kernels.spectrum_files.readers import Embeddings

PROGRAM = "vne-spectrum"

DESCRIPTION = """\
The spectrum of embeddings in files, and its scores: von Neumann entropy, effective rank, Vendi
scores, RankMe, participation ratio, rank. The rows of all files are one data set; they are read in
one pass, a chunk at a time, so that files may be larger than memory.

  vne-spectrum embeddings.npy
  vne-spectrum shard-*.safetensors --out spectrum
  vne-spectrum features.npz:train

files, each a matrix (rows, features) of float16, bfloat16, float32 or float64:
  .npy           NumPy's array
  .npz           one array, or the one named: FILE.npz:KEY; may be compressed
  .safetensors   one tensor, or FILE.safetensors:KEY
  .parquet       the column that holds lists of numbers, or FILE.parquet:COLUMN; without such a
                 column, all columns of floating-point numbers
"""

EPILOG = """\
written to DIR:
  spectrum.csv   index, eigenvalue, share of the sum, cumulative share
  scores.json    all scores; entropies in nats
  spectrum.png   both as a picture

Ctrl-C, SIGTERM and SIGUSR1 stop after the chunk in hand, and every minute what was summed up so far
is saved: the same command goes on from there, and comes to the same numbers.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="FILE or FILE:KEY")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where results go (default: FILE-spectrum, next to the first FILE)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write over files of these names that this program has not written",
    )
    parser.add_argument(
        "--no-normalize",
        action="store_true",
        help="take the rows as they are; without this each is divided by its norm",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "float64"),
        default="float64",
        metavar="DTYPE",
        help="of the sums: float64, or float32, which is faster and leaves out RankMe, the rank "
        "and Vendi scores of q < 1, as rounding hides small eigenvalues (default: float64)",
    )
    parser.add_argument(
        "--skip-nonfinite",
        action="store_true",
        help="leave out rows that hold NaN or infinity; without this they are an error",
    )
    parser.add_argument(
        "--chunk-rows",
        type=_count,
        metavar="N",
        help="rows read at a time (default: so many as take 16 MiB)",
    )
    parser.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="DEVICE",
        help="auto, cpu or cuda (default: auto, a GPU where one can be used)",
    )
    parser.add_argument("--no-plot", action="store_true", help="write no picture")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    if text not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be auto, cpu or cuda, got {text!r}")
    why_no_gpu = available_backends()["cuda"]
    if text == "cuda" and why_no_gpu is not None:
        raise argparse.ArgumentTypeError(f"must be auto or cpu, got 'cuda': {why_no_gpu}")
    return "cuda" if text != "cpu" and why_no_gpu is None else "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    show_any_text()
    options = make_parser().parse_args(arguments)
    try:
        with StopSignals() as signals, needed_by("this program", "spectrum"):
            return _run(options, signals)
    except (FileError, ModuleNotFoundError) as error:
        message, code = f"error: {error}", 1
    except Stopped as stop:
        message = f"stopped by {stop}"
        code = 130 if stop.signum == signal.SIGINT else REQUEUE
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Exception as error:
        if (why := reason(error)) is None:
            raise
        message, code = f"error: {why}", 1
    _print_message(message)
    return code


def _run(options: argparse.Namespace, signals: StopSignals) -> int:
    from vne_kernels.spectrum_files import outputs
    from vne_kernels.spectrum_files import scores as scoring
    from vne_kernels.spectrum_files.work import Settings, Work, default_chunk_rows, open_all

    if not options.no_plot:  # imported now: without matplotlib the program ends before the work
        from vne_kernels.spectrum_files import plot
    begin = time.monotonic()
    data = open_all(options.files)
    settings = Settings(
        normalize=not options.no_normalize,
        precision=options.precision,
        device=options.device,
        chunk_rows=options.chunk_rows or default_chunk_rows(data),
        skip_nonfinite=options.skip_nonfinite,
    )
    for embeddings in data:
        if ignored := embeddings.ignored:
            _print_message(f"{embeddings.name}: leaves out {ignored}")
    out: Path = options.out or _default_out(data)
    with locked(out, "spectrum"):
        if not options.overwrite and not outputs.is_ours(out):
            spare(out, outputs.ALL, "give another --out, or --overwrite")
        work = Work(data, settings)
        if message := work.resume(out):
            _print_message(message)
        work.run(out, signals)
        eigenvalues, raw = work.spectra()
        scores = scoring.compute(eigenvalues, raw, work.rounding)
        rows = work.sums["rows"].rows
        of_files = f"from {len(data)} files" if len(data) > 1 else f"of {data[0].name}"
        title = f"{rows:,} rows of {data[0].features:,} features {of_files}"
        about = {
            "files": [outputs.well_formed(embeddings.name) for embeddings in data],
            "rows": rows,
            "rows_left_out": work.progress.nonfinite,
            "features": data[0].features,
            "normalize": settings.normalize,
            "precision": settings.precision,
            "vne_kernels": vne_kernels.__version__,
        }
        # The scores come first: by them the folder is known as this program's from now on.
        write_json(out / outputs.SCORES, about | scores)
        write_table(out / outputs.TABLE, scoring.HEADER, scoring.table(eigenvalues))
        written = [outputs.TABLE, outputs.SCORES]
        if not options.no_plot:
            shares = scoring.cumulative_shares(eigenvalues).numpy()
            top = eigenvalues[0] if eigenvalues[0] > 0 else 1.0  # may leave the range of float32
            rounded = (eigenvalues / top).to(getattr(torch, settings.precision))
            drawn = spectra.resolved(rounded).double() * top
            plot.draw(out / outputs.PICTURE, title, drawn.numpy(), shares, scores)
            written.append(outputs.PICTURE)
        (out / outputs.UNFINISHED).unlink(missing_ok=True)

    print(printable(title))
    if left_out := work.progress.nonfinite:
        print(f"  {left_out:,} rows with NaN or infinity are left out")
    for name, value, remark in scoring.lines(scores, len(eigenvalues)):
        print(f"  {name:<24} {value:<13} {remark}".rstrip())
    seconds = time.monotonic() - begin
    print(f"wrote {', '.join(written)} in {printable(out)} ({seconds:.1f} s)")
    return 0


def _print_message(message: str) -> None:
    print(f"{PROGRAM}: {printable(message)}", file=sys.stderr)


def _default_out(data: Sequence[Embeddings]) -> Path:
    first = data[0]
    stem = re.sub(r"[^\w.-]+", "-", first.path.stem + (f"-{first.key}" if first.key else ""))
    more = f"-and-{len(data) - 1}-more" if len(data) > 1 else ""
    return first.path.with_name(f"{stem}{more}-spectrum")
