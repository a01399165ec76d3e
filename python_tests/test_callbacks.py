"""The Lightning callback: what is logged at which steps, and what is said of a collapse."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from naming import naming
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vne_kernels import vn_entropy
from vne_kernels.callbacks import CollapseWatch, SpectrumMonitor

ROWS, FEATURES = 8, 6


class Model(pl.LightningModule):
    """Two views through one projector; from step to step as collapsed as `spread` says."""

    def __init__(self, spread: list[float], projector: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = nn.Linear(FEATURES, FEATURES)
        self.projector = nn.Identity() if projector is None else projector
        self.spread = spread
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        one = self.backbone.weight[:1] + self.spread[batch_idx] * batch
        self.seen.append(torch.cat([one, 2 * one]).detach())
        return self.projector(one).mean() + self.projector(2 * one).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.projector(torch.full((3, FEATURES), math.nan))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Recorder(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, {k: v for k, v in metrics.items() if k.startswith("spectrum/")}))


def train(
    model: Model, monitors: list[SpectrumMonitor], loggers: list, folder: Path, **options: object
) -> pl.Trainer:
    g = torch.Generator().manual_seed(0)
    data = [torch.randn(ROWS, FEATURES, generator=g) for _ in model.spread]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=loggers,
        callbacks=monitors,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message="The number of training batches")
        trainer.fit(model, *(DataLoader(x, batch_size=None) for x in (data, data[:1])))
    return trainer


def test_what_is_logged_when(tmp_path: Path) -> None:
    """Of both views together, on every second step, though gradients of two batches are summed."""
    model, recorder = Model([1.0] * 10), Recorder()
    board = TensorBoardLogger(tmp_path, name="", version="")
    trainer = train(
        model,
        [SpectrumMonitor("projector", every_n_steps=2)],
        [recorder, board],
        tmp_path,
        accumulate_grad_batches=2,
    )
    rows = [(step, row) for step, row in recorder.rows if row]
    assert [step for step, _ in rows] == [0, 2, 4]
    for step, row in rows:
        entropy = float(vn_entropy(model.seen[2 * step].double()))
        assert row["spectrum/entropy"] == pytest.approx(entropy, abs=1e-5)
        assert row["spectrum/effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-5)
    last = trainer.callback_metrics["spectrum/effective_rank"]
    assert float(last) == pytest.approx(rows[-1][1]["spectrum/effective_rank"])
    assert not model.projector._forward_hooks

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("spectrum/entropy")] == [0, 2, 4]
    pictures = events.Images("spectrum/eigenvalues")
    assert [picture.step for picture in pictures] == [0, 2, 4]
    assert all(picture.encoded_image_string.startswith(b"\x89PNG") for picture in pictures)


def test_a_collapse_is_reported_once_and_so_is_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitors = [
        SpectrumMonitor("projector", every_n_steps=1),
        SpectrumMonitor("backbone", name="unused"),  # has no output in this model
    ]
    spread = [1.0, 1e-3, 1e-3, math.nan, 1e-3, 1.0, 1.0]
    # A run of vne-pretrain in this process has silenced Lightning's loggers.
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        caplog.set_level("INFO", logger=name)
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="projector") as warned:
        train(Model(spread), monitors, [], tmp_path)
    (message,) = [str(w.message) for w in warned if "projector" in str(w.message)]
    assert re.search(naming("step 1", 16), message)
    (silent,) = [str(w.message) for w in warned if "backbone" in str(w.message)]
    assert "step 0" in silent
    assert [r.getMessage().count("step 5") for r in caplog.records if "step" in r.getMessage()] == [
        1
    ]


def test_a_resumed_run_does_not_warn_again() -> None:
    before, after = (SpectrumMonitor("projector") for _ in range(2))
    assert re.search(naming("1.00", "8 rows"), before.collapse.message(0.001, "8 rows"))
    after.load_state_dict(before.state_dict())
    assert after.collapse.message(0.001, "8 rows") is None
    assert "2.72" in after.collapse.message(1.0, "8 rows")
    assert SpectrumMonitor("a").state_key != SpectrumMonitor("b").state_key


def test_nan_is_neither_a_collapse_nor_the_end_of_one() -> None:
    watch = CollapseWatch(0.5, "it")
    assert watch.message(math.nan, "") is None
    assert watch.message(0.1, "") is not None
    assert watch.message(math.nan, "") is None
    assert watch.collapsed


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("every_n_steps", 0, ValueError),
        ("every_n_steps", 1.5, TypeError),
        ("collapse_below", "2", TypeError),
        ("collapse_below", 1.0, ValueError),
        ("collapse_below", math.nan, ValueError),
        ("normalize", "yes", TypeError),
    ],
)
def test_wrong_arguments(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=naming(name)):
        SpectrumMonitor("projector", **{name: value})


def test_numbers_of_numpy() -> None:
    monitor = SpectrumMonitor("p", every_n_steps=np.int64(3), collapse_below=np.float32(2))
    assert monitor.every_n_steps == 3
    assert monitor.collapse.below == pytest.approx(math.log(2))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Wrapped(nn.Module):
    """A module whose output is not what the monitor wants, inside one whose output is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(
    ("inner", "error", "named"),
    [
        (None, ValueError, ("submodule", "backbone", "projector")),
        (nn.Unflatten(1, (2, 3)), ValueError, ("projector.inner", (8, 2, 3))),
        (Pair(), TypeError, ("projector.inner", "tuple")),
    ],
)
def test_wrong_submodules(
    inner: nn.Module | None, error: type[Exception], named: tuple[object, ...], tmp_path: Path
) -> None:
    submodule = "head" if inner is None else "projector.inner"
    model = Model([1.0], None if inner is None else Wrapped(inner))
    with pytest.raises(error, match=naming(*named)):
        train(model, [SpectrumMonitor(submodule)], [], tmp_path)
    assert not any(module._forward_hooks for module in model.modules())
