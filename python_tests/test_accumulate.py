"""Rows in chunks against the float64 oracle of all of them at once, on the table of inputs."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest
import torch
from cases import (
    DEFICIENT_SPECTRA,
    DTYPES,
    SPECTRA,
    VALUE,
    VALUE_DEFICIENT,
    assert_value,
    gaussian,
    generator,
    spectrum_case,
)
from naming import naming
from torch import Tensor

from vne_kernels import DensityAccumulator, get_vne, reference
from vne_kernels._core import rows, spectra

SHAPE = (130, 24)
CHUNKS = {"single rows": [1] * 130, "uneven": [0, 1, 7, 90, 0, 32], "one": [130]}

EIGENVALUE = {
    torch.float64: (1e-14, "8e-16"),
    torch.float32: (1e-7, "5e-9"),
    torch.bfloat16: (1e-7, "5e-9"),
    torch.float16: (1e-7, "7e-9"),
}
"""Absolute, for a trace of 1, and the worst that was measured over this file's spectra."""
DOUBLE = 1e-14
"""The same with ``double=True``, whatever the dtype. Measured: 8e-16."""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that these inputs fill more than once."""
    monkeypatch.setattr(rows, "BLOCK_ROWS", 16)


def accumulated(
    z: Tensor, sizes: list[int], weights: Tensor | None = None, **options: object
) -> DensityAccumulator:
    sums = DensityAccumulator(z.shape[-1], **options)
    parts = [None] * len(sizes) if weights is None else weights.split(sizes)
    for chunk, w in zip(z.split(sizes), parts, strict=True):
        sums.update(chunk, w)
    return sums


def true_eigenvalues(z: Tensor, weights: Tensor | None = None, *, normalize: bool = True) -> Tensor:
    """Squared singular values of diag(sqrt p) U in float64, descending."""
    z = z.double()
    u = torch.nn.functional.normalize(z, dim=-1) if normalize else z
    w = torch.ones(len(z)).double() if weights is None else weights.double()
    return torch.linalg.svdvals((w / w.sum()).sqrt()[:, None] * u).square()


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", SPECTRA)
def test_chunks_are_the_whole(name: str, chunks: str, dtype: torch.dtype) -> None:
    z = spectrum_case(name, SHAPE, dtype)
    sums = accumulated(z, CHUNKS[chunks])
    assert (sums.rows, float(sums.weight)) == (130, 130.0)
    tolerance = (VALUE_DEFICIENT if name in DEFICIENT_SPECTRA else VALUE)[dtype]
    assert_value(sums.entropy(), reference.oracle(z), tolerance)
    eigenvalues = sums.eigenvalues()
    assert eigenvalues.dtype == sums.density().dtype == torch.float64
    assert (eigenvalues >= 0).all()
    assert (eigenvalues.diff() <= 0).all()
    expected = true_eigenvalues(z)
    torch.testing.assert_close(eigenvalues, expected, rtol=0, atol=EIGENVALUE[dtype][0])
    double = accumulated(z, CHUNKS[chunks], double=True)
    torch.testing.assert_close(double.eigenvalues(), expected, rtol=0, atol=DOUBLE)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_count_up_to_a_factor(dtype: torch.dtype, normalize: bool) -> None:
    z = spectrum_case("iid", SHAPE, dtype) / SHAPE[1] ** 0.5
    w = 5 * torch.rand(130, generator=generator(3), dtype=dtype)
    w[::4] = 0
    sums = accumulated(z, CHUNKS["uneven"], w, normalize=normalize)
    p = w.double() / w.double().sum()
    expected = reference.oracle(z, weights=p, normalize=normalize)
    assert_value(sums.entropy(), expected, VALUE[dtype])
    assert float(sums.weight) == pytest.approx(float(w.double().sum()), rel=1e-14)
    eigenvalues = true_eigenvalues(z, w, normalize=normalize)
    torch.testing.assert_close(sums.eigenvalues(), eigenvalues, rtol=0, atol=EIGENVALUE[dtype][0])


def test_double_keeps_weights_and_small_eigenvalues_of_float32_rows() -> None:
    """Eigenvalues down to 1e-10 of the largest, of which float32 products keep nothing."""
    left, right = (torch.linalg.qr(gaussian(n, 12, generator(n))).Q for n in (64, 12))
    z = (left * torch.logspace(0, -5, 12, dtype=torch.float64)) @ right.mT
    z = z.float()
    w = torch.rand(64, generator=generator(1), dtype=torch.float64)
    expected = true_eigenvalues(z, w, normalize=False)
    sums = accumulated(z, [20, 44], w, normalize=False, double=True)
    torch.testing.assert_close(sums.eigenvalues(), expected, rtol=1e-5, atol=0)
    single = accumulated(z, [20, 44], w, normalize=False).eigenvalues()
    assert (single / expected - 1).abs().max() > 0.1


def test_full_blocks_and_the_float32_error_of_many_rows() -> None:
    """Three blocks and a rest; the error of rho is no more than that of one block."""
    z = spectrum_case("decay", (3 * rows.BLOCK_ROWS + 5, 16), torch.float32)
    u = torch.nn.functional.normalize(z.double(), dim=-1)
    rho = u.mT @ u / len(u)
    for sizes in ([len(z)], [1000] * 6 + [149]):
        error = (accumulated(z, sizes).density() - rho).abs().max()
        assert error < 1e-7  # measured: 1.0e-8


@pytest.mark.usefixtures("small_blocks")
def test_every_leading_dimension_is_rows_and_dtypes_may_change() -> None:
    z = spectrum_case("relu", (2, 3, 10, 24), torch.float32)
    sums = DensityAccumulator(24)
    sums.update(z[0], torch.full((10,), 2.0)).update(z[1].double(), torch.full((3, 1), 2.0))
    assert (sums.rows, float(sums.weight)) == (60, 120.0)
    assert_value(sums.entropy(), reference.oracle(z.flatten(0, 2)), VALUE[torch.float32])


def test_fewer_rows_than_features_leave_so_many_eigenvalues() -> None:
    z = spectrum_case("iid", (5, 24), torch.float64)
    eigenvalues = accumulated(z, [2, 3]).eigenvalues()
    torch.testing.assert_close(eigenvalues, true_eigenvalues(z), rtol=0, atol=DOUBLE)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_rows_are_kept_until_they_outnumber_the_features(
    dtype: torch.dtype, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the rows alone, with the sum, and from a state in between: the same eigenvalues."""
    monkeypatch.setattr(rows, "BLOCK_ROWS", 8)
    z = spectrum_case("relu", (60, 24), dtype)
    w = torch.rand(60, generator=generator(2), dtype=torch.float64).to(dtype)
    sums = DensityAccumulator(24, normalize=normalize)
    tolerance = DOUBLE if dtype == torch.float64 else 1e-6
    for begin, end in pairwise((0, 3, 5, 20, 23, 24, 31, 60)):
        sums.update(z[begin:end], w[begin:end])
        state = sums.state_dict()
        assert state["total"].shape == ((0, 0) if end < 24 else (24, 24))
        assert len(state["pending"]) == {24: 1, 31: 0, 60: 5}.get(end, end)
        loaded = DensityAccumulator(24, normalize=normalize)
        loaded.load_state_dict(state)
        merged = DensityAccumulator(24, normalize=normalize)
        merged.update(z[: end // 2], w[: end // 2])
        rest = DensityAccumulator(24, normalize=normalize).update(
            z[end // 2 : end], w[end // 2 : end]
        )
        merged.merge(rest)
        x, p = z[:end].double(), w[:end].double()
        u = torch.nn.functional.normalize(x, dim=-1) if normalize else x
        exact = torch.linalg.eigvalsh((u.mT * p) @ u / p.sum()).flip(-1)[: min(end, 24)]
        for one in (sums, loaded, merged):
            error = (one.eigenvalues() - exact.clamp_min(0)).abs().max()
            assert error <= tolerance * exact.sum(), end
    state = DensityAccumulator(24).update(z[:5]).state_dict() | {"rows": 7}
    with pytest.raises(ValueError, match=naming("state", "of 5 rows", "7")):
        DensityAccumulator(24).load_state_dict(state)


def test_few_rows_with_a_bad_number() -> None:
    z, one = spectrum_case("iid", (5, 24), torch.float64), torch.ones(5)
    second = torch.tensor(2)
    cases = [(z, -one)]
    for bad in (math.nan, math.inf):
        cases.append((z.index_fill(0, second, bad), None))
    for bad in (math.nan, math.inf, -1.0):
        cases.append((z, one.index_fill(0, second, bad)))
    for x, w in cases:
        assert DensityAccumulator(24).update(x, w).eigenvalues().isnan().all()


def test_few_rows_of_many_features_take_no_large_matrix() -> None:
    """Of 60,000 x 60,000 numbers, 28.8 GB."""
    z = spectrum_case("iid", (50, 60_000), torch.float32)
    sums = DensityAccumulator(60_000).update(z[:20]).update(z[20:])
    again = DensityAccumulator(60_000)
    again.load_state_dict(sums.state_dict())
    assert_value(again.merge(sums).entropy(), reference.oracle(z), VALUE[torch.float32])


def test_scores_are_those_of_the_eigenvalues() -> None:
    z = spectrum_case("relu", SHAPE, torch.float64)
    scores = accumulated(z, [130]).scores()
    p = true_eigenvalues(z)
    entropy = float(reference.oracle(z))
    expected = {
        "entropy": entropy,
        "entropy_bound": math.log(24),
        "effective_rank": math.exp(entropy),
        "renyi_2": -math.log(float(p.square().sum())),
        "participation_ratio": 1 / float(p.square().sum()),
        "min_entropy": -math.log(float(p[0])),
        "largest_eigenvalue": float(p[0]),
        "trace": 1.0,
    }
    assert {name: float(x) for name, x in scores.items()} == pytest.approx(expected, rel=1e-12)


def test_scores_do_not_depend_on_the_scale_of_raw_rows() -> None:
    z = spectrum_case("relu", SHAPE, torch.float64)
    one, tenfold = (accumulated(x, [130], normalize=False).scores() for x in (z, 10 * z))
    factors = dict.fromkeys(one, 1) | {"largest_eigenvalue": 100, "trace": 100}
    for name, factor in factors.items():
        assert float(tenfold[name]) == pytest.approx(factor * float(one[name]), rel=1e-12)


# ---------------------------------------------------------------------------------------------
# Merging, states, reading in between
# ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
def test_the_order_of_merges_changes_rounding_alone() -> None:
    z = spectrum_case("decay", SHAPE, torch.float64)
    w = torch.rand(130, generator=generator(2), dtype=torch.float64)
    whole = accumulated(z, [130], w)
    sizes = [40, 0, 89, 1]
    parts = list(zip(z.split(sizes), w.split(sizes), strict=True))
    for order in ([0, 1, 2, 3], [3, 1, 2, 0], [2, 3, 0, 1]):
        merged = DensityAccumulator(24)
        for index in order:
            part = DensityAccumulator(24).update(*parts[index])
            merged.merge(part)
            assert part.rows == sizes[index]
        assert merged.rows == 130
        torch.testing.assert_close(merged.weight, whole.weight, rtol=1e-15, atol=0)
        torch.testing.assert_close(merged.density(), whole.density(), rtol=0, atol=1e-15)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_state_loaded_goes_on_to_the_same_bits(dtype: torch.dtype) -> None:
    z = spectrum_case("decay", SHAPE, dtype)
    whole = accumulated(z, [25, 40, 65])
    first = accumulated(z[:65], [25, 40])
    first.scores()  # reading changes nothing
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = DensityAccumulator(24)
    second.load_state_dict(torch.load(file, weights_only=True))
    first.update(z[:3])  # has no part in the other any more
    second.update(z[65:])
    assert (second.rows, float(second.weight)) == (130, 130.0)
    assert torch.equal(second.density(), whole.density())


def test_inference_mode_is_no_trap_for_later_chunks() -> None:
    z = spectrum_case("iid", SHAPE, torch.float64)
    with torch.inference_mode():
        sums = DensityAccumulator(24).update(z[:60])
    sums.update(z[60:].clone().requires_grad_())
    assert not sums.density().requires_grad
    assert_value(sums.entropy(), reference.oracle(z), VALUE[torch.float64])


# ---------------------------------------------------------------------------------------------
# Nothing, zeros, NaN, and what is refused
# ---------------------------------------------------------------------------------------------


def test_without_rows_there_is_nothing_to_ask_for() -> None:
    sums = DensityAccumulator(4).update(torch.empty(0, 4))
    assert (sums.rows, float(sums.weight)) == (0, 0.0)
    for ask in (sums.density, sums.eigenvalues, sums.entropy, sums.scores):
        with pytest.raises(ValueError, match=naming("update")):
            ask()


def test_weights_of_zero_and_zero_rows_are_the_zero_matrix() -> None:
    for sums in (
        DensityAccumulator(4).update(torch.eye(4), torch.zeros(4)),
        DensityAccumulator(4).update(torch.zeros(3, 4)),
    ):
        assert not sums.density().any()
        assert sums.entropy() == 0
        assert sums.scores()["effective_rank"] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "nan weight", "negative weight"])
def test_one_bad_number_makes_all_nan(bad: float | str) -> None:
    z, w = spectrum_case("iid", SHAPE, torch.float32), torch.ones(SHAPE[0])
    if isinstance(bad, float):
        z[100, 3] = bad
    else:
        w[100] = math.nan if bad == "nan weight" else -1.0
    sums = accumulated(z, [50, 80], w)
    assert sums.density().isnan().all()
    assert sums.entropy().isnan()
    assert sums.eigenvalues().isnan().all()
    scores = sums.scores()
    assert [name for name in scores if not scores[name].isnan()] == ["entropy_bound"]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("d", 0, ValueError),
        ("d", 2.0, TypeError),
        ("d", True, TypeError),
        ("normalize", 1, TypeError),
        ("eps", -1.0, ValueError),
    ],
)
def test_wrong_settings(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=naming(name)):
        DensityAccumulator(**{"d": 4} | {name: value})


@pytest.mark.parametrize(
    ("z", "weights", "error", "named"),
    [
        (torch.zeros(4), None, ValueError, ("z", (4,))),
        (torch.zeros(2, 5), None, ValueError, ("z", (2, 5))),
        (torch.zeros(2, 4).int(), None, TypeError, ("z", torch.int32)),
        (torch.zeros(2, 4, device="meta"), None, ValueError, ("z", "meta")),
        (torch.eye(4), torch.ones(3), ValueError, ("weights", (3,))),
    ],
)
def test_wrong_chunks_leave_the_sums_alone(
    z: Tensor, weights: Tensor | None, error: type[Exception], named: tuple[object, ...]
) -> None:
    sums = DensityAccumulator(4).update(torch.eye(4))
    with pytest.raises(error, match=naming(*named)):
        sums.update(z, weights)
    assert sums.rows == 4
    assert float(sums.entropy()) == pytest.approx(math.log(4))


def test_what_cannot_be_merged_or_loaded() -> None:
    sums = DensityAccumulator(4, double=True)
    with pytest.raises(TypeError, match=naming("other", "Tensor")):
        sums.merge(torch.eye(4))
    other = DensityAccumulator(4).update(torch.eye(4))
    with pytest.raises(ValueError, match=naming("other", "double")):
        sums.merge(other)
    with pytest.raises(ValueError, match=naming("state", 3, 4)):
        DensityAccumulator(3).load_state_dict(other.state_dict())
    state = other.state_dict()
    with pytest.raises(ValueError, match=naming("state", (3, 4))):
        DensityAccumulator(4).load_state_dict(state | {"total": torch.zeros(3, 4)})
    for name, wrong, error in (
        ("total", torch.zeros(4, 4).int(), TypeError),
        ("total", torch.zeros(4, 4).to_sparse(), TypeError),
        ("weight", 4.0, TypeError),
        ("pending", state["pending"].half(), TypeError),
        ("rows", -5, ValueError),
        ("rows", 3, ValueError),  # fewer than wait
        ("rows", 4.0, ValueError),
    ):
        loaded = DensityAccumulator(4).update(torch.ones(7, 4))
        with pytest.raises(error, match=naming("state")):
            loaded.load_state_dict(state | {name: wrong})
        assert loaded.rows == 7
        assert float(loaded.entropy()) == pytest.approx(0, abs=1e-6)
    del state["rows"]
    with pytest.raises(ValueError, match=naming("state", "rows")):
        DensityAccumulator(4).load_state_dict(state)


def test_rankme_of_raw_rows_counts_the_smaller_side() -> None:
    """As many eigenvalues as singular values, for each adds eps to the probabilities (14)."""
    z = spectrum_case("relu", (10, 24), torch.float32)
    sums = accumulated(z, [4, 6], normalize=False, double=True)
    s = torch.linalg.svdvals(z.double())
    p = s / s.sum() + 1e-7
    expected = float((-(p * p.log()).sum()).exp())
    assert float(spectra.rankme(sums.eigenvalues(), 1e-7)) == pytest.approx(expected, rel=1e-9)


def test_get_vne_is_the_official_code_s_value_with_a_gradient_everywhere() -> None:
    for name in SPECTRA:
        h = spectrum_case(name, (40, 24), torch.float64)
        expected = reference.official_svd(h)
        assert_value(get_vne(h), expected, VALUE[torch.float64])
    h = spectrum_case("duplicated", (40, 24), torch.float32).requires_grad_()
    get_vne(h).backward()
    assert_value(h.grad, reference.oracle_grad(h.detach()), VALUE[torch.float32])
    for shape in ((2, 3, 4), (0, 4)):
        with pytest.raises(ValueError, match=naming("H", shape)):
            get_vne(torch.zeros(shape))
