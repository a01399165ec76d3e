"""Entropy, effective rank, Vendi score and RankMe of a data set as torchmetrics metrics.

Their states are the sums of equation (16), so that batches of any sizes, on any number of
processes, give what all rows at once would. They stay in float64 whatever the metric, or a model
that holds it, is cast to. For ``pip install "vne_kernels[metrics]"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vne_kernels._core import checks, matrices, spectra
from vne_kernels._core.rows import add_rows, check_rows, density_of
from vne_kernels.common.extras import needed_by
from vne_kernels.functional.families import RENYI, Matrices, entropy

with needed_by("vne_kernels.metrics", "metrics"):
    from torchmetrics import Metric

__all__ = ["EffectiveRank", "RankMe", "VendiScore", "VonNeumannEntropy"]


class _DensityMetric(Metric):
    """A number computed of the density matrix of all rows."""

    is_differentiable = True
    higher_is_better = True
    full_state_update = False

    rows: Tensor
    weight: Tensor

    def __init__(
        self, num_features: int, *, normalize: bool, eps: float, double: bool, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_features = d = checks.integer("num_features", num_features, 1)
        checks.normalize(normalize)
        self.normalize, self.eps, self._double = normalize, checks.eps(eps), double
        # A MetricCollection shares states of the same names and, in the first batch, about the same
        # numbers; sums that are made in another way have another name.
        rows = f"unit{self.eps:g}" if normalize else "raw"
        self._total = f"total_{rows}_{'double' if double else 'single'}"
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state(self._total, zero.new_zeros(d, d), "sum")
        self.add_state("weight", zero, "sum")
        self.add_state("rows", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, z: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch of rows.

        Args:
            z: (..., n, d) with d = num_features, all leading dimensions are rows; n may be 0.
                float16, bfloat16, float32 or float64, on the metric's device.
            weights: w, broadcastable to (..., n), not negative, up to a common factor; a mask of
                bool or integers too. A row of weight 0 is absent, whatever it holds. Default: 1.

        Raises:
            ValueError: z is not (..., n, d), or on another device; weights do not broadcast.
            TypeError: z or weights is not a dense tensor of one of these dtypes.
        """
        total = getattr(self, self._total)
        x, w = check_rows(z, weights, total, self._double)
        if total.is_inference() and not torch.is_inference_mode_enabled():
            total = total.clone()  # a reset in inference mode left what only that may change
            setattr(self, self._total, total)
        add_rows(total, x, w, normalize=self.normalize, eps=self.eps, double=self._double)
        self.weight = self.weight + (len(x) if w is None else w.sum())
        self.rows = self.rows + (len(x) if w is None else (w != 0).sum())

    def compute(self) -> Tensor:
        """The score of all rows so far, () float64; NaN before the first."""
        score = self._score(density_of(getattr(self, self._total), self.weight))
        return torch.where(self.rows == 0, torch.nan, score)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Moves the states to a device. Their dtypes stay: half precision cannot hold such sums."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, *args, **kwargs)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw a value, or several, of ``forward`` or ``compute``; by default of ``compute``.

        Returns:
            (figure, axes) of matplotlib.
        """
        return self._plot(val, ax)

    def _score(self, rho: Tensor) -> Tensor:
        raise NotImplementedError


class VonNeumannEntropy(_DensityMetric):
    """Von Neumann entropy of a data set: `vne_kernels.vn_entropy` of all its rows.

    Equations (1) and (16) of csrc/README.md.

    Args:
        num_features: d of the rows, at least 1.
        normalize, eps, double: as for `vne_kernels.DensityAccumulator`.
        base: of the logarithm, such as 2; positive, and not 1. Default: e, an entropy in nats.
        kwargs: of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Shape:
        update: z (..., n, d), weights broadcastable to (..., n). compute: () float64.

    Raises:
        ValueError: num_features is below 1; eps is negative or not finite; base is not positive
            and finite, or 1.
        TypeError: num_features is no whole number; normalize is not a bool; eps or base is not a
            number.

    Source: Kim et al., "VNE: An Effective Method for Improving Deep Representation by Manipulating
    Eigenvalue Distribution", CVPR 2023.

    Example:
        >>> metric = VonNeumannEntropy(4)
        >>> metric.update(torch.eye(4)[:3])
        >>> metric.update(torch.eye(4)[3:])
        >>> metric.compute()  # log 4
        tensor(1.3863, dtype=torch.float64)
    """

    plot_lower_bound = 0.0

    def __init__(
        self,
        num_features: int,
        *,
        normalize: bool = True,
        eps: float = 1e-12,
        double: bool = False,
        base: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, normalize=normalize, eps=eps, double=double, **kwargs)
        self._log_base = checks.base(base)

    def _score(self, rho: Tensor) -> Tensor:
        return spectra.in_base(matrices.vn_entropy(rho), self._log_base)


class VendiScore(_DensityMetric):
    """Vendi score of order q under the cosine kernel: `vne_kernels.vendi_score` of all rows.

    exp of Rényi's entropy (13) of rho over its trace. Orders below 1 count small eigenvalues, so
    that their products are computed in float64.

    Args:
        num_features: d of the rows, at least 1.
        q: the order, at least 0; ``math.inf`` too.
        normalize, eps: as for `vne_kernels.DensityAccumulator`. Without ``normalize`` the kernel
            is the scalar product.
        kwargs: of ``torchmetrics.Metric``.

    Shape:
        update: z (..., n, d), weights broadcastable to (..., n). compute: () float64, from 1 to
        min(n, d).

    Raises:
        ValueError: num_features is below 1; q is below 0; eps is negative or not finite.
        TypeError: num_features is no whole number; normalize is not a bool; q or eps is not a
            number.

    Source: Friedman and Dieng, "The Vendi Score: A Diversity Evaluation Metric for Machine
    Learning", TMLR 2023; of order q, Pasarkar and Dieng, AISTATS 2024.

    Example:
        >>> metric = VendiScore(4)
        >>> round(float(metric(torch.eye(4))), 6)
        4.0
    """

    plot_lower_bound = 1.0

    def __init__(
        self,
        num_features: int,
        q: float = 1,
        *,
        normalize: bool = True,
        eps: float = 1e-12,
        **kwargs: Any,
    ) -> None:
        self.q = checks.order("q", q)
        super().__init__(num_features, normalize=normalize, eps=eps, double=self.q < 1, **kwargs)

    def _score(self, rho: Tensor) -> Tensor:
        return entropy(Matrices(rho), self.q, RENYI).exp()


class EffectiveRank(VendiScore):
    """Effective rank exp(S) of a data set: `vne_kernels.effective_rank` of all its rows.

    S is von Neumann's entropy of rho over its trace; the Vendi score of order 1.

    Args:
        num_features, normalize, eps, kwargs: as for `VendiScore`.

    Shape, Raises: as `VendiScore`.

    Example:
        >>> metric = EffectiveRank(4)
        >>> round(float(metric(torch.eye(4)[:2])), 6)
        2.0
    """

    def __init__(
        self, num_features: int, *, normalize: bool = True, eps: float = 1e-12, **kwargs: Any
    ) -> None:
        super().__init__(num_features, 1, normalize=normalize, eps=eps, **kwargs)


class RankMe(_DensityMetric):
    """RankMe, the rank of a data set that predicts how its encoder does: `vne_kernels.rankme`.

    exp of Shannon's entropy of the singular values of the rows as they are over their sum, plus
    eps: equation (14). The singular values are roots of eigenvalues, hence products in float64; of
    those min(n, d) count, which the host waits for when the score is computed.

    Args:
        num_features: d of the rows, at least 1.
        eps: what is added to each share, as the paper has it; at least 0.
        kwargs: of ``torchmetrics.Metric``.

    Shape:
        update: z (..., n, d), weights broadcastable to (..., n). compute: () float64, from 1 to
        min(n, d), but for eps.

    Raises:
        ValueError: num_features is below 1; eps is negative or not finite.
        TypeError: num_features is no whole number; eps is not a number.

    Source: Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained
    Self-Supervised Representations by Their Rank", ICML 2023.

    Example:
        >>> metric = RankMe(4)
        >>> round(float(metric(torch.eye(4))), 3)
        4.0
    """

    plot_lower_bound = 1.0

    def __init__(self, num_features: int, eps: float = 1e-7, **kwargs: Any) -> None:
        super().__init__(num_features, normalize=False, eps=0.0, double=True, **kwargs)
        self.added = checks.eps(eps)

    def _score(self, rho: Tensor) -> Tensor:
        count = min(max(int(self.rows), 1), self.num_features)
        return spectra.rankme(matrices.eigenvalues(rho)[:count], self.added)
