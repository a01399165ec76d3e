"""The public functions: arguments validated, then one operator each.

Functions of the package call the entries of `_core.ops` and not each other, so that nothing is
checked twice.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vne_kernels import distributed
from vne_kernels._core import ops, transforms
from vne_kernels._core.checks import (
    check_base,
    check_beta,
    check_eps,
    check_max_rows,
    check_method,
    check_normalize,
    check_sample_weights,
    check_samples,
    check_weights,
    in_base,
    relative,
)
from vne_kernels._core.ops import compute_dtype, to_float64

_ops = torch.ops.vne_kernels

EPS = 1e-12
"""The smallest norm a row is divided by, unless a function says otherwise."""


_OVER_PROCESSES = (
    "{} with group= has no derivative of torch.func or forward mode; torch.autograd has one, and "
    "without group= there are both"
)


class DoEComponents(NamedTuple):
    """What `doe_loss` returns with ``return_components=True``, each (...) and differentiable."""

    loss: Tensor
    entropy: Tensor
    cosine: Tensor


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
    check_samples("z", z, may_be_empty=group is not None)
    check_normalize(normalize)
    check_method(method)
    eps = check_eps(eps)
    log_base = check_base(base)
    if group is None:
        p = check_sample_weights(weights, z, normalize)
        return in_base(ops.vn_entropy(z, p, normalize, method, eps), log_base)
    transforms.refuse(_OVER_PROCESSES.format("vn_entropy"), z, weights)
    w = check_weights(weights, z)
    share = distributed.make_share(z, w, group, check_max_rows(max_rows))
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
    check_samples("H", H)
    if H.dim() != 2:
        raise ValueError(f"H must be (n, d), got {tuple(H.shape)}")
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
    check_samples("z", z)
    check_normalize(normalize)
    return ops.spectrum(z, check_sample_weights(weights, z, normalize), normalize, EPS)


def doe_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    beta: float | Tensor = 1.0,
    weights: Tensor | None = None,
    method: str = "auto",
    return_components: bool = False,
    group: Any = None,
    max_rows: int | None = None,
) -> Tensor | DoEComponents:
    """Difference-of-entropies loss -S(U1) - beta * mean_i cos(z1_i, z2_i): equation (8).

    Args:
        z1: (..., n, d), representations of one view of n images.
        z2: (..., n, d), of the other view, row by row of the same images.
        beta: weight of the cosine similarity. The paper raises it from 1 to 10 during training.
        weights: of the pairs, as for `vn_entropy`: relative, in the entropy and in the mean cosine.
        method: as for `vn_entropy`.
        return_components: return a `DoEComponents` (loss, entropy of z1, mean cosine).
        group, max_rows: the loss of the pairs of all processes together, as for `vn_entropy`.

    Returns:
        (...): a scalar for one pair of views; dtype as `vn_entropy`. Differentiable once, in
        reverse and forward mode, and twice by torch.func.

    Raises:
        ValueError: shapes or devices differ, or shapes are not (..., n, d) with n, d >= 1; weights
            do not broadcast to (..., n); method is unknown; group or max_rows as for `vn_entropy`.
        TypeError: not tensors of one floating dtype; beta is not a number; group is no group.

    Source: "Formulating A Non-contrastive Loss As A Difference Of Entropies Using A Von Neumann
    Entropy Bound", Algorithm 1.

    Example:
        >>> z = torch.eye(4)
        >>> float(doe_loss(z, z, beta=2.0))  # -log 4 - 2
        -3.386294364929199
    """
    group = distributed.process_group(group)
    check_samples("z1", z1, may_be_empty=group is not None)
    check_samples("z2", z2, may_be_empty=group is not None)
    check_method(method)
    if z1.shape != z2.shape:
        raise ValueError(
            f"z1 and z2 must have the same shape, got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    if z1.dtype != z2.dtype:
        raise TypeError(f"z1 and z2 must have the same dtype, got {z1.dtype} and {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"z1 and z2 must be on the same device, got {z1.device} and {z2.device}")
    beta = check_beta(beta)
    w = check_weights(weights, z1)
    if group is not None:
        transforms.refuse(_OVER_PROCESSES.format("doe_loss"), z1, z2, w)
        share = distributed.make_share(z1, w, group, check_max_rows(max_rows))
        if w is None:
            entropy, cosine = distributed.doe_terms(z1, z2, share, method=method, eps=EPS)
        else:
            entropy = distributed.vn_entropy(z1, w, share, normalize=True, method=method, eps=EPS)
            own = torch.stack([mean_cosine(z1, z2, w, EPS), w.sum(-1)])
            weighted, total = distributed.summed(own, share)
            cosine = weighted / total
    elif w is not None or transforms.is_transformed(z1, z2):
        p = None if w is None else relative(w)
        entropy = ops.vn_entropy(z1, p, True, method, EPS)
        cosine = mean_cosine(z1, z2, p, EPS)
    elif transforms.wants_grad(z1, z2):
        entropy, cosine, *_ = _ops.doe_loss_grad(z1, z2, method, EPS)
    else:
        entropy, cosine = _ops.doe_loss(z1, z2, method, EPS)
    loss: Tensor = -entropy - beta * cosine
    return DoEComponents(loss, entropy, cosine) if return_components else loss


def mean_cosine(z1: Tensor, z2: Tensor, p: Tensor | None, eps: float) -> Tensor:
    """sum_i p_i cos(z1_i, z2_i), (...), in plain torch; the mean where p is None.

    The operators have it fused with the entropy: for all rows alike, and in reverse mode.
    """
    # An absent row may hold anything.
    absent = (z1.new_zeros(()) if p is None else p == 0).to(torch.bool).unsqueeze(-1)
    views = [torch.where(absent, 0, to_float64(z)) for z in (z1, z2)]

    def unit(z: Tensor) -> Tensor:
        size = z.detach().abs().amax(-1, keepdim=True)  # the square of a row may overflow
        size = torch.where((size > 0) & (size < math.inf), size, 1)
        zero = (z == 0).all(-1, keepdim=True)  # its gradient is 0
        row = torch.where(zero, 1, z / size)
        norm = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
        return torch.where(zero, 0, row / torch.maximum(norm, eps / size))

    cosines = (unit(views[0]) * unit(views[1])).sum(-1)
    mean = cosines.mean(-1) if p is None else (p.to(cosines) * cosines).sum(-1)
    # Of a sample that is not finite the gradient is NaN throughout, of its zero rows too.
    nothing = (0 * mean.detach())[..., None, None]
    mean = mean + (nothing * (views[0] + views[1])).sum((-2, -1))
    return mean.to(z1.device, compute_dtype(z1.dtype))
