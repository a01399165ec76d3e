"""The commands that train many runs: what they start, how they stop, what they write.

The engine is tested with a program that replaces ``vne-pretrain`` and writes a run folder in
no time; that the real one fits is tested once, on a tiny run.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from naming import exit_code, last_error, naming
from PIL import Image
from tiny_run import write_noise

from vne_kernels.pretrain import batch_size, paper, sweep, variance
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.config import OptionError, Options
from vne_kernels.pretrain.sweep import Run

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
Calls = Callable[[], list[list[str]]]

# It imports nothing of the package, which would take seconds for each of the many processes.
FAKE = """
import json, os, sys, time
from pathlib import Path

command, *rest = sys.argv[1:]
with Path(os.environ["FAKE_CALLS"]).open("a") as file:
    file.write(json.dumps([command, os.environ.get("OMP_NUM_THREADS"), *rest]) + "\\n")
if command == "linear-eval":
    print("evaluating", rest[0])
    Path(rest[0], "linear_eval.json").write_text(json.dumps({"accuracy": 0.75}))
    sys.exit()

out = Path(rest[rest.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
config = json.loads(os.environ["FAKE_CONFIG"])
for option in rest:
    if "=" in option:
        name, value = option[2:].split("=", 1)
        config[name.replace("-", "_")] = int(value) if value.isdecimal() else value
(out / "config.json").write_text(json.dumps(config))
print("training", out, flush=True)
checkpoint = out / "checkpoints" / "step-00000012.ckpt"
checkpoint.parent.mkdir(exist_ok=True)
if os.environ.get("FAKE_FAILS", "nothing") in str(out):
    print("progress 1\\rprogress 2")
    sys.exit("no more memory")
if "FAKE_WAITS" in os.environ and "--resume" not in rest:
    try:
        (out / "waiting").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        checkpoint.touch()
        sys.exit(130)
checkpoint.touch()
rows = [f"{k},{1 + (k - 1) // 4},{-k},{k / 10}" for k in range(1, 4 * config["epochs"] + 1)]
(out / "metrics.csv").write_text("\\n".join(["step,epoch,loss,information", *rows]) + "\\n")
last = {"online_linear": 0.5, "online_knn": 0.25, "effective_rank": 12.5}
results = {"evaluation": {"trained": {"knn": 0.6}}, "training": {"last_epoch": last}}
results["data"] = {"train_images": 1437}
(out / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: Patch) -> Calls:
    """The stand-in is started in place of the program; returns what it was called with."""
    program, log = tmp_path / "fake.py", tmp_path / "calls"
    program.write_text(FAKE)
    log.touch()
    monkeypatch.setattr(sweep, "PROGRAM", (sys.executable, str(program)))
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("FAKE_CALLS", str(log))
    config = Options(data="digits", backbone="resnet18").resolved(native_size=8)
    monkeypatch.setenv("FAKE_CONFIG", json.dumps(dataclasses.asdict(config)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


def grid(out: Path, *arguments: str) -> list[str]:
    options = ["--out", str(out), "--batch-sizes", "8", "16", "--epochs", "3", *arguments]
    return ["batch-size", *options, "--", "--data", "digits", "--backbone", "resnet18"]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- the sweep ---------------------------------------------------------------------------------


def test_every_run_is_trained_and_evaluated(calls: Calls, tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "out"
    assert main(grid(out, "--losses", "vn-doe", "simclr", "--seeds", "0", "1")) == 0
    assert [call[0] for call in calls()] == ["train", "linear-eval"] * 8
    _, _, *first = calls()[0]
    folder = str(out / "vn-doe-batch8-epochs3-seed0")
    varied = ["--loss=vn-doe", "--batch-size=8", "--epochs=3", "--seed=0"]
    assert first == ["--out", folder, *varied, "--data", "digits", "--backbone", "resnet18"]
    assert calls()[1][2:] == [folder]
    # the first seed of everything comes first
    assert [call[2].endswith("seed0") for call in calls()[1::2]] == [True] * 4 + [False] * 4
    shown = capfd.readouterr()
    assert f"training {folder}" in shown.out
    assert "8/8" in shown.err

    rows = table(out / "batch_size.csv")
    assert [(row["loss"], row["batch_size"], row["seed"]) for row in rows] == sorted(
        (
            (loss, size, seed)
            for loss in ("simclr", "vn-doe")
            for size in ("8", "16")
            for seed in "01"
        ),
        key=lambda key: (key[0], int(key[1]), key[2]),
    )
    assert rows[0] == {
        "data": "digits",
        "train_images": "1437",
        "backbone": "resnet18",
        "loss": "simclr",
        "batch_size": "8",
        "epochs": "3",
        "seed": "0",
        "linear_accuracy": "0.75",
        "knn": "0.6",
        "online_linear": "0.5",
        "online_knn": "0.25",
        "effective_rank": "12.5",
    }
    assert Image.open(out / "batch_size.png").size[0] > 500


def test_finished_runs_are_skipped_and_begun_ones_resumed(calls: Calls, tmp_path: Path) -> None:
    assert main(grid(tmp_path)) == 0
    before = len(calls())
    assert main(grid(tmp_path)) == 0
    assert len(calls()) == before
    (tmp_path / "vn-doe-batch8-epochs3-seed0" / "results.json").unlink()  # but a checkpoint is
    (tmp_path / "vn-doe-batch16-epochs3-seed0" / "linear_eval.json").unlink()
    (tmp_path / "batch_size.csv").unlink()
    assert main(grid(tmp_path, "--seeds", "0", "1")) == 0
    again = calls()[before:]
    assert [call[0] for call in again] == ["train", "linear-eval"] + ["train", "linear-eval"] * 2
    assert again[0][-1] == "--resume"
    assert all("--resume" not in call for call in again[1:])
    assert len(table(tmp_path / "batch_size.csv")) == 4


@pytest.mark.parametrize("threads", [None, "3"])
def test_runs_side_by_side_share_the_threads(
    threads: str | None, calls: Calls, tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert main(grid(tmp_path, "--jobs", "2")) == 0
    assert {call[1] for call in calls()} == {threads or "4"}
    log = (tmp_path / "vn-doe-batch8-epochs3-seed0" / "log.txt").read_text()
    assert all(part in log for part in ("$ vne-pretrain train", "training", "evaluating"))
    assert "training" not in capfd.readouterr().out


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_failed_run_is_reported_and_the_others_go_on(
    jobs: str, calls: Calls, tmp_path: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "batch8")
    assert main(grid(tmp_path, "--jobs", jobs)) == 1
    error = capfd.readouterr().err
    assert error.count("vn-doe-batch8-epochs3-seed0") >= 2  # when it fails, and at the end
    assert "no more memory" in error
    assert [row["batch_size"] for row in table(tmp_path / "batch_size.csv")] == ["16"]
    monkeypatch.delenv("FAKE_FAILS")
    assert main(grid(tmp_path, "--jobs", jobs)) == 0
    assert len(table(tmp_path / "batch_size.csv")) == 2


def test_a_command_that_leaves_nothing_has_failed(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sweep, "PROGRAM", (sys.executable, "-c", ""))
    run = Run(tmp_path / "run", ())
    assert sweep.sweep(tmp_path, [run], 1, lambda: None).failed == [run]


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(
        b"x" * 70_000
        + b"\n1%\r2%\r\n\n"
        + b"\xff wrong\n"
        + b"".join(b"%d\n" % i for i in range(12))
    )
    lines = sweep._tail(log)
    assert lines == ["1%", "2%", "\ufffd wrong", *map(str, range(12))]


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "signum"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_ctrl_c_reaches_the_runs_and_waits_for_them(
    jobs: int, signum: int, calls: Calls, tmp_path: Path, monkeypatch: Patch
) -> None:
    out = tmp_path / "out"
    # In a process of its own: the sweep of this one would take the signals of the test itself.
    code = (
        "import sys; from vne_kernels.pretrain import cli, sweep; "
        f"sweep.PROGRAM = {sweep.PROGRAM!r}; sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *grid(out, "--jobs", str(jobs))],
        cwd=tmp_path,  # not the source folder
        env={**os.environ, "FAKE_WAITS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*/waiting"))) < jobs:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # A sweep at work keeps others away.
        assert main(grid(out)) == 2
        process.send_signal(signum)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (130 if signum == signal.SIGINT else 75)
    assert len(calls()) == len(list(out.glob("*/checkpoints/*"))) == jobs  # none started after it
    assert main(grid(out)) == 0
    assert sum("--resume" in call for call in calls()) == jobs


# ---- options -----------------------------------------------------------------------------------


def test_without_options_the_papers_protocol(
    calls: Calls, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(
        sweep, "sweep", lambda out, runs, jobs, after: seen.extend(runs) or sweep.Outcome()
    )
    seen: list[Run] = []
    assert main(["batch-size", "--out", str(tmp_path)]) == 0
    assert len(seen) == 15  # Figure 3: 8 to 128; 25, 50 and 100 epochs
    assert all("--recipe=cifar10-table1a" in run.train for run in seen)
    seen.clear()
    main(["batch-size", "--out", str(tmp_path), "--", "--data", "digits", "--accelerator", "cpu"])
    assert not any("recipe" in option for run in seen for option in run.train)
    assert seen[0].linear_eval == ("--accelerator=cpu",)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--jobs", "0"], "--jobs"),
        (["--", "--seed", "1"], "--seed"),
        (["--", "--out", "here"], "--out"),
        (["--batch-sizes", "1"], "--batch-size"),
        (["--", "--recipe", "none"], "--recipe"),
        (["--losses", "other"], "--losses"),
        (["--", "--overwrite"], "--overwrite"),
        (["--", "--unknown"], "--unknown"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    arguments: list[str], option: str, calls: Calls, tmp_path: Path, capsys: Capture
) -> None:
    assert exit_code(main, ["batch-size", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert re.search(naming(option), last_error(capsys))
    assert calls() == []


def test_runs_of_other_options_are_not_taken_for_these(
    calls: Calls, tmp_path: Path, capsys: Capture
) -> None:
    assert main(grid(tmp_path)) == 0
    assert main([*grid(tmp_path)[:-1], "resnet34"]) == 2
    assert re.search(naming("--backbone", "resnet18"), last_error(capsys))


def test_an_output_folder_that_cannot_be_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OptionError, match=naming("--out")):
        sweep.sweep(file, [Run(file / "run", ())], 1, lambda: None)


# ---- the paper's numbers -----------------------------------------------------------------------


def test_table_1a() -> None:
    cifar = paper.table_1a("cifar10")
    assert cifar["vn-doe", 100] == {16: 84.2, 32: 87.2, 64: 88.2, 128: 88.3}
    assert cifar["simclr", 50] == {32: 79.7, 64: 79.0, 128: 79.7}
    assert paper.table_1a("imagenet100")["simsiam", 25] == {16: 37.1, 32: 49.5, 64: 50.7, 128: 56.5}
    assert paper.table_1a("digits") == {}
    # Figure 2's are those of Table 1a
    for loss in ("simclr", "vn-doe"):
        assert paper.FIGURE_2[loss] == cifar[loss, 100][128]
    for data in paper.DATA:
        lines = paper.table_1a(data)
        assert lines.keys() == {
            (x, e) for x in ("simclr", "simsiam", "vn-doe") for e in paper.EPOCHS
        }
        assert sum(len(line) for line in lines.values()) >= 35


# ---- pictures ----------------------------------------------------------------------------------


def test_paper_is_drawn_for_the_same_images_alone(tmp_path: Path) -> None:
    def row(data: str, loss: str) -> batch_size.Row:
        nan = math.nan
        return batch_size.Row(data, 1437, "resnet18", loss, 16, 20, 0, 0.5, nan, nan, nan, nan)

    widths = {}
    for data, loss in (("digits", "simclr"), ("cifar10", "simclr"), ("cifar10", "byol")):
        picture = batch_size.write([row(data, loss)], tmp_path / f"{data}-{loss}.csv")
        widths[data, loss] = Image.open(picture).size[0]
    assert widths["cifar10", "simclr"] > widths["digits", "simclr"] == widths["cifar10", "byol"]
    lines = batch_size._paper_lines([row("cifar10", "simclr"), row("cifar10", "vicreg")])
    assert lines == {("simclr", 25): {16: [73.6], 32: [73.8], 64: [73.5], 128: [68.7]}}


# ---- variance ----------------------------------------------------------------------------------


def test_variance(calls: Calls, tmp_path: Path, capfd: Capture) -> None:
    command = ["variance", "--out", str(tmp_path), "--", "--data", "digits"]
    assert main(command) == 0
    losses = ["simclr", "shannon-doe", "vn-doe"]
    assert [call[2:] for call in calls()[::2]] == [
        ["--out", str(tmp_path / loss), f"--loss={loss}", "--data", "digits"] for loss in losses
    ]
    rows = table(tmp_path / "variance.csv")
    epochs = Options(data="digits").resolved(native_size=8).epochs
    assert [row["loss"] for row in rows] == [loss for loss in losses for _ in range(epochs)]
    # the stand-in's steps of the second epoch: 5 to 8, information 0.5 to 0.8 nats
    assert (rows[1]["epoch"], rows[1]["steps"]) == ("2", "4")
    assert float(rows[1]["information_mean"]) == pytest.approx(0.65 / math.log(2), rel=1e-5)
    assert float(rows[1]["information_max"]) == pytest.approx(0.8 / math.log(2), rel=1e-5)
    assert float(rows[1]["loss_value_min"]) == -8
    assert float(rows[1]["loss_value_std"]) == pytest.approx(np.std([5, 6, 7, 8]), rel=1e-5)
    assert float(rows[1]["loss_value_step_std"]) == pytest.approx(0, abs=1e-9)
    assert Image.open(tmp_path / "variance.png").size[0] > 1000
    shown = capfd.readouterr().out
    assert "shannon-doe" in shown
    assert "75.00 %" in shown
    assert main([*command, "--loss", "byol"]) == 2


def test_step_std_is_that_of_the_noise() -> None:
    random = np.random.default_rng(0)
    rows, noise = [], 0.3
    for epoch in range(1, 21):
        trend = np.linspace(epoch, epoch + 1, 100)
        spread = variance.spread(trend + noise * random.standard_normal(100))
        assert spread.std > 1.2 * spread.step_std
        rows.append(variance.Row("simclr", epoch, 100, spread, spread))
    # of 2000 draws: a relative standard error of 1.6 %
    assert variance.step_std(rows, "information") == pytest.approx(noise, rel=0.05)


def test_step_std_of_too_few_steps_is_unknown() -> None:
    spread = variance.spread(np.array([1.0, 2.0]))
    assert (spread.mean, spread.min, spread.max) == (1.5, 1, 2)
    row = variance.Row("simclr", 1, 2, spread, spread)
    assert math.isnan(spread.step_std)
    assert math.isnan(variance.step_std([row], "information"))
    # and does not spoil that of the other epochs
    known = variance.Row("simclr", 2, 3, *[variance.spread(np.array([0.0, 1.0, 0.0]))] * 2)
    assert variance.step_std([row, known], "information") == known.information.step_std


# ---- the real program --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_program(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)  # its processes must not find the source folder
    write_noise(Path("noise.npz"), 24)
    options = ["--data", "noise.npz", "--backbone", "resnet18", "--projector-dim", "16"]
    options += ["--workers", "0", "--accelerator", "cpu", "--precision", "32-true"]
    command = ["batch-size", "--out", "out", "--batch-sizes", "8", "--epochs", "2", "--jobs", "2"]
    assert main([*command, "--", *options, "--no-evaluation"]) == 0
    (row,) = table(Path("out/batch_size.csv"))
    assert (row["data"], row["loss"], row["epochs"]) == ("noise", "vn-doe", "2")
    assert 0 <= float(row["linear_accuracy"]) <= 1
    assert 0 <= float(row["online_linear"]) <= 1
    assert 1 <= float(row["effective_rank"]) <= 8
    assert row["knn"] == "nan"  # left out by --no-evaluation
