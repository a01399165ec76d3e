"""The difference-of-entropies loss: equation (8) of csrc/README.md."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from vne_kernels import distributed
from vne_kernels._core import checks, ops, transforms
from vne_kernels._core.rows import relative
from vne_kernels.functional.entropy import EPS, OVER_PROCESSES


class DoEComponents(NamedTuple):
    """What `doe_loss` returns with ``return_components=True``, each (...) and differentiable."""

    loss: Tensor
    entropy: Tensor
    cosine: Tensor


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
    checks.samples("z1", z1, may_be_empty=group is not None)
    checks.samples("z2", z2, may_be_empty=group is not None)
    checks.method(method)
    checks.same("z1 and z2", "shape", z1.shape, z2.shape)
    checks.same("z1 and z2", "dtype", z1.dtype, z2.dtype, TypeError)
    checks.same("z1 and z2", "device", z1.device, z2.device)
    beta = checks.beta(beta)
    w = checks.weights(weights, z1)
    if group is not None:
        transforms.refuse(OVER_PROCESSES.format("doe_loss"), z1, z2, w)
        share = distributed.make_share(z1, w, group, checks.max_rows(max_rows))
        entropy, cosine = distributed.doe_terms(z1, z2, share, weights=w, method=method, eps=EPS)
    elif w is not None:
        entropy, cosine = ops.weighted_doe_terms(z1, z2, relative(w), method, EPS)
    else:
        entropy, cosine = ops.doe_terms(z1, z2, method, EPS)
    loss: Tensor = -entropy - beta * cosine
    return DoEComponents(loss, entropy, cosine) if return_components else loss
