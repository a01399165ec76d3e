"""The entropy of a batch that is spread over processes: equation (12) of csrc/README.md.

Every process holds some rows of one batch and gets S of all rows together. Two routes lead there:

* reduce: each process takes the d x d density matrix of its own rows, an all-reduce sums them, each
  process takes S and log rho of the sum and from it the gradient of its own rows;
* gather: each process receives the rows of all others and works on their n x n Gram matrix, which
  is the smaller one where all rows together are fewer than features.

Either way every process knows dS/dz of its own rows once the forward has ended. The value is the
same on each, and each may weigh it differently in its loss, so the exact gradient takes their
incoming gradients together: the backward sums these scalars over the processes and scales. The sum
of all processes' losses is what is differentiated; DistributedDataParallel, which averages
gradients over processes, turns that into the gradient of the mean of their losses, which is the
loss of one process that holds the whole batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh

from vne_kernels._core import collectives
from vne_kernels._core.cosine import mean_cosine
from vne_kernels._core.dtypes import compute_dtype
from vne_kernels._core.ops import DENSITY_ONCE, operator
from vne_kernels._core.transforms import refuse, scaled, wants_grad

_ops = torch.ops.vne_kernels


class RankRows(NamedTuple):
    """What one process knows of the rows of all."""

    name: str  # of the group
    rank: int
    world: int
    #: rows of every process; None: not asked for, none has more than ``most``
    sizes: list[int] | None
    most: int

    @property
    def total(self) -> int:
        """Rows of all processes; at most, where their sizes are not known."""
        return self.world * self.most if self.sizes is None else sum(self.sizes)

    @property
    def first(self) -> int:
        """Where this process's rows begin among those that `_all_rows` gives."""
        return self.rank * self.most if self.sizes is None else sum(self.sizes[: self.rank])


# ---- groups and sizes ----------------------------------------------------------------------------


def process_group(group: Any) -> Any:
    """The ProcessGroup that ``group`` names; None where there is but one process.

    Args:
        group: a ProcessGroup or a one-dimensional DeviceMesh that this process belongs to, or None.

    Raises:
        TypeError: it is something else.
        ValueError: this process does not belong to it.
    """
    if group is None:
        return None
    if dist.is_available():
        if isinstance(group, DeviceMesh):
            group = group.get_group()
        if isinstance(group, dist.ProcessGroup):
            return group if group.size() > 1 else None
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must hold this process, got a group of others")
    raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")


def default_group() -> Any:
    """All processes; None without torch.distributed."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def make_share(z: Tensor, weights: Tensor | None, group: Any, max_rows: int | None) -> RankRows:
    """Asks the processes for their sizes, unless ``max_rows`` bounds them.

    Raises:
        ValueError: z has more than ``max_rows`` rows; the processes' tensors do not go together.
    """
    n = z.shape[-2]
    name, rank, world = group.group_name, group.rank(), group.size()
    if max_rows is not None:
        if n > max_rows:
            raise ValueError(f"z must have at most max_rows = {max_rows} rows, got {n}")
        return RankRows(name, rank, world, None, max_rows)
    exchange = collectives.exchange_sizes
    if torch.compiler.is_compiling():  # the others do not load the compiler
        from vne_kernels._core.untraced import exchange_sizes as exchange
    sizes = exchange(z, weights is not None, name, world)
    return RankRows(name, rank, world, sizes, max(sizes))


def takes_gather(rows: int, d: int) -> bool:
    """Whether the route is to gather ``rows`` rows of d features, not to reduce d x d.

    Then fewer numbers travel, and the matrix whose logarithm everyone takes is the smaller one.
    Between d and 2 d rows the reduction moves more, but works less: see bench/scaling.py.
    """
    return rows <= d


# ---- rows and sums of all processes --------------------------------------------------------------


def _all_rows(x: Tensor, ranks: RankRows, dim: int) -> Tensor:
    """The rows of all processes along ``dim``, padding included where sizes are unknown."""
    missing = ranks.most - x.shape[dim]
    if missing:
        x = torch.nn.functional.pad(x, (0, 0) * (-1 - dim) + (0, missing))
    pending = collectives.all_gather_async(x.movedim(dim, 0), ranks.name, ranks.world)
    gathered = collectives.wait(pending)
    if ranks.sizes is not None and min(ranks.sizes) < ranks.most:
        parts = torch.split(gathered, ranks.most)
        gathered = torch.cat([p[:size] for p, size in zip(parts, ranks.sizes, strict=True)])
    return gathered.movedim(0, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, ranks: RankRows) -> Tensor:
        ctx.ranks, ctx.n = ranks, z.shape[-2]
        return _all_rows(z, ranks, -2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every process may put the rows to a use of its own: the gradients are summed.
        total = collectives.all_reduce(grads[0], ctx.ranks.name)
        return total.narrow(-2, ctx.ranks.first, ctx.n), None


def gather(z: Tensor, group: Any = None, *, equal: bool = False) -> Tensor:
    """The rows of z of all processes, in the order of their ranks, with a gradient.

    The gradient is that of the sum of all processes' losses, which DistributedDataParallel's
    average turns into the gradient of their mean: of one process's loss of the whole batch, where
    every process computes that from the gathered rows.

    Args:
        z: (..., n, d); n may differ between processes.
        group: a ProcessGroup or one-dimensional DeviceMesh; None: all processes.
        equal: every process has as many rows as this one. Otherwise they tell each other how many
            they have, which the host waits for.

    Returns:
        (..., sum of n, d); z itself without torch.distributed or with one process.
    """
    group = process_group(default_group() if group is None else group)
    if group is None:
        return z
    refuse("distributed.gather has no derivative of torch.func or forward mode, but autograd's", z)
    ranks = make_share(z, None, group, z.shape[-2] if equal else None)
    gathered: Tensor = _Gather.apply(z, ranks)
    return gathered


class _Sum(torch.autograd.Function):
    """The sum over the processes of a tensor of the same shape on all; gradient as of `gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return collectives.all_reduce(x, name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return collectives.all_reduce(grads[0], ctx.name), None


# ---- entropy -------------------------------------------------------------------------------------


class _Options(NamedTuple):
    normalize: bool
    method: str
    eps: float
    with_grad: bool


_Forward = tuple[Tensor, Tensor | None, Tensor | None]
"""S (...) of all processes' rows, and its gradient in this process's rows (..., n, d) and their
weights (..., n); None where it is not wanted."""


def _nonzero(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1, total)


def _of_relative(grad_p: Tensor, along: Tensor, p: Tensor, total: Tensor) -> Tensor:
    """The gradient in weights w of p = w / total, along = sum of p dS/dp over all samples."""
    return torch.where(p == 0, 0, (grad_p - along) / total)


def _by_reduce(z: Tensor, weights: Tensor | None, ranks: RankRows, options: _Options) -> _Forward:
    normalize, method, eps, with_grad = options
    n, d = z.shape[-2:]
    if n == 0:  # no rows here: one that is absent
        z = z.new_zeros(*z.shape[:-2], 1, d)
        weights = None if weights is None else weights.new_zeros(z.shape[:-1])
    p, total = weights, None
    is_relative = normalize
    if p is None:
        is_relative = ranks.sizes is None
        p = z.new_full(z.shape[:-1], float(n > 0), dtype=compute_dtype(z.dtype))
        p = p if is_relative else p / ranks.total
    rho = _ops.density(z, p, normalize, eps)
    if is_relative:  # the sum of the weights travels with the matrix
        sum_p = p.sum(-1)[..., None, None].expand(*rho.shape[:-2], 1, d)
        both = collectives.all_reduce(torch.cat([rho, sum_p], -2), ranks.name)
        total = _nonzero(both[..., -1:, 0])
        rho = both[..., :-1, :] / total[..., None]
        p = p / total
    else:
        rho = collectives.all_reduce(rho, ranks.name)
    if not with_grad:
        return _ops.density_entropy(rho, method), None, None
    entropy, grad_rho = _ops.density_entropy_grad(rho, method)
    grad_z, grad_p = _ops.density_backward(grad_rho, z, p, normalize, eps)
    if weights is not None and total is not None:
        along = (rho * grad_rho).sum((-2, -1))[..., None]
        grad_p = _of_relative(grad_p, along, p, total)
    return entropy, grad_z[..., :n, :], None if weights is None else grad_p[..., :n]


def _by_gather(z: Tensor, weights: Tensor | None, ranks: RankRows, options: _Options) -> _Forward:
    # The rows as they are, not on the sphere: half precisions keep their two bytes and all digits.
    normalize, method, eps, with_grad = options
    n, first = z.shape[-2], ranks.first
    all_z = _all_rows(z, ranks, -2)
    own, all_p, total = weights, None, None
    if own is None and ranks.sizes is None:  # a weight distinguishes rows from padding
        own = z.new_ones(z.shape[:-1], dtype=compute_dtype(z.dtype))
    if own is not None:
        all_p = _all_rows(own, ranks, -1)
        if weights is None or normalize:
            total = _nonzero(all_p.sum(-1, keepdim=True))
            all_p = all_p / total
    if not with_grad:
        return _ops.vn_entropy(all_z, all_p, normalize, method, eps), None, None
    entropy, grad_z, grad_p = _ops.vn_entropy_grad(all_z, all_p, normalize, method, eps)
    grad_z = grad_z.narrow(-2, first, n)
    if weights is None:
        return entropy, grad_z, None
    if all_p is not None and total is not None:
        grad_p = _of_relative(grad_p, (all_p * grad_p).sum(-1, keepdim=True), all_p, total)
    return entropy, grad_z, grad_p.narrow(-1, first, n)


def _forward(z: Tensor, weights: Tensor | None, ranks: RankRows, options: _Options) -> _Forward:
    by_route = _by_gather if takes_gather(ranks.total, z.shape[-1]) else _by_reduce
    with torch.no_grad():
        return by_route(z.detach(), None if weights is None else weights.detach(), ranks, options)


torch.library.define(
    "vne_kernels::scaled_gradient", "(Tensor grad, Tensor unit_grad, Tensor like) -> Tensor"
)
# An operator, so that a second derivative meets an error; ``like`` is what it would be of.
operator(
    "scaled_gradient",
    kernel=lambda grad, unit_grad, like: scaled(grad, unit_grad).to(like.dtype),
    fake=lambda grad, unit_grad, like: like.new_empty(like.shape),
    once=DENSITY_ONCE,
)


class _Entropy(torch.autograd.Function):
    """S, with the gradient that the forward has already found."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: Tensor | None, found: _Forward, name: str) -> Tensor:
        entropy, *unit_grads = found
        ctx.name = name
        ctx.save_for_backward(z, weights, *unit_grads)
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, weights, unit_grad, weights_grad = ctx.saved_tensors
        grad = collectives.all_reduce(grads[0], ctx.name)
        grad_weights = None
        if weights is not None:
            grad_weights = _ops.scaled_gradient(grad, weights_grad, weights)
        return _ops.scaled_gradient(grad, unit_grad, z), grad_weights, None, None


def vn_entropy(
    z: Tensor,
    weights: Tensor | None,
    ranks: RankRows,
    *,
    normalize: bool,
    method: str,
    eps: float,
) -> Tensor:
    """S of the rows of all processes; arguments as `vne_kernels.vn_entropy` has checked them.

    Args:
        weights: (..., n) of this process's rows, relative to those of all if ``normalize``; None:
            1/N each, of N rows in all.

    Returns:
        (...), the same on every process.
    """
    options = _Options(normalize, method, eps, wants_grad(z, weights))
    found = _forward(z, weights, ranks, options)
    if not options.with_grad:
        return found[0]
    entropy: Tensor = _Entropy.apply(z, weights, found, ranks.name)
    return entropy


# ---- difference of entropies ---------------------------------------------------------------------


class _DoE(torch.autograd.Function):
    """S and the mean cosine, with what the forward has found of their gradients."""

    @staticmethod
    def forward(
        ctx: Any, z1: Tensor, z2: Tensor, values: tuple[Tensor, Tensor], saved: Any, name: str
    ) -> tuple[Tensor, Tensor]:
        ctx.name = name
        ctx.save_for_backward(z1, z2, *saved)
        return values[0].clone(), values[1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z1, z2, entropy_grad, row_stats, part = ctx.saved_tensors
        grad_entropy, grad_cosine = collectives.all_reduce(torch.stack(grads), ctx.name).unbind()
        if z1.shape[-2] == 0:  # no rows here
            return torch.zeros_like(z1), torch.zeros_like(z2), None, None, None
        grad_z1, grad_z2 = _ops.doe_loss_backward(
            grad_entropy, grad_cosine * part, z1, z2, entropy_grad, row_stats
        )
        return grad_z1.to(z1.dtype), grad_z2.to(z2.dtype), None, None, None


def doe_terms(
    z1: Tensor,
    z2: Tensor,
    ranks: RankRows,
    *,
    weights: Tensor | None = None,
    method: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """S of the first view and the mean cosine of the pairs, of the rows of all processes.

    Only what the entropy needs of the first view travels, and one number for the cosine.

    Args:
        weights: (..., n) of this process's pairs, relative to those of all; None: all alike.

    Returns:
        (...), (...), the same on every process.
    """
    if weights is not None:
        entropy = vn_entropy(z1, weights, ranks, normalize=True, method=method, eps=eps)
        own = torch.stack([mean_cosine(z1, z2, weights, eps), weights.sum(-1)])
        weighted, total_weight = _Sum.apply(own, ranks.name)
        return entropy, weighted / total_weight
    options = _Options(True, method, eps, wants_grad(z1, z2))
    n = z1.shape[-2]
    batch, dtype = z1.shape[:-2], compute_dtype(z1.dtype)
    with torch.no_grad():
        cosine, row_stats = z1.new_zeros(batch, dtype=dtype), z1.new_zeros(0, dtype=dtype)
        if n > 0:
            cosine, row_stats = _ops.cosine(z1.detach(), z2.detach(), eps)
        count = torch.full_like(cosine, n)
        # The sums travel while the entropy is computed.
        pending = collectives.all_reduce_async(torch.stack([cosine * n, count]), ranks.name)
        entropy, entropy_grad, _ = _forward(z1, None, ranks, options)
        total, all_count = collectives.wait(pending).unbind()
        cosine = total / all_count
    if not options.with_grad:
        return entropy, cosine
    saved = entropy_grad, row_stats, count / all_count
    entropy, cosine = _DoE.apply(z1, z2, (entropy, cosine), saved, ranks.name)
    return entropy, cosine
