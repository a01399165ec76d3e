"""Von Neumann entropy of representations, and the spectrum that it is a function of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vne_kernels import distributed
from vne_kernels._core import checks, ops, transforms
from vne_kernels._core.rows import probabilities
from vne_kernels._core.spectra import in_base

EPS = 1e-12
"""The smallest norm a row is divided by, unless a function says otherwise."""


OVER_PROCESSES = (
    "{} with group= has no derivative of torch.func or forward mode; torch.autograd has one, and "
    "without group= there are both"
)


def vn_entropy(
    z: Tensor,
    *,
    normalize: bool = True,
    weights: Tensor | None = None,
    method: str = "auto",
    eps: float = EPS,
    group: Any = None,
    max_rows: int | None = None,
    base: float | None = None,
) -> Tensor:
    """Von Neumann entropy of representations: equation (1) of csrc/README.md.

    S = -tr(rho log rho) with rho = U^T diag(p) U, U the rows of z on the unit sphere. Between 0
    (all rows parallel) and log(min(n, d)) (all directions used alike).

    Args:
        z: (..., n, d), n samples of d features; float16, bfloat16, float32 or float64. Leading
            dimensions are a batch.
        normalize: divide each row by max(norm, eps), as ``torch.nn.functional.normalize`` does. If
            False, rho = Z^T diag(p) Z, and S is -sum(l log l) whatever its trace.
        weights: (..., n) or broadcastable to it, not negative; a mask of bool or integers too. With
            ``normalize`` they are relative, p being the weights over their sum (of all processes
            with ``group``); otherwise p is the weights as given. A sample of weight 0 is absent,
            whatever it holds. Default: p = 1/n.
        method: "eigh", by an eigendecomposition; "poles", by the logarithm as a sum of inverses;
            "auto", the faster one for this size, dtype and number of threads.
        eps: the smallest norm a row is divided by; not below that of a normal float64, 2.2e-308.
        group: a ProcessGroup or one-dimensional DeviceMesh: S of the rows of all its processes
            together, 1/N each of N in all unless ``weights`` (of this process's rows) say
            otherwise; n may differ, and be 0 on some. Every process must call this, and run its
            backward; differentiable once, in reverse mode. The gradient is that of the sum of all
            processes' losses: averaged over them, as DistributedDataParallel does, that of one
            process with the whole batch. Default: the rows of this process alone.
        max_rows: with ``group``, no process has more rows, such as the batch size of the loader.
            Without it the processes tell each other how many they have, which the host waits for
            and torch.compile and CUDA graphs stumble over.
        base: of the logarithm, such as 2 for bits. Default: e, for nats.

    Returns:
        (...), float64 for float64 input, otherwise float32. NaN for a sample that holds a NaN or an
        infinity, or has a negative weight; the other samples of the batch are not touched by it. A
        norm of a row, or a trace of rho, beyond the range of float64 is an infinity.

        Differentiable twice in z and weights (the second time by an eigendecomposition, whatever
        the method), in reverse and forward mode; a third derivative raises NotImplementedError.

    Raises:
        ValueError: z has fewer than 2 dimensions, or n = 0 or d = 0; weights do not broadcast to
            (..., n); method is unknown; eps is negative or not finite; base is not positive and
            finite, or 1; max_rows is not positive or less than n; the processes' z differ in d,
            batch or dtype (unless ``max_rows`` is given, which leaves that unseen).
        TypeError: z or weights is not a dense tensor of one of these dtypes; normalize is not a
            bool; eps or base is not a number; group is no group.

    Source: Kim et al., "VNE: An Effective Method for Improving Deep Representation by Manipulating
    Eigenvalue Distribution", CVPR 2023.

    Example:
        >>> float(vn_entropy(torch.eye(4)))  # four orthogonal rows: log 4
        1.3862943649291992
    """
    group = distributed.process_group(group)
    checks.method(method)
    eps = checks.eps(eps)
    log_base = checks.base(base)
    if group is None:
        p = probabilities(z, normalize, weights)
        return in_base(ops.vn_entropy(z, p, normalize, method, eps), log_base)
    checks.samples("z", z, may_be_empty=True)
    checks.normalize(normalize)
    transforms.refuse(OVER_PROCESSES.format("vn_entropy"), z, weights)
    w = checks.weights(weights, z)
    share = distributed.make_share(z, w, group, checks.max_rows(max_rows))
    entropy = distributed.vn_entropy(z, w, share, normalize=normalize, method=method, eps=eps)
    return in_base(entropy, log_base)


def get_vne(H: Tensor) -> Tensor:
    """`vn_entropy` under the name and signature of the VNE paper's code, for those who copied it.

    What is different: the gradient is finite where rows are duplicated, features dead or
    representations collapsed, where that of ``svd`` or ``eigh`` is NaN; a NaN in H gives NaN
    instead of an error; half precision is taken, and computed in float32.

    Args:
        H: (n, d), n representations of d features; float16, bfloat16, float32 or float64.

    Returns:
        (), S in nats, as `vn_entropy`. That code's loss subtracts it to raise it.

    Raises:
        ValueError: H is not (n, d) with n, d >= 1.
        TypeError: H is not a dense tensor of one of these dtypes.

    Source: https://github.com/jaeill/CVPR23-VNE, ``vne/__init__.py``; Kim et al., CVPR 2023.

    Example:
        >>> float(get_vne(torch.eye(4)))  # four orthogonal rows: log 4
        1.3862943649291992
    """
    checks.samples("H", H)
    if H.dim() != 2:
        raise checks.wrong("H", "(n, d)", H.shape)
    return ops.vn_entropy(H, None, True, "auto", EPS)


def spectrum(z: Tensor, *, normalize: bool = True, weights: Tensor | None = None) -> Tensor:
    """Eigenvalues of rho in descending order: those of `vn_entropy`, none below 0.

    Entropies of other orders and the scores that count directions have functions of their own, such
    as `vne_kernels.renyi_entropy` and `vne_kernels.effective_rank`.

    Args:
        z: (..., n, d), as for `vn_entropy`.
        normalize: as for `vn_entropy`.
        weights: as for `vn_entropy`.

    Returns:
        (..., min(n, d)), float64 for float64 input, otherwise float32; NaN for an invalid sample.
        The remaining max(n, d) - min(n, d) eigenvalues are 0. Differentiable once; where
        eigenvalues coincide the gradient is that of one ordering of them.

    Raises:
        ValueError, TypeError: as `vn_entropy`.

    Example:
        >>> spectrum(torch.eye(2))
        tensor([0.5000, 0.5000])
    """
    return ops.spectrum(z, probabilities(z, normalize, weights), normalize, EPS)
