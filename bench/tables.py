"""Every table of figures in the README, made from the data in `results` alone.

    python bench/tables.py            # prints them
    python bench/tables.py --write    # rewrites them in README.md
    python bench/tables.py --check    # exit 1 and a diff if README.md holds anything else

In README.md each stands between `<!-- table: NAME -->` and `<!-- /table -->`.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import itertools
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import rows as results
from rows import BEST_VENDOR, LABELS, OURS, Row, number, timed, unique, where

from vne_kernels.common.files import replacing
from vne_kernels.pretrain.config import LOSSES

BENCH = Path(__file__).resolve().parent
WIDTH = 140
BLOCK = re.compile(r"^<!-- table: (\S+) -->\n(.*?)^<!-- /table -->$", re.MULTILINE | re.DOTALL)
MISSING = "–"
HEADLINE = ("128", "512")

DIGITS = {
    "linear_probe": "linear probe, all {train:,} labels",
    "knn": "k nearest neighbours, all labels",
    "linear_probe_10_labels": "linear probe, 10 labels per class",
    "knn_10_labels": "k nearest neighbours, 10 labels per class",
}
ENCODERS = ("pixels", "untrained", "trained")
#: beside batch_size.csv: by linear-eval and knn with --encoder untrained, and of one of the runs
BESIDE = ("linear_eval_untrained", "knn_untrained", "results")
COMPARED = ("vn-doe", "simclr", "simsiam", "shannon-doe")
COLUMNS = {"linear_accuracy": "linear", "knn": "kNN", "effective_rank": "effective rank"}


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    first, *others = (f"| {' | '.join(line)} |" for line in [header, *lines])
    return "\n".join([first, "|---" * len(header) + "|", *others])


def _sentences(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _times(gain: float) -> str:
    return f"{results.ratio(gain)}×" if math.isfinite(gain) else MISSING


def _error(row: Row | None) -> str:
    error = number(row, "grad_rel_error") if row else math.nan
    return f"{error:.1e}" if math.isfinite(error) else MISSING


def _size(n: str, d: str) -> str:
    return f"{n} × {d}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _threads(rows: Sequence[Row]) -> list[str]:
    return sorted((t for (t,) in unique(rows, "threads")), key=int)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _cpu(folder: Path) -> list[Row]:
    """What the README shows of cpu.csv: plain calls in the first dtype."""
    return results.plain(results.read(folder / "cpu.csv"))


def _with_gradient(rows: Sequence[Row]) -> list[Row]:
    return where(rows, mode="forward+backward")


# ---------------------------------------------------------------------------------------------
# The entropy on a CPU
# ---------------------------------------------------------------------------------------------


def cpu_headline(folder: Path) -> str:
    """The first of the README's reasons."""
    n, d = HEADLINE
    rows = _with_gradient(where(_cpu(folder), n=n, d=d, batch="1"))
    cases = [where(rows, threads=t) for t in _threads(rows)]
    gram = sorted(results.gain(case, "gram") for case in cases)
    paper = min(results.gain(case, "algorithm1") for case in cases)
    low, high = results.ratio(gram[0]), results.ratio(gram[-1])
    return _sentences(
        f"- **Fast:** one C++ operator from the normalisation to the gradient, {low} to {high}"
        f" times as fast as Gram matrix and `eigvalsh`, {paper:.0f} times as fast as the paper's"
        f" algorithm (n = {n}, d = {d}, with the gradient, on a CPU; [measured](#measured))."
    ).replace("\n", "\n  ")


def cpu_machine(folder: Path) -> str:
    rows = _cpu(folder)
    first = rows[0]
    threads = _threads(rows)
    return _sentences(
        "How many times faster `vn_entropy` is than what one would write otherwise: value and"
        f" gradient, {first['dtype']}, medians of one run with all of them interleaved;"
        f" {results.machine(rows)}, on {_listed(threads)} thread{'s' * (threads != ['1'])};"
        f" {first.get('date', MISSING)}, commit {first.get('commit', MISSING)}."
    )


def cpu_entropy(folder: Path) -> str:
    rows = _with_gradient(_cpu(folder))
    threads = _threads(rows)
    first, *batches = sorted((b for (b,) in unique(rows, "batch")), key=int)
    header = ["n × d", f"Algorithm 1: {', '.join(threads)} thread{'s' * (threads != ['1'])}"]
    header += ["svd form", "Gram + eigvalsh", *(f"Gram + eigvalsh, batch {b}" for b in batches)]
    header += ["gradient error", "of Gram + eigvalsh"]
    columns = [(first, name) for name in ("algorithm1", "svd", "gram")]
    columns += [(batch, "gram") for batch in batches]
    lines = []
    for _, n, d in sorted({results.size(row) for row in rows}):
        size = where(rows, n=str(n), d=str(d))
        gains = [
            ", ".join(
                _times(results.gain(where(size, batch=batch, threads=t), name)) for t in threads
            )
            for batch, name in columns
        ]
        found = results.by_provider(where(size, batch=first, threads=threads[0]))
        errors = [_error(found.get(OURS)), _error(found.get("gram"))]
        lines.append([_size(str(n), str(d)), *gains, *errors])
    return _table(header, lines)


def _case_name(case: Sequence[Row]) -> str:
    row = case[0]
    threads = _count(int(row["threads"]), "thread")
    return f"{_size(row['n'], row['d'])}, batch {row['batch']}, {threads}"


def _all_gains(rows: Sequence[Row], baseline: str) -> list[tuple[float, str]]:
    """(gain, name of the case) of each case that has both."""
    keys = unique(rows, "n", "d", "batch", "threads")
    cases = [where(rows, n=n, d=d, batch=b, threads=t) for n, d, b, t in keys]
    gains = [(results.gain(case, baseline), _case_name(case)) for case in cases]
    return [(gain, name) for gain, name in gains if math.isfinite(gain)]


def _range(gains: Sequence[tuple[float, str]]) -> str:
    low, high = results.ratio(min(gains)[0]), results.ratio(max(gains)[0])
    return f"{low} to {high} ×" if low != high else f"{low} ×"


def _slower(gains: Sequence[tuple[float, str]]) -> str:
    slower = [f"{name}, {results.ratio(gain)} ×" for gain, name in gains if gain < 1]
    of = f"of {_count(len(gains), 'case')}"
    return (
        f"slower in {len(slower)} {of}: {'; '.join(slower)}" if slower else f"slower in none {of}"
    )


def cpu_sentence(folder: Path) -> str:
    """Over all cases: the gain over Gram + eigvalsh, and where there is none."""
    rows = _cpu(folder)
    text = "Over all sizes, batches and threads,"
    for mode, words in (("forward+backward", "with the gradient"), ("forward", "without it")):
        gains = _all_gains(where(rows, mode=mode), "gram")
        if gains:
            text += f" {words} the gain over Gram + eigvalsh is {_range(gains)}, {_slower(gains)};"
    compiled = _all_gains(_with_gradient(rows), "gram+compile")
    if compiled:
        text += f" over the same under `torch.compile`, with the gradient, {_range(compiled)};"
    text = text.removesuffix(";") + "."
    broken = [
        _case_name([row])
        for row in timed(_with_gradient(where(rows, provider="gram")))
        if not math.isfinite(number(row, "grad_rel_error"))
    ]
    if broken:
        cases = _count(len(broken), "case")
        text += f" The gradient of Gram + eigvalsh was not finite in {cases}: {'; '.join(broken)}."
    return _sentences(text)


# ---------------------------------------------------------------------------------------------
# The entropy on a GPU
# ---------------------------------------------------------------------------------------------


def _files(folder: Path, wanted: Callable[[Sequence[Row]], bool]) -> list[tuple[Path, list[Row]]]:
    every = [(path, results.read(path)) for path in results.files(folder)]
    return [(path, rows) for path, rows in every if wanted(rows)]


def _device(path: Path, rows: Sequence[Row]) -> str:
    first = rows[0]
    parts = [results.machine(rows)]
    for label, column in (("CUDA", "cuda"), ("cuSOLVER", "cusolver"), ("driver", "driver")):
        if first.get(column, "-") not in ("", "-"):
            parts.append(f"{label} {first[column]}")
    parts += [first.get("date", MISSING), f"commit {first.get('commit', MISSING)}"]
    return f"{', '.join(parts)} (`{path.name}`):"


def _ms(row: Row | None) -> str:
    return f"{number(row, 'p50_ms'):.3g}" if row else MISSING


def _vendor(case: Sequence[Row]) -> str:
    best = results.by_provider(case).get(BEST_VENDOR)
    gain = _times(results.gain(case, BEST_VENDOR))
    return f"{gain} ({LABELS[best['provider']]})" if best and gain != MISSING else MISSING


def _gpu_line(rows: Sequence[Row], n: int, d: int, batches: Sequence[str]) -> list[str]:
    size = where(rows, n=str(n), d=str(d))
    eager = where(size, launch="eager", batch=batches[0])
    found = results.by_provider(eager)
    graph = results.by_provider(where(size, launch="graph", batch=batches[0])).get(OURS)
    share = number(graph, "floor_share") if graph else math.nan
    gains = [_times(results.gain(eager, name)) for name in ("algorithm1", "svd", "gram")]
    vendors = [_vendor(where(size, launch="eager", batch=batch)) for batch in batches]
    return [
        *(_size(str(n), str(d)), _ms(found.get(OURS)), _ms(graph)),
        f"{100 * share:.0f} %" if math.isfinite(share) else MISSING,
        *(*gains, *vendors, _error(found.get(OURS)), _error(found.get("gram"))),
    ]


def _gpu_table(path: Path, rows: Sequence[Row]) -> str:
    """Warm caches, the first dtype, the first family of shapes, the least and the largest batch."""
    rows = results.main_family(_with_gradient(rows))
    rows = where(rows, l2="hot", dtype=results.main_dtype(rows))
    every = sorted((b for (b,) in unique(rows, "batch")), key=int)
    batches = list(dict.fromkeys((every[0], every[-1])))
    header = ["n × d", "eager, ms", "graph, ms", "floor / graph", "Algorithm 1", "svd form"]
    header += ["Gram + eigvalsh", *(f"best vendor eigensolver, batch {b}" for b in batches)]
    header += ["gradient error", "of Gram + eigvalsh"]
    sizes = sorted({results.size(row) for row in rows})
    lines = [_gpu_line(rows, n, d, batches) for _, n, d in sizes]
    return f"{_device(path, rows)}\n\n{_table(header, lines)}"


def gpu_entropy(folder: Path) -> str:
    """A table for each GPU's results file."""

    def of_a_gpu(rows: Sequence[Row]) -> bool:
        return not results.is_training(rows) and rows[0]["device"] == "cuda"

    tables = [_gpu_table(path, rows) for path, rows in _files(folder, of_a_gpu)]
    return "\n\n".join(tables) or (
        "**No GPU has run this comparison yet**, so there is no figure here."
        " `python bench/compare_vs_torch.py --device cuda` takes them."
    )


# ---------------------------------------------------------------------------------------------
# The loss in a training step
# ---------------------------------------------------------------------------------------------


def _step_cell(row: Row | None) -> str:
    if row is None or not timed([row], "loss_p50_ms"):
        return MISSING
    loss, step = results.figures(number(row, "loss_p50_ms")), number(row, "step_p50_ms")
    share, memory = number(row, "loss_share"), number(row, "loss_peak_mib")
    text = f"{loss} ms"
    if math.isfinite(step):
        text = f"{loss} of {results.figures(step)} ms"
    if math.isfinite(share):
        text += f", {100 * share:.2g} %"
    return text + (f", {memory:.2g} MiB" if math.isfinite(memory) else "")


def _loss_name(loss: str) -> str:
    name = loss.split(" x")[0]
    if " x" in loss:
        return (
            "entropy in one call, vne_kernels" if name == OURS else "entropy by `get_vne`, looped"
        )
    return results.TRAINING_LABELS.get(name, name)


def _step_table(path: Path, rows: Sequence[Row]) -> str:
    cases = sorted(unique(rows, "image", "batch"), key=lambda c: (int(c[0]), int(c[1])))
    header = ["loss", "views", *(f"{image} × {image} images, batch {b}" for image, b in cases)]
    lines = []
    for loss, views in unique(rows, "loss", "views"):
        own = where(rows, loss=loss)
        found = [where(own, image=image, batch=batch) for image, batch in cases]
        lines.append([_loss_name(loss), views, *(_step_cell(r[0] if r else None) for r in found)])
    return f"{_device(path, rows)}\n\n{_table(header, lines)}"


def training_step(folder: Path) -> str:
    """Time of the loss of that of the step, its share, and the memory that the loss takes."""
    tables = [_step_table(path, rows) for path, rows in _files(folder, results.is_training)]
    return "\n\n".join(tables) or (
        "Not measured yet: `python bench/training_step.py` takes the figures."
    )


# ---------------------------------------------------------------------------------------------
# The loss of a batch spread over processes
# ---------------------------------------------------------------------------------------------

STEP = {"loss": "ours", "views": "2"}  # beside which it is told


def _scaling(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    path = folder / "scaling.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def scaling_machine(folder: Path) -> str:
    rows, found = _scaling(folder)
    first, model = rows[0], found["model"]
    percent = {name: f"{100 * found[name]:.0f} %" for name in found if "error" in name}
    return _sentences(
        f"{first['device_name']}, {first['cores']} cores, torch {first['torch']}, gloo over the"
        f" loopback device, one thread a process; {first['date']}, commit {first['commit']}. Model:"
        f" {1e3 * model['message_ms']:.0f} µs a message, {1e9 * model['byte_ms']:.0f} µs a"
        f" megabyte; its error over all rows: median {percent['error_median']}, largest"
        f" {percent['error_max']}. Fitted without"
        f" the rows of {found['held_out_processes']} processes, its error on them: median"
        f" {percent['held_out_error_median']}, largest {percent['held_out_error_max']}."
    )


def scaling_measured(folder: Path) -> str:
    """Time, bytes and memory of the largest batch of a process."""
    rows, _ = _scaling(folder)
    n = str(max(int(row["n"]) for row in rows))
    counts = sorted({int(row["processes"]) for row in rows})
    lines = []
    for d, route in itertools.product(sorted({int(r["d"]) for r in rows}), ("reduce", "gather")):
        own = {int(row["processes"]): row for row in where(rows, n=n, d=str(d), route=route)}
        cells = [
            f"{results.figures(number(own[p], 'time_p50_ms'))} ms"
            f", {results.figures(number(own[p], 'loopback_bytes') / 2**10)} KiB"
            f", {results.figures(number(own[p], 'peak_mib'))} MiB"
            for p in counts
        ]
        lines.append([f"{n} × {d}", route, *cells])
    header = ["rows of each × d", "route", *(f"{p} process{'es' * (p > 1)}" for p in counts)]
    return _table(header, lines)


def scaling_predicted(folder: Path) -> str:
    _, found = _scaling(folder)
    n = max(row["n"] for row in found["predicted"])
    features = sorted({row["d"] for row in found["predicted"]})
    steps = [
        row
        for path, other in _files(folder, results.is_training)
        for row in where(other, device="cpu", **STEP)
    ]
    beside = max(
        steps, key=lambda row: int(row["image"])
    )  # the paper's ImageNet, where it is there
    batch, image, step = beside["batch"], beside["image"], number(beside, "step_p50_ms")
    header = ["processes", *(f"d = {d}: model, bytes sent by each" for d in features)]
    lines = []
    for count in sorted({row["processes"] for row in found["predicted"]}):
        own = {
            row["d"]: row
            for row in found["predicted"]
            if (row["n"], row["processes"]) == (n, count)
        }
        cells = [
            f"{results.figures(own[d]['model_ms'])} ms, {100 * own[d]['model_ms'] / step:.2g} %;"
            f" {own[d]['bytes'] / 2**20:.2g} MiB, {100 * own[d]['share_of_ddp_bytes']:.2g} %"
            if d in own
            else MISSING
            for d in features
        ]
        lines.append([f"{count:,}", *cells])
    told = _sentences(
        f"What the model says of more processes, each on a core of its own, {n} rows each (**not"
        f" measured**). The shares: of a ResNet-50 step of {batch} images of {image} pixels"
        f" on a CPU ({step / 1e3:.1f} s, the table above), and of the bytes that"
        " DistributedDataParallel sends for the"
        f" {found['ddp_parameters'] / 1e6:.0f} million gradients of encoder and projector."
    )
    return f"{told}\n\n{_table(header, lines)}"


# ---------------------------------------------------------------------------------------------
# The training program
# ---------------------------------------------------------------------------------------------


def _runs(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "digits").glob("seed*.json"))
    if not paths:
        raise ValueError(f"{folder / 'digits'} has no seed*.json")
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(runs, key=lambda run: int(run["config"]["seed"]))


def _each(values: Sequence[object]) -> str:
    """One value a seed, or the one that they share."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def digits(folder: Path) -> str:
    runs = _runs(folder)
    data = runs[0]["data"]
    seeds = " / ".join(str(run["config"]["seed"]) for run in runs)
    what = f"test accuracy, % ({data['test_images']} images; seeds {seeds})"
    lines = []
    for measure, label in DIGITS.items():
        cells = [
            _each([f"{100 * run['evaluation'][encoder][measure]:.1f}" for run in runs])
            for encoder in ENCODERS
        ]
        lines.append([label.format(train=data["train_images"]), *cells[:-1], f"**{cells[-1]}**"])
    return _table([what, "raw pixels", "untrained ResNet-50", "after pretraining"], lines)


def digits_seconds(folder: Path) -> str:
    runs = _runs(folder)
    config = runs[0]["config"]
    size, seeds = config["image_size"], " / ".join(str(run["config"]["seed"]) for run in runs)
    return _sentences(
        f"ResNet-50 on {size} × {size} images of handwritten digits, without labels, for"
        f" {config['epochs']} epochs, on {_each([run['environment']['device'] for run in runs])};"
        " the encoder is then frozen. Seconds, evaluation included, for the seeds"
        f" {seeds}: {_each([round(run['seconds']) for run in runs])}; precision, as the program"
        f" chose it: {_each([run['config']['precision'] for run in runs])}."
    )


def _comparison(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows of batch_size.csv, and what else lies beside it, by its name."""
    folder = folder / "cifar10"
    with (folder / "batch_size.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    others = {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in BESIDE}
    return rows, others


def cifar10(folder: Path) -> str:
    """A line a loss, a column a measure and batch size: the mean of the seeds, and each."""
    rows, others = _comparison(folder)
    sizes = sorted({int(row["batch_size"]) for row in rows})
    seeds = sorted({int(row["seed"]) for row in rows})
    header = [f"% (mean; seeds {' / '.join(map(str, seeds))})"]
    header += [f"{name}, batch {size}" for name in COLUMNS.values() for size in sizes]
    lines = []
    for loss in COMPARED:
        cells = [
            [float(row[column]) for row in where(rows, loss=loss, batch_size=str(size))]
            for column in COLUMNS
            for size in sizes
        ]
        if not all(cells):
            continue
        accuracies, ranks = cells[: -len(sizes)], cells[-len(sizes) :]
        told = [[f"{100 * value:.1f}" for value in cell] for cell in accuracies]
        means = [f"{100 * mean(cell):.1f}" for cell in accuracies]
        lines.append(
            [LOSSES[loss]]
            + [f"{one} ({' / '.join(each)})" for one, each in zip(means, told, strict=True)]
            + [f"{mean(cell):.1f}" for cell in ranks]
        )
    untrained = [others["linear_eval_untrained"], others["knn_untrained"]]
    same = [f"{100 * other['accuracy']:.1f}" for other in untrained for _ in sizes]
    lines.append(["untrained encoder, seed 0", *same, *[MISSING] * len(sizes)])
    return _table(header, lines)


def cifar10_scale(folder: Path) -> str:
    rows, others = _comparison(folder)
    config, data, made = (others["results"][name] for name in ("config", "data", "environment"))
    (epochs,) = {row["epochs"] for row in rows}
    return _sentences(
        f"{config['backbone'].replace('resnet', 'ResNet-')} with ImageNet's {config['stem']} stem,"
        f" {data['train_images']:,} of CIFAR-10's 50,000 training images, {epochs} epochs (the"
        " paper: ResNet-50 with a 3x3 stem, all images, 25 to 100 epochs); base learning rate"
        f" {config['lr']:g} for every loss, linear evaluation on all {data['test_images']:,} test"
        f" images; {made['processor']}, torch {made['torch']}, one thread a run; commit"
        f" {made['commit'][:10]}."
    )


# ---------------------------------------------------------------------------------------------
# Hostile use
# ---------------------------------------------------------------------------------------------


_KERNELS = {
    "cpu": "CPU kernels",
    "emulated": "CUDA kernels, emulated",
    "triton": "Triton kernels, interpreted",
}


def reliability(folder: Path) -> str:
    """What the fuzzer found, and how memory grew."""
    folder = folder / "reliability"
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("cases*.json")]
    runs.sort(key=lambda run: list(_KERNELS).index(run["backend"]))
    memory = results.read(folder / "memory.csv")
    last = memory[-1]
    first = next(
        row for row in memory if number(row, "calls") > results.WARM_UP * number(last, "calls")
    )
    return "\n".join(
        [
            f"{results.machine(memory)}; {runs[0]['date']}, commit {runs[0]['commit']}:",
            "",
            _table(
                ["random cases", *(_KERNELS[run["backend"]] for run in runs)],
                [
                    ["in all", *(f"{run['cases']:,}, {run['seconds']:.0f} s" for run in runs)],
                    *(
                        [what, *(f"{run[key]:,}" for run in runs)]
                        for what, key in {
                            "value, shape and dtype as stated": "values",
                            "samples NaN, just those stated": "nan_samples",
                            "gradients, of arguments": "gradients",
                            "from several threads, bit-equal": "from_threads",
                            "shapes alone (meta, fake)": "shapes",
                            "refused, by the stated error": "errors",
                        }.items()
                    ),
                    ["**failures**", *(f"**{run['failures']:,}**" for run in runs)],
                ],
            ),
            "",
            _sentences(
                f"Memory, mapped files aside, over {int(last['calls']):,} calls of value,"
                f" gradient and errors:"
                f" {number(first, 'rss_mib'):.1f} MiB after the warm-up,"
                f" {number(last, 'rss_mib'):.1f} MiB at the end, a slope of"
                f" **{results.growth(memory):+.2f} MiB per 100,000 calls**; Python objects:"
                f" {results.growth(memory, 'objects'):+.0f}."
            ),
        ]
    )


# ---------------------------------------------------------------------------------------------
# The family
# ---------------------------------------------------------------------------------------------


def _family(folder: Path) -> list[Row]:
    with (folder / "family.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["by"] != "vne_kernels"]


def family_machine(folder: Path) -> str:
    rows = _family(folder)
    first = rows[0]
    threads = _listed([t for (t,) in unique(rows, "threads")])
    threads = "one thread" if threads == "1" else f"{threads} threads"
    return _sentences(
        "How many times faster, medians of one run with all of them interleaved, values alone; "
        f"{first['device_name']}, torch {first['torch']}, on {threads}; {first['date']}, "
        f"commit {first['commit']}."
    )


def family_vendi(folder: Path) -> str:
    """vendi_score of order 1, in full."""
    rows = where(_family(folder), function="vendi_score")
    columns = unique(rows, "by", "dtype")
    lines = []
    for n, d in unique(rows, "n", "d"):
        cells = []
        for by, dtype in columns:
            of_case = where(rows, n=n, d=d, by=by, dtype=dtype)
            cells.append(", ".join(_times(number(row, "times_ours")) for row in of_case))
        lines.append([_size(n, d), *cells])
    header = [f"{by.split(', ')[-1]}, {dtype}" for by, dtype in columns]
    return _table(["n × d", *header], lines)


def family_others(folder: Path) -> str:
    """The others, over sizes, dtypes and threads."""
    rows = [row for row in _family(folder) if row["function"] != "vendi_score"]
    lines = []
    for function, by in unique(rows, "function", "by"):
        of_pair = where(rows, function=function, by=by)
        good = timed(of_pair)
        if not good:
            continue
        gains = [number(row, "times_ours") for row in good]
        exact = [number(r, "deviation") for r in good if r["dtype"] == "float64"]
        sizes = [_size(*size) for size in unique(of_pair, "n", "d")]
        lines.append(
            [
                f"`{function}`",
                by,
                f"{sizes[0]} to {sizes[-1]}",
                f"{_times(min(gains))} to {_times(max(gains))}",
                f"{sum(gain < 1 for gain in gains)} of {len(gains)}",
                f"{max(exact):.0e}" if exact else MISSING,
            ]
        )
    return _table(
        ["function", "beside", "sizes", "times faster", "slower in", "differ by (float64)"], lines
    )


def family_slower(folder: Path) -> str:
    """Every case in which vendi-score is the faster one."""
    rows = [row for row in timed(_family(folder)) if row["by"].startswith("vendi-score")]
    slower = sorted((row for row in rows if number(row, "times_ours") < 1), key=_gain)
    text = f"Of {len(rows)} cases beside vendi-score ours is slower in {len(slower)}"
    if not slower:
        return f"{text}."
    told = [
        f"{row['function'].removeprefix('vendi_score').strip(', ') or 'q = 1'}, "
        f"{row['by'].split(', ')[-1]}, "
        f"{_size(row['n'], row['d'])}, {row['dtype']}: {_times(_gain(row))}"
        for row in slower
    ]
    return _sentences(f"{text}: {'; '.join(told)}.")


def _gain(row: Row) -> float:
    return number(row, "times_ours")


def _accumulator(folder: Path, measure: str) -> list[Row]:
    with (folder / "accumulator.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["measure"] == measure]


def accumulator_rate(folder: Path) -> str:
    """Share of the rate of sgemm."""
    rows = where(_accumulator(folder, "rate"), provider="update")
    kinds = unique(rows, "threads", "chunk")
    header = [
        f"{'one chunk' if index == 0 else f'chunks of {chunk}'}, {threads} thread"
        + ("s" if threads != "1" else "")
        for threads in dict.fromkeys(t for t, _ in kinds)
        for index, chunk in enumerate(c for t, c in kinds if t == threads)
    ]
    lines = []
    for (d,) in unique(rows, "d"):
        found = [where(rows, d=d, threads=t, chunk=c) for t, c in kinds]
        lines.append([d, *(f"{100 * number(f[0], 'sgemm_share'):.0f} %" for f in found)])
    return _table(["d", *header], lines)


def accumulator_memory(folder: Path) -> str:
    rows = _accumulator(folder, "memory")
    first = rows[0]
    told = []
    for (d,) in unique(rows, "d"):
        of_d = where(rows, d=d)
        peaks = [
            f"{int(row['rows']):,} rows {number(row, 'peak_mib'):.0f} MiB at "
            f"{number(row, 'gflops'):.0f} GFLOP/s"
            for row in of_d
        ]
        told.append(f"d = {d}: {'; '.join(peaks)}")
    before = min(number(row, "before_mib") for row in rows)
    return _sentences(
        f"Peak memory of a process that streams them ({before:.0f} MiB of it before the first row: "
        f"the interpreter, torch and a chunk), and its rate, float64 sum and entropy included: "
        f"{'. '.join(told)}. {first['device_name']}, torch {first['torch']}, {first['date']}, "
        f"commit {first['commit']}."
    )


# ---------------------------------------------------------------------------------------------
# README.md
# ---------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[Path], str]] = {
    "cpu-headline": cpu_headline,
    "cpu-machine": cpu_machine,
    "cpu-entropy": cpu_entropy,
    "cpu-sentence": cpu_sentence,
    "gpu-entropy": gpu_entropy,
    "training-step": training_step,
    "family-machine": family_machine,
    "family-vendi": family_vendi,
    "family-others": family_others,
    "family-slower": family_slower,
    "accumulator-rate": accumulator_rate,
    "accumulator-memory": accumulator_memory,
    "scaling-machine": scaling_machine,
    "scaling-measured": scaling_measured,
    "scaling-predicted": scaling_predicted,
    "digits-seconds": digits_seconds,
    "digits": digits,
    "cifar10-scale": cifar10_scale,
    "cifar10": cifar10,
    "reliability": reliability,
}


def filled(readme: str, tables: dict[str, str]) -> str:
    """The README with each table in its place; ValueError unless it has one for each."""
    found = [match.group(1) for match in BLOCK.finditer(readme)]
    for name in tables:
        if found.count(name) != 1:
            raise ValueError(
                f"the README must have <!-- table: {name} --> ... <!-- /table --> once,"
                f" got it {found.count(name)} times"
            )
    unknown = sorted(set(found) - tables.keys())
    if unknown:
        raise ValueError(f"the README has tables of no known name: {', '.join(unknown)}")
    return BLOCK.sub(
        lambda m: f"<!-- table: {m.group(1)} -->\n{tables[m.group(1)]}\n<!-- /table -->", readme
    )


def _difference(readme: str, wanted: str) -> str:
    old, new = (text.splitlines(keepends=True) for text in (readme, wanted))
    return "".join(difflib.unified_diff(old, new, "README.md", "made from the data"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tables.py", description="The tables of README.md, made from the results files."
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="rewrite them in the README")
    how.add_argument("--check", action="store_true", help="exit 1 if the README has others")
    parser.add_argument("--results", type=Path, default=BENCH / "results", help="folder")
    parser.add_argument("--readme", type=Path, default=BENCH.parent / "README.md", help="file")
    arguments = parser.parse_args(argv)
    try:
        tables = {name: make(arguments.results) for name, make in TABLES.items()}
        if not (arguments.write or arguments.check):
            print(*(f"{name}:\n\n{text}\n" for name, text in tables.items()), sep="\n")
            return 0
        readme = arguments.readme.read_text(encoding="utf-8")
        wanted = filled(readme, tables)
    except (OSError, ValueError) as error:
        print(f"tables.py: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        print(_difference(readme, wanted), end="")
        return int(readme != wanted)
    with replacing(arguments.readme) as temporary:
        temporary.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
