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

The collectives are torch's functional ones, which torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh

from vne_kernels._core.checks import DTYPES
from vne_kernels._core.dtypes import compute_dtype
from vne_kernels._core.ops import DENSITY_ONCE, operator
from vne_kernels._core.transforms import refuse, scaled, wants_grad

_ops = torch.ops.vne_kernels
ROUTES = ("auto", "reduce", "gather")


class Share(NamedTuple):
    """What one process knows of the rows of all."""

    name: str  # of the group
    rank: int
    world: int
    #: rows of every process; None: not asked for, none has more than ``most``
    sizes: list[int] | None
    most: int

    @property
    def rows(self) -> int:
        """Of all processes; at most, where their sizes are not known."""
        return self.world * self.most if self.sizes is None else sum(self.sizes)


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


def make_share(z: Tensor, weights: Tensor | None, group: Any, max_rows: int | None) -> Share:
    """Asks the processes for their sizes, unless ``max_rows`` bounds them.

    Raises:
        ValueError: z has more than ``max_rows`` rows; the processes' tensors do not go together.
    """
    n = z.shape[-2]
    name, rank, world = group.group_name, group.rank(), group.size()
    if max_rows is not None:
        if n > max_rows:
            raise ValueError(f"z must have at most max_rows = {max_rows} rows, got {n}")
        return Share(name, rank, world, None, max_rows)
    exchanged: Callable[..., list[int]] = exchanged_sizes
    if torch.compiler.is_compiling():  # the others do not load the compiler
        from vne_kernels._core.untraced import exchanged_sizes as exchanged
    sizes = exchanged(z, weights is not None, name, world)
    return Share(name, rank, world, sizes, max(sizes))


def exchanged_sizes(z: Tensor, weighted: bool, name: str, world: int) -> list[int]:
    """The rows of every process, after a look that their tensors go together."""
    batch = z.shape[:-2]
    # what must agree: it stops every process, where a collective of other sizes would hang
    own = [z.shape[-2], z.shape[-1], batch.numel(), DTYPES.index(z.dtype), int(weighted)]
    everyones = _ended(_gather_begun(torch.tensor([own], device=z.device), name, world)).tolist()
    for rank, theirs in enumerate(everyones):
        if theirs[1:] != own[1:]:
            raise ValueError(
                "z must have the same d, batch and dtype, and weights or none, on every process, "
                f"got {_told(own)} here and {_told(theirs)} on process {rank} of the group"
            )
    sizes = [theirs[0] for theirs in everyones]
    if sum(sizes) == 0:
        raise ValueError(f"z must be (..., n, d) with n >= 1 on some process, got {tuple(z.shape)}")
    return sizes


def _told(described: Sequence[int]) -> str:
    n, d, batch, dtype, weighted = described
    weights = "with weights" if weighted else "without weights"
    return f"n = {n}, d = {d}, a batch of {batch}, {DTYPES[dtype]} {weights}"


def takes_gather(rows: int, d: int) -> bool:
    """Whether the route "auto" is to gather ``rows`` rows of d features, not to reduce d x d.

    Then fewer numbers travel, and the matrix whose logarithm everyone takes is the smaller one.
    Between d and 2 d rows the reduction moves more, but works less: see bench/scaling.py.
    """
    return rows <= d


# ---- collectives ---------------------------------------------------------------------------------


def _sum_begun(x: Tensor, name: str) -> Tensor:
    """The sum over the processes of a tensor of the same shape on all, once it is waited for."""
    begun: Tensor = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", name)
    return begun


def _gather_begun(x: Tensor, name: str, world: int) -> Tensor:
    """The tensors of all, of the same shape, behind each other along dimension 0, likewise."""
    begun: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), world, name)
    return begun


def _ended(begun: Tensor) -> Tensor:
    ended: Tensor = torch.ops._c10d_functional.wait_tensor(begun)
    return ended


def _summed(x: Tensor, name: str) -> Tensor:
    return _ended(_sum_begun(x, name))


def _padded(x: Tensor, rows: int, dim: int) -> Tensor:
    """x with zeros behind it, ``rows`` long."""
    missing = rows - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)


def _all_rows(x: Tensor, share: Share, dim: int) -> Tensor:
    """The rows of all processes along ``dim``, padding included where sizes are unknown."""
    first = _padded(x, share.most, dim).movedim(dim, 0)
    everyones = _ended(_gather_begun(first, share.name, share.world))
    if share.sizes is not None and min(share.sizes) < share.most:
        parts = torch.split(everyones, share.most)
        everyones = torch.cat([p[:size] for p, size in zip(parts, share.sizes, strict=True)])
    return everyones.movedim(0, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, share: Share) -> Tensor:
        ctx.share, ctx.n = share, z.shape[-2]
        return _all_rows(z, share, -2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every process may put the rows to a use of its own: the gradients are summed.
        share: Share = ctx.share
        total = _summed(grads[0], share.name)
        return total.narrow(-2, _first_row(share), ctx.n), None


def _first_row(share: Share) -> int:
    """Where this process's rows begin among all that :func:`_all_rows` gives."""
    if share.sizes is None:
        return share.rank * share.most
    return sum(share.sizes[: share.rank])


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
    share = make_share(z, None, group, z.shape[-2] if equal else None)
    gathered: Tensor = _Gather.apply(z, share)
    return gathered


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return _summed(x, name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.name), None


def summed(x: Tensor, share: Share) -> Tensor:
    """The sum over the processes of a tensor of the same shape on all; gradient as of `gather`."""
    total: Tensor = _Sum.apply(x, share.name)
    return total


# ---- entropy -------------------------------------------------------------------------------------


class _How(NamedTuple):
    """What is asked of the operators, whatever the route."""

    normalize: bool
    method: str
    eps: float
    with_grad: bool

    def is_relative(self, weights: Tensor | None, share: Share) -> bool:
        """Whether the weights, or 1 for each row, have yet to be divided by their sum."""
        return share.sizes is None if weights is None else self.normalize


class _Forward(NamedTuple):
    entropy: Tensor  # (...), of all processes' rows
    grad: Tensor | None  # (..., n, d), its gradient in this process's rows; None: not wanted
    weights_grad: Tensor | None  # (..., n)


def _of_weights(of_p: Tensor, along: Tensor, p: Tensor, total: Tensor) -> Tensor:
    """The gradient in weights w of p = w / total, along = sum of p dS/dp over all samples."""
    return torch.where(p == 0, 0, (of_p - along) / total)


def _nonzero(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1, total)


def _by_reduce(z: Tensor, weights: Tensor | None, share: Share, how: _How) -> _Forward:
    n, d = z.shape[-2:]
    if n == 0:  # no rows here: one that is absent
        z = z.new_zeros(*z.shape[:-2], 1, d)
        weights = None if weights is None else weights.new_zeros(z.shape[:-1])
    # the sum of the rows' own matrices, over the sum of their weights
    p = weights
    if p is None:
        p = z.new_full(z.shape[:-1], float(n > 0), dtype=compute_dtype(z.dtype))
    total = p.new_ones(())
    if weights is None and share.sizes is not None:
        p = p / share.rows
    rho = _ops.density(z, p, how.normalize, how.eps)
    if how.is_relative(weights, share):  # the sum of the weights travels with the matrix
        of_rows = p.sum(-1)[..., None, None].expand(*rho.shape[:-2], 1, d)
        both = _summed(torch.cat([rho, of_rows], -2), share.name)
        total = _nonzero(both[..., -1:, 0])
        rho = both[..., :-1, :] / total[..., None]
        p = p / total
    else:
        rho = _summed(rho, share.name)
    if not how.with_grad:
        return _Forward(_ops.density_entropy(rho, how.method), None, None)
    entropy, of_rho = _ops.density_entropy_grad(rho, how.method)
    of_z, of_p = _ops.density_backward(of_rho, z, p, how.normalize, how.eps)
    of_z = of_z[..., :n, :]
    if weights is None:
        return _Forward(entropy, of_z, None)
    if how.normalize:
        along = (rho * of_rho).sum((-2, -1))[..., None]
        of_p = _of_weights(of_p, along, p, total)
    return _Forward(entropy, of_z, of_p[..., :n])


def _by_gather(z: Tensor, weights: Tensor | None, share: Share, how: _How) -> _Forward:
    # The rows as they are, not on the sphere: half precisions keep their two bytes and all digits.
    n = z.shape[-2]
    all_z = _all_rows(z, share, -2)
    all_p = total = None
    if weights is not None or share.sizes is None:  # padding is told from rows by its weight
        own = weights
        if own is None:
            own = z.new_ones(z.shape[:-1], dtype=compute_dtype(z.dtype))
        all_p = _all_rows(own, share, -1)
    if all_p is not None and how.is_relative(weights, share):
        total = _nonzero(all_p.sum(-1, keepdim=True))
        all_p = all_p / total
    if not how.with_grad:
        return _Forward(
            _ops.vn_entropy(all_z, all_p, how.normalize, how.method, how.eps), None, None
        )
    entropy, of_z, of_p = _ops.vn_entropy_grad(all_z, all_p, how.normalize, how.method, how.eps)
    first = _first_row(share)
    of_z = of_z.narrow(-2, first, n)
    if weights is None:
        return _Forward(entropy, of_z, None)
    if all_p is not None and total is not None:
        of_p = _of_weights(of_p, (all_p * of_p).sum(-1, keepdim=True), all_p, total)
    return _Forward(entropy, of_z, of_p.narrow(-1, first, n))


_BY_ROUTE = {"reduce": _by_reduce, "gather": _by_gather}


def _forward(z: Tensor, weights: Tensor | None, share: Share, how: _How, route: str) -> _Forward:
    if route == "auto":
        route = "gather" if takes_gather(share.rows, z.shape[-1]) else "reduce"
    with torch.no_grad():
        p = None if weights is None else weights.detach()
        return _BY_ROUTE[route](z.detach(), p, share, how)


torch.library.define(
    "vne_kernels::scaled_gradient", "(Tensor grad, Tensor unit_grad, Tensor like) -> Tensor"
)


def _scaled_gradient(grad: Tensor, unit_grad: Tensor, like: Tensor) -> Tensor:
    """An operator, so that a second derivative meets an error; ``like`` is what it would be of."""
    return scaled(grad, unit_grad).to(like.dtype)


operator(
    "scaled_gradient",
    kernel=_scaled_gradient,
    fake=lambda grad, unit_grad, like: torch.empty_like(
        like, memory_format=torch.contiguous_format
    ),
    once=DENSITY_ONCE,
)


class _Entropy(torch.autograd.Function):
    """S, with the gradient that the forward has already found."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weights: Tensor | None,
        entropy: Tensor,
        grad: Tensor,
        weights_grad: Tensor | None,
        name: str,
    ) -> Tensor:
        ctx.name = name
        ctx.save_for_backward(z, weights, grad, weights_grad)
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, weights, unit_grad, weights_grad = ctx.saved_tensors
        grad = _summed(grads[0], ctx.name)
        of_weights = None if weights is None else _ops.scaled_gradient(grad, weights_grad, weights)
        return _ops.scaled_gradient(grad, unit_grad, z), of_weights, None, None, None, None


def vn_entropy(
    z: Tensor,
    weights: Tensor | None,
    share: Share,
    *,
    normalize: bool,
    method: str,
    eps: float,
    route: str = "auto",
) -> Tensor:
    """S of the rows of all processes; arguments as `vne_kernels.vn_entropy` has checked them.

    Args:
        weights: (..., n) of this process's rows, relative to those of all if ``normalize``; None:
            1/N each, of N rows in all.
        route: "auto", "reduce" or "gather"; the same on every process.

    Returns:
        (...), the same on every process.
    """
    how = _How(normalize, method, eps, wants_grad(z, weights))
    found = _forward(z, weights, share, how, route)
    if found.grad is None:
        return found.entropy
    entropy: Tensor = _Entropy.apply(
        z, weights, found.entropy, found.grad, found.weights_grad, share.name
    )
    return entropy


# ---- difference of entropies ---------------------------------------------------------------------


class _DoE(torch.autograd.Function):
    """S and the mean cosine, with what the forward has found of their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        entropy: Tensor,
        cosine: Tensor,
        entropy_grad: Tensor,
        row_stats: Tensor,
        part: Tensor,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.name = name
        ctx.save_for_backward(z1, z2, entropy_grad, row_stats, part)
        return entropy.clone(), cosine.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z1, z2, entropy_grad, row_stats, part = ctx.saved_tensors
        of_entropy, of_cosine = _summed(torch.stack(grads), ctx.name).unbind()
        if z1.shape[-2] == 0:  # no rows here
            return torch.zeros_like(z1), torch.zeros_like(z2), *[None] * 6
        of_z1, of_z2 = _ops.doe_loss_backward(
            of_entropy, of_cosine * part, z1, z2, entropy_grad, row_stats
        )
        return of_z1.to(z1.dtype), of_z2.to(z2.dtype), *[None] * 6


def doe_terms(
    z1: Tensor, z2: Tensor, share: Share, *, method: str, eps: float, route: str = "auto"
) -> tuple[Tensor, Tensor]:
    """S of the first view and the mean cosine of the pairs, of the rows of all processes.

    Only what the entropy needs of the first view travels, and one number for the cosine.

    Returns:
        (...), (...), the same on every process.
    """
    how = _How(True, method, eps, wants_grad(z1, z2))
    n = z1.shape[-2]
    batch, dtype = z1.shape[:-2], compute_dtype(z1.dtype)
    with torch.no_grad():
        cosine, row_stats = z1.new_zeros(batch, dtype=dtype), z1.new_zeros(0, dtype=dtype)
        if n > 0:
            cosine, row_stats = _ops.cosine(z1.detach(), z2.detach(), eps)
        rows = torch.full_like(cosine, n)
        # It travels while the entropy is computed.
        begun = _sum_begun(torch.stack([cosine * n, rows]), share.name)
        found = _forward(z1, None, share, how, route)
        total, count = _ended(begun).unbind()
        cosine = total / count
    if found.grad is None:
        return found.entropy, cosine
    entropy, cosine = _DoE.apply(
        z1, z2, found.entropy, cosine, found.grad, row_stats, rows / count, share.name
    )
    return entropy, cosine
