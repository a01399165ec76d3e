"""Weights are relative where rows are normalized: one meaning for functions, losses and metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import VALUE, gaussian, generator, spectrum_case
from torch import Tensor

from vne_kernels import (
    DensityAccumulator,
    DoELoss,
    VNEntropy,
    doe_loss,
    effective_rank,
    estimate_vn_entropy,
    participation_ratio,
    rankme,
    reference,
    renyi_entropy,
    spectrum,
    tsallis_entropy,
    vendi_score,
    vn_entropy,
)
from vne_kernels.metrics import EffectiveRank, RankMe, VendiScore, VonNeumannEntropy

FLOAT32, FLOAT64 = torch.float32, torch.float64
N, D = 12, 7
OFF_BY = 1e-10
"""Relative. Measured: 1e-13, by order 1/2."""


def accumulated(z: Tensor, weights: Tensor | None = None) -> Tensor:
    return DensityAccumulator(z.shape[-1], double=True).update(z, weights).entropy()


def of_metric(make: Callable[[int], Callable[..., Tensor]]) -> Callable[..., Tensor]:
    def score(z: Tensor, weights: Tensor | None = None) -> Tensor:
        metric = make(z.shape[-1])
        metric.update(z, weights)
        return metric.compute()

    return score


def of_kernel(z: Tensor, weights: Tensor | None = None) -> Tensor:
    return vendi_score(z @ z.mT, is_kernel=True, weights=weights)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "vn_entropy": vn_entropy,
    "VNEntropy": VNEntropy(),
    "spectrum": spectrum,
    "doe_loss": lambda z, weights=None: doe_loss(z, z.flip(-1), weights=weights),
    "DoELoss": lambda z, weights=None: DoELoss()(z, z.flip(-1), weights),
    **{f"renyi_entropy {a}": partial(renyi_entropy, alpha=a) for a in (0.5, 1, 2, 3)},
    "renyi_entropy as they are": partial(renyi_entropy, alpha=3, normalize=False),
    "tsallis_entropy": partial(tsallis_entropy, q=3),
    "effective_rank": effective_rank,
    "vendi_score": vendi_score,
    "vendi_score of a kernel": of_kernel,
    "participation_ratio": participation_ratio,
    "rankme": rankme,
    "estimate_vn_entropy": lambda z, weights=None: estimate_vn_entropy(z, weights=weights).entropy,
    "DensityAccumulator": accumulated,
    "metrics.VonNeumannEntropy": of_metric(partial(VonNeumannEntropy, double=True)),
    "metrics.EffectiveRank": of_metric(EffectiveRank),
    "metrics.VendiScore": of_metric(partial(VendiScore, q=0.5)),
    "metrics.RankMe": of_metric(RankMe),
}
FLOAT32_SUMS = ("metrics.EffectiveRank",)


def close(name: str, found: Tensor, expected: Tensor) -> None:
    off_by = VALUE[FLOAT32].relative if name in FLOAT32_SUMS else OFF_BY
    torch.testing.assert_close(found, expected, rtol=off_by, atol=off_by)


@pytest.fixture(params=FUNCTIONS)
def named(request: pytest.FixtureRequest) -> tuple[str, Callable[..., Tensor]]:
    return request.param, FUNCTIONS[request.param]


Named = tuple[str, Callable[..., Tensor]]


def test_a_common_factor_does_not_matter(named: Named) -> None:
    name, function = named
    z = spectrum_case("iid", (N, D), FLOAT64)
    weights = torch.rand(N, generator=generator(2), dtype=FLOAT64) + 0.1
    expected = function(z, weights=weights / weights.sum())
    for factor in (1.0, 128.0, 1e-20, 1e20):
        close(name, function(z, weights=factor * weights), expected)


def test_without_weights_they_are_alike(named: Named) -> None:
    name, function = named
    z = spectrum_case("iid", (N, D), FLOAT64)
    close(name, function(z, weights=torch.full((N,), 3.0)), function(z))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, FLOAT64])
def test_a_mask_leaves_rows_out_whatever_they_hold(named: Named, dtype: torch.dtype) -> None:
    name, function = named
    z = spectrum_case("iid", (N, D), FLOAT64)
    mask = torch.ones(N, dtype=dtype)
    mask[[2, 9, 10]] = 0
    present = z[mask.bool()]
    z[2], z[9], z[10] = torch.nan, torch.inf, 1e300
    found = function(z, weights=mask)
    if name == "spectrum":  # more of them are 0
        found = found[..., : min(present.shape)]
    close(name, found, function(present))


def test_an_attention_mask_of_a_batch() -> None:
    tokens = gaussian(3 * 8, 5, generator(4)).reshape(3, 8, 5)
    lengths = (8, 5, 2)
    mask = torch.tensor([[1] * length + [0] * (8 - length) for length in lengths])
    found = vn_entropy(tokens.masked_fill(mask[..., None] == 0, torch.nan), weights=mask)
    expected = [vn_entropy(z[:length]) for z, length in zip(tokens, lengths, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_only_without_normalize_they_are_used_as_given(normalize: bool) -> None:
    z = spectrum_case("iid", (N, D), FLOAT64) / D
    weights = torch.full((N,), 0.5, dtype=FLOAT64)
    p = weights / weights.sum() if normalize else weights
    x = torch.nn.functional.normalize(z, dim=-1) if normalize else z
    exact = torch.special.entr(torch.linalg.eigvalsh(x.mT @ (p[:, None] * x))).sum()
    torch.testing.assert_close(vn_entropy(z, weights=weights, normalize=normalize), exact)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(function, id=name)
        for name, function in FUNCTIONS.items()
        if not name.startswith(("metrics.", "Density", "estimate"))  # they have no gradient
    ],
)
def test_the_gradient_of_a_masked_row_is_zero(function: Callable[..., Tensor]) -> None:
    z = spectrum_case("iid", (N, D), FLOAT64)
    if function is of_kernel:
        z, function = z @ z.mT, partial(vendi_score, is_kernel=True)
        z[:, 4] = torch.nan
    weights = torch.rand(N, generator=generator(3), dtype=FLOAT64) + 0.1
    weights[4], z[4] = 0, torch.nan
    leaves = z.requires_grad_(), weights.requires_grad_()
    grad_z, grad_weights = torch.autograd.grad(function(leaves[0], weights=leaves[1]).sum(), leaves)
    assert grad_z.isfinite().all()
    assert grad_weights.isfinite().all()
    assert (grad_z[4] == 0).all()
    assert grad_weights[4] == 0


@pytest.mark.parametrize("bad", [-1.0, torch.nan])
def test_a_bad_weight_makes_its_sample_nan(bad: float) -> None:
    z = spectrum_case("iid", (2, N, D), FLOAT64)
    weights = torch.ones(2, N)
    weights[1, 3] = bad
    for function in (vn_entropy, effective_rank, FUNCTIONS["doe_loss"]):
        found = function(z, weights=weights)
        assert found[0].isfinite()
        assert found[1].isnan()


def test_doe_loss_is_that_of_the_pairs_repeated() -> None:
    """An integer weight counts a pair as often."""
    z1, z2 = (spectrum_case(name, (5, 4), FLOAT64) for name in ("iid", "relu"))
    counts = torch.tensor([1, 3, 0, 2, 1])
    repeated = [z.repeat_interleave(counts, 0) for z in (z1, z2)]
    exact = reference.oracle_doe(*repeated, 2.0)
    for dtype in (FLOAT64, FLOAT32, torch.bfloat16):
        views = [z.to(dtype) for z in (z1, z2)]
        loss = doe_loss(*views, beta=2.0, weights=counts)
        assert loss.dtype == (FLOAT64 if dtype == FLOAT64 else FLOAT32)
        tolerance = {FLOAT64: 1e-12, FLOAT32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=tolerance)


def test_gradcheck_of_a_weighted_doe_loss(gradcheck: Callable[..., bool]) -> None:
    leaves = [spectrum_case(name, (5, 4), FLOAT64).requires_grad_() for name in ("iid", "relu")]
    weights = torch.rand(5, generator=generator(3), dtype=FLOAT64).add(0.1).requires_grad_()
    assert gradcheck(lambda z1, z2, w: doe_loss(z1, z2, weights=w), (*leaves, weights))
