"""What the processes of test_distributed do: a module of its own, so that they can import it.

The whole batch is a function of the case alone: every process cuts its own rows out of it, and the
test computes the same loss of all of them in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from cases import gaussian, generator, spectrum_case, views
from test_objectives import FEATURES, Encoder, config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vne_kernels import DoELoss, VNEntropy, distributed, doe_loss, vn_entropy
from vne_kernels.pretrain.config import LOSSES
from vne_kernels.pretrain.objectives import OBJECTIVES

BETA, INPUTS = 2.5, 12
#: rows of each process, by the number of processes
SIZES = {
    "even": {2: [8, 8], 3: [6, 6, 6]},
    "uneven": {2: [9, 5], 3: [7, 2, 5]},
    "empty": {2: [0, 9], 3: [6, 0, 5]},
}


@dataclass(frozen=True)
class Case:
    """A loss of projections (n, d) of one batch."""

    loss: str  # a key of LOSS
    route: str
    sizes: str
    d: int
    dtype: str
    weighted: bool = False
    known: bool = False  # whether max_rows says how many rows there may be
    method: str = "auto"

    def __str__(self) -> str:
        words = [self.loss, self.route, self.sizes, f"d{self.d}", self.dtype, self.method]
        return " ".join(words + ["weights"] * self.weighted + ["max_rows"] * self.known)


def _doe(z1: Tensor, z2: Tensor, p: Tensor | None, case: Case, **over: Any) -> Tensor:
    loss = doe_loss(z1, z2, beta=BETA, weights=p, method=case.method, **over)
    assert isinstance(loss, Tensor)
    return loss


def _entropy(z1: Tensor, z2: Tensor, p: Tensor | None, case: Case, **over: Any) -> Tensor:
    return -vn_entropy(z1, weights=p, method=case.method, **over)


def _unnormalized(z1: Tensor, z2: Tensor, p: Tensor | None, case: Case, **over: Any) -> Tensor:
    return -vn_entropy(z1, weights=p, normalize=False, method=case.method, **over)


def _batch_of_two(z1: Tensor, z2: Tensor, p: Tensor | None, case: Case, **over: Any) -> Tensor:
    both = torch.stack([z1, z2])
    return (
        -vn_entropy(both, weights=p, method=case.method, **over).mul(both.new_tensor([1, 3])).sum()
    )


LOSS: dict[str, Callable[..., Tensor]] = {
    "entropy": _entropy,
    "unnormalized": _unnormalized,
    "batch of two": _batch_of_two,
    "doe": _doe,
}


def cases() -> list[Case]:
    """Every loss, both routes and all sizes of batches; d on both sides of the rows of all."""
    table = [
        Case(loss, route, sizes, d, dtype, known=known)
        for loss in LOSS
        for route in ("reduce", "gather")
        for sizes in SIZES
        for d in (6, 24)
        for dtype in ("float64", "float32")
        for known in (False, True)
    ]
    table += [
        Case(loss, route, "uneven", d, "float64", weighted=True, known=known)
        for loss in LOSS
        for route in ("reduce", "gather")
        for d in (6, 24)
        for known in (False, True)
    ]
    table += [
        Case(loss, route, "uneven", d, "float32", method="poles")
        for loss in ("entropy", "doe")
        for route in ("reduce", "gather")
        for d in (6, 24)
    ]
    return table


def projector(case: Case) -> nn.Linear:
    """The same weights in every process.

    The bias is large: rows far from orthogonal have a gradient that is more than what cancels, so
    that float32 alone leaves one process's own gradient within 1e-6 of float64's.
    """
    model = nn.Linear(INPUTS, case.d, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(gaussian(case.d, INPUTS, generator(3)))
        model.bias.copy_(4 * gaussian(1, case.d, generator(4))[0])
    return model.to(getattr(torch, case.dtype))


def batch(case: Case, world: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """All rows, their second view, and their weights."""
    n = sum(SIZES[case.sizes][world])
    x1, x2 = views("iid", (n, INPUTS), getattr(torch, case.dtype))
    p = torch.rand(n, generator=generator(5), dtype=torch.float64) if case.weighted else None
    if p is not None:
        p[1] = 0  # an absent row
    return x1, x2, p


def loss_of(case: Case, model: nn.Module, rows: slice, world: int, **over: Any) -> Tensor:
    x1, x2, p = batch(case, world)
    z1, z2 = model(x1[rows]), model(x2[rows])
    weights = None
    if p is not None:
        # Weights of the model, so that their gradients count; the absent row holds NaN.
        weights = p[rows] * z1.mean(-1).sigmoid()
        z1, z2 = (z.masked_fill((weights == 0).unsqueeze(-1), torch.nan) for z in (z1, z2))
    return LOSS[case.loss](z1, z2, weights, case, **over)


def my_rows(case: Case) -> slice:
    sizes, rank = SIZES[case.sizes][dist.get_world_size()], dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def over_processes(case: Case) -> dict[str, Any]:
    over: dict[str, Any] = {"group": dist.group.WORLD}
    if case.known:
        over["max_rows"] = max(SIZES[case.sizes][dist.get_world_size()])
    return over


@contextmanager
def by_route(route: str) -> Iterator[None]:
    """What is decided by the sizes elsewhere."""
    decided = distributed.takes_gather
    distributed.takes_gather = lambda rows, d: route == "gather"
    try:
        yield
    finally:
        distributed.takes_gather = decided


def step(case: Case, *, factor: float = 1.0) -> list[Tensor]:
    """The loss and the gradients after DistributedDataParallel has averaged them."""
    model = DistributedDataParallel(projector(case))
    world = dist.get_world_size()
    with by_route(case.route):
        loss = loss_of(case, model, my_rows(case), world, **over_processes(case))
        with torch.no_grad():
            alone = loss_of(case, model, my_rows(case), world, **over_processes(case))
        assert torch.equal(loss.detach(), alone) or torch.allclose(loss, alone, rtol=1e-5)
        (factor * loss).backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def all_cases() -> dict[str, list[Tensor]]:
    found = {str(case): step(case) for case in cases()}
    wrong = Case("doe", "reduce", "even", 6, "float64")
    found["wrong"] = step(wrong, factor=dist.get_world_size())
    return found


# ---- other ways to train -------------------------------------------------------------------------

PLAIN = Case("doe", "auto", "even", 6, "float64")


def accumulated() -> list[Tensor]:
    """Two losses for one step, of the two halves of every process's rows."""
    model = DistributedDataParallel(projector(PLAIN))
    rows = my_rows(PLAIN)
    world, half = dist.get_world_size(), (rows.stop - rows.start) // 2
    first = slice(rows.start, rows.start + half)
    second = slice(rows.start + half, rows.stop)
    with model.no_sync():
        loss_of(PLAIN, model, first, world, group=dist.group.WORLD).backward()
    loss_of(PLAIN, model, second, world, group=dist.group.WORLD).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def compiled() -> dict[str, list[Tensor]]:
    """One graph, collectives and all; aot_eager, as inductor's compiler takes its time."""
    found = {}
    for route in ("reduce", "gather"):
        for loss in ("entropy", "doe"):
            case = Case(loss, route, "uneven", 6, "float64", known=True)
            model = projector(case)
            rows, world, over = my_rows(case), dist.get_world_size(), over_processes(case)
            x1, x2, _ = (None if x is None else x[rows] for x in batch(case, world))
            with by_route(route):
                function = torch.compile(LOSS[loss], backend="aot_eager", fullgraph=True)
                value = function(model(x1), model(x2), None, case, **over)
                value.backward()
            grads = [p.grad / world for p in model.parameters() if p.grad is not None]
            for grad in grads:
                dist.all_reduce(grad)
            found[str(case)] = [value.detach(), *grads]
    return found


def modules() -> list[Tensor]:
    """The losses as modules, over all processes by default."""
    z1, z2 = views("iid", (6, 4), torch.float64)
    z1, z2 = z1 + dist.get_rank(), z2 - dist.get_rank()
    return [
        VNEntropy(gather_distributed=True)(z1),
        VNEntropy(gather_distributed=True, max_rows=6)(z1),
        VNEntropy()(z1),
        DoELoss(BETA, gather_distributed=True)(z1, z2),
        DoELoss(BETA)(z1, z2),
        distributed.gather(z1),
        distributed.gather(z2, equal=True),
    ]


def sub_groups() -> list[Tensor]:
    """Two processes of three, as a ProcessGroup and as a DeviceMesh; the third has its own."""
    pair, single = dist.new_group([0, 2]), dist.new_group([1])
    mesh = dist.init_device_mesh("cpu", (3,))
    mine = single if dist.get_rank() == 1 else pair
    z = spectrum_case("iid", (5, 4), torch.float64, seed=dist.get_rank()).requires_grad_()
    entropy = vn_entropy(z, group=mine)
    (grad,) = torch.autograd.grad(entropy, z)
    refused = "nothing"
    if dist.get_rank() == 1:
        try:
            vn_entropy(z, group=pair)
        except ValueError as error:
            refused = str(error)
        assert refused == "group must hold this process, got a group of others", refused
    return [z.detach(), entropy.detach(), grad, vn_entropy(z, group=mesh).detach()]


def uneven_gather() -> list[Tensor]:
    """Every process weighs the gathered rows in its own way; the gradients are summed."""
    rank = dist.get_rank()
    z = torch.full((rank + 1, 2), float(rank), dtype=torch.float64, requires_grad=True)
    gathered = distributed.gather(z)
    ((rank + 1) * gathered.square()).sum().backward()
    assert z.grad is not None
    return [gathered.detach(), z.grad]


def errors() -> dict[str, str]:
    """Every process reports arguments that do not go together, and none hangs."""
    rank, world = dist.get_rank(), dist.get_world_size()
    z = torch.randn(4, 3)
    tried: dict[str, Callable[[], Any]] = {
        "d": lambda: vn_entropy(torch.randn(4, 3 + rank), group=dist.group.WORLD),
        "dtype": lambda: vn_entropy(z.double() if rank else z, group=dist.group.WORLD),
        "weights": lambda: vn_entropy(
            z, weights=torch.ones(4) if rank else None, group=dist.group.WORLD
        ),
        "rows": lambda: vn_entropy(z[:0], group=dist.group.WORLD),
        "max_rows": lambda: vn_entropy(z, group=dist.group.WORLD, max_rows=3),
        "no group": lambda: vn_entropy(z, group="world"),
        "second derivative": _second_derivative,
    }
    messages = {}
    for name, attempt in tried.items():
        try:
            attempt()
            messages[name] = "nothing"
        except (RuntimeError, TypeError, ValueError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    assert world == dist.get_world_size()
    return messages


def _second_derivative() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    entropy = vn_entropy(z, group=dist.group.WORLD)
    (grad,) = torch.autograd.grad(entropy, z, create_graph=True)
    (grad.square().sum() + z.sum()).backward()


def nan_in_one_sample() -> list[Tensor]:
    """A batch of three samples; process 0 has a NaN in the second."""
    z = spectrum_case("iid", (3, 5, 4), torch.float32, seed=dist.get_rank())
    if dist.get_rank() == 0:
        z[1, 2, 3] = float("nan")
    z.requires_grad_()
    found = []
    for route in ("reduce", "gather"):
        with by_route(route):
            entropy = vn_entropy(z, group=dist.group.WORLD)
            (grad,) = torch.autograd.grad(entropy.sum(), z)
            found += [entropy.detach(), grad]
    return found


# ---- the objectives of vne-pretrain --------------------------------------------------------------


class Trained(nn.Module):
    """Encoder and objective with weights of the seed alone, and without batch norms.

    A batch norm's statistics are those of one process's rows, unless torch synchronises them.
    """

    def __init__(self, loss: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Encoder()
        self.objective = OBJECTIVES[loss](config(loss), FEATURES, self.encoder)
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm1d):
                    setattr(parent, name, nn.Identity())
        self.double()

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        h1, h2 = self.encoder(first), self.encoder(second)
        terms = self.objective(h1, h2, (first, second), BETA)
        return terms.loss, terms.information, terms.entropy, terms.cosine


def images(n: int) -> tuple[Tensor, Tensor]:
    g = generator(6)
    first = torch.randn(n, 3, 4, 4, generator=g, dtype=torch.float64)
    return first, first + 0.3 * torch.randn(n, 3, 4, 4, generator=g, dtype=torch.float64)


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def objectives(rows: int) -> dict[str, tuple[dict[str, Tensor], list[Tensor]]]:
    """Gradients and terms of every objective, of ``rows`` pairs on each process."""
    found = {}
    mine = slice(rows * dist.get_rank(), rows * (dist.get_rank() + 1))
    first, second = (x[mine] for x in images(rows * dist.get_world_size()))
    for loss in LOSSES:
        model = Trained(loss)
        wrapped = DistributedDataParallel(model)
        value, *terms = wrapped(first, second)
        value.backward()
        found[loss] = named_gradients(model), [value.detach(), *terms]
    return found
