"""The von Neumann entropy of large representations, estimated from products, with an error bar.

Where min(n, d) is in the tens of thousands, the eigendecomposition takes hours and the smaller side
of (2) more memory than there is. Here A is only multiplied with blocks of vectors: its leading
eigenvectors are split off, the rest is measured by random probes. Equation (17) of csrc/README.md.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vne_kernels._core import checks, matrices, ops, transforms
from vne_kernels._core.dtypes import compute_dtype
from vne_kernels._core.rows import probabilities
from vne_kernels.functional.entropy import EPS

PROBES = 32
"""How many probes an estimate takes, unless it is told otherwise."""

_BLOCK = 16
"""Vectors that A is multiplied with at once while its leading eigenvectors are sought."""
_DEPTH = 8
"""Such products, each by A of the one before: the basis has _BLOCK * _DEPTH vectors."""
_SMALLEST = 3 * _BLOCK * _DEPTH
"""The smallest m that is estimated. Below it the exact entropy takes less time."""
_FIRST_PROBES = 8
"""Probes before the error is first held against a tolerance; their number doubles from there."""
_TOGETHER = 32
"""The most probes at once, whose recursions are all in memory."""
_FIRST_STEPS = 8
_MORE_STEPS = 4
_MOST_STEPS = 96
"""Of a probe's Lanczos recursion: at first, between two looks at its error, and at most."""
_SHARE = 0.25
"""What the bracket of the quadrature may add to the statistical error, of that. If it narrows like
steps^-2.5, and the error like probes^-0.5, a quarter costs the fewest products for a given bar."""
_ENOUGH = 1e-4
"""What it may add in any case, over the entropy; with a tolerance, _SHARE of that."""
_SPLIT_LOSS = 1e-5
"""What splitting off inexact eigenvectors may change, over the entropy."""
_SPLIT_SHARE = 0.01
"""The same for each of them, over its own term of the entropy."""
_EXACT = {torch.float32: (1e-5, 3e-5), torch.float64: (1e-12, 1e-12)}
"""The error of `vn_entropy`, relative and absolute, that its tests hold it to."""
_MAY_LOSE = 0.01
"""The most that negative eigenvalues may change an estimate, over log(m). They widen the bar, too:
a large one would hide behind it."""
_ROUNDINGS = 16
"""Rounding errors of size eps (1 + S) that an estimate is granted."""


class EntropyEstimate(NamedTuple):
    """What `estimate_vn_entropy` returns: entropy and error (...), probes (...) int64."""

    entropy: Tensor
    """(...), the estimate of S."""
    error: Tensor
    """(...), half the confidence interval: S is within entropy - error and entropy + error."""
    probes: Tensor
    """(...), how many random vectors it took; 0 where S was computed exactly."""


def estimate_vn_entropy(
    z: Tensor,
    *,
    normalize: bool = True,
    weights: Tensor | None = None,
    tolerance: float | None = None,
    max_probes: int = PROBES,
    confidence: float = 0.99,
    generator: torch.Generator | None = None,
    eps: float = EPS,
    base: float | None = None,
) -> EntropyEstimate:
    """Estimate of `vn_entropy` for large min(n, d), with an error bar: equation (17).

    Time and memory are those of products of z with blocks of vectors, some hundred columns in all.
    It is faster than `vn_entropy` from min(n, d) = 2,000 on where n and d are alike, and from 4,000
    on where one is three times the other, by a factor that grows with min(n, d). Elsewhere, of ten
    times more rows than features for example, `vn_entropy` reads z fewer times and is faster. Below
    384 the result is that of `vn_entropy`, and its error that of rounding.

    Args:
        z: (..., n, d), as for `vn_entropy`; its leading dimensions are looped over. One copy of a
            sample is made.
        normalize, weights, eps, base: as for `vn_entropy`.
        tolerance: stop as soon as the error is at most this, in nats or the unit of ``base``. An
            error of S in nats is a relative error of the effective rank exp(S). Default: take all
            ``max_probes``.
        max_probes: the most random vectors to take, at least 8. The error falls like one over its
            root.
        confidence: the probability with which S is within ``entropy`` plus or minus ``error``,
            below 1. With a tolerance the looks at the error share what is left to 1.
        generator: of the random vectors; with a seed, the result is reproducible on one device.
            Default: torch's own.

    Returns:
        (entropy, error, probes), each (...); entropy and error float64 for float64 input, otherwise
        float32. NaN for a sample with a NaN or an infinity, or a negative weight; the other samples
        are not touched by it. The host waits for results of the device, and torch's setting of the
        precision of float32 products is "ieee" meanwhile. Not differentiable.

    Warns:
        UserWarning: the error of a sample is above tolerance, after ``max_probes`` vectors.

    Raises:
        ValueError: z requires a gradient while gradients are recorded; z, weights, eps or base as
            for `vn_entropy`; tolerance is not positive, max_probes below 8, or confidence not
            between 0 and 1.
        TypeError: as `vn_entropy`; tolerance or confidence is not a number, max_probes not a whole
            one; generator is not a torch.Generator.
        NotImplementedError: within a transform of torch.func, or z or weights has a tangent of
            forward mode.

    Source: Meyer, Musco, Musco and Woodruff, "Hutch++: Optimal Stochastic Trace Estimation", SOSA
    2021; Ubaru, Chen and Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature",
    SIAM J. Matrix Anal. Appl. 2017; Golub and Meurant, "Matrices, Moments and Quadrature", 1994.

    Example:
        >>> z = torch.randn(2000, 500, generator=torch.Generator().manual_seed(0))
        >>> entropy, error, _ = estimate_vn_entropy(z, generator=torch.Generator().manual_seed(1))
        >>> bool((entropy - vn_entropy(z)).abs() <= error)
        True
        >>> bool(error < 0.005 * entropy)
        True
    """
    eps = checks.eps(eps)
    options = _check_options(tolerance, max_probes, confidence, generator, base)
    transforms.refuse(_NO_DERIVATIVE.format("estimate_vn_entropy", "vn_entropy"), z, weights)
    p = probabilities(z, normalize, weights)
    _check_no_gradient(z=z, weights=p)
    n, d = z.shape[-2:]
    if min(n, d) < _SMALLEST:
        return _finished(_exactly(ops.vn_entropy(z, p, normalize, "auto", eps)), options)

    def estimate_sample(index: tuple[int, ...]) -> _Interval:
        x, trace = _unit_trace_rows(z[index], None if p is None else p[index], normalize, eps)
        return _of_trace(_Gram(x if n <= d else x.mT), trace, options)

    return _finished(_over_batch(z, estimate_sample), options)


def estimate_vn_entropy_from_density(
    rho: Tensor,
    *,
    normalize_trace: bool = False,
    tolerance: float | None = None,
    max_probes: int = PROBES,
    confidence: float = 0.99,
    generator: torch.Generator | None = None,
    base: float | None = None,
) -> EntropyEstimate:
    """Estimate of `vn_entropy_from_density` for large matrices, with an error bar: equation (17).

    Args:
        rho: (..., d, d), real, symmetric and positive semidefinite; float16, bfloat16, float32 or
            float64. Its symmetric part counts. One copy of a matrix is made.
        normalize_trace: as for `vn_entropy_from_density`.
        tolerance, max_probes, confidence, generator, base: as for `estimate_vn_entropy`.

    Returns:
        As `estimate_vn_entropy`; NaN where the trace is negative.

    Warns:
        UserWarning: as `estimate_vn_entropy`.

    Raises:
        ValueError: rho is not (..., d, d) with d >= 1; it has negative eigenvalues that the error
            would not cover (below d = 384 they count as 0); otherwise as `estimate_vn_entropy`.
        TypeError: rho is not a dense tensor of one of these dtypes; otherwise as
            `estimate_vn_entropy`.
        NotImplementedError: as `estimate_vn_entropy`.

    Source: as `estimate_vn_entropy`.

    Example:
        >>> rho = torch.eye(1000) / 1000
        >>> estimate = estimate_vn_entropy_from_density(rho)
        >>> bool((estimate.entropy - torch.tensor(1000).log()).abs() <= estimate.error)
        True
    """
    checks.matrices("rho", rho)
    if rho.is_complex():
        raise checks.wrong("rho", "real", rho.dtype, TypeError)
    options = _check_options(tolerance, max_probes, confidence, generator, base)
    options = options._replace(over_trace=normalize_trace)
    names = "estimate_vn_entropy_from_density", "vn_entropy_from_density"
    transforms.refuse(_NO_DERIVATIVE.format(*names), rho)
    _check_no_gradient(rho=rho)
    if rho.shape[-1] < _SMALLEST:
        exact = matrices.vn_entropy(rho, normalize_trace=normalize_trace)
        return _finished(_exactly(exact), options)

    def estimate_matrix(index: tuple[int, ...]) -> _Interval:
        a = rho[index].to(compute_dtype(rho.dtype))
        trace = float(a.diagonal().double().sum())
        a = torch.add(a, a.mT).mul_(0.5 / (trace or 1.0))
        if not (0 <= trace < math.inf and bool(a.isfinite().all())):
            trace = math.nan
        found = _of_trace(_Dense(a), trace, options)
        if found.lowest < 0:
            of_sample = f" in sample {index}" if index else ""
            raise ValueError(
                "rho must be positive semidefinite to be estimated, got an eigenvalue of at most "
                f"{found.lowest:.3g}{of_sample}; vn_entropy_from_density counts those as 0"
            )
        return found

    return _finished(_over_batch(rho, estimate_matrix), options)


# ---- arguments and results -----------------------------------------------------------------------


_NO_DERIVATIVE = (
    "{0} reads numbers on the host and has no derivative: call it outside of torch.func and of "
    "forward mode, with a batch for vmap, or call {1}, which has them"
)


class _Options(NamedTuple):
    tolerance: float | None  # in nats
    max_probes: int
    confidence: float
    generator: torch.Generator | None
    log_base: float
    over_trace: bool = False
    """Whether S of A over its trace is wanted, which of a positive part is not known."""


class _Interval(NamedTuple):
    """Where S is, with the confidence asked for."""

    low: float
    high: float
    probes: int
    lowest: float = 0.0
    """A negative eigenvalue that is not rounding, with which there is no interval."""


def _check_options(
    tolerance: float | None,
    max_probes: int,
    confidence: float,
    generator: object,
    base: float | None,
) -> _Options:
    log_base = checks.base(base) or 1.0
    if tolerance is not None:
        tolerance = checks.number("tolerance", tolerance)
        if not 0 < tolerance < math.inf:
            raise checks.wrong("tolerance", "positive and finite", tolerance)
        tolerance *= abs(log_base)
    max_probes = checks.integer("max_probes", max_probes, _FIRST_PROBES)
    confidence = checks.number("confidence", confidence)
    if not 0 < confidence < 1:
        raise checks.wrong("confidence", "between 0 and 1", confidence)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    return _Options(tolerance, max_probes, confidence, generator, log_base)


def _check_no_gradient(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if transforms.wants_grad(tensor):
            raise ValueError(
                f"{name} must not require a gradient, as the estimate has none; "
                f"pass {name}.detach()"
            )


def _exactly(entropy: Tensor) -> EntropyEstimate:
    relative, absolute = _EXACT[entropy.dtype]
    error = relative * entropy.abs() + absolute
    return EntropyEstimate(entropy, error, torch.zeros_like(entropy, dtype=torch.int64))


def _finished(found: EntropyEstimate, options: _Options) -> EntropyEstimate:
    """In the unit of the logarithm, with a warning where the tolerance was not met."""
    entropy, error, probes = found
    unit = abs(options.log_base)
    if options.tolerance is not None and error.numel():
        largest = float(error.double().nan_to_num(0).max())
        if largest > options.tolerance * (1 + torch.finfo(torch.float32).eps):
            name = str(error.dtype).removeprefix("torch.")
            drawn = bool((probes > 0).any())
            why = f"at max_probes = {options.max_probes}" if drawn else f"by rounding in {name}"
            warnings.warn(
                f"tolerance = {options.tolerance / unit:.6g} was not met: the largest error is "
                f"{largest / unit:.3g} {why}; it falls like one over the root of max_probes, to "
                "what rounding leaves",
                UserWarning,
                stacklevel=3,
            )
    return EntropyEstimate(entropy / options.log_base, error / unit, probes)


def _over_batch(
    samples: Tensor, estimate: Callable[[tuple[int, ...]], _Interval]
) -> EntropyEstimate:
    batch = samples.shape[:-2]
    with torch.no_grad(), _full_precision(samples.device):
        found = [estimate(index)[:3] for index in itertools.product(*map(range, batch))]
    columns = torch.tensor(found, dtype=torch.float64).reshape(*batch, 3)
    low, high, probes = columns.unbind(-1)
    dtype = compute_dtype(samples.dtype)
    middle, error = ((low + high) / 2).to(dtype), ((high - low) / 2).to(dtype)
    return EntropyEstimate(*(x.to(samples.device) for x in (middle, error, probes.long())))


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products as their dtype says: neither TF32 nor autocast, whose errors no bar tells of.

    torch has one such setting for all threads of a process: others see it for as long.
    """
    backends: Any = torch.backends  # its stubs know one of the two
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


# ---- the matrix, of trace 1, known by its products -----------------------------------------------


class _Gram:
    """A = X X^T, m x m, of the rows of X, (m, k), which are ours to write to."""

    def __init__(self, rows: Tensor) -> None:
        self.like = rows
        self.size = rows.shape[0]

    def apply(self, v: Tensor) -> Tensor:
        """v A, (k, m), of k rows."""
        return (v @ self.like) @ self.like.mT

    def split_off(self, q: Tensor) -> None:
        """From now on P A P with P = I - q^T q, of the orthonormal rows of q, (r, m)."""
        self.like.addmm_(q.mT, q @ self.like, alpha=-1)

    def trace(self) -> float:
        return float(torch.linalg.vector_norm(self.like, dtype=torch.float64)) ** 2


class _Dense(_Gram):
    """A of its own rows, (m, m), symmetric and positive semidefinite."""

    def apply(self, v: Tensor) -> Tensor:
        return v @ self.like

    def split_off(self, q: Tensor) -> None:
        super().split_off(q)
        self.like.addmm_(self.like @ q.mT, q, alpha=-1)

    def trace(self) -> float:
        return float(self.like.diagonal().double().sum())


def _unit_trace_rows(
    z: Tensor, p: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, float]:
    """X with rho = tau X^T X and tr(X^T X) = 1, (n, d), and tau, NaN if the sample is invalid."""
    norm = torch.linalg.vector_norm(z, dim=-1, dtype=torch.float64)
    weights = norm.new_tensor(1 / z.shape[0]) if p is None else p.double()
    absent = weights == 0  # whatever the row holds
    norm = torch.where(absent, 1, norm)
    root = weights.sqrt()  # NaN of a negative weight
    scale = root / norm.clamp_min(eps) if normalize else root.expand_as(norm)
    trace = float((scale * norm).square().sum())
    if not 0 < trace < math.inf:
        return z, trace if trace == 0 else math.nan
    half = (scale / math.sqrt(trace)).sqrt().to(compute_dtype(z.dtype))[:, None]
    # In two halves, for each of them is within the range of float32.
    x = (z.to(compute_dtype(z.dtype)) * half).mul_(half)
    return x if p is None else x.masked_fill_(absent[:, None], 0), trace


def _of_trace(operator: _Gram, trace: float, options: _Options) -> _Interval:
    """S of trace * A, (10), or of A itself where S over the trace is wanted."""
    if not trace > 0:  # 0, or NaN
        return _Interval(abs(trace), abs(trace), 0)
    found = _estimate(operator, options)
    factor = 1.0 if options.over_trace else trace
    low, high = (factor * (bound - math.log(factor)) for bound in (found.low, found.high))
    return _Interval(low, high, found.probes, trace * found.lowest)


# ---- the estimate, (17) --------------------------------------------------------------------------


def _estimate(operator: _Gram, options: _Options) -> _Interval:
    """Where S of A is, of trace 1."""
    q, theta, loss = _leading_eigenvectors(operator, options.generator)
    operator.split_off(q)
    rest = operator.trace()
    theta = theta * ((1 - rest) / theta.sum().clamp_min(torch.finfo(torch.float64).tiny))
    exact = float(torch.special.entr(theta).sum())
    rounding = _ROUNDINGS * torch.finfo(q.dtype).eps

    counts = _counts_of_probes(options)
    doubt = (1 - options.confidence) / len(counts)
    low = high = q.new_empty(0, dtype=torch.float64)
    for count in counts:
        quantile = _student_quantile(1 - doubt / 2, count - 1)
        while len(low) < count:
            taken = min(count - len(low), _TOGETHER)
            probes = _Probes(operator, q, taken, options.generator)
            while True:
                probes.step()
                lower, upper = probes.bracket(rest)
                all_low, all_high = torch.cat([low, lower]), torch.cat([high, upper])
                spread = quantile * float(all_high.std()) / math.sqrt(count)
                middle = exact + float(all_low.mean() + all_high.mean()) / 2
                granted = rounding * (1 + abs(middle))
                enough = _ENOUGH * abs(middle)
                if options.tolerance is not None:
                    enough = _SHARE * options.tolerance
                width = float((upper - lower).mean()) / 2
                may_add = max(_SHARE * spread, enough, granted)
                lost = probes.dimension * _lost(probes.nodes, rounding, theta)
                # S / P + log P of P, the trace of the positive part
                unknown = 2 * probes.negative * (1 + abs(middle)) if options.over_trace else 0.0
                lost += unknown
                if lost > min(may_add, _MAY_LOSE * math.log(operator.size)):
                    return _Interval(math.nan, math.nan, count, float(probes.nodes.min()))
                if width <= may_add or probes.steps >= _MOST_STEPS:
                    break
            low, high = all_low, all_high
        spread_low = quantile * float(low.std()) / math.sqrt(count)
        interval = _Interval(
            exact - loss + float(low.mean()) - spread_low - granted - unknown,
            exact + float(high.mean()) + spread + granted + unknown,
            count,
        )
        error = (interval.high - interval.low) / 2
        if options.tolerance is not None and error <= options.tolerance:
            break
    return interval


def _lost(nodes: Tensor, rounding: float, theta: Tensor) -> float:
    """What a negative eigenvalue that the probes have seen may change of each term of S.

    The brackets are those of a smooth function. From -x on, entr(max(., 0)) is within entr(x) of
    one: of entr(. + x).
    """
    norm = float(torch.cat([theta, nodes.flatten()]).max())
    seen = max(0.0, -float(nodes.min()) - rounding * norm)
    return float(torch.special.entr(torch.tensor(min(seen, math.exp(-1)), dtype=torch.float64)))


def _counts_of_probes(options: _Options) -> list[int]:
    """After how many probes the error is looked at."""
    counts, count = [], _FIRST_PROBES
    while options.tolerance is not None and count < options.max_probes:
        counts.append(count)
        count *= 2
    return [*counts, options.max_probes]


def _leading_eigenvectors(
    operator: _Gram, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, float]:
    """Eigenvectors of A to split off, (r, m), their eigenvalues, (r,) in float64, and the loss.

    The loss is what S of the two parts may be above S of A. By a randomized block Krylov space.
    """
    m = operator.size
    basis = operator.like.new_empty((_BLOCK * _DEPTH, m))
    images = torch.empty_like(basis)
    new = _random(operator, _BLOCK, generator)
    for j in range(_DEPTH):
        before, here = basis[: j * _BLOCK], slice(j * _BLOCK, (j + 1) * _BLOCK)
        # A block that the space already holds is all rounding: what QR makes of it is orthogonal to
        # the others only after another pass.
        for _ in range(3):
            new = torch.linalg.qr((new - (new @ before.mT) @ before).mT).Q.mT
        basis[here] = new
        images[here] = new = operator.apply(new)
    projected = (basis @ images.mT).double()
    theta, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
    theta = theta.clamp_min(torch.finfo(torch.float64).tiny)
    rotation = rotation.mT.to(basis.dtype)
    q = rotation @ basis
    residual = (rotation @ images).sub_(theta[:, None].to(basis.dtype) * q)
    squared = residual.double().square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
    ratio = (squared / theta.square() / m).clamp_max(0.5)
    losses = 2 * squared / theta * -ratio.log() / (1 - ratio)
    entropies = torch.special.entr(theta).clamp_min(0)
    # What cannot be told from rounding costs as much as it holds: it is left to the probes.
    losses = torch.where(losses <= _SPLIT_SHARE * entropies, losses, math.inf)
    sorted_losses, order = losses.sort()
    kept = order[sorted_losses.cumsum(0) <= _SPLIT_LOSS * entropies.sum()]
    return q[kept], theta[kept], float(losses[kept].sum())


class _Probes:
    """Random unit vectors v orthogonal to q, and Lanczos' recursion from each of them."""

    def __init__(
        self, operator: _Gram, q: Tensor, count: int, generator: torch.Generator | None
    ) -> None:
        v = _random(operator, count, generator)
        for _ in range(2):
            v = v - (v @ q.mT) @ q
            v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        self.operator = operator
        self.dimension = operator.size - len(q)
        self.vectors = v.new_empty((count, _MOST_STEPS + 1, operator.size))
        self.vectors[:, 0] = v
        self.alpha: list[Tensor] = []  # (count,) each, float64: the diagonal of T
        self.beta: list[Tensor] = []  # the off-diagonal
        self.nodes = v.new_zeros((count, 1), dtype=torch.float64)  # of the last bracket

    @property
    def steps(self) -> int:
        return len(self.alpha)

    def step(self) -> None:
        for _ in range(_MORE_STEPS if self.steps else _FIRST_STEPS):
            self._step()

    def _step(self) -> None:
        j = self.steps
        w = self.operator.apply(self.vectors[:, j])
        before = self.vectors[:, : j + 1]
        alpha = torch.zeros_like(w[:, 0])
        for _ in range(2):  # orthogonal to all before, not to the last two alone
            overlap = torch.bmm(before, w[:, :, None])
            alpha += overlap[:, j, 0]
            w = w - torch.bmm(overlap.mT, before)[:, 0]
        beta = torch.linalg.vector_norm(w, dim=-1)
        # Where the space is exhausted, the quadrature is exact, and goes on with nothing.
        beta = torch.where(beta > torch.finfo(w.dtype).eps * alpha, beta, 0)
        self.vectors[:, j + 1] = torch.where(beta[:, None] > 0, w / beta[:, None], 0)
        self.alpha.append(alpha.double())
        self.beta.append(beta.double())

    def bracket(self, trace: float) -> tuple[Tensor, Tensor]:
        """Below and above (m - r) v^T f(A) v + c ((m - r) v^T A v - trace) of each probe, (count,).

        The mean of v^T A v is known: c is what leaves the least variance.
        """
        alpha, beta = torch.stack(self.alpha, -1), torch.stack(self.beta, -1)
        tiny = torch.finfo(torch.float64).tiny
        pivot = alpha[:, 0]
        for j in range(1, self.steps):
            pivot = alpha[:, j] - beta[:, j - 1].square() / pivot.clamp_min(tiny)
            pivot = pivot.clamp_min(torch.finfo(self.vectors.dtype).eps * alpha[:, j])
        last = beta[:, -1:].square() / pivot.clamp_min(tiny)[:, None]
        self.nodes, weights = _quadrature(alpha, beta[:, :-1])
        nodes = self.nodes.clamp_min(0)
        below_0 = (weights * (nodes - self.nodes)).sum(-1).mean()
        self.negative = self.dimension * float(below_0)  # minus the sum of eigenvalues below 0
        f = torch.special.entr(nodes)
        above = (weights * f).sum(-1)
        nodes_at_0, weights_at_0 = _quadrature(torch.cat([alpha, last], -1), beta)
        below = (weights_at_0 * torch.special.entr(nodes_at_0.clamp_min(0))).sum(-1)

        pooled = weights / len(weights)
        mean = (pooled * nodes).sum()
        variance = (pooled * (nodes - mean).square()).sum()
        slope = (pooled * (nodes - mean) * f).sum() / variance.clamp_min(tiny)
        known = slope * (self.dimension * alpha[:, 0] - trace)
        return self.dimension * below - known, self.dimension * above - known


def _quadrature(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the quadrature with these Jacobi matrices, (count, k) each."""
    lower = torch.diag_embed(off_diagonal, -1)
    nodes, vectors = torch.linalg.eigh(torch.diag_embed(diagonal) + lower + lower.mT)
    return nodes, vectors[:, 0].square()


def _random(operator: _Gram, count: int, generator: torch.Generator | None) -> Tensor:
    """(count, m), normal, drawn where the generator is."""
    like = operator.like
    device = like.device if generator is None else generator.device
    drawn = torch.randn(
        (count, operator.size), dtype=like.dtype, device=device, generator=generator
    )
    return drawn.to(like.device)


def _student_quantile(probability: float, degrees: int) -> float:
    """Of Student's t, by bisection of its distribution: Abramowitz and Stegun 26.7.3 and 4."""
    low, high = 0.0, math.pi / 2  # the angle whose tangent is t / sqrt(degrees)
    for _ in range(60):
        angle = (low + high) / 2
        odd = degrees % 2
        term = math.cos(angle) if odd else 1.0
        terms = [term] if degrees > 1 else []
        for k in range(2 + odd, degrees - 1, 2):
            term *= (k - 1) / k * math.cos(angle) ** 2
            terms.append(term)
        within = math.sin(angle) * math.fsum(terms)  # the probability of [-t, t]
        if odd:
            within = 2 / math.pi * (angle + within)
        low, high = (angle, high) if within < 2 * probability - 1 else (low, angle)
    return math.sqrt(degrees) * math.tan(low)
