"""The entropy of a batch spread over processes: its gradient is one process's with all rows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import distributed_worker as worker
import pytest
import ranks
import torch
from cases import (
    in_tiers,
    relative_error,
    spectrum_case,
    views,
)
from distributed_worker import BETA, PLAIN, SIZES, Case, Trained
from naming import naming
from torch import Tensor

from vne_kernels import DoELoss, VNEntropy, doe_loss, reference, vn_entropy
from vne_kernels.distributed import gather, takes_gather
from vne_kernels.pretrain.config import LOSSES

pytestmark = [pytest.mark.cpu_only, pytest.mark.xdist_group("distributed")]
WORLDS = (2, 3)
#: Of values and gradients, relative; measured: float64 2e-14, float32 7e-7.
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
#: Of the d x d matrix of fewer rows than d, which no one gets who does not ask; measured: 2.4e-6.
TOLERANCE_AGAINST_NATURE = {"float64": 1e-12, "float32": 5e-6}


@cache
def on_processes(world: int, function: str, *arguments: Any) -> list[Any]:
    return ranks.run(world, getattr(worker, function), *arguments)


def of_one_process(case: Case, world: int) -> list[Tensor]:
    """Loss and gradients of all rows together."""
    model = worker.projector(case)
    loss = worker.loss_of(case, model, slice(None), world)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= tolerance


def assert_same_step(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """The same loss, and the same gradient of all parameters together."""
    assert relative_error(found[0], expected[0]) <= tolerance
    assert relative_error(flat(found[1:]), flat(expected[1:])) <= tolerance


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("case", worker.cases(), ids=str)
@pytest.mark.parametrize("world", in_tiers(WORLDS, first=(2,)))
def test_gradient_is_that_of_one_process(world: int, case: Case) -> None:
    """DDP averages over processes; the average must be the gradient of the whole batch."""
    expected = of_one_process(case, world)
    rows = sum(SIZES[case.sizes][world])
    natural = case.route == "gather" or not takes_gather(rows, case.d)
    tolerance = (TOLERANCE if natural else TOLERANCE_AGAINST_NATURE)[case.dtype]
    for found in on_processes(world, "all_cases"):
        assert_same_step(found[str(case)], expected, tolerance)


@pytest.mark.parametrize("world", in_tiers(WORLDS, first=(2,)))
def test_a_factor_of_the_world_size_would_be_seen(world: int) -> None:
    case = Case("doe", "reduce", "even", 6, "float64")
    expected = of_one_process(case, world)
    for found in on_processes(world, "all_cases"):
        wrong = [found["wrong"][0], *(grad / world for grad in found["wrong"][1:])]
        assert_same_step(wrong, expected, TOLERANCE["float64"])
        with pytest.raises(AssertionError):
            assert_same_step(found["wrong"], expected, TOLERANCE["float64"])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("world", in_tiers(WORLDS, first=(2,)))
def test_objectives_of_the_program(world: int, loss: str) -> None:
    rows = 4
    model = Trained(loss)
    value, *terms = model(*worker.images(rows * world))
    value.backward()
    expected = worker.named_gradients(model)
    found = [rank[loss] for rank in on_processes(world, "objectives", rows)]
    for grads, _ in found:
        assert grads.keys() == expected.keys()
        whole = flat(grads[name] for name in expected)
        assert relative_error(whole, flat(expected.values())) <= 1e-6
    mean = torch.stack([values[0] for _, values in found]).mean()
    assert float(mean) == pytest.approx(float(value.detach()), rel=1e-6)
    for _, (_, *gathered) in found:  # what is logged is of all pairs
        assert torch.stack(gathered).tolist() == pytest.approx(
            torch.stack(terms).tolist(), rel=1e-5, nan_ok=True
        )


@pytest.mark.parametrize("world", in_tiers(WORLDS, first=(2,)))
def test_gradient_accumulation(world: int) -> None:
    """Each loss is that of all processes' rows of its half."""
    model = worker.projector(PLAIN)
    sizes = SIZES["even"][world]
    half = sizes[0] // 2
    x1, x2, _ = worker.batch(PLAIN, world)
    starts = [sum(sizes[:rank]) for rank in range(world)]
    for offset in (0, half):
        rows = torch.cat([torch.arange(s + offset, s + offset + half) for s in starts])
        worker.LOSS["doe"](model(x1[rows]), model(x2[rows]), None, PLAIN).backward()
    expected = [p.grad for p in model.parameters()]
    for found in on_processes(world, "accumulated"):
        assert_same(found, expected, TOLERANCE["float64"])


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    for found in on_processes(2, "compiled"):
        for name, values in found.items():
            (case,) = (case for case in worker.cases() if str(case) == name)
            assert_same_step(values, of_one_process(case, 2), TOLERANCE["float64"])


def test_modules_and_gather() -> None:
    pairs = [views("iid", (6, 4), torch.float64) for _ in range(2)]
    pairs = [(z1 + rank, z2 - rank) for rank, (z1, z2) in enumerate(pairs)]
    all1, all2 = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    entropy, loss = vn_entropy(all1), doe_loss(all1, all2, beta=BETA)
    for rank, found in enumerate(on_processes(2, "modules")):
        z1, z2 = pairs[rank]
        expected = [entropy, entropy, vn_entropy(z1), loss, doe_loss(z1, z2, beta=BETA), all1, all2]
        assert_same(found, expected, 1e-13)
        assert abs(found[0] - found[2]) > 1e-3  # one process's rows have another entropy


def test_sub_groups() -> None:
    found = on_processes(3, "sub_groups")
    rows = [rank[0] for rank in found]
    for ranks_of_group in ([0, 2], [1]):
        z = torch.cat([rows[rank] for rank in ranks_of_group])
        # the sum of the processes' losses, each S
        expected = len(ranks_of_group) * reference.oracle_grad(z)
        for place, rank in enumerate(ranks_of_group):
            _, entropy, grad, _ = found[rank]
            assert relative_error(entropy, reference.oracle(z)) <= 1e-12
            assert relative_error(grad, expected[5 * place : 5 * (place + 1)]) <= 1e-12
    whole = reference.oracle(torch.cat(rows))
    assert all(relative_error(rank[3], whole) <= 1e-12 for rank in found)


def test_gathered_rows_may_be_used_differently_by_each_process() -> None:
    found = on_processes(3, "uneven_gather")
    rows = torch.cat([torch.full((rank + 1, 2), float(rank)) for rank in range(3)]).double()
    for rank, (gathered, grad) in enumerate(found):
        assert torch.equal(gathered, rows)
        # factors 1, 2 and 3 of the squares
        assert torch.equal(grad, torch.full((rank + 1, 2), 2.0 * rank * 6).double())


def test_what_does_not_go_together_is_an_error_everywhere() -> None:
    for rank, errors in enumerate(on_processes(2, "errors")):
        for error, named in {
            "d": ("ValueError", "z", f"d = {3 + rank}", f"d = {4 - rank}"),
            "dtype": ("ValueError", "z", "torch.float64"),
            "weights": ("ValueError", "z", "weights"),
            "rows": ("ValueError", "z", (0, 3)),
            "max_rows": ("ValueError", "z", "max_rows", 3, 4),
            "no group": ("TypeError", "group", "str"),
            "second derivative": ("NotImplementedError",),
        }.items():
            assert re.match(naming(*named), errors[error]), errors[error]


def test_nan_stays_in_its_sample_on_every_process() -> None:
    for rank, found in enumerate(on_processes(2, "nan_in_one_sample")):
        for entropy, grad in zip(found[::2], found[1::2], strict=True):
            assert entropy.isnan().tolist() == [False, True, False]
            assert grad[1].isnan().all(), rank
            assert grad[::2].isfinite().all()


# ---- one process -------------------------------------------------------------------------------


def test_without_processes_it_is_the_plain_loss() -> None:
    z1, z2 = views("iid", (16, 12), torch.float64)
    assert torch.equal(DoELoss(gather_distributed=True, max_rows=16)(z1, z2), DoELoss()(z1, z2))
    assert torch.equal(VNEntropy(gather_distributed=True)(z1), VNEntropy()(z1))
    assert gather(z1) is z1


def test_bad_bound_and_bad_group() -> None:
    for max_rows in (0, -1):
        with pytest.raises(ValueError, match=naming("max_rows", max_rows)):
            DoELoss(gather_distributed=True, max_rows=max_rows)
    with pytest.raises(TypeError, match=naming("group", "list")):
        vn_entropy(spectrum_case("iid", (4, 3), torch.float64), group=[0, 1])
