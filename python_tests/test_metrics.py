"""The metrics: the scores of all rows, however these come, and what torchmetrics does with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import lightning.pytorch as pl
import metrics_worker as worker
import numpy as np
import pytest
import ranks
import torch
from cases import spectrum_case
from naming import naming
from torch import Tensor
from torchmetrics import Metric, MetricCollection

import vne_kernels
from vne_kernels._core import rows as blocks
from vne_kernels.metrics import EffectiveRank, RankMe, VendiScore, VonNeumannEntropy

EXACT = 1e-12
"""Relative, in float64. Measured: 4e-14."""
SINGLE = 1e-5
"""Relative, of float32 rows against the same in float64. Measured: 3e-7; 2e-6 in one block."""
AGREEMENT = 1e-6
"""Relative, with vendi-score in float64. Measured: 2e-15."""

FUNCTIONS = {
    "entropy": vne_kernels.vn_entropy,
    "effective_rank": vne_kernels.effective_rank,
    "vendi_2": lambda z, **over: vne_kernels.vendi_score(z, 2, **over),
    "vendi_half": lambda z, **over: vne_kernels.vendi_score(z, 0.5, **over),
}

pytestmark = [
    # scipy.sparse.csr, in vendi-score; the processes without data are meant
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The ``compute`` method of metric"),
]


def scores(z: Tensor, weights: Tensor | None = None) -> dict[str, float]:
    """Of all rows at once, in float64, by the functions; RankMe's weights are its rows' squares."""
    z = z.double()
    p = None if weights is None else weights / weights.sum()
    found = {name: float(f(z, weights=p)) for name, f in FUNCTIONS.items()}
    raw = z if p is None else p.sqrt()[:, None] * z
    return found | {"rankme": float(vne_kernels.rankme(raw))}


def numbers(computed: dict[str, Tensor]) -> dict[str, float]:
    assert all(x.dtype == torch.float64 for x in computed.values())
    return {name: float(x) for name, x in computed.items()}


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "duplicated", "rank3", "decay"])
@pytest.mark.parametrize("rows", [53, 7])
def test_batches_are_the_whole(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 16)
    z = spectrum_case(name, (rows, worker.FEATURES), torch.float64)
    collected = worker.collection()
    for batch in z.split([1, 0, rows - 3, 2]):
        collected.update(batch)
    assert numbers(collected.compute()) == pytest.approx(scores(z), rel=EXACT)
    single = worker.collection()
    single.update(z.float())
    assert numbers(single.compute()) == pytest.approx(scores(z.float()), rel=SINGLE)


def test_vendi_score_is_the_package_s(vendi: ModuleType) -> None:
    z = spectrum_case("relu", (53, 12), torch.float64)
    for q in (0.5, 1, 2, math.inf):
        metric = VendiScore(12, q)
        metric.update(z)
        expected = vendi.score_dual(z.numpy(), q="inf" if q == math.inf else q)
        assert float(metric.compute()) == pytest.approx(expected, rel=AGREEMENT)
    effective_rank = EffectiveRank(12)
    effective_rank.update(z)
    assert float(effective_rank.compute()) == pytest.approx(vendi.score_X(z.numpy()), rel=AGREEMENT)


@pytest.mark.parametrize("metric", [VonNeumannEntropy(12), EffectiveRank(12)])
def test_a_batch_s_value_has_a_gradient(metric: Metric) -> None:
    z = spectrum_case("relu", (20, 12), torch.float64).requires_grad_()
    function = FUNCTIONS["entropy" if isinstance(metric, VonNeumannEntropy) else "effective_rank"]
    metric(z.detach())
    value = metric(z)
    expected = function(z)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=EXACT)
    (ours,), (theirs,) = (torch.autograd.grad(x, z) for x in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not metric.compute().requires_grad


def test_without_normalisation_and_nan() -> None:
    z = spectrum_case("relu", (53, 12), torch.float64)
    metric = VonNeumannEntropy(12, normalize=False, double=True)
    metric.update(z)
    expected = vne_kernels.vn_entropy(z, normalize=False)
    assert float(metric.compute()) == pytest.approx(float(expected), rel=EXACT)
    z[3, 3] = math.nan
    collected = worker.collection()
    collected.update(z)
    assert all(math.isnan(x) for x in numbers(collected.compute()).values())


def test_no_rows_are_nan() -> None:
    collected = worker.collection()
    collected.update(torch.empty(0, 12))
    assert all(math.isnan(x) for x in numbers(collected.compute()).values())


def test_rows_of_weight_zero_do_not_count() -> None:
    """RankMe takes min(n, d) singular values; without any row there is no score."""
    z = spectrum_case("relu", (53, 12), torch.float64)
    w = torch.zeros(53, dtype=torch.float64)
    collected = worker.collection()
    collected.update(z, w)
    assert all(math.isnan(x) for x in numbers(collected.compute()).values())
    w[4:9] = 3
    collected.update(z, w)
    assert numbers(collected.compute()) == pytest.approx(scores(z[4:9]), rel=EXACT)
    assert int(collected["rankme"].rows) == 5


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_leaves_out_padding(dtype: torch.dtype) -> None:
    """As it comes with a batch of token sequences, whatever the padding holds."""
    z = spectrum_case("relu", (4, 20, 12), torch.float64)
    mask = torch.arange(20) < torch.tensor([3, 20, 1, 7])[:, None]
    collected = worker.collection()
    collected.update(torch.where(mask[..., None], z, math.nan), mask.to(dtype))
    assert numbers(collected.compute()) == pytest.approx(scores(z[mask]), rel=EXACT)


def test_numbers_of_numpy_and_other_logarithms() -> None:
    z = spectrum_case("relu", (53, 12), torch.float64)
    metrics: dict[Metric, Metric] = {
        VendiScore(np.int64(12), np.float32(0.5), eps=np.float64(1e-12)): VendiScore(12, 0.5),
        EffectiveRank(np.int32(12)): EffectiveRank(12),
        RankMe(np.int64(12), eps=np.float64(1e-7)): RankMe(12),
    }
    for one, other in metrics.items():
        assert float(one(z)) == float(other(z))
    expected = float(vne_kernels.vn_entropy(z))
    for base in (2, np.int64(10), 0.5):
        found = float(VonNeumannEntropy(12, base=base)(z))
        assert found == pytest.approx(expected / math.log(base), rel=EXACT)


# ---------------------------------------------------------------------------------------------
# What torchmetrics does
# ---------------------------------------------------------------------------------------------


def test_over_two_processes() -> None:
    z, w = worker.rows_and_weights()
    expected = pytest.approx(scores(z, w), rel=EXACT)
    for found in ranks.run(2, worker.over_processes):
        assert found.keys() == {f"{n}{again}" for n in worker.BATCHES for again in ("", ", again")}
        for computed in found.values():
            assert numbers(computed) == expected


def test_states_are_shared_where_their_sums_are_the_same_and_only_there() -> None:
    """The first rows are of length one: raw sums and normalized ones are still the same."""
    z = torch.nn.functional.normalize(spectrum_case("relu", (40, 12), torch.float64), dim=-1)
    collected = MetricCollection(
        {
            "entropy": VonNeumannEntropy(12),
            "rank": EffectiveRank(12),
            "vendi": VendiScore(12, 2),
            "precise": VonNeumannEntropy(12, double=True),
            "raw": VonNeumannEntropy(12, normalize=False),
            "eps": VonNeumannEntropy(12, eps=0.5),
            "rankme": RankMe(12),
        }
    )
    collected.update(z[:20])
    groups = sorted(sorted(group) for group in collected.compute_groups.values())
    together = ["entropy", "rank", "vendi"]
    assert groups == sorted([together, ["precise"], ["raw"], ["eps"], ["rankme"]])
    z[20:] *= torch.linspace(0.1, 9, 20, dtype=torch.float64)[:, None]
    collected.update(z[20:])
    found = numbers(collected.compute())
    assert found["rank"] == pytest.approx(float(vne_kernels.effective_rank(z)), rel=EXACT)
    raw = vne_kernels.vn_entropy(z, normalize=False)
    assert found["raw"] == pytest.approx(float(raw), rel=EXACT)
    assert found["rankme"] == pytest.approx(float(vne_kernels.rankme(z)), rel=EXACT)
    assert found["eps"] < found["entropy"]


def test_merge_state_and_refuse_other_sums() -> None:
    z = spectrum_case("relu", (53, 12), torch.float64)
    one, other = RankMe(12), RankMe(12)
    one.update(z[:50])
    other.update(z[50:])
    one.merge_state(other)
    assert float(one.compute()) == pytest.approx(float(vne_kernels.rankme(z)), rel=EXACT)
    with pytest.raises(ValueError, match="total_raw_single"):
        VonNeumannEntropy(12, normalize=False).merge_state(VonNeumannEntropy(12))


def test_a_reset_in_inference_mode_is_no_trap_for_later_batches() -> None:
    z = spectrum_case("relu", (53, 12), torch.float64)
    metric = VonNeumannEntropy(12)
    with torch.inference_mode():
        metric.update(z)
        metric.reset()
    metric.update(z[:30])
    metric.half()  # states stay in float64
    with torch.inference_mode():
        metric.update(z[30:])
    assert float(metric.compute()) == pytest.approx(float(vne_kernels.vn_entropy(z)), rel=EXACT)


CASTS: dict[str, Callable[[torch.nn.Module], object]] = {
    "half": lambda module: module.half(),
    "to float16": lambda module: module.to(torch.float16),
    "to float16 and a device": lambda module: module.to("cpu", torch.float16),
    "to bfloat16": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "type": lambda module: module.type(torch.float16),
    "set_dtype": lambda module: [
        child.set_dtype(torch.float16) for child in module.modules() if isinstance(child, Metric)
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("parent", ["metric", "collection", "model"])
def test_casts_leave_the_sums_in_float64(
    parent: str, cast: Callable[[torch.nn.Module], object]
) -> None:
    """Half precision counts to 65,504, bfloat16 to 256; a cast may come at any time."""
    metrics = {"effective_rank": EffectiveRank(12), "rankme": RankMe(12)}
    modules: list[torch.nn.Module] = list(metrics.values())
    if parent != "metric":
        modules = [MetricCollection(metrics)]
    if parent == "model":
        model = pl.LightningModule()
        model.layer, model.metrics = torch.nn.Linear(2, 2), modules[0]
        modules = [model]
    z = spectrum_case("relu", (35_000, 12), torch.float32)
    for _ in range(2):
        for module in modules:
            cast(module)
        for metric in metrics.values():
            metric.update(z)
    for name, expected in scores(torch.cat([z, z])).items():
        if name in metrics:
            metric = metrics[name]
            assert float(metric.compute()) == pytest.approx(expected, rel=SINGLE)
            assert int(metric.rows) == 70_000
            metric.reset()
            states = {name: getattr(metric, name).dtype for name in metric._defaults}
            assert states.pop("rows") == torch.int64
            assert set(states.values()) == {torch.float64}


def test_a_device_is_taken() -> None:
    metric = EffectiveRank(12).to("meta", torch.float16)
    assert metric.device.type == "meta"
    assert metric.rows.device.type == metric.weight.device.type == "meta"


def test_rows_may_be_in_half_precision() -> None:
    z = spectrum_case("relu", (53, 12), torch.float16)
    collected = worker.collection().to(torch.float16)
    collected.update(z)
    assert numbers(collected.compute()) == pytest.approx(scores(z), rel=SINGLE)


def test_plot() -> None:
    metric = EffectiveRank(12)
    values = [metric(z) for z in spectrum_case("relu", (3, 20, 12), torch.float64)]
    figure, axes = metric.plot(values)
    (line,) = axes.get_lines()[:1]
    assert line.get_ydata().tolist() == [float(value) for value in values]
    figure.clear()


def test_wrong_arguments() -> None:
    for metric_class, arguments, options, error, named in (
        (VonNeumannEntropy, (0,), {}, ValueError, "num_features"),
        (VonNeumannEntropy, (4.0,), {}, TypeError, "num_features"),
        (VonNeumannEntropy, (4,), {"base": 1}, ValueError, "base"),
        (VendiScore, (4, -1), {}, ValueError, "q"),
        (RankMe, (4,), {"eps": -1}, ValueError, "eps"),
    ):
        with pytest.raises(error, match=naming(named)):
            metric_class(*arguments, **options)
    metric = EffectiveRank(4)
    with pytest.raises(ValueError, match=naming("z", (3, 5))):
        metric.update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=naming("weights", (3,), (2,))):
        metric.update(torch.zeros(3, 4), torch.zeros(2))
