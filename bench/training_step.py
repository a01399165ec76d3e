"""The loss in its place: what a loss costs of a ResNet-50 training step, in time and in memory.

    python bench/training_step.py            # every case, to bench/results/cpu-training-step.csv
    python bench/training_step.py --quick    # 32 x 32, batch 64, three losses: about a minute

A case is an image size and a batch size. In each, every loss is timed alone, forward and backward
to the embeddings, and inside a step that is really run with this loss and this number of views:
encoder and projector of all views under autocast, the loss in float32, backward, SGD.

Encoder, projector and optimiser are those of `vne_kernels.pretrain` (the projector that of small
images, at every image size), written out here so that torchvision is all that is needed beside this
package; the losses to compare with come from lightly.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import arguments as options
import harness
import machine
import memory
import torch
from torch import Tensor, nn

try:
    from torchvision import models

    import vne_kernels
    from vne_kernels import reference
except ImportError as error:
    print(f"training_step: {error}; install the package and torchvision first", file=sys.stderr)
    sys.exit(2)

IMAGES = (32, 224)
BATCHES = (64, 128)
VIEWS = (2, 4, 8)
DEFAULT_SECONDS = {"cpu": 24.0, "cuda": 8.0}  # two cores: three steps of 2 x 128 small images
QUICK_SECONDS = 12.0
DIM = 256
BACKBONES = ("resnet18", "resnet50")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

HIDDEN = 2048  # width of the projector's hidden layer
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-5
EMA_DECAY = 0.996  # of a momentum encoder, as lightly's examples set it
ALONE = 0.25  # of the time for the steps of a case is given to the losses by themselves besides
FREE = 0.9  # of the memory that is free may be taken by a step
OUTLIER = 1.5  # times the fastest step of as many views: more is tried once more
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

Row = dict[str, object]
# Embeddings (V, n, d) of the V views, and those of a momentum encoder where the loss has one.
Criterion = Callable[[Tensor, Tensor | None], Tensor]


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """`build` imports what it needs: a package that is missing is a note in this loss's row."""

    name: str
    views: int
    build: Callable[[], Criterion]
    momentum: bool = False  # its step has a momentum encoder too


def _of_two(criterion: Callable[[Tensor, Tensor], Tensor]) -> Criterion:
    return lambda z, _: criterion(*z.unbind())


def _ours() -> Criterion:
    return _of_two(vne_kernels.DoELoss(BETA))


def _algorithm1() -> Criterion:
    return _of_two(lambda z1, z2: reference.algorithm1_loss(z1, z2, BETA))


def _lightly(name: str) -> nn.Module:
    from lightly import loss

    criterion: nn.Module = getattr(loss, name)()
    return criterion


def _frossl() -> Criterion:
    criterion = _lightly("FroSSLLoss")
    return lambda z, _: criterion(list(z.unbind()))


def _mmcr() -> Criterion:
    criterion = _lightly("MMCRLoss")  # takes (n, V, d)

    def call(z: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        loss: Tensor = criterion(z.transpose(0, 1), target.transpose(0, 1))
        return loss

    return call


def _get_vne() -> Criterion:
    """The mean negative entropy of the views, one call for each: how get_vne is used."""
    return lambda z, _: -torch.stack([reference.official_svd(one) for one in z.unbind()]).mean()


def _ours_at_once() -> Criterion:
    """The same in one call for all views."""
    return lambda z, _: -vne_kernels.vn_entropy(z).mean()


MULTI_VIEW = "multi-view"
TWO_VIEWS = {
    "ours": Loss("ours", 2, _ours),
    "algorithm1": Loss("algorithm1", 2, _algorithm1),
    "nt-xent": Loss("nt-xent", 2, lambda: _of_two(_lightly("NTXentLoss"))),
    "barlow": Loss("barlow", 2, lambda: _of_two(_lightly("BarlowTwinsLoss"))),
    "vicreg": Loss("vicreg", 2, lambda: _of_two(_lightly("VICRegLoss"))),
    "frossl": Loss("frossl", 2, _frossl),
    "mmcr": Loss("mmcr", 2, _mmcr, momentum=True),
}
NAMES = (*TWO_VIEWS, MULTI_VIEW)
QUICK_NAMES = ("ours", "algorithm1", "nt-xent")


def make_losses(names: Sequence[str], views: Sequence[int]) -> list[Loss]:
    """The losses of these names; MULTI_VIEW stands for two of them for each number of views."""
    losses: list[Loss] = []
    for name in names:
        if name == MULTI_VIEW:
            for v in views:
                losses += [
                    Loss(f"get_vne x{v}", v, _get_vne),
                    Loss(f"ours x{v}", v, _ours_at_once),
                ]
        else:
            losses.append(TWO_VIEWS[name])
    return losses


def _value_and_grad(criterion: Criterion, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = criterion(z, None)
    value.backward()
    assert z.grad is not None
    return value.detach().double(), z.grad.double()


def errors_of(ours: Criterion, baseline: Criterion, z: Tensor) -> tuple[float, float]:
    """Relative errors of the value and of the gradient; the baseline is computed in float64."""
    value, grad = _value_and_grad(ours, z)
    want_value, want_grad = _value_and_grad(baseline, z.double())
    value_error = (value - want_value).abs() / want_value.abs()
    grad_error = (grad - want_grad).norm() / want_grad.norm()
    return value_error.item(), grad_error.item()


def check_ours(z: Tensor) -> None:
    """Raises ArithmeticError unless ours computes what its two baselines compute on z (V, n, d)."""
    pairs = (("ours", _ours(), _algorithm1(), z[:2]), ("ours xV", _ours_at_once(), _get_vne(), z))
    for name, ours, baseline, views in pairs:
        value_error, grad_error = errors_of(ours, baseline, views)
        if not (value_error <= VALUE_TOLERANCE and grad_error <= GRAD_TOLERANCE):
            raise ArithmeticError(
                f"{name} must agree with its baseline in float64 to {VALUE_TOLERANCE} "
                f"({GRAD_TOLERANCE} in the gradient), got {value_error:.1e} and {grad_error:.1e}"
            )


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


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


def make_optimizer(model: nn.Module, batch: int) -> torch.optim.SGD:
    """SGD with momentum, which it holds from the start; biases and norms are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.5 * batch / 256, momentum=MOMENTUM, fused=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@dataclass(frozen=True)
class Case:
    """What all steps have in common."""

    image: int
    batch: int
    dim: int
    backbone: str
    dtype: str  # of autocast; float32: none

    def __str__(self) -> str:
        return f"image={self.image} batch={self.batch}"


class Training:
    """Model, optimiser and images of one case, for steps of any loss.

    Every step starts from the same weights, so that all of them do the same work, however many
    there are, and a loss whose gradient is NaN spoils none but its own.
    """

    def __init__(self, case: Case, views: int, momentum: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.model = make_model(case.backbone, case.image, case.dim).to(device)
        self.optimizer = make_optimizer(self.model, case.batch)
        self.images = torch.randn(views * case.batch, 3, case.image, case.image).to(
            device, memory_format=torch.channels_last
        )
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
        self.momentum_model = (
            torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average)
            if momentum
            else None
        )
        velocities = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        state = [*self.model.state_dict().values(), *velocities]
        self._start = [(tensor, tensor.clone()) for tensor in state]

    def restart(self) -> None:
        """Weights, statistics and momentum as at the start, and no gradients."""
        self.optimizer.zero_grad()
        with torch.no_grad():
            for tensor, start in self._start:
                tensor.copy_(start)

    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, d), float32."""
        dtype = DTYPES[self.case.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            z: Tensor = model(images)
        return z.float()

    def step(self, criterion: Criterion, views: int, batch: int, momentum: bool = False) -> Tensor:
        """All views in one pass, as one batch of the batch norms; returns the loss."""
        images, shape = self.images[: views * batch], (views, batch, self.case.dim)
        target = None
        if momentum:
            assert self.momentum_model is not None
            self.momentum_model.update_parameters(self.model)
            with torch.no_grad():
                target = self.embed(self.momentum_model, images).view(shape)
        value = criterion(self.embed(self.model, images).view(shape), target)
        value.backward()
        self.optimizer.step()
        return value.detach()


# ---------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One loss of a case: by itself, and in a step."""

    loss: Loss
    criterion: Criterion | None
    alone: harness.Contender
    step: harness.Contender
    note: str = ""


def _try(contender: harness.Contender, device: torch.device) -> float:
    """Warms up, measures memory, and keeps the reason of one that fails: that is a result too.

    Returns the seconds of this first call, NaN where it failed.
    """
    try:
        contender.prepare()
        begin = time.perf_counter()
        contender.peak_bytes = memory.peak_bytes(contender.call, device)
        if math.isnan(contender.peak_bytes):  # it was not called
            contender.call()
        return time.perf_counter() - begin
    except Exception as error:
        contender.error = harness.reason(error)
        return math.nan


def _time_alone(
    losses: Sequence[Loss], case: Case, device: torch.device, budget_s: float
) -> list[Measured]:
    """Every loss from a leaf (V, n, d), float32, to its gradient; the same numbers for all."""
    generator = torch.Generator().manual_seed(0)
    most = max(2, *(loss.views for loss in losses))
    shape = (most, case.batch, case.dim)
    z, target = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    check_ours(z)

    def measured(loss: Loss) -> Measured:
        leaf, other = z[: loss.views].clone().requires_grad_(), target[: loss.views]

        def clear() -> None:
            leaf.grad = None

        nothing = harness.Contender(loss.name, lambda: None, clear)
        try:
            criterion = loss.build()
        except Exception as error:
            nothing.error = harness.reason(error)
            return Measured(loss, None, nothing, nothing, nothing.error)
        alone = harness.Contender(loss.name, lambda: criterion(leaf, other).backward(), clear)
        _try(alone, device)
        if alone.error is None:  # once more: what a library takes once and keeps is not the loss's
            _try(alone, device)
        return Measured(loss, criterion, alone, nothing, alone.error or "")

    results = [measured(loss) for loss in losses]
    harness.time_interleaved([result.alone for result in results], device, budget_s)
    return results


def _free_bytes() -> float:
    """Memory that is free on the host; NaN where the system does not say."""
    info = Path("/proc/meminfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    return 1024.0 * int(found[1]) if found else math.nan


def _mean_square(z: Tensor, target: Tensor | None) -> Tensor:
    """Next to no loss, for the steps that are not timed."""
    return z.square().mean()


def _bytes_per_image(training: Training) -> float:
    """What one more image adds to the memory of a step, from small steps, the first a warm-up."""
    peaks = {}
    for batch in (2, 2, 4):
        training.restart()
        step = partial(training.step, _mean_square, 2, batch)
        peaks[batch] = memory.peak_bytes(step, training.device)
    return (peaks[4] - peaks[2]) / 4


def _tried_step(
    training: Training, loss: Loss, criterion: Criterion, bytes_per_image: float
) -> tuple[harness.Contender, str]:
    """The step of a loss, tried once, and a note of what is wrong with it."""
    batch, value = training.case.batch, torch.zeros(())

    def step() -> None:
        nonlocal value
        value = training.step(criterion, loss.views, batch, loss.momentum)

    contender = harness.Contender(loss.name, step, training.restart)
    needed = bytes_per_image * loss.views * batch
    if training.device.type == "cpu" and needed > FREE * _free_bytes():  # a host kills, not raises
        contender.error = f"needs about {needed / 2**30:.0f} GiB of memory, more than is free"
    else:
        contender.estimate_s = _try(contender, training.device)
    if contender.error is not None:
        return contender, f"no step: {contender.error}"
    return contender, "" if value.isfinite() else "the loss of the step is not finite"


def _try_outliers_again(results: Sequence[Measured], device: torch.device) -> None:
    """Steps of as many views differ little: one that took far longer was probably interrupted.

    On a CPU a first call may remain the only sample, and a slow step makes its loss look cheap.
    """
    for result in results:
        same = [r.step.estimate_s for r in results if r.loss.views == result.loss.views]
        if result.step.estimate_s > OUTLIER * min(same):
            result.step.estimate_s = _try(result.step, device)


def _time_steps(
    results: Sequence[Measured], case: Case, device: torch.device, budget_s: float
) -> None:
    """The step of every loss that could be computed alone."""
    running = [result for result in results if result.alone.error is None]
    if not running:
        return
    views = sorted({result.loss.views for result in running})
    momentum = any(result.loss.momentum for result in running)
    training = Training(case, max(2, *views), momentum, device)
    bytes_per_image = _bytes_per_image(training)
    for v in views:  # the first step of a size is slower, whatever its loss
        warm_up = Loss("warm-up", v, lambda: _mean_square)
        _tried_step(training, warm_up, _mean_square, bytes_per_image)
    for result in running:
        assert result.criterion is not None
        result.step, result.note = _tried_step(
            training, result.loss, result.criterion, bytes_per_image
        )
    tried = [result for result in running if result.step.error is None]
    _try_outliers_again(tried, device)
    harness.time_interleaved([result.step for result in tried], device, budget_s)


def _row(result: Measured, case: Case) -> Row:
    loss, alone, step = result.loss, result.alone, result.step
    times: Row = {}
    for what, contender in (("loss", alone), ("step", step)):
        times[f"{what}_samples"] = len(contender.samples_s)
        for name, value in zip(("p20", "p50", "p80"), contender.quantiles_ms(), strict=True):
            times[f"{what}_{name}_ms"] = f"{value:.5g}"
        times[f"{what}_peak_mib"] = f"{contender.peak_bytes / 2**20:.4g}"
    share = alone.quantiles_ms()[1] / step.quantiles_ms()[1]
    return {
        "loss": loss.name,
        "views": loss.views,
        **asdict(case),
        **times,
        "loss_share": f"{share:.4g}",
        "note": result.note,
    }


def measure_case(
    losses: Sequence[Loss], case: Case, device: torch.device, budget_s: float
) -> list[Row]:
    """All losses of one case, timed together: by themselves, then in their steps, for budget_s."""
    results = _time_alone(losses, case, device, ALONE * budget_s)
    _time_steps(results, case, device, budget_s)
    return [_row(result, case) for result in results]


# ---------------------------------------------------------------------------------------------
# Screen
# ---------------------------------------------------------------------------------------------


def print_case(case: Case, rows: Sequence[Row]) -> None:
    print(f"\n{case} dim={case.dim} {case.backbone} {case.dtype}")
    print(
        f"  {'loss':<12}{'views':>5}{'loss ms':>10}{'step ms':>10}{'share':>10}"
        f"{'loss MiB':>10}{'step MiB':>10}{'samples':>10}  note"
    )
    for row in rows:
        share = f"{100 * float(str(row['loss_share'])):.3f} %"
        samples = f"{row['loss_samples']}, {row['step_samples']}"
        print(
            f"  {row['loss']:<12}{row['views']:>5}{row['loss_p50_ms']:>10}{row['step_p50_ms']:>10}"
            f"{share:>10}{row['loss_peak_mib']:>10}{row['step_peak_mib']:>10}{samples:>10}"
            f"  {row['note']}"
        )
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(names) <= set(NAMES):
        raise argparse.ArgumentTypeError(f"wanted some of {', '.join(NAMES)}, got {text!r}")
    return names


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training_step.py",
        description="Time and memory of a loss beside the training step that it is part of.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--images", type=options.positives, help="side in pixels; default: 32,224")
    add("--batches", type=options.positives, help="images of one view; default: 64,128")
    add("--dim", type=options.positive, default=DIM, help=f"of the embeddings; default: {DIM}")
    add("--views", type=options.positives, default=VIEWS, help="of multi-view; default: 2,4,8")
    add("--losses", type=_names, help=f"default: all of {','.join(NAMES)}")
    add("--backbone", choices=BACKBONES, default="resnet50")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of autocast; float32: none")
    add(
        "--case-seconds",
        type=options.duration,
        help="for the steps of one case; a quarter besides for the losses alone",
    )
    add(
        "--stop-after",
        type=options.duration,
        default=math.inf,
        help="seconds; then start no more cases",
    )
    add("--quick", action="store_true", help="one case of three losses, unless given")
    add("--out", type=Path, help="CSV file; default: bench/results/<device>-training-step.csv")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    if min(arguments.batches or BATCHES) < 2:
        parser.error("argument --batches: wanted 2 or more, got 1")
    arguments.images = arguments.images or (IMAGES[:1] if quick else IMAGES)
    arguments.batches = arguments.batches or (BATCHES[:1] if quick else BATCHES)
    arguments.losses = arguments.losses or (QUICK_NAMES if quick else NAMES)
    seconds = QUICK_SECONDS if quick else DEFAULT_SECONDS[arguments.device]
    arguments.case_seconds = arguments.case_seconds or seconds
    if arguments.device == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        parser.error(f"no CUDA device: torch {torch.__version__} ({built}) sees none")
    if arguments.out is None:
        arguments.out = harness.results_file(torch.device(arguments.device), "-training-step")
    return arguments


def run(arguments: argparse.Namespace) -> list[Row]:
    """Measure every case, print it, and keep what is done in a .partial file until the end."""
    begin = time.monotonic()
    device = torch.device(arguments.device)
    where: Row = {**harness.environment(device), "threads": torch.get_num_threads()}
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    partial_file = arguments.out.with_name(arguments.out.name + ".partial")
    partial_file.unlink(missing_ok=True)
    losses = make_losses(arguments.losses, arguments.views)
    common = (arguments.dim, arguments.backbone, arguments.dtype)
    cases = [Case(i, b, *common) for i in arguments.images for b in arguments.batches]
    progress = harness.Progress(len(cases))
    rows: list[Row] = []
    for case in cases:
        if progress.done and time.monotonic() - begin > arguments.stop_after:
            print(f"\nstopped after {progress.done} of {len(cases)} cases")
            break
        progress.start(case)
        measured = measure_case(losses, case, device, arguments.case_seconds)
        progress.stop()
        print_case(case, measured)
        clocks = machine.clocks(device)
        rows += [{**where, "clocks": clocks, **row} for row in measured]
        harness.write_csv(partial_file, COLUMNS, rows)
    os.replace(partial_file, arguments.out)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except KeyboardInterrupt:
        print(f"\nstopped; any finished case is in {arguments.out}.partial", file=sys.stderr)
        return 130
    print(f"\n{arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
