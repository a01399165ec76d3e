"""The loss in its place: model, losses, rows and messages; no number is judged for speed."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

BENCH = Path(__file__).resolve().parents[1] / "bench"
CPU = torch.device("cpu")
TWO_VIEWS = ["ours", "algorithm1", "nt-xent", "barlow", "vicreg", "frossl", "mmcr"]
TINY = "--images 8 --batches 4 --dim 16 --backbone resnet18 --views 2,3 --case-seconds 0.1"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import training_step

    return training_step


def tiny_case(training: ModuleType, dtype: str = "float32") -> object:
    return training.Case(image=8, batch=4, dim=16, backbone="resnet18", dtype=dtype)


# ---------------------------------------------------------------------------------------------
# The whole program, once
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """Output, errors and results file of a tiny run of every loss."""
    folder = tmp_path_factory.mktemp("bench")
    done = subprocess.run(
        [
            sys.executable,
            str(BENCH / "training_step.py"),
            *TINY.split(),
            "--out",
            "results/tiny.csv",
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, folder / "results" / "tiny.csv"


@pytest.fixture(scope="module")
def rows(finished: tuple[str, str, Path]) -> list[dict[str, str]]:
    with finished[2].open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_per_loss(rows: list[dict[str, str]], training: ModuleType) -> None:
    assert tuple(rows[0]) == training.COLUMNS
    multi_view = [("get_vne x2", "2"), ("ours x2", "2"), ("get_vne x3", "3"), ("ours x3", "3")]
    wanted = [*((name, "2") for name in TWO_VIEWS), *multi_view]
    assert [(row["loss"], row["views"]) for row in rows] == wanted


def test_rows_say_where_they_come_from(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert row["torch"] == torch.__version__
        assert (row["device"], row["threads"], row["dtype"]) == ("cpu", "1", "bfloat16")
        assert (row["image"], row["batch"], row["dim"]) == ("8", "4", "16")
        assert row["backbone"] == "resnet18"
        assert all(row[name] for name in ("date", "commit", "cusolver", "driver", "clocks"))


def test_numbers_are_plausible(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert row["note"] == ""
        for what in ("loss", "step"):
            p20, p50, p80 = (float(row[f"{what}_{q}_ms"]) for q in ("p20", "p50", "p80"))
            assert 0 < p20 <= p50 <= p80
            assert int(row[f"{what}_samples"]) >= 1
        share = float(row["loss_p50_ms"]) / float(row["step_p50_ms"])
        assert float(row["loss_share"]) == pytest.approx(share, rel=2e-3)
        if not math.isnan(float(row["loss_peak_mib"])):  # there is a C compiler
            assert 0 < float(row["loss_peak_mib"]) < float(row["step_peak_mib"])


def test_table_on_screen_and_nothing_half_written(finished: tuple[str, str, Path]) -> None:
    table, progress, out = finished
    assert "\nimage=8 batch=4 dim=16 resnet18 bfloat16\n" in table
    for name in (*TWO_VIEWS[1:], "get_vne x2", "ours x3"):
        assert table.count(f"\n  {name} ") == 1
    assert "[1/1] image=8 batch=4" in progress
    assert [path.name for path in out.parent.iterdir()] == ["tiny.csv"]


# ---------------------------------------------------------------------------------------------
# What is trained
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image", "stem"), [(32, "3x3"), (224, "7x7")])
def test_model_is_the_pretraining_program_s(training: ModuleType, image: int, stem: str) -> None:
    from lightly.models.utils import get_weight_decay_parameters

    from vne_kernels.pretrain.model import make_encoder
    from vne_kernels.pretrain.objectives import paper_projector

    model = training.make_model("resnet18", image, 24)
    program = torch.nn.Sequential(make_encoder("resnet18", stem), paper_projector(512, 2048, 1, 24))
    states = zip(model.state_dict().values(), program.state_dict().values(), strict=True)
    for one, other in states:
        assert one.shape == other.shape
        other.copy_(one)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(images), program(images))
    groups = training.make_optimizer(model, 64).param_groups
    for group, wanted in zip(groups, get_weight_decay_parameters([model]), strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in wanted}


def test_resnet50_has_as_many_parameters_as_the_program_s(training: ModuleType) -> None:
    from vne_kernels.pretrain.model import make_encoder
    from vne_kernels.pretrain.objectives import paper_projector

    program = [make_encoder("resnet50", "3x3"), paper_projector(2048, 2048, 1, training.DIM)]
    wanted = sum(p.numel() for part in program for p in part.parameters())
    model = training.make_model("resnet50", 32, training.DIM)
    assert sum(p.numel() for p in model.parameters()) == wanted


def test_every_step_starts_from_the_same_weights(training: ModuleType) -> None:
    """Also after a loss whose gradient is NaN."""
    one = training.Training(tiny_case(training), 2, True, CPU)
    frossl, mmcr = training.TWO_VIEWS["frossl"], training.TWO_VIEWS["mmcr"]
    values = []
    for spoil in (False, True, False):
        one.restart()
        if spoil:
            one.step(lambda z, _: z.sum() * math.nan, 2, 4)
            assert not next(one.model.parameters()).isfinite().any()
        else:
            values.append(one.step(frossl.build(), 2, 4))
    assert values[0] == values[1]
    one.restart()
    assert one.step(mmcr.build(), 2, 4, momentum=True).isfinite()


def test_a_step_is_that_of_its_number_of_views(training: ModuleType) -> None:
    one = training.Training(tiny_case(training, "bfloat16"), 3, False, CPU)
    seen: list[tuple[torch.Size, torch.dtype]] = []

    def criterion(z: Tensor, target: Tensor | None) -> Tensor:
        assert target is None
        seen.append((z.shape, z.dtype))
        return z.square().mean()

    before = next(one.model.parameters()).clone()
    one.step(criterion, 3, 4)
    assert seen == [(torch.Size((3, 4, 16)), torch.float32)]
    assert not torch.equal(before, next(one.model.parameters()))


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(8, 24), (24, 8), (64, 256)])
def test_ours_agrees_with_what_it_is_compared_to(training: ModuleType, n: int, d: int) -> None:
    training.check_ours(torch.randn(4, n, d, generator=torch.Generator().manual_seed(1)))


def test_a_loss_that_computes_something_else_is_not_timed(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = training._ours()
    monkeypatch.setattr(training, "_ours", lambda: lambda z, t: 1.001 * ours(z, t))
    losses = training.make_losses(["nt-xent"], [2])
    with pytest.raises(ArithmeticError, match=r"ours must agree with its baseline .* got 1\.0e-03"):
        training.measure_case(losses, tiny_case(training), CPU, 0.01)


def test_missing_and_failing_losses_stay_in_the_table(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(z: Tensor, target: Tensor | None) -> Tensor:
        raise NotImplementedError("not for these views\nand more")

    def only_alone(z: Tensor, target: Tensor | None) -> Tensor:
        if not z.is_leaf:
            raise RuntimeError("not in a step")
        return z.sum()

    monkeypatch.setitem(sys.modules, "lightly", None)
    losses = [
        *training.make_losses(["nt-xent", "ours"], [2]),
        training.Loss("refuses", 2, lambda: refuses),
        training.Loss("only alone", 2, lambda: only_alone),
        training.Loss("not finite", 2, lambda: lambda z, _: z.sum() * math.nan),
    ]
    case = tiny_case(training)
    missing, ours, refused, alone, nan = training.measure_case(losses, case, CPU, 0.01)
    assert missing["note"].startswith("ModuleNotFoundError: ")
    assert refused["note"] == "NotImplementedError: not for these views"
    for row in (missing, refused):
        assert (row["loss_samples"], row["step_samples"]) == (0, 0)
        assert {row[name] for name in ("loss_p50_ms", "step_p50_ms", "loss_share")} == {"nan"}
    assert alone["note"] == "no step: RuntimeError: not in a step"
    assert float(alone["loss_p50_ms"]) > 0
    assert (alone["step_p50_ms"], alone["loss_share"]) == ("nan", "nan")
    assert nan["note"] == "the loss of the step is not finite"
    assert ours["note"] == ""
    assert float(ours["loss_share"]) > 0


def test_a_step_that_does_not_fit_is_not_tried(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_free_bytes", lambda: 8.5 * 2.0**30)
    monkeypatch.setattr(training, "_bytes_per_image", lambda _: 2.0**30)
    (row,) = training.measure_case(
        training.make_losses(["ours"], [2]), tiny_case(training), CPU, 0.01
    )
    assert row["note"] == "no step: needs about 8 GiB of memory, more than is free"
    assert row["step_samples"] == 0


def test_an_interrupted_step_is_tried_again(training: ModuleType) -> None:
    contender = training.harness.Contender
    two, four = (training.Loss("a loss", views, training._ours) for views in (2, 4))
    seconds = ((two, 0.1), (two, 0.11), (two, 0.9), (four, 0.9))
    results = []
    for loss, estimate_s in seconds:
        step = contender("a step", lambda: None, lambda: None, estimate_s=estimate_s)
        results.append(training.Measured(loss, None, step, step))
    training._try_outliers_again(results, CPU)
    fast, close, again, alone = (result.step.estimate_s for result in results)
    assert (fast, close, alone) == (0.1, 0.11, 0.9)
    assert again != 0.9  # on a busy machine even nothing may take a while


def test_memory_for_one_more_image(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {4: 100.0, 8: 140.0}
    one = training.Training(tiny_case(training), 2, False, CPU)
    sizes = iter((4, 4, 8))
    monkeypatch.setattr(training.memory, "peak_bytes", lambda call, device: held[next(sizes)])
    assert training._bytes_per_image(one) == 10.0
    assert training._free_bytes() > 0 or math.isnan(training._free_bytes())


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--bogus", "unrecognized arguments: --bogus"),
        ("--images 32x32", "argument --images: wanted positive whole numbers, got '32x32'"),
        ("--batches 1", "argument --batches: wanted 2 or more, got 1"),
        ("--views 0", "argument --views: wanted positive whole numbers, got '0'"),
        ("--losses ours,dino", "argument --losses: wanted some of ours, algorithm1, nt-xent"),
        ("--case-seconds -1", "argument --case-seconds: wanted a positive number"),
        ("--stop-after inf", "argument --stop-after: wanted a positive number"),
        ("--dtype float16", "argument --dtype: invalid choice: 'float16'"),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_wrong_arguments(
    arguments: str, message: str, training: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        training.parse_arguments(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_without_a_device_says_so(
    training: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        training.parse_arguments(["--device", "cuda"])
    assert stopped.value.code == 2
    assert f"no CUDA device: torch {torch.__version__}" in capsys.readouterr().err


def test_quick_gives_way_to_what_is_given(training: ModuleType) -> None:
    quick = training.parse_arguments(["--quick", "--batches", "16"])
    assert (quick.images, quick.batches) == ((32,), (16,))
    assert quick.losses == ("ours", "algorithm1", "nt-xent")
    assert quick.out == BENCH / "results" / "cpu-training-step.csv"
    everything = training.parse_arguments([])
    assert (everything.images, everything.batches) == ((32, 224), (64, 128))
    names = [loss.name for loss in training.make_losses(everything.losses, everything.views)]
    assert names[: len(TWO_VIEWS)] == TWO_VIEWS
    assert names[-2:] == ["get_vne x8", "ours x8"]


@pytest.fixture
def two_cases(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ModuleType, list[str], Path]:
    """The program in this process, its two cases not measured."""
    out = tmp_path / "out.csv"
    out.write_text("earlier results\n")
    row = dict.fromkeys(training.COLUMNS, "1")
    monkeypatch.setattr(training, "measure_case", lambda *_: [dict(row)])
    return training, ["--batches", "4,8", "--images", "8", "--out", str(out)], out


def test_ctrl_c_keeps_finished_cases_and_earlier_results(
    two_cases: tuple[ModuleType, list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training, arguments, out = two_cases
    first = training.measure_case

    def interrupted(losses: object, case: object, *rest: object) -> object:
        if "batch=8" in str(case):
            raise KeyboardInterrupt
        return first()

    monkeypatch.setattr(training, "measure_case", interrupted)
    assert training.main(arguments) == 130
    assert f"any finished case is in {out}.partial" in capsys.readouterr().err
    assert out.read_text() == "earlier results\n"
    assert len(out.with_name("out.csv.partial").read_text().splitlines()) == 2


def test_stop_after_publishes_what_is_finished(
    two_cases: tuple[ModuleType, list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    training, arguments, out = two_cases
    assert training.main([*arguments, "--stop-after", "1e-9"]) == 0
    assert "stopped after 1 of 2 cases" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 2
    assert training.main(arguments) == 0
    assert len(out.read_text().splitlines()) == 3
    assert not out.with_name("out.csv.partial").exists()
