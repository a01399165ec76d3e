"""Functions of a spectrum: what scores, metrics and programs of the package have in common.

Each takes eigenvalues of density matrices, (..., m), none below 0, in any order, and is
differentiable in them. All but `vn_entropy` divide them by their sum first: a density matrix counts
up to a factor. Orders of entropies are at least 0; ``math.inf`` is one.
Imports torch alone; equation numbers are those of csrc/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_NEAR_ONE = 0.5
"""Orders this near to 1 are computed from their deviation, which rounding would swallow."""
_SERIES = 0.05
"""Below it, eight terms of a series are exact to float64, and the quotient loses digits."""


def resolved(eigenvalues: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The eigenvalues, with 0 in place of those that rounding may have made.

    These are the ones below m * eps times the largest, eps that of `dtype`, by default their own:
    the threshold of ``torch.linalg.matrix_rank``.
    """
    eps = torch.finfo(dtype or eigenvalues.dtype).eps
    floor = eigenvalues.shape[-1] * eps * eigenvalues.amax(-1, keepdim=True)
    return torch.where(eigenvalues < floor, 0, eigenvalues)


def in_base(entropy: Tensor, log_base: float | None) -> Tensor:
    """An entropy in nats to the base whose natural logarithm is given; None: e."""
    return entropy if log_base is None else entropy / log_base + 0.0  # not -0.


def vn_entropy(eigenvalues: Tensor) -> Tensor:
    """S = -sum_k l_k log l_k, (1), of the eigenvalues as they are, not over their sum; in nats.

    A zero eigenvalue has the gradient 0.
    """
    return _tsallis(eigenvalues, 1)


def tsallis_entropy(eigenvalues: Tensor, q: float) -> Tensor:
    """T_q = (1 - sum_k p_k^q) / (q - 1), (13), with p the eigenvalues over their sum; in nats.

    Its limits at 0 (the rank - 1), 1 (von Neumann's entropy) and infinity (0) are continuous.
    Orders below 1 count the eigenvalues that `resolved` leaves. Where all are 0 the entropy is 0.
    """
    p = _probabilities(eigenvalues, q)
    if q == math.inf:
        return 0 * p.sum(-1)  # NaN for a NaN
    return _tsallis(p, q)


def renyi_entropy(eigenvalues: Tensor, alpha: float) -> Tensor:
    """R_alpha = log(sum_k p_k^alpha) / (1 - alpha), (13), p as in `tsallis_entropy`; in nats.

    Its limits at 0 (log of the rank), 1 (von Neumann's entropy) and infinity (-log of the largest
    p) are continuous. Where all eigenvalues are 0 the entropy is 0.
    """
    p = _probabilities(eigenvalues, alpha)
    if alpha == math.inf:
        return 0 - p.amax(-1).log()  # not -0.
    if alpha == 1:
        return _tsallis(p, 1)
    if abs(alpha - 1) < _NEAR_ONE:
        tsallis = _tsallis(p, alpha)  # sum p^alpha = 1 + (1 - alpha) tsallis
        return tsallis * _log1p_over((1 - alpha) * tsallis)
    powers = torch.where(p == 0, -math.inf, alpha * _log(p))
    largest = powers.detach().amax(-1, keepdim=True)
    # Not logsumexp: its derivative in forward mode has none in reverse mode.
    log_sum = (powers - largest).exp().sum(-1).log() + largest.squeeze(-1)
    return (0 - log_sum / (alpha - 1)).clamp_min(0)  # neither -0. nor -1e-16


def entropy_slope(eigenvalues: Tensor, order: float, *, renyi: bool) -> Tensor:
    """The derivative of `renyi_entropy` or else `tsallis_entropy` in each eigenvalue, (..., m).

    For kernels, below autograd, as common/orders.h has it: with t_k = (p_k^(q - 1) - 1) / (1 - q)
    and T their mean under p, that of T_q is q (t_k - T) over the sum of the eigenvalues. It is 0 of
    an eigenvalue that does not count, and finite of every other.
    """
    values = resolved(eigenvalues) if order < 1 else eigenvalues
    p, total = _over_sum(values), values.sum(-1, keepdim=True)
    zero, far = p == 0, abs(order - 1) >= _NEAR_ONE
    if order == math.inf:
        is_largest = p == p.amax(-1, keepdim=True)
        share = torch.where(is_largest, 1 / (p * is_largest.sum(-1, keepdim=True)), 0)
        slope = 1 - share if renyi else 0 * p
    elif renyi and far:
        powers = torch.where(zero, -math.inf, order * _log(p)).softmax(-1)
        slope = order / (1 - order) * (powers / torch.where(zero, 1, p) - 1)
    else:
        at_zero = 1 / (order - 1 if order > 1 and far else order or 1)
        t = torch.where(zero, at_zero, -_log(p) * _expm1_over((order - 1) * _log(p)))
        tsallis = (p * t).sum(-1, keepdim=True)
        slope = order * (t - tsallis) / (1 + (1 - order) * tsallis if renyi else 1)
    counts = (total != 0) & ~(zero & (order < 1))
    return torch.where(counts, slope / total, 0)


def unless_zero(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), and 0 where x is 0, with a gradient of 0 where that of the function is none."""
    zero = x == 0
    return torch.where(zero, 0, function(torch.where(zero, 1, x)))


def divided_differences_of_log(values: Tensor) -> Tensor:
    """Gamma of (9), (..., m, m): (log l_i - log l_j) / (l_i - l_j), and 1 / l_i where they meet."""
    gap = values.unsqueeze(-1) - values.unsqueeze(-2)
    ratio = gap / values.unsqueeze(-2)
    quotient = torch.where(gap == 0, 1.0, torch.log1p(ratio) / torch.where(gap == 0, 1.0, ratio))
    return quotient / values.unsqueeze(-2)


def rankme(eigenvalues: Tensor, eps: float, count: Tensor | None = None) -> Tensor:
    """exp(-sum_k p_k log p_k), (14), with p_k = s_k / sum_j s_j + eps, s_k the singular values.

    Args:
        eigenvalues: (..., m), the squares of the singular values up to a factor; of these m counts,
            as each zero adds eps to the probabilities.
        eps: at least 0.
        count: (...), how many of the eigenvalues, in descending order, there are; default: m.

    Returns:
        (...), from 1 to m, but for eps.
    """
    p = _over_sum(unless_zero(torch.sqrt, resolved(eigenvalues))) + eps
    if count is not None:
        p = torch.where(torch.arange(p.shape[-1], device=p.device) < count.unsqueeze(-1), p, 0)
    return _tsallis(p, 1).exp()


def rankme_slope(eigenvalues: Tensor, eps: float, count: Tensor | None) -> Tensor:
    """The derivative of `rankme` in each eigenvalue, (..., m), for kernels, below autograd."""
    s = unless_zero(torch.sqrt, resolved(eigenvalues))
    share, total = _over_sum(s), s.sum(-1, keepdim=True)
    of_p = -_log(share + eps) - 1
    if count is not None:
        of_p = torch.where(
            torch.arange(s.shape[-1], device=s.device) < count.unsqueeze(-1), of_p, 0
        )
    of_s = (of_p - (share * of_p).sum(-1, keepdim=True)) / total
    value = rankme(eigenvalues, eps, count).unsqueeze(-1)
    return torch.where(s == 0, 0, value * of_s / (2 * s))


def rank(eigenvalues: Tensor, rounding: float) -> Tensor:
    """How many singular values exceed m eps times the largest, as in ``numpy.linalg.matrix_rank``.

    Args:
        eigenvalues: (..., m), descending, the squares of the singular values up to a factor.
        rounding: eps, that of the dtype of the rows.

    Returns:
        (...), int64.
    """
    squares = resolved(eigenvalues)
    floor = (squares.shape[-1] * rounding) ** 2 * squares[..., :1]
    return (squares > floor).sum(-1)


RANKME_EPS = 1e-7
"""That of the paper of RankMe."""


def summary(
    eigenvalues: Tensor, raw: Tensor | None = None, rounding: float = 0.0
) -> dict[str, Tensor]:
    """The scores of one spectrum, under the names that they have everywhere in the package.

    Args:
        eigenvalues: (m,), descending, of a density matrix.
        raw: (m,), descending, of the sum over the rows as they are, whose singular values
            ``rankme`` and ``rank`` count. Default: without these two.
        rounding: the eps of the dtype of the rows, for ``rank``.

    Returns:
        Names to tensors (). Entropies are in nats, of the eigenvalues over their sum: ``renyi_2``
        and ``min_entropy`` have the orders 2 and infinity. ``effective_rank`` and
        ``participation_ratio``, exp of ``entropy`` and of ``renyi_2``, are Vendi scores too.
    """
    entropy, renyi_2, min_entropy = (renyi_entropy(eigenvalues, q) for q in (1, 2, math.inf))
    scores = {
        "entropy": entropy,
        "entropy_bound": entropy.new_tensor(len(eigenvalues)).log(),
        "effective_rank": entropy.exp(),
        "renyi_2": renyi_2,
        "participation_ratio": renyi_2.exp(),
        "min_entropy": min_entropy,
        "largest_eigenvalue": eigenvalues[0],
        "trace": eigenvalues.sum(),
    }
    if raw is not None:
        scores |= {"rankme": rankme(raw, RANKME_EPS), "rank": rank(raw, rounding)}
    return scores


def _over_sum(x: Tensor) -> Tensor:
    """x over its sum; where that is 0 a pure state, for all entropies are 0 there."""
    total = x.sum(-1, keepdim=True)
    pure = torch.arange(x.shape[-1], device=x.device) == 0
    return torch.where(total == 0, pure.to(x.dtype), x / torch.where(total == 0, 1, total))


def _probabilities(eigenvalues: Tensor, order: float) -> Tensor:
    return _over_sum(resolved(eigenvalues) if order < 1 else eigenvalues)


def _log(p: Tensor) -> Tensor:
    """log p, and 0 with a gradient of 0 where p is 0."""
    return torch.where(p == 0, 1, p).log()


def _tsallis(p: Tensor, q: float) -> Tensor:
    """sum_k p_k (-log p_k) phi((q - 1) log p_k), phi(x) = (e^x - 1) / x: (13) for any q < inf."""
    log_p = _log(p)
    terms = p * log_p if q == 1 else p * log_p * _expm1_over((q - 1) * log_p)
    return 0 - terms.sum(-1)  # not -0.


def _expm1_over(x: Tensor) -> Tensor:
    """(e^x - 1) / x, and its limit 1 at 0."""
    return _quotient(x, torch.expm1, [1 / math.factorial(k + 1) for k in range(8)])


def _log1p_over(x: Tensor) -> Tensor:
    """log(1 + x) / x, and its limit 1 at 0."""
    return _quotient(x, torch.log1p, [(-1) ** k / (k + 1) for k in range(14)])


def _quotient(x: Tensor, f: Callable[[Tensor], Tensor], series: Sequence[float]) -> Tensor:
    """f(x) / x, near 0 by the series of it."""
    near = x.abs() < _SERIES
    small, large = torch.where(near, x, 0), torch.where(near, 1, x)
    sum_of_series = torch.zeros_like(x)
    for coefficient in reversed(series):
        sum_of_series = sum_of_series * small + coefficient
    return torch.where(near, sum_of_series, f(large) / large)
