"""Watch the spectrum of a layer while Lightning trains it, for ``vne_kernels[metrics]``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vne_kernels._core import checks, ops
from vne_kernels._core.spectra import renyi_entropy
from vne_kernels.common.extras import needed_by
from vne_kernels.functional.entropy import EPS

with needed_by("vne_kernels.callbacks", "metrics"):
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

__all__ = ["CollapseWatch", "SpectrumMonitor"]


class CollapseWatch:
    """Notices when an entropy falls below a threshold, and when it is above again.

    Args:
        below: the threshold, in nats.
        what: whose entropy it is, such as "a fixed batch".
    """

    def __init__(self, below: float, what: str) -> None:
        self.below, self.what = below, what
        self.collapsed = False

    def message(self, entropy: float, rows: str) -> str | None:
        """The message about an entropy in nats of rows, such as "128 images", where there is one.

        `collapsed` is whether it reports a collapse or the end of one. NaN is neither.
        """
        collapsed = entropy < self.below
        if collapsed == self.collapsed or math.isnan(entropy):
            return None
        self.collapsed = collapsed
        rank = f"effective rank {math.exp(entropy):.2f}"
        if not collapsed:
            return f"no longer collapsed: {rank}"
        return (
            f"the representation collapses: the entropy of {self.what} is {entropy:.3g} nats, "
            f"{rank} of {rows} (warned below {self.below:.3g} nats)"
        )


class SpectrumMonitor(Callback):
    """Logs entropy, effective rank and spectrum of a submodule's output; warns of a collapse.

    On a monitored step the rows that the submodule put out are taken together, as of several views,
    on each process its own. ``spectrum/entropy`` (nats) and ``spectrum/effective_rank`` go to every
    logger, and into ``trainer.callback_metrics``; the eigenvalues as a picture,
    ``spectrum/eigenvalues``, to TensorBoard. When the effective rank falls below the threshold
    there is one warning, and one message when it is above it again. If the submodule is not called
    in monitored steps there is one warning, too. Steps that are not monitored cost one comparison;
    a monitored one waits for the device.

    Args:
        submodule: the name of the module in the LightningModule, as ``get_submodule`` takes it,
            such as "projector"; its output in training is (n, d).
        every_n_steps: optimizer steps from one monitored step to the next; the first is monitored.
        collapse_below: effective rank, above 1, below which the user is warned.
        normalize: as for `vne_kernels.vn_entropy`.
        name: what the logged names begin with; a second monitor needs another.

    Raises:
        ValueError: every_n_steps is below 1; collapse_below is not above 1. In training: the
            LightningModule has no such submodule; its output is not (n, d).
        TypeError: every_n_steps is no whole number; collapse_below is not a number; normalize is
            not a bool; the output is not a floating tensor.

    Example:
        >>> monitor = SpectrumMonitor("projector", every_n_steps=100)
        >>> trainer = pl.Trainer(callbacks=[monitor])  # and further arguments
    """

    def __init__(
        self,
        submodule: str,
        *,
        every_n_steps: int = 50,
        collapse_below: float = 1.5,
        normalize: bool = True,
        name: str = "spectrum",
    ) -> None:
        self.submodule, self.name = submodule, name
        self.every_n_steps = checks.integer("every_n_steps", every_n_steps, 1)
        below = checks.number("collapse_below", collapse_below)
        if not 1 < below < math.inf:
            raise checks.wrong("collapse_below", "finite and above 1", collapse_below)
        checks.normalize(normalize)
        self.normalize = normalize
        self.collapse = CollapseWatch(math.log(below), f"the output of {submodule!r}")
        self._called: bool | None = None  # in a monitored step; None: in none yet
        self._outputs: list[Tensor] | None = None  # None: not a monitored step
        self._last_step = -1
        self._hook: RemovableHandle | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(submodule=self.submodule, name=self.name)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            module = pl_module.get_submodule(self.submodule)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"submodule must name a module of {type(pl_module).__name__}, which has {names}, "
                f"got {self.submodule!r}"
            ) from error
        self._last_step, self._called = -1, None
        self._hook = module.register_forward_hook(self._keep)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step  # the same one for all batches whose gradients are accumulated
        monitored = step % self.every_n_steps == 0 and step != self._last_step
        self._outputs = [] if monitored else None
        self._last_step = step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        rows, self._outputs = self._outputs, None
        if rows:
            self._called = True
            self._log(torch.cat(rows), trainer, pl_module)
        elif rows is not None and self._called is None:
            self._called = False
            rank_zero_warn(
                f"step {self._last_step}: submodule {self.submodule!r} was not called in the "
                "training step, so SpectrumMonitor logs nothing. Calls of the module count, calls "
                "of its forward method do not. This warning is given once."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._outputs = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"collapsed": self.collapse.collapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.collapse.collapsed = state_dict["collapsed"]

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._outputs is None:
            return
        what = f"the output of {self.submodule!r}"
        checks.samples(what, output)
        if output.dim() != 2:
            raise checks.wrong(what, "(n, d)", output.shape)
        self._outputs.append(output.detach().clone())  # it may be changed in place afterwards

    def _log(self, z: Tensor, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = self._last_step
        eigenvalues = ops.spectrum(z, None, self.normalize, EPS).double().cpu()
        entropy = renyi_entropy(eigenvalues, 1)
        values = {
            f"{self.name}/entropy": entropy.float(),
            f"{self.name}/effective_rank": entropy.exp().float(),
        }
        pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False)
        numbers = {key: float(value) for key, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                figure = _picture(eigenvalues)
                logger.experiment.add_figure(f"{self.name}/eigenvalues", figure, step)
        message = self.collapse.message(float(entropy), f"{len(z)} rows")
        if message is not None:
            report = rank_zero_warn if self.collapse.collapsed else rank_zero_info
            report(f"step {step}: {message}")


def _picture(eigenvalues: Tensor) -> Any:
    """Eigenvalues over their sum against their index; NaN and 0 are left out."""
    with needed_by("the picture of SpectrumMonitor", "metrics"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    shares = eigenvalues / eigenvalues.sum()
    axes.semilogy(range(1, len(shares) + 1), torch.where(shares > 0, shares, torch.nan))
    axes.set(xlabel="index", ylabel="eigenvalue / sum")
    axes.grid(alpha=0.3)
    return figure
