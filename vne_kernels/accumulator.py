"""The density matrix of more rows than fit into memory, chunk by chunk: equation (16)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vne_kernels._core import checks, matrices, spectra
from vne_kernels._core import rows as _rows
from vne_kernels._core.dtypes import compute_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DensityAccumulator"]


class DensityAccumulator:
    """Density matrix, spectrum and entropy of rows that come in chunks: equation (16).

    rho = sum_i w_i u_i u_i^T / sum_i w_i over all rows of all chunks. Products of up to 2,048 rows
    are computed in the precision of the rows (float32 for half precision and float32) and added up
    in float64, so that memory is that of d x d and 2,048 x d numbers, and the error that of one
    block, however many rows there are. Fewer rows than features are kept instead, and their
    eigenvalues are those of the smaller matrix, in float64: nothing of d x d is made. Two
    accumulators can be merged, as of two processes; the order of chunks and merges changes rounding
    alone.

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
        checks.normalize(normalize)
        checks.eps(eps)
        self.d = checks.integer("d", d, 1)
        self.normalize, self.eps, self.double = normalize, eps, double
        self._rows = 0
        with torch.inference_mode(False):  # later chunks may come outside of it
            self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self.device = self._weight.device
        self._total: Tensor | None = None  # of the rows that do not wait, once there are some
        self._pending = _Pending(self.d, torch.float32, self.device)

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
        x, w = _rows.check_rows(z, weights, self._pending.x, self.double)
        self._rows += len(x)
        self._weight += len(x) if w is None else w.sum()
        dtype = torch.float64 if self.double else compute_dtype(z.dtype)
        if self._pending.x.dtype != dtype:
            if self._pending.count:
                self._flush()
            self._pending = _Pending(self.d, dtype, self.device)
        if self._has_room(len(x)):
            self._pending.append(x, w)
            return self
        if self._pending.count >= _rows.BLOCK_ROWS:
            self._flush()
        # What fills a block is not copied; the rest waits, as small chunks do: d x d additions
        # would cost more than their products.
        begin = min(-self._pending.count % _rows.BLOCK_ROWS, len(x))
        end = len(x) - (len(x) - begin) % _rows.BLOCK_ROWS
        parts = x.tensor_split((begin, end))
        w_parts = (None,) * 3 if w is None else w.tensor_split((begin, end))
        self._wait(parts[0], w_parts[0])
        if len(parts[1]):
            self._add(self._made_total(), parts[1], w_parts[1])
        self._wait(parts[2], w_parts[2])
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
            raise checks.wrong("other", "a DensityAccumulator", type(other).__name__, TypeError)
        self._check_same("other", other._settings())
        count, weight = other._rows, other.weight  # it may be this one
        x, w = other._pending.rows()
        if other._total is None and x.dtype == self._pending.x.dtype and self._has_room(len(x)):
            self._pending.append(x.to(self.device), w.to(self.device))
        else:
            total = other._sum().to(self.device)
            self._made_total().add_(total)
        self._rows += count
        self._weight += weight.to(self.device)
        return self

    def density(self) -> Tensor:
        """rho, (d, d) float64, symmetric; zeros where the weights sum to 0.

        Raises:
            ValueError: no row has come.
        """
        if self._rows == 0:
            raise ValueError("there is no density matrix of no rows: call update first")
        return _rows.density_of(self._sum(), self.weight)

    def eigenvalues(self) -> Tensor:
        """Eigenvalues of rho, (min(rows, d),) float64, descending, none below 0; the others are 0.

        Raises:
            ValueError: no row has come.
        """
        if self._total is not None or not 0 < self._rows < self.d:
            return matrices.eigenvalues(self.density())[: min(self._rows, self.d)]
        x, w = (rows.double() for rows in self._pending.rows())
        p = _rows.density_of(w, self._weight.abs())  # a negative weight stays one: NaN
        values: Tensor = torch.ops.vne_kernels.spectrum(x, p, self.normalize, self.eps)
        return values

    def entropy(self, *, base: float | None = None) -> Tensor:
        """S = -tr(rho log rho), (1), () float64: `vne_kernels.vn_entropy` of all rows.

        Args:
            base: the base of the logarithm, positive and not 1: 2 for bits. Default: e, nats.

        Raises:
            ValueError: no row has come; base is not positive and finite, or 1.
            TypeError: base is not a number.
        """
        log_base = checks.base(base)
        return spectra.in_base(spectra.vn_entropy(self.eigenvalues()), log_base)

    def scores(self) -> dict[str, Tensor]:
        """The scores of the spectrum, from one eigendecomposition: each () float64.

        ``entropy`` of normalized rows is `entropy`. It and all others but ``largest_eigenvalue``
        and ``trace`` are otherwise of rho over its trace. ``entropy``, its bound log m
        of m eigenvalues (``entropy_bound``), ``renyi_2`` and ``min_entropy`` (Rényi's of order
        infinity) are in nats; ``effective_rank``, also known as the Vendi score, and
        ``participation_ratio`` are exp of ``entropy`` and of ``renyi_2``.

        Raises:
            ValueError: no row has come.

        Example:
            >>> scores = DensityAccumulator(4).update(torch.eye(4)).scores()
            >>> float(scores["participation_ratio"])
            4.0
        """
        values = self.eigenvalues()
        scores = spectra.summary(values)
        if self.normalize:
            scores["entropy"] = spectra.vn_entropy(values)
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, for ``torch.save``; loaded, it continues to the same bits."""
        x, w = self._pending.rows()
        return {
            **self._settings(),
            "rows": self._rows,
            "weight": self.weight,
            "total": self._weight.new_empty(0, 0) if self._total is None else self._total.clone(),
            "pending": x.clone(),
            "pending_weights": w.clone(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place of the accumulator that ``state_dict`` was called of; on this device.

        Raises:
            ValueError: it was made with another d, normalize, eps or double; or has not the
                entries and shapes of a state.
            TypeError: it holds other things than tensors where those have to be.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise checks.wrong("state", f"of {', '.join(own)}", ", ".join(map(str, state)))
        self._check_same("state", state)
        total, weight, x, w = tensors = [
            state[name] for name in ("total", "weight", "pending", "pending_weights")
        ]
        if not all(
            isinstance(tensor, Tensor)
            and tensor.layout == torch.strided
            and tensor.dtype in (torch.float32, torch.float64)
            for tensor in tensors
        ):
            raise TypeError("state must hold dense tensors of float32 or float64")
        d, waiting, count = self.d, len(w), state["rows"]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        all_wait = shapes[0] == (0, 0)
        room = self._room if all_wait else _rows.BLOCK_ROWS
        others = [(), (waiting, d), (waiting,)]
        if shapes not in ([(d, d), *others], [(0, 0), *others]) or waiting >= room:
            wanted = f"a ({d}, {d}) or (0, 0) total, a () weight, up to {room - 1} pending rows"
            raise checks.wrong("state", f"{wanted} and as many weights", shapes)
        if type(count) is not int or count < waiting or (all_wait and count != waiting):
            wanted = f"of {waiting} rows" if all_wait else f"of {waiting} rows or more"
            raise checks.wrong("state", wanted, repr(count))
        with torch.inference_mode(False):
            self._total = None if all_wait else total.to(self.device, torch.float64, copy=True)
            self._weight = weight.to(self.device, torch.float64, copy=True)
        self._rows = count
        self._pending = _Pending(self.d, x.dtype, self.device)
        self._pending.append(x, w)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self._settings().items())
        return f"{type(self).__name__}({settings}, rows={self._rows})"

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("d", "normalize", "eps", "double")}

    def _check_same(self, name: str, given: dict[str, Any]) -> None:
        for setting, wanted in self._settings().items():
            if given[setting] != wanted:
                raise checks.wrong(name, f"of {setting} = {wanted}, as this one is", given[setting])

    @property
    def _room(self) -> int:
        """How many rows wait at most before there is a sum."""
        return max(_rows.BLOCK_ROWS, self.d)

    def _has_room(self, count: int) -> bool:
        """Whether so many more rows can wait, as all others do."""
        return self._total is None and self._pending.count + count < self._room

    def _made_total(self) -> Tensor:
        if self._total is None:
            with torch.inference_mode(False):  # later chunks may come outside of it
                self._total = self._weight.new_zeros(self.d, self.d)
        return self._total

    def _add(self, total: Tensor, x: Tensor, w: Tensor | None) -> None:
        _rows.add_rows(total, x, w, normalize=self.normalize, eps=self.eps, double=self.double)

    def _wait(self, x: Tensor, w: Tensor | None) -> None:
        """Keep rows, as many as there is room for, until they fill a block."""
        if len(x):
            self._pending.append(x, w)
            if self._pending.count == _rows.BLOCK_ROWS:
                self._flush()

    def _flush(self) -> None:
        x, w = self._pending.rows()
        self._add(self._made_total(), x, w)
        self._pending = _Pending(self.d, x.dtype, self.device)

    @torch.no_grad()
    def _sum(self) -> Tensor:
        """The sum over all rows. Those that wait go on waiting: asking changes no later result."""
        d = self.d
        total = self._weight.new_zeros(d, d) if self._total is None else self._total.clone()
        self._add(total, *self._pending.rows())
        return total

    def _is_finite(self) -> bool:
        """Whether all that has come is finite, without a new matrix."""
        sums = () if self._total is None else (self._total,)
        return all(bool(x.isfinite().all()) for x in (*sums, *self._pending.rows(), self._weight))


class _Pending:
    """Rows that are kept, none of them normalized yet."""

    def __init__(self, d: int, dtype: torch.dtype, device: torch.device) -> None:
        self.count = 0
        self.x, self.w = self._empty(0, d, dtype, device)

    @staticmethod
    def _empty(
        size: int, d: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # filled by later chunks, which may come outside of it
            x = torch.empty(size, d, dtype=dtype, device=device)
            return x, torch.empty(size, dtype=dtype, device=device)

    def append(self, x: Tensor, w: Tensor | None) -> None:
        begin, end = self.count, self.count + len(x)
        if end > len(self.x):
            before = self.rows()
            size = max(end, min(2 * end, _rows.BLOCK_ROWS))
            self.x, self.w = self._empty(size, x.shape[-1], self.x.dtype, self.x.device)
            self.x[:begin], self.w[:begin] = before
        self.x[begin:end] = x
        self.w[begin:end] = 1 if w is None else w
        self.count = end

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.x[: self.count], self.w[: self.count]
