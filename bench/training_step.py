"""What a loss costs of a ResNet-50 training step, in time and in memory.

    python bench/training_step.py            # every case, to bench/results/cpu-training-step.csv
    python bench/training_step.py --quick    # 32 x 32, batch 64, three losses: about a minute

A case is an image size (`--sizes`), a batch size and autocast's dtype. In each, every loss is timed
alone, and inside a step that is really run with this loss and this number of views: encoder and
projector of all views under autocast, the loss in float32, backward, SGD. Both are those of
`vne_kernels.pretrain`, repeated here so that only torchvision is needed besides this package. The
losses of others come from lightly.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import machine
import runner
import torch
from runner import Contender
from torch import Tensor, nn
from torch.func import grad_and_value

import vne_kernels
from vne_kernels import reference

try:
    from torchvision import models
except ImportError as error:
    sys.exit(f"training_step: {error}; pip install torchvision")

IMAGES = (32, 224)
BATCHES = (64, 128)
VIEWS = (2, 4, 8)
SECONDS = {"cpu": 24.0, "cuda": 8.0, "quick": 12.0}  # two cores: three steps of 2 x 128 of 32 x 32
DIM = 256
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

HIDDEN = 2048  # width of the projector's hidden layer
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-5
EMA_DECAY = 0.996  # of a momentum encoder, as in lightly's examples
ALONE = 0.25  # the losses alone get this share of a case's seconds, in addition to the steps
FREE = 0.9  # a step may take this share of the free memory
OUTLIER = 1.5  # a step slower than the fastest of as many views by this factor is tried again
BETA = 1.0  # weight of the cosine; the time does not depend on it
DOE = vne_kernels.DoELoss(BETA)

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

# Embeddings (V, n, d) of the V views, and those of a momentum encoder where the loss has one.
Criterion = Callable[[Tensor, Tensor | None], Tensor]


# ---- losses ------------------------------------------------------------------------------------


@cache
def lightly_loss(name: str) -> nn.Module:
    """A loss of lightly. Without lightly its first call raises, which is a note in its row."""
    from lightly import loss

    criterion: nn.Module = getattr(loss, name)()
    return criterion


@dataclass(frozen=True)
class Loss:
    name: str
    views: int
    criterion: Criterion
    momentum: bool = False  # its step has a momentum encoder too


def get_vne(z: Tensor, _: Tensor | None) -> Tensor:
    """The mean negative entropy of the views, one call for each: how get_vne is used."""
    return -torch.stack([reference.official_svd(one) for one in z]).mean()


def ours_at_once(z: Tensor, _: Tensor | None) -> Tensor:
    """The same in one call for all views."""
    return -vne_kernels.vn_entropy(z).mean()


def mmcr(z: Tensor, target: Tensor | None) -> Tensor:
    assert target is not None
    return lightly_loss("MMCRLoss")(z.transpose(0, 1), target.transpose(0, 1))  # (n, V, d)


NO_LOSS = Loss("warm-up", 2, lambda z, _: z.square().mean())  # for steps that are not timed
OURS = Loss("ours", 2, lambda z, _: DOE(*z))
ALGORITHM1 = Loss("algorithm1", 2, lambda z, _: reference.algorithm1_loss(*z, BETA))
TWO_VIEWS = (
    OURS,
    ALGORITHM1,
    Loss("nt-xent", 2, lambda z, _: lightly_loss("NTXentLoss")(*z)),
    Loss("barlow", 2, lambda z, _: lightly_loss("BarlowTwinsLoss")(*z)),
    Loss("vicreg", 2, lambda z, _: lightly_loss("VICRegLoss")(*z)),
    Loss("frossl", 2, lambda z, _: lightly_loss("FroSSLLoss")(list(z))),
    Loss("mmcr", 2, mmcr, momentum=True),
)
MULTI_VIEW = "multi-view"
NAMES = (*(loss.name for loss in TWO_VIEWS), MULTI_VIEW)
QUICK_NAMES = ("ours", "algorithm1", "nt-xent")


def losses_of(names: Sequence[str], views: Sequence[int]) -> list[Loss]:
    """The losses of these names; MULTI_VIEW is two of them for each number of views."""
    losses = [loss for loss in TWO_VIEWS if loss.name in names]
    for v in views if MULTI_VIEW in names else ():
        losses += [Loss(f"get_vne x{v}", v, get_vne), Loss(f"ours x{v}", v, ours_at_once)]
    return losses


def check_ours(z: Tensor) -> None:
    """Raises ArithmeticError unless ours computes what its two baselines compute on z (V, n, d)."""
    two = (OURS.criterion, ALGORITHM1.criterion, z[:2])
    for criterion, baseline, views in (two, (ours_at_once, get_vne, z)):
        grad, value = grad_and_value(criterion)(views, None)
        want_grad, want = grad_and_value(baseline)(views.double(), None)
        value_error = float((value - want).abs() / want.abs())
        grad_error = float((grad - want_grad).norm() / want_grad.norm())
        if not (value_error <= VALUE_TOLERANCE and grad_error <= GRAD_TOLERANCE):
            errors = f"{value_error:.1e} in the value, {grad_error:.1e} in the gradient"
            raise ArithmeticError(f"ours differs from its float64 baseline by {errors}")


# ---- training ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What all steps of a case have in common."""

    image: int
    batch: int
    dim: int
    backbone: str
    dtype: str  # of autocast; float32: none


def make_model(backbone: str, image: int, dim: int) -> nn.Sequential:
    """Encoder and projector, (n, 3, image, image) -> (n, dim), as in `vne_kernels.pretrain`.

    Up to 64 pixels the stem is a 3x3 convolution of stride 1 without pooling, above torchvision's.
    """
    encoder = models.get_model(backbone, weights=None)
    features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if image <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    projector = nn.Sequential(
        nn.Linear(features, HIDDEN, bias=False),
        nn.BatchNorm1d(HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, dim),
    )
    return nn.Sequential(encoder.to(memory_format=torch.channels_last), projector)


class Training:
    """Model, optimizer and images of one case, for steps of any loss.

    Every step starts from the same weights. So all steps do the same work, however many there are,
    and a loss whose gradient is NaN does not spoil the others.
    """

    def __init__(self, case: Case, losses: Sequence[Loss], device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.model = make_model(case.backbone, case.image, case.dim).to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
        )
        for p in self.model.parameters():  # a step allocates the momentum
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        count = max(8, case.batch * max(loss.views for loss in losses))
        images = torch.randn(count, 3, case.image, case.image)
        self.images = images.to(device, memory_format=torch.channels_last)
        if any(loss.momentum for loss in losses):
            swa = torch.optim.swa_utils
            average = swa.get_ema_multi_avg_fn(EMA_DECAY)
            self.momentum_model = swa.AveragedModel(self.model, multi_avg_fn=average)
        velocities = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        state = [*self.model.state_dict().values(), *velocities]
        self.start = [(tensor, tensor.clone()) for tensor in state]

    def restart(self) -> None:
        """Weights, statistics and momentum as at the start, and no gradients."""
        self.optimizer.zero_grad()
        with torch.no_grad():
            for tensor, start in self.start:
                tensor.copy_(start)

    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, d), float32."""
        dtype = DTYPES[self.case.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            z: Tensor = model(images)
        return z.float()

    def step(self, loss: Loss, batch: int) -> None:
        """All views in one pass, as one batch of the batch norms."""
        images, shape = self.images[: loss.views * batch], (loss.views, batch, self.case.dim)
        target = None
        if loss.momentum:
            self.momentum_model.update_parameters(self.model)
            with torch.no_grad():
                target = self.embed(self.momentum_model, images).view(shape)
        loss.criterion(self.embed(self.model, images).view(shape), target).backward()
        self.optimizer.step()

    def bytes_per_image(self) -> float:
        """How much one more image adds to the memory of a step; the first step is a warm-up."""
        peaks = {}
        for batch in (2, 2, 4):
            self.restart()
            peaks[batch] = machine.peak_bytes(partial(self.step, NO_LOSS, batch), self.device)
        return (peaks[4] - peaks[2]) / 4


# ---- one case ----------------------------------------------------------------------------------


def try_once(contender: Contender, device: torch.device) -> float:
    """Measures memory, or keeps the reason of a failure; seconds of this call, NaN if it failed."""

    def call() -> None:
        contender.peak_bytes = machine.peak_bytes(contender.call, device)
        if math.isnan(contender.peak_bytes):  # without memray nothing was called
            contender.call()

    try:
        contender.prepare()
        return runner.time_once(Contender(contender.name, call), device)
    except Exception as error:
        contender.error = runner.reason(error)
        return math.nan


def time_alone(
    losses: Sequence[Loss], case: Case, device: torch.device, budget_s: float
) -> list[Contender]:
    """Every loss from a leaf (V, n, d), float32, to its gradient; the same numbers for all."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(2, *(loss.views for loss in losses)), case.batch, case.dim)
    z, target = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    check_ours(z)

    contenders = []
    for loss in losses:
        leaf, other = z[: loss.views].clone().requires_grad_(), target[: loss.views]

        def call(loss: Loss = loss, leaf: Tensor = leaf, other: Tensor = other) -> object:
            return torch.autograd.grad(loss.criterion(leaf, other), leaf)

        contender = Contender(loss.name, call)
        try_once(contender, device)
        if contender.error is None:  # once more: what a library allocates once is not the loss's
            try_once(contender, device)
        contenders.append(contender)
    runner.time_interleaved(contenders, device, budget_s)
    return contenders


def free_bytes() -> float:
    """Memory that is free on the host; NaN where the system does not say."""
    info = Path("/proc/meminfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    return 1024.0 * int(found[1]) if found else math.nan


def tried_step(training: Training, loss: Loss, bytes_per_image: float) -> Contender:
    batch = training.case.batch
    contender = Contender(loss.name, partial(training.step, loss, batch), training.restart)
    needed = bytes_per_image * loss.views * batch
    if training.device.type == "cpu" and needed > FREE * free_bytes():  # a host kills, not raises
        contender.error = f"needs about {needed / 2**30:.0f} GiB of memory, more than is free"
    else:
        contender.estimate_s = try_once(contender, training.device)
    return contender


def time_steps(
    losses: Sequence[Loss], case: Case, device: torch.device, budget_s: float
) -> list[Contender]:
    """A step of every loss, all of them from the same weights and images."""
    training = Training(case, losses, device)
    bytes_per_image = training.bytes_per_image()
    for views in sorted({loss.views for loss in losses}):  # the first step of a size is slower
        tried_step(training, replace(NO_LOSS, views=views), bytes_per_image)
    steps = [tried_step(training, loss, bytes_per_image) for loss in losses]
    # Steps of as many views differ little: one that took far longer was probably interrupted. On a
    # CPU a first call may remain the only sample, and a slow step makes its loss look cheap.
    able = [(loss.views, s) for loss, s in zip(losses, steps, strict=True) if s.error is None]
    for views, step in able:
        if step.estimate_s > OUTLIER * min(s.estimate_s for v, s in able if v == views):
            step.estimate_s = try_once(step, device)
    runner.time_interleaved(steps, device, budget_s)
    return steps


def measure(
    losses: Sequence[Loss], case: Case, device: torch.device, budget_s: float
) -> list[runner.Row]:
    """All losses of one case, timed together: alone, then in their steps, for budget_s."""
    alone = time_alone(losses, case, device, ALONE * budget_s)
    able = [loss for loss, one in zip(losses, alone, strict=True) if one.error is None]
    timed = time_steps(able, case, device, budget_s) if able else []
    steps = {step.name: step for step in timed}
    rows = []
    for loss, one in zip(losses, alone, strict=True):
        step = steps.get(loss.name, Contender(loss.name, runner.nothing))
        rows.append(
            {
                "loss": loss.name,
                "views": loss.views,
                **one.columns("loss_"),
                **step.columns("step_"),
                "loss_share": f"{one.quantiles_ms()[1] / step.quantiles_ms()[1]:.4g}",
                "loss_peak_mib": f"{one.peak_bytes / 2**20:.4g}",
                "step_peak_mib": f"{step.peak_bytes / 2**20:.4g}",
                "note": one.error or (f"no step: {step.error}" if step.error else ""),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = runner.make_parser(
        __doc__,
        "{device}-training-step",
        seconds=SECONDS,
        device=True,
        quick="one case of three losses, unless given",
        sizes=runner.positives,
        batches=True,
        dtypes=tuple(DTYPES),
        providers=NAMES,
    )
    add = parser.add_argument
    add("--dim", type=runner.positive, default=DIM, help=f"of the embeddings; default: {DIM}")
    add("--views", type=runner.positives, default=VIEWS, help="of multi-view; default: 2,4,8")
    add("--backbone", choices=("resnet18", "resnet50"), default="resnet50")
    arguments = runner.parse(parser, argv)
    count = 1 if arguments.quick else None
    batches = arguments.batches or BATCHES[:count]
    if min(batches) < 2:
        parser.error("argument --batches: wanted 2 or more, got 1")
    names = arguments.providers or (QUICK_NAMES if arguments.quick else NAMES)
    losses = losses_of(names, arguments.views)
    grid = product(arguments.sizes or IMAGES[:count], batches, arguments.dtypes or ("bfloat16",))
    cases = [Case(i, b, arguments.dim, arguments.backbone, dtype) for i, b, dtype in grid]

    return runner.run_cases(
        arguments,
        cases,
        lambda case: measure(losses, case, arguments.device, arguments.case_seconds),
        COLUMNS,
        SHOWN,
    )


if __name__ == "__main__":
    sys.exit(main())
