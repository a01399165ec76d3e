"""What the processes of test_metrics do: a module of its own, so that they can import it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from cases import spectrum_case
from torch import Tensor
from torchmetrics import MetricCollection

from vne_kernels.metrics import EffectiveRank, RankMe, VendiScore, VonNeumannEntropy

ROWS, FEATURES = 53, 12
#: batches of each process; the second gets none in the first case
BATCHES = {"one without data": [[20, 33], []], "uneven": [[7, 1, 12], [33]]}


def collection() -> MetricCollection:
    return MetricCollection(
        {
            "entropy": VonNeumannEntropy(FEATURES),
            "effective_rank": EffectiveRank(FEATURES),
            "vendi_2": VendiScore(FEATURES, 2),
            "vendi_half": VendiScore(FEATURES, 0.5),
            "rankme": RankMe(FEATURES),
        }
    )


def rows_and_weights() -> tuple[Tensor, Tensor]:
    z = spectrum_case("relu", (ROWS, FEATURES), torch.float64)
    return z, torch.arange(1.0, ROWS + 1, dtype=torch.float64)


def over_processes() -> dict[str, dict[str, Tensor]]:
    """All scores of both cases, twice: the sums of a process are its own again after a compute."""
    z, w = rows_and_weights()
    found = {}
    for name, batches in BATCHES.items():
        rank = dist.get_rank()
        metrics = collection()
        begin = sum(sum(sizes) for sizes in batches[:rank])
        for size in batches[rank]:
            metrics.update(z[begin : begin + size], w[begin : begin + size])
            begin += size
        found[name] = metrics.compute()
        for metric in metrics.values():
            metric._computed = None  # else the second compute is the first one's
        found[f"{name}, again"] = metrics.compute()
    return found
