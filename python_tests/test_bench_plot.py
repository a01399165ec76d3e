"""Pictures and tables made from results files; and the README holds what the data gives."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
RESULTS = BENCH / "results"
README = ROOT / "README.md"
PNG = b"\x89PNG\r\n\x1a\n"
KINDS = ("time", "time-cold", "speedup", "error", "shapes")
VERMILION = (0xD5 / 255, 0x5E / 255, 0.0, 1.0)

Row = dict[str, str]

MILLISECONDS = {"algorithm1": 40.0, "svd": 8.0, "gram": 4.0, "ours": 2.0, "ours-poles": 2.5}
GPU_MILLISECONDS = {**MILLISECONDS, "gram+compile": 3.5, "syevjBatched": 3.0, "XsyevBatched": 1.5}


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import plot

    return plot


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import tables

    return tables


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import rows

    return rows


# ---------------------------------------------------------------------------------------------
# Invented results, which say so
# ---------------------------------------------------------------------------------------------


def entropy_row(provider: str, n: int, d: int, p50: float, **others: object) -> Row:
    with_grad = others.get("mode", "forward+backward") == "forward+backward"
    row: dict[str, object] = {
        "date": "2000-01-02",
        "commit": "0123456789",
        "torch": "0.0",
        "device": "cpu",
        "device_name": "INVENTED",
        "threads": 1,
        "provider": provider,
        "mode": "forward+backward",
        "launch": "eager",
        "l2": "hot",
        "dtype": "float32",
        "n": n,
        "d": d,
        "m": min(n, d),
        "batch": 1,
        "p20_ms": 0.9 * p50,
        "p50_ms": p50,
        "p80_ms": 1.2 * p50,
        "floor_ms": "",
        "floor_share": "",
        "grad_rel_error": (5e-7 if provider.startswith("ours") else 4e-6) if with_grad else "",
        "note": "",
    }
    return {column: str(value) for column, value in {**row, **others}.items()}


def cpu_rows() -> list[Row]:
    """Two sizes, batches 1 and 8, 1 and 2 threads; without gradient the last case is slower."""
    rows = []
    for n, d in ((64, 256), (128, 512)):
        for batch in (1, 8):
            for threads in (1, 2):
                for mode, gram in (("forward+backward", 4.0), ("forward", 3.0)):
                    slow = (n, batch, threads, mode) == (128, 8, 2, "forward")
                    for provider, ms in MILLISECONDS.items():
                        own = gram if provider == "gram" else ms * (2 if slow else 1)
                        case = {"batch": batch, "threads": threads, "mode": mode}
                        rows.append(entropy_row(provider, n, d, own * batch, **case))
    return rows


def gpu_rows() -> list[Row]:
    """Three shapes of two m; ours and ours-poles are replayed too, MAGMA is not there."""
    rows = []
    for m in (64, 128):
        for n, d in ((m, 4 * m), (m, m), (4 * m, m)):
            for batch in (1, 64):
                for l2 in ("hot", "cold"):
                    case = {"device": "cuda", "batch": batch, "l2": l2, "floor_ms": m / 128}
                    for name, ms in GPU_MILLISECONDS.items():
                        rows.append(entropy_row(name, n, d, ms, **case))
                        graph = ms / 2 if name.startswith("ours") else math.nan
                        share = {"launch": "graph", "floor_share": m / 128 / graph}
                        rows.append(entropy_row(name, n, d, graph, **case, **share))
                    note = {"note": "built without MAGMA", "grad_rel_error": "nan"}
                    rows.append(entropy_row("gram@magma", n, d, math.nan, **case, **note))
    return rows


def training_rows() -> list[Row]:
    """A case of 100 ms a step: two losses of two views, and the entropies of 2 and 4 views."""
    times = {"ours": 2, "algorithm1": 20, "frossl": math.nan}
    times |= {"get_vne x2": 4, "ours x2": 1, "get_vne x4": 8, "ours x4": 1.5}
    row = {"date": "2000-01-02", "commit": "0123456789", "torch": "0.0", "device": "cpu"}
    row |= {"device_name": "INVENTED", "image": "32", "batch": "64", "backbone": "resnet50"}
    return [
        {
            **row,
            "loss": loss,
            "views": loss.split(" x")[1] if " x" in loss else "2",
            **{f"loss_p{q}_ms": str(ms) for q in (20, 50, 80)},
            **{f"step_p{q}_ms": "100" for q in (20, 50, 80)},
            "loss_share": str(ms / 100),
            "loss_peak_mib": "1.5",
            "note": "",
        }
        for loss, ms in times.items()
    ]


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def without(rows: Iterable[Row], *columns: str) -> list[Row]:
    return [{k: v for k, v in row.items() if k not in columns} for row in rows]


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def test_pictures_of_the_committed_results(plot: ModuleType, tmp_path: Path) -> None:
    path = Path(shutil.copy(RESULTS / "cpu.csv", tmp_path))
    pictures = plot.draw(path)
    assert [p.name for p in pictures] == ["cpu-time.png", "cpu-speedup.png", "cpu-error.png"]
    assert sorted(tmp_path.iterdir()) == sorted([path, *pictures])  # nothing half written
    for picture in pictures:
        content = picture.read_bytes()
        assert content.startswith(PNG)
        assert plot.source(path).encode() in content


def test_pictures_of_a_gpu(plot: ModuleType, tmp_path: Path) -> None:
    pictures = plot.draw(write(tmp_path / "invented.csv", gpu_rows()))
    assert [p.name for p in pictures] == [f"invented-{kind}.png" for kind in KINDS]


def test_time_of_a_gpu(plot: ModuleType) -> None:
    figure = plot.time(gpu_rows(), "hot")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["forward+backward\nbatch 1", "forward+backward\nbatch 64"]
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["64", "128"]
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    graphs = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert len(axes.get_lines()) == len(GPU_MILLISECONDS) + len(graphs) + 1
    assert [list(line.get_ydata()) for line in graphs] == [[1.0, 1.0], [1.25, 1.25]]
    same = [line.get_color() for label, line in lines.items() if label == "vne_kernels"]
    assert graphs[0].get_color() == same[0]
    floor = lines["floor of the poles on this device"]
    assert floor.get_linestyle() == "--"
    assert list(floor.get_ydata()) == [0.5, 1.0]
    assert "INVENTED, torch 0.0" in figure.get_suptitle()
    legend = figure.legends[0]
    assert legend.get_title().get_text() == "No time at all: torch's MAGMA (built without MAGMA)"
    assert "replayed as a CUDA graph" in [text.get_text() for text in legend.get_texts()]


def test_time_of_a_cpu_is_by_size(plot: ModuleType) -> None:
    figure = plot.time(cpu_rows(), "hot")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == [
        "forward+backward\nbatch 1, 1 thread",
        "forward+backward\nbatch 1, 2 threads",
    ]
    assert len(titles) == 8
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert labels == ["64×256", "128×512"]
    assert not any("floor" in str(line.get_label()) for line in figure.axes[0].get_lines())
    assert plot.time(cpu_rows(), "cold") is None


def test_files_from_before_the_columns(plot: ModuleType, rows: ModuleType, tmp_path: Path) -> None:
    old = without(cpu_rows(), "launch", "l2", "floor_ms", "floor_share")
    path = write(tmp_path / "old.csv", old)
    assert {(row["launch"], row["l2"]) for row in rows.read(path)} == {("eager", "hot")}
    assert len(plot.draw(path)) == 3


def test_shapes_have_a_panel_each(plot: ModuleType) -> None:
    half = [{**row, "dtype": "bfloat16"} for row in gpu_rows()]
    titles = [axes.get_title() for axes in plot.shapes(gpu_rows() + half).axes]
    assert titles[:3] == ["d = 4 n, float32", "n = d, float32", "n = 4 d, float32"]
    assert titles[3:] == ["d = 4 n, bfloat16", "n = d, bfloat16", "n = 4 d, bfloat16"]


def test_bars_end_at_the_ratios(plot: ModuleType) -> None:
    figure = plot.speedup(gpu_rows())
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:3] == ["Algorithm 1", "svd form", "Gram + eigvalsh"]
    assert labels[3:] == ["best of the vendor's eigensolvers", "slower"]
    for axes in figure.axes:
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
        assert ends == pytest.approx([20, 20, 4, 4, 2, 2, 0.75, 0.75])
        slower = [bar.get_facecolor() == pytest.approx(VERMILION) for bar in axes.patches]
        assert slower == [end < 1 for end in ends]
        written = [text.get_text() for text in axes.texts]
        assert written == ["20.0", "20.0", "4.0", "4.0", "2.0", "2.0", "0.75", "0.75"]
        assert axes.get_xlim()[0] < 0.75


def test_rows_without_a_time_are_left_out(plot: ModuleType) -> None:
    rows = cpu_rows()
    for row in rows:
        if row["provider"] == "svd" and row["n"] == "128":
            row["p20_ms"] = row["p50_ms"] = row["p80_ms"] = row["grad_rel_error"] = "nan"
    svd = [
        line
        for line in plot.time(rows, "hot").axes[0].get_lines()
        if line.get_label() == "svd form"
    ]
    assert [list(line.get_ydata()) for line in svd] == [[8.0]]
    assert plot.speedup(rows) is not None
    names = [text.get_text() for text in plot.error(rows).axes[-1].texts]
    assert "svd form" not in names
    assert "Gram + eigvalsh" in names
    assert plot.speedup([row for row in rows if row["provider"] != "ours"]) is None


@pytest.mark.parametrize("source", ["cpu.csv", "a GPU"])
def test_error_names_every_point_once(plot: ModuleType, rows: ModuleType, source: str) -> None:
    """And no name hides another."""
    data = gpu_rows() if source == "a GPU" else rows.read(RESULTS / source)
    figure = plot.error(data)
    figure.draw_without_rendering()
    for axes in figure.axes:
        points = [str(line.get_label()) for line in axes.get_lines()]
        assert sorted(t.get_text() for t in axes.texts) == sorted(
            label for label in points if not label.startswith("_")
        )
        renderer = figure.canvas.get_renderer()
        boxes = [type(text).__mro__[1].get_window_extent(text, renderer) for text in axes.texts]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_error_is_drawn_for_the_size_of_the_readme(plot: ModuleType, rows: ModuleType) -> None:
    titles = [axes.get_title() for axes in plot.error(rows.read(RESULTS / "cpu.csv")).axes]
    assert "n×d = 128×512" in titles
    assert plot.error([row for row in cpu_rows() if row["mode"] == "forward"]) is None


def test_training_step(plot: ModuleType, tmp_path: Path) -> None:
    figure = plot.training_step(training_rows())
    shares, views = figure.axes
    assert [bar.get_width() for bar in shares.patches] == pytest.approx([2, 20])
    assert [text.get_text() for text in shares.texts] == ["2 of 100 ms", "20 of 100 ms"]
    assert [text.get_text() for text in shares.get_yticklabels()] == ["vne_kernels", "Algorithm 1"]
    assert [list(line.get_xdata()) for line in views.get_lines()] == [[2, 4], [2, 4]]
    assert [list(line.get_ydata()) for line in views.get_lines()] == [[4, 8], [1, 1.5]]
    path = write(tmp_path / "cpu-training-step.csv", training_rows())
    assert [p.name for p in plot.draw(path)] == ["cpu-training-step.png"]


def memory_rows() -> list[Row]:
    """Grows for the first 2,000 of 10,000 calls, then by a MiB a thousand calls."""
    row = {"torch": "0.0", "device_name": "INVENTED", "objects": "7"}
    rss = [100, 200, 210, 211, 212, 213, 214, 215, 216, 217]
    return [{**row, "calls": str(1000 * (i + 1)), "rss_mib": str(mib)} for i, mib in enumerate(rss)]


def test_memory(plot: ModuleType, rows: ModuleType, tmp_path: Path) -> None:
    assert rows.growth(memory_rows()) == pytest.approx(100)
    assert rows.growth(memory_rows(), "objects") == pytest.approx(0)
    figure = plot.memory(memory_rows())
    assert "+100.00 MiB over 100,000 calls" in figure.get_suptitle()
    assert list(figure.axes[0].get_lines()[0].get_ydata())[:2] == [100, 200]
    path = write(tmp_path / "reliability" / "memory.csv", memory_rows())
    assert plot.everything(tmp_path) == [path]
    assert [p.name for p in plot.draw(path)] == ["memory.png"]


def test_a_run_is_drawn_from_its_tables(plot: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    write(
        folder / "metrics.csv", [dict.fromkeys(("step", "loss", "entropy", "cosine", "beta"), "1")]
    )
    names = ("epoch", "step", "loss", "entropy", "cosine", "probe_entropy")
    write(folder / "epochs.csv", [dict.fromkeys(names, "1")])
    write(
        folder / "spectrum.csv", [{"epoch": "1", "step": "1", "lambda_1": "0.7", "lambda_2": "0.3"}]
    )
    shutil.copy(RESULTS / "digits" / "seed0.json", folder)
    assert plot.everything(tmp_path) == [folder]
    pictures = {path.name for path in plot.draw(folder)}
    assert pictures == {"loss.png", "entropy.png", "cosine.png", "spectrum.png"}


def run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_plot_is_a_program(tmp_path: Path) -> None:
    write(tmp_path / "moved.csv", cpu_rows())
    done = run("plot.py", "moved.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["moved-time.png", "moved-speedup.png", "moved-error.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("provider,n\ngram,3\n", "other.csv lacks the columns batch, d, m, mode, p50_ms, threads"),
        ("loss,loss_p50_ms\nours,3\n", "other.csv lacks the columns batch, image, loss_share"),
        ("provider,n\n", "other.csv has no rows"),
    ],
)
def test_plot_says_what_is_wrong_with_a_file(
    content: str, message: str, plot: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.csv").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(tmp_path / "other.csv")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_without_a_time(plot: ModuleType, tmp_path: Path) -> None:
    path = write(tmp_path / "none.csv", [entropy_row("ours", 2, 3, math.nan)])
    with pytest.raises(ValueError, match=r"none\.csv has no row with a time"):
        plot.draw(path)


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------

CPU_TABLE = """\
| n × d | Algorithm 1: 1, 2 threads | svd form | Gram + eigvalsh | Gram + eigvalsh, batch 8 | \
gradient error | of Gram + eigvalsh |
|---|---|---|---|---|---|---|
| 64 × 256 | 20.0×, 20.0× | 4.0×, 4.0× | 2.0×, 2.0× | 2.0×, 2.0× | 5.0e-07 | 4.0e-06 |
| 128 × 512 | 20.0×, 20.0× | 4.0×, 4.0× | 2.0×, 2.0× | 2.0×, 2.0× | 5.0e-07 | 4.0e-06 |"""

GPU_TABLE = """\
INVENTED, torch 0.0, 2000-01-02, commit 0123456789 (`gpu.csv`):

| n × d | eager, ms | graph, ms | floor / graph | Algorithm 1 | svd form | Gram + eigvalsh | \
best vendor eigensolver, batch 1 | best vendor eigensolver, batch 64 | gradient error | \
of Gram + eigvalsh |
|---|---|---|---|---|---|---|---|---|---|---|
| 64 × 256 | 2 | 1 | 50 % | 20.0× | 4.0× | 2.0× | 0.75× (XsyevBatched) | 0.75× (XsyevBatched) | \
5.0e-07 | 4.0e-06 |
| 128 × 512 | 2 | 1 | 100 % | 20.0× | 4.0× | 2.0× | 0.75× (XsyevBatched) | 0.75× (XsyevBatched) | \
5.0e-07 | 4.0e-06 |"""

TRAINING_TABLE = """\
INVENTED, torch 0.0, 2000-01-02, commit 0123456789 (`cpu-training-step.csv`):

| loss | views | 32 × 32 images, batch 64 |
|---|---|---|
| vne_kernels | 2 | 2 of 100 ms, 2 %, 1.5 MiB |
| Algorithm 1 | 2 | 20 of 100 ms, 20 %, 1.5 MiB |
| FroSSL | 2 | – |
| entropy by `get_vne`, looped | 2 | 4 of 100 ms, 4 %, 1.5 MiB |
| entropy in one call, vne_kernels | 2 | 1 of 100 ms, 1 %, 1.5 MiB |
| entropy by `get_vne`, looped | 4 | 8 of 100 ms, 8 %, 1.5 MiB |
| entropy in one call, vne_kernels | 4 | 1.5 of 100 ms, 1.5 %, 1.5 MiB |"""


@pytest.fixture
def invented(tmp_path: Path) -> Path:
    """A folder of results with every kind of file."""
    write(tmp_path / "cpu.csv", cpu_rows())
    write(tmp_path / "gpu.csv", gpu_rows())
    write(tmp_path / "cpu-training-step.csv", training_rows())
    (tmp_path / "else.csv").write_text("something,else\n1,2\n")
    for run in ("digits", "cifar10", "reliability"):
        shutil.copytree(RESULTS / run, tmp_path / run)
    for name in ("accumulator.csv", "family.csv", "scaling.csv", "scaling.json"):
        shutil.copy(RESULTS / name, tmp_path)
    return tmp_path


def test_tables_word_for_word(tables: ModuleType, invented: Path) -> None:
    assert tables.cpu_entropy(invented) == CPU_TABLE
    assert tables.gpu_entropy(invented) == GPU_TABLE
    assert tables.training_step(invented) == TRAINING_TABLE


def test_scaling_tables(tables: ModuleType) -> None:
    """A row and a column of each, against the files."""
    with (RESULTS / "scaling.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = json.loads((RESULTS / "scaling.json").read_text())
    last = next(r for r in rows if (r["processes"], r["n"], r["d"]) == ("4", "128", "512"))
    line = next(
        line
        for line in tables.scaling_measured(RESULTS).splitlines()
        if line.startswith(f"| 128 × 512 | {last['route']} |")
    )
    assert f"{float(last['time_p50_ms']):.3g} ms, " in line.split("|")[-2]
    assert f"{100 * found['error_median']:.0f} %, largest" in tables.scaling_machine(RESULTS)
    told = tables.scaling_predicted(RESULTS)
    assert "(**not measured**)" in " ".join(told.split())
    (most,) = (
        r for r in found["predicted"] if (r["processes"], r["n"], r["d"]) == (1024, 128, 256)
    )
    (line,) = (line for line in told.splitlines() if line.startswith("| 1,024 |"))
    assert f" {most['model_ms']:.0f} ms, " in line
    assert f"; {most['bytes'] / 2**20:.2g} MiB, " in line


def test_sentences_name_what_is_slower(tables: ModuleType, invented: Path) -> None:
    assert " ".join(tables.cpu_sentence(invented).split()) == (
        "Over all sizes, batches and threads, with the gradient the gain over Gram + eigvalsh is"
        " 2.0 ×, slower in none of 8 cases; without it the gain over Gram + eigvalsh is 0.75 to"
        " 1.5 ×, slower in 1 of 8 cases: 128 × 512, batch 8, 2 threads, 0.75 ×."
    )
    assert "2.0 to 2.0 times as fast" in " ".join(tables.cpu_headline(invented).split())
    assert "20 times as fast as the paper's" in " ".join(tables.cpu_headline(invented).split())
    machine = "INVENTED, torch 0.0, on 1 and 2 threads; 2000-01-02, commit 0123456789."
    assert machine in " ".join(tables.cpu_machine(invented).split())


def test_a_gradient_that_is_not_finite_is_told(tables: ModuleType, tmp_path: Path) -> None:
    rows = cpu_rows()
    next(row for row in rows if row["provider"] == "gram")["grad_rel_error"] = "nan"
    write(tmp_path / "cpu.csv", rows)
    sentence = " ".join(tables.cpu_sentence(tmp_path).split())
    assert sentence.endswith("was not finite in 1 case: 64 × 256, batch 1, 1 thread.")
    assert "| 5.0e-07 | – |" in tables.cpu_entropy(tmp_path)


def test_what_was_not_measured_is_said(tables: ModuleType, tmp_path: Path) -> None:
    write(tmp_path / "cpu.csv", cpu_rows())
    assert "**No GPU has run this comparison yet**" in tables.gpu_entropy(tmp_path)
    assert tables.training_step(tmp_path).startswith("Not measured yet")


def test_digits_have_a_value_for_each_seed(tables: ModuleType) -> None:
    table = tables.digits(RESULTS)
    assert len(table.splitlines()) == 2 + 4
    assert "| linear probe, all 1,437 labels | 96.9 | " in table


def test_reliability(tables: ModuleType, tmp_path: Path) -> None:
    write(tmp_path / "reliability" / "memory.csv", memory_rows())
    cases = dict.fromkeys(("values", "nan_samples", "gradients", "from_threads", "shapes"), 5)
    cases |= {"cases": 1234, "errors": 6, "failures": 1, "seconds": 7.4}
    cases |= {"date": "2000-01-02", "commit": "0123456789", "backend": "cpu"}
    (tmp_path / "reliability" / "cases.json").write_text(json.dumps(cases))
    emulated = cases | {"backend": "emulated", "cases": 56, "failures": 0, "seconds": 3.0}
    (tmp_path / "reliability" / "cases-emulated.json").write_text(json.dumps(emulated))
    text = tables.reliability(tmp_path)
    assert text.startswith("INVENTED, torch 0.0; 2000-01-02, commit 0123456789:")
    assert "| in all | 1,234, 7 s | 56, 3 s |" in text
    assert "| **failures** | **1** | **0** |" in text
    assert "Memory, mapped files aside, over 10,000 calls" in text
    assert "210.0 MiB after the warm-up, 217.0 MiB at the end" in " ".join(text.split())
    assert "**+100.00 MiB per 100,000 calls**" in " ".join(text.split())


def test_comparison_on_cifar10(tables: ModuleType, tmp_path: Path) -> None:
    """Means and every seed, from the rows themselves; the untrained encoder beside them."""
    folder = tmp_path / "cifar10"
    shutil.copytree(RESULTS / "cifar10", folder)
    header = (folder / "batch_size.csv").read_text().splitlines()[0].split(",")
    rows = []
    for loss, size, seed, accuracy, rank in (
        ("vn-doe", 32, 0, 0.5, 20),
        ("vn-doe", 32, 1, 0.6, 22),
        ("vn-doe", 128, 0, 0.25, 30),
        ("simsiam", 32, 0, 0.1, 2),
        ("simsiam", 128, 0, 0.2, 3),
        ("simclr", 32, 0, 0.9, 9),  # not at 128: it has no line yet
    ):
        row = dict.fromkeys(header, "nan") | {"loss": loss, "epochs": "4", "seed": str(seed)}
        row |= {"batch_size": str(size), "linear_accuracy": str(accuracy)}
        rows.append(row | {"effective_rank": str(rank), "knn": str(accuracy / 2)})
    with (folder / "batch_size.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "linear_eval_untrained.json").write_text('{"accuracy": 0.333}')
    (folder / "knn_untrained.json").write_text('{"accuracy": 0.222}')
    lines = tables.cifar10(tmp_path).splitlines()
    assert lines[2:] == [
        "| von Neumann DoE | 55.0 (50.0 / 60.0) | 25.0 (25.0) | 27.5 (25.0 / 30.0) | 12.5 (12.5) |"
        " 21.0 | 30.0 |",
        "| SimSiam | 10.0 (10.0) | 20.0 (20.0) | 5.0 (5.0) | 10.0 (10.0) | 2.0 | 3.0 |",
        "| untrained encoder, seed 0 | 33.3 | 33.3 | 22.2 | 22.2 | – | – |",
    ]
    assert lines[0] == (
        "| % (mean; seeds 0 / 1) | linear, batch 32 | linear, batch 128 | kNN, batch 32 |"
        " kNN, batch 128 | effective rank, batch 32 | effective rank, batch 128 |"
    )


def marked(names: Iterable[str]) -> str:
    return "".join(
        f"# Title\n\n<!-- table: {name} -->\n<!-- /table -->\n\nText.\n" for name in names
    )


def test_write_then_check(
    tables: ModuleType, invented: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = invented / "README.md"
    readme.write_text(marked(tables.TABLES), encoding="utf-8")
    where = ["--results", str(invented), "--readme", str(readme)]
    assert tables.main(["--check", *where]) == 1
    assert "+| 64 × 256 | 20.0×" in capsys.readouterr().out
    assert tables.main(["--write", *where]) == 0
    assert tables.main(["--check", *where]) == 0
    text = readme.read_text(encoding="utf-8")
    assert f"<!-- table: cpu-entropy -->\n{CPU_TABLE}\n<!-- /table -->\n\nText." in text
    readme.write_text(text.replace("20.0×", "21.0×"), encoding="utf-8")
    assert tables.main(["--check", *where]) == 1


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("", "must have <!-- table: a --> ... <!-- /table --> once, got it 0 times"),
        (marked("aa"), "once, got it 2 times"),
        (marked("ab"), "tables of no known name: b"),
    ],
)
def test_markers_are_checked(tables: ModuleType, readme: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tables.filled(readme, {"a": "A"})


# ---------------------------------------------------------------------------------------------
# The README
# ---------------------------------------------------------------------------------------------


def test_the_readme_holds_what_the_data_gives(
    tables: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    status = tables.main(["--check"])
    printed = capsys.readouterr()
    assert status == 0, f"{printed.err}{printed.out}\nrun: python bench/tables.py --write"


def pictures_of_the_readme() -> list[Path]:
    return [ROOT / name for name in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", README.read_text())]


def test_the_pictures_are_those_of_the_data(plot: ModuleType, rows: ModuleType) -> None:
    """Each picture of the README that a results file gives was drawn from that very file."""
    memory = RESULTS / "reliability" / "memory.csv"
    drawn = {memory.with_suffix(".png"): memory}
    for path in (*rows.files(RESULTS), RESULTS / plot.SCALING):
        drawn[path.with_suffix(".png")] = path  # of training_step.py
        drawn |= {path.with_name(f"{path.stem}-{kind}.png"): path for kind in KINDS}
    for picture in pictures_of_the_readme():
        assert picture.read_bytes().startswith(PNG)
        if picture in drawn:
            held = plot.source(drawn[picture]).encode() in picture.read_bytes()
            assert held, f"{picture.name} is of other data: run python bench/plot.py"
        else:
            folders = ("digits", "digits-spectrum", "cifar10")
            assert picture.parent in [RESULTS / folder for folder in folders]


def test_the_drawn_run_is_that_of_the_table() -> None:
    digits = RESULTS / "digits"
    if not (digits / "epochs.csv").is_file():
        pytest.skip("the tables of the run with seed 0 are not committed")
    with (digits / "epochs.csv").open(newline="", encoding="utf-8") as file:
        *_, last = csv.DictReader(file)
    told = json.loads((digits / "seed0.json").read_text())["training"]["last_epoch"]
    assert {name: float(value) for name, value in last.items()} == pytest.approx(told)
