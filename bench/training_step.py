"""What a loss costs of a ResNet-50 training step, in time and in memory.

    python bench/training_step.py            # every case, to bench/results/cpu-training-step.csv
    python bench/training_step.py --quick    # 32 x 32, batch 64, three losses: about a minute

A case is an image size (`--sizes`), a batch size and autocast's dtype. In each, every loss is timed
alone, and inside a step that is really run with this loss and this number of views: encoder and
projector of all views under autocast, the loss in float32, backward, SGD. Both are those of
`vne_kernels.pretrain`. The losses of others come from lightly: `pip install '.[bench,pretrain]'`.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import machine
import runner
import torch
from lightly import loss as lightly
from runner import Contender
from torch import Tensor, nn
from torch.func import grad_and_value

import vne_kernels
from vne_kernels import reference
from vne_kernels.pretrain.model import make_encoder
from vne_kernels.pretrain.objectives import paper_projector

BACKBONES = {"resnet18": 512, "resnet50": 2048}  # and their features
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ALONE = 0.25  # the losses alone get this share of a case's seconds, in addition to the steps
FREE = 0.9  # the steps may take this share of the host's free memory
BETA = 1.0  # weight of the cosine; the time does not depend on it

# Ours in float32 against its baseline in float64, relative. Measured on a CPU with such embeddings:
# at most 5e-7 in the value, 2e-6 in the gradient, and 2e-5 for as many samples as features.
VALUE_TOLERANCE, GRAD_TOLERANCE = 1e-4, 1e-3

COLUMNS = (
    *("date", "commit", "torch", "cuda", "cusolver", "driver"),
    *("device", "device_name", "clocks", "threads"),
    *("loss", "views", "image", "batch", "dim", "backbone", "dtype"),
    *("loss_samples", "loss_p20_ms", "loss_p50_ms", "loss_p80_ms"),
    *("step_samples", "step_p20_ms", "step_p50_ms", "step_p80_ms"),
    *("loss_share", "loss_peak_mib", "step_peak_mib", "note"),
)
SHOWN = ("loss", "views", "loss_p50_ms", "step_samples", "step_p50_ms", *COLUMNS[-4:])


@dataclass(frozen=True)
class Loss:
    name: str
    views: int
    #: Of embeddings (V, n, d) of the views, and of those of a momentum encoder or None.
    criterion: Callable[[Tensor, Any], Tensor]
    momentum: bool = False  # its step has a momentum encoder too


def of_pair(criterion: nn.Module) -> Callable[[Tensor, object], Tensor]:
    return lambda z, _: criterion(*z)


def get_vne(z: Tensor, _: object) -> Tensor:
    return -torch.stack([reference.official_svd(one) for one in z]).mean()


def of_views(v: int) -> tuple[Loss, Loss]:
    """The mean negative entropy of v views: by one call of get_vne for each, by ours for all."""
    ours = Loss(f"ours x{v}", v, lambda z, _: -vne_kernels.vn_entropy(z).mean())
    return Loss(f"get_vne x{v}", v, get_vne), ours


FROSSL, MMCR = lightly.FroSSLLoss(), lightly.MMCRLoss()
TWO_VIEWS = (
    Loss("ours", 2, of_pair(vne_kernels.DoELoss(BETA))),
    Loss("algorithm1", 2, lambda z, _: reference.algorithm1_loss(*z, BETA)),
    Loss("nt-xent", 2, of_pair(lightly.NTXentLoss())),
    Loss("barlow", 2, of_pair(lightly.BarlowTwinsLoss())),
    Loss("vicreg", 2, of_pair(lightly.VICRegLoss())),
    Loss("frossl", 2, lambda z, _: FROSSL(list(z))),
    Loss("mmcr", 2, lambda z, m: MMCR(z.transpose(0, 1), m.transpose(0, 1)), True),
)
MULTI_VIEW = "multi-view"  # the losses of `of_views`, for each number of views
NAMES = (*(loss.name for loss in TWO_VIEWS), MULTI_VIEW)


def check_ours(z: Tensor) -> None:
    """Raises ArithmeticError unless ours computes what its two baselines compute on z (V, n, d)."""
    for baseline, ours in (TWO_VIEWS[1::-1], of_views(len(z))):
        views = z[: ours.views]
        grad, value = grad_and_value(ours.criterion)(views, None)
        want_grad, want = grad_and_value(baseline.criterion)(views.double(), None)
        value_error = float((value - want).abs() / want.abs())
        grad_error = float((grad - want_grad).norm() / want_grad.norm())
        if not (value_error <= VALUE_TOLERANCE and grad_error <= GRAD_TOLERANCE):
            errors = f"value {value_error:.1e}, gradient {grad_error:.1e}"
            raise ArithmeticError(f"{ours.name} differs from its float64 baseline: {errors}")


@dataclass(frozen=True)
class Case:
    """What all steps of a case have in common."""

    image: int
    batch: int
    dim: int
    backbone: str
    dtype: str  # of autocast; float32: none


class Training:
    """Model, optimizer and images of one case, for steps of any loss.

    Every step starts from the same weights. So all steps do the same work, however many there are,
    and a loss whose gradient is NaN does not spoil the others.
    """

    def __init__(self, case: Case, losses: Sequence[Loss], device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        encoder = make_encoder(case.backbone, "3x3" if case.image <= 64 else "7x7")
        projector = paper_projector(BACKBONES[case.backbone], 2048, 1, case.dim)
        self.model = nn.Sequential(encoder, projector).to(device)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=5e-5, fused=True)
        for p in self.model.parameters():  # a step allocates the momentum
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        count = case.batch * max(loss.views for loss in losses)
        images = torch.randn(count, 3, case.image, case.image)
        self.images = images.to(device, memory_format=torch.channels_last)
        if any(loss.momentum for loss in losses):
            swa = torch.optim.swa_utils
            average = swa.get_ema_multi_avg_fn(0.996)  # as in lightly's examples
            self.momentum_model = swa.AveragedModel(self.model, multi_avg_fn=average)
        self.start = deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def restart(self) -> None:
        """Weights, statistics and momentum as at the start, and no gradients."""
        self.optimizer.zero_grad()
        self.model.load_state_dict(self.start[0])
        self.optimizer.load_state_dict(deepcopy(self.start[1]))  # it keeps the tensors

    def embed(self, model: nn.Module, loss: Loss) -> Tensor:
        """(V, n, d) in float32. All views pass at once, as one batch of the batch norms."""
        dtype = DTYPES[self.case.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            z = model(self.images[: loss.views * self.case.batch])
        return z.float().view(loss.views, self.case.batch, self.case.dim)

    def step(self, loss: Loss) -> None:
        target = None
        if loss.momentum:
            self.momentum_model.update_parameters(self.model)
            with torch.no_grad():
                target = self.embed(self.momentum_model, loss)
        loss.criterion(self.embed(self.model, loss), target).backward()
        self.optimizer.step()


def tried(contender: Contender, device: torch.device) -> Contender:
    """Measures the memory and estimates the time, or keeps the reason of a failure.

    On a CPU the estimate may remain the only sample of a step. So it is the better of two that are
    warm: a slow step makes its loss look cheap.
    """
    try:
        for _ in range(2):  # the second call is without what libraries allocate once
            contender.prepare()
            contender.peak_bytes = machine.peak_bytes(contender.call, device)
        contender.estimate_s = min(runner.time_once(contender, device) for _ in range(2))
    except Exception as error:
        contender.error = runner.reason(error)
    return contender


def measure(
    losses: Sequence[Loss], case: Case, device: torch.device, budget_s: float
) -> list[runner.Row]:
    """All losses of one case, timed together: alone, then in their steps, for budget_s."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(2, *(loss.views for loss in losses)), case.batch, case.dim)
    z, target = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    check_ours(z)

    def alone(loss: Loss) -> Contender:
        """From a leaf (V, n, d), float32, to its gradient; the same numbers for all."""
        leaf, other = z[: loss.views].clone().requires_grad_(), target[: loss.views]
        one = Contender(loss.name, lambda: torch.autograd.grad(loss.criterion(leaf, other), leaf))
        return tried(one, device)

    contenders = [alone(loss) for loss in losses]
    runner.time_interleaved(contenders, device, ALONE * budget_s)

    training = Training(case, losses, device)
    steps = []
    for loss, contender in zip(losses, contenders, strict=True):
        call = partial(training.step, loss)
        step = Contender(loss.name, call, training.restart, error=contender.error)
        steps.append(step if step.error else tried(step, device))
    runner.time_interleaved(steps, device, budget_s)
    return [
        {
            "loss": loss.name,
            "views": loss.views,
            **contender.columns("loss_"),
            **step.columns("step_"),
            "loss_share": f"{contender.quantiles_ms()[1] / step.quantiles_ms()[1]:.4g}",
            "loss_peak_mib": f"{contender.peak_bytes / 2**20:.4g}",
            "step_peak_mib": f"{step.peak_bytes / 2**20:.4g}",
            "note": step.error or "",
        }
        for loss, contender, step in zip(losses, contenders, steps, strict=True)
    ]


def limit_memory() -> None:
    """Makes a step that does not fit raise: the host would end the program without a note."""
    free_kib = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (int(FREE * 1024 * free_kib), hard))


def main(argv: Sequence[str] | None = None) -> int:
    parser = runner.make_parser(
        __doc__,
        "{device}-training-step",
        seconds={"cpu": 24.0, "cuda": 8.0, "quick": 12.0},  # three steps of 2 x 128 of 32 x 32
        device=True,
        quick="one case of three losses, unless given",
        sizes=runner.positives,
        batches=True,
        dtypes=tuple(DTYPES),
        providers=NAMES,
    )
    add = parser.add_argument
    add("--dim", type=runner.positive, default=256, help="of the embeddings; default: 256")
    add("--views", type=runner.positives, default=(2, 4, 8), help="of multi-view; default: 2,4,8")
    add("--backbone", choices=BACKBONES, default="resnet50")
    arguments = runner.parse(parser, argv)
    count = 1 if arguments.quick else 2
    batches = arguments.batches or (64, 128)[:count]
    if min(batches) < 2:
        parser.error("argument --batches: wanted 2 or more, got 1")
    names = arguments.providers or NAMES[: 3 if arguments.quick else None]
    losses = [loss for loss in TWO_VIEWS if loss.name in names]
    if MULTI_VIEW in names:
        losses += [loss for views in arguments.views for loss in of_views(views)]
    images, dtypes = arguments.sizes or (32, 224)[:count], arguments.dtypes or ("bfloat16",)
    grid = product(images, batches, (arguments.dim,), (arguments.backbone,), dtypes)
    cases = [Case(*parts) for parts in grid]
    device, seconds = arguments.device, arguments.case_seconds
    if device.type == "cpu" and sys.platform == "linux":
        limit_memory()
    return runner.run_cases(
        arguments, cases, lambda case: measure(losses, case, device, seconds), COLUMNS, SHOWN
    )


if __name__ == "__main__":
    sys.exit(main())
