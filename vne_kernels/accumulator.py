"""The density matrix of more rows than fit into memory, chunk by chunk: equation (16)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vne_kernels._core import ops as _registered  # noqa: F401  (fake kernels and autograd of the operators)
from vne_kernels._core import spectra, transforms
from vne_kernels._core.checks import (
    check_base,
    check_eps,
    check_integer,
    check_normalize,
    check_samples,
    check_weights,
    in_base,
)
from vne_kernels._core.ops import compute_dtype
from vne_kernels.functional.density import eigenvalues

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "DensityAccumulator",
    "add_rows",
    "check_features",
    "check_rows",
    "density_of",
    "row_weights",
]

_ops = torch.ops.vne_kernels

BLOCK_ROWS = 2048
"""Rows of one product. Fewer, and adding d x d numbers in float64 costs more than a tenth of it;
more, and a block leaves the cache. Its float32 sums stay short."""


class DensityAccumulator:
    """Density matrix, spectrum and entropy of rows that come in chunks: equation (16).

    rho = sum_i w_i u_i u_i^T / sum_i w_i over all rows of all chunks. Products of up to 2,048 rows
    are computed in the precision of the rows (float32 for half precision and float32) and added up
    in float64, so that memory is that of d x d and 2,048 x d numbers, and the error that of one
    block, however many rows there are. Two accumulators can be merged, as of two processes; the
    order of chunks and merges changes rounding alone.

    Not differentiable. A row that holds a NaN or an infinity, and a negative or non-finite weight,
    makes rho NaN, and all that is computed of it; nothing waits for the device before a result is
    read by the caller.

    Args:
        d: features of a row, at least 1.
        normalize: divide each row by max(norm, eps), as `vne_kernels.vn_entropy` does.
        eps: the smallest norm a row is divided by.
        double: compute the products in float64 whatever the rows are in. The float32 ones are off
            by up to 1e-7 of the largest eigenvalue, which hides eigenvalues below that: take it for
            scores that small ones decide, such as RankMe or the rank, and for rows whose squares
            leave the range of float32 without ``normalize``. Those of float64 hold rows from about
            1e-150 to 1e150; scale others by a power of two.
        device: where the matrix is kept and the chunks have to be; default: torch's.

    Raises:
        ValueError: d is less than 1; eps is negative or not finite.
        TypeError: d is no whole number; normalize is not a bool; eps is not a number.

    Example:
        >>> sums = DensityAccumulator(4)
        >>> for chunk in torch.eye(4).split(3):
        ...     _ = sums.update(chunk)
        >>> float(sums.entropy())  # four orthogonal rows: log 4
        1.3862943611198906
    """

    def __init__(
        self,
        d: int,
        *,
        normalize: bool = True,
        eps: float = 1e-12,
        double: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        check_normalize(normalize)
        check_eps(eps)
        self.d = check_features("d", d)
        self.normalize, self.eps, self.double = normalize, eps, double
        self._rows = 0
        with torch.inference_mode(False):  # later chunks may come outside of it
            self._total = torch.zeros(self.d, self.d, dtype=torch.float64, device=device)
            self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self.device = self._total.device
        self._pending = _Pending.empty(self.d, torch.float32, self.device)

    @property
    def rows(self) -> int:
        """How many rows have come."""
        return self._rows

    @property
    def weight(self) -> Tensor:
        """Sum of all weights, () float64: `rows` if none were given."""
        return self._weight.clone()

    @torch.no_grad()
    def update(self, z: Tensor, weights: Tensor | None = None) -> Self:
        """Add a chunk of rows.

        Args:
            z: (..., n, d), all leading dimensions are rows; n may be 0. float16, bfloat16, float32
                or float64, not the same one for every chunk if need be.
            weights: w, broadcastable to (..., n), not negative, up to a factor common to all
                chunks. Default: 1 each.

        Returns:
            The accumulator.

        Raises:
            ValueError: z is not (..., n, d) with this d, or on another device; weights do not
                broadcast to (..., n).
            TypeError: z or weights is not a dense tensor of one of these dtypes.
        """
        check_rows(z, self.d, self.device)
        w = row_weights(z, weights, self.double)
        rows = z if z.dim() == 2 else z.flatten(0, -2)
        dtype = torch.float64 if self.double else compute_dtype(z.dtype)
        self._rows += len(rows)
        self._weight += len(rows) if w is None else w.sum()
        if self._pending.x.dtype != dtype:
            self._flush()
            self._pending = _Pending.empty(self.d, dtype, self.device)
        begin = 0
        while begin < len(rows):
            # What fills a block is not copied; the rest waits, as small chunks do: d x d additions
            # would cost more than their products.
            take = min(BLOCK_ROWS - self._pending.count, len(rows) - begin)
            chunk = slice(begin, begin + take)
            of_chunk = None if w is None else w[chunk]
            if take == BLOCK_ROWS:
                self._add(self._total, rows[chunk], of_chunk)
            else:
                self._pending.append(rows[chunk], of_chunk)
                if self._pending.count == BLOCK_ROWS:
                    self._flush()
            begin += take
        return self

    @torch.no_grad()
    def merge(self, other: DensityAccumulator) -> Self:
        """Add the rows of another accumulator, which stays as it is; it may be on another device.

        Returns:
            The accumulator.

        Raises:
            TypeError: other is no DensityAccumulator.
            ValueError: other was made with another d, normalize, eps or double.
        """
        if not isinstance(other, DensityAccumulator):
            raise TypeError(f"other must be a DensityAccumulator, got {type(other).__name__}")
        self._check_same("other", other._settings())
        total, rows, weight = other._sum(), other._rows, other.weight
        self._total += total.to(self.device)
        self._rows += rows
        self._weight += weight.to(self.device)
        return self

    def density(self) -> Tensor:
        """rho, (d, d) float64, symmetric; zeros where the weights sum to 0.

        Raises:
            ValueError: no row has come.
        """
        if self._rows == 0:
            raise ValueError("there is no density matrix of no rows: call update first")
        return density_of(self._sum(), self.weight)

    def eigenvalues(self) -> Tensor:
        """Eigenvalues of rho, (min(rows, d),) float64, descending, none below 0; the others are 0.

        Raises:
            ValueError: no row has come.
        """
        return eigenvalues(self.density())[: min(self._rows, self.d)]

    def entropy(self, *, base: float | None = None) -> Tensor:
        """S = -tr(rho log rho), (1), () float64: `vne_kernels.vn_entropy` of all rows.

        Args:
            base: the base of the logarithm, positive and not 1: 2 for bits. Default: e, nats.

        Raises:
            ValueError: no row has come; base is not positive and finite, or 1.
            TypeError: base is not a number.
        """
        log_base = check_base(base)
        return in_base(spectra.vn_entropy(self.eigenvalues()), log_base)

    def scores(self) -> dict[str, Tensor]:
        """What the spectrum says, from one eigendecomposition: each () float64.

        ``entropy`` (nats) is `entropy` of normalized rows; of others, with ``normalize=False``, it
        is that of rho over its trace, as are ``effective_rank`` (exp of an entropy, the Vendi
        score), ``renyi_2`` (nats), ``participation_ratio`` (its exp) and ``min_entropy`` (nats;
        Rényi's of order infinity). ``largest_eigenvalue`` and ``trace`` are those of rho.

        Raises:
            ValueError: no row has come.

        Example:
            >>> scores = DensityAccumulator(4).update(torch.eye(4)).scores()
            >>> float(scores["participation_ratio"])
            4.0
        """
        values = self.eigenvalues()
        entropy, renyi_2, min_entropy = (
            spectra.renyi_entropy(values, alpha) for alpha in (1, 2, float("inf"))
        )
        return {
            "entropy": spectra.vn_entropy(values) if self.normalize else entropy,
            "effective_rank": entropy.exp(),
            "renyi_2": renyi_2,
            "participation_ratio": renyi_2.exp(),
            "min_entropy": min_entropy,
            "largest_eigenvalue": values[0],
            "trace": values.sum(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, for ``torch.save``; loaded, it goes on to the same bits."""
        pending = self._pending
        return {
            **self._settings(),
            "rows": self._rows,
            "weight": self.weight,
            "total": self._total.clone(),
            "pending": pending.x[: pending.count].clone(),
            "pending_weights": pending.w[: pending.count].clone(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place of the accumulator that ``state_dict`` was called of; on this device.

        Raises:
            ValueError: it was made with another d, normalize, eps or double; or has not the
                entries and shapes of a state.
            TypeError: it holds other things than tensors where those have to be.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"state must have the entries {', '.join(self.state_dict())}, "
                f"got {', '.join(map(str, state))}"
            )
        self._check_same("state", {name: state[name] for name in self._settings()})
        tensors = [state[name] for name in ("total", "weight", "pending", "pending_weights")]
        rows = state["rows"]
        if not all(
            isinstance(x, Tensor)
            and x.layout == torch.strided
            and x.dtype in (torch.float32, torch.float64)
            for x in tensors
        ):
            raise TypeError("state must hold dense tensors of float32 or float64")
        _, _, x, w = tensors
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if shapes != [(self.d, self.d), (), (len(w), self.d), (len(w),)] or len(w) >= BLOCK_ROWS:
            raise ValueError(
                f"state must hold a ({self.d}, {self.d}) total, a () weight, and fewer than "
                f"{BLOCK_ROWS} pending rows with as many weights, got {shapes}"
            )
        if type(rows) is not int or rows < len(w):
            raise ValueError(f"state must count at least its {len(w)} pending rows, got {rows!r}")
        with torch.inference_mode(False):
            self._total = state["total"].to(self.device, torch.float64, copy=True)
            self._weight = state["weight"].to(self.device, torch.float64, copy=True)
        self._rows = rows
        self._pending = _Pending.empty(self.d, x.dtype, self.device)
        self._pending.append(x, w)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self._settings().items())
        return f"{type(self).__name__}({settings}, rows={self._rows})"

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("d", "normalize", "eps", "double")}

    def _check_same(self, name: str, settings: dict[str, Any]) -> None:
        for setting, wanted in self._settings().items():
            if settings[setting] != wanted:
                raise ValueError(
                    f"{name} must have {setting} = {wanted} as this one has, "
                    f"got {settings[setting]}"
                )

    def _add(self, total: Tensor, x: Tensor, w: Tensor | None) -> None:
        add_rows(total, x, w, normalize=self.normalize, eps=self.eps, double=self.double)

    def _flush(self) -> None:
        if self._pending.count:
            self._add(self._total, *self._pending.take())

    @torch.no_grad()
    def _sum(self) -> Tensor:
        """The sum over all rows. Those that wait go on waiting: asking changes no later result."""
        total = self._total.clone()
        pending = self._pending
        if pending.count:
            self._add(total, pending.x[: pending.count], pending.w[: pending.count])
        return total


class _Pending:
    """Rows of small chunks, until they fill a block; none is normalised yet."""

    def __init__(self, x: Tensor, w: Tensor) -> None:
        self.x, self.w, self.count = x, w, 0

    @classmethod
    def empty(cls, d: int, dtype: torch.dtype, device: torch.device) -> _Pending:
        with torch.inference_mode(False):  # filled by later chunks, which may come outside of it
            x = torch.empty(BLOCK_ROWS, d, dtype=dtype, device=device)
            return cls(x, torch.empty(BLOCK_ROWS, dtype=dtype, device=device))

    def append(self, x: Tensor, w: Tensor | None) -> None:
        places = slice(self.count, self.count + len(x))
        self.x[places] = x
        if w is None:
            self.w[places] = 1
        else:
            self.w[places] = w
        self.count += len(x)

    def take(self) -> tuple[Tensor, Tensor]:
        count, self.count = self.count, 0
        return self.x[:count], self.w[:count]


# ---- the steps, on tensors: what an accumulator and a metric have in common ----------------------


def check_features(name: str, d: int) -> int:
    return check_integer(name, d, 1)


def check_rows(z: Tensor, d: int, device: torch.device) -> None:
    """Whether z can be added to a d x d matrix there."""
    transforms.refuse(
        "DensityAccumulator and the metrics have no derivatives of torch.func and forward mode; "
        "vn_entropy and the scores of all rows at once have",
        z,
    )
    check_samples("z", z, may_be_empty=True)
    if z.shape[-1] != d:
        raise ValueError(f"z must be (..., n, {d}), got {tuple(z.shape)}")
    if z.device != device:
        raise ValueError(f"z must be on {device}, as the sum is, got {z.device}")


def row_weights(z: Tensor, weights: Tensor | None, double: bool) -> Tensor | None:
    """w of every row, (rows,) float64; rounded to the dtype of the products, as those see it."""
    checked = check_weights(weights, z)
    if weights is None or checked is None:
        return None
    exact = weights.to(z.device, torch.float64).expand(z.shape[:-1])
    return (exact if double else checked.double()).flatten()


def add_rows(
    total: Tensor, x: Tensor, w: Tensor | None, *, normalize: bool, eps: float, double: bool
) -> None:
    """total += sum_i w_i u_i u_i^T, by blocks.

    Args:
        total: (d, d) float64, added to in place.
        x: (n, d), n from 0 on.
        w: (n,), not negative; None: 1 each.
        normalize, eps, double: as for `DensityAccumulator`.
    """
    for begin in range(0, len(x), BLOCK_ROWS):
        block = x[begin : begin + BLOCK_ROWS]
        u = block.double() if double else block
        dtype = compute_dtype(u.dtype)
        if w is None:
            p = torch.ones(len(u), dtype=dtype, device=u.device)
        else:
            p = w[begin : begin + BLOCK_ROWS].to(dtype)
        total += _ops.density(u, p, normalize, eps)


def density_of(total: Tensor, weight: Tensor) -> Tensor:
    """rho, (d, d), of the sum and the weight of all rows; zeros if that is 0."""
    return total / torch.where(weight == 0, 1, weight)
