"""The functions as modules, for a training loop."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from vne_kernels._core import checks
from vne_kernels._core.exporters import refused_by_script
from vne_kernels.distributed import default_group
from vne_kernels.functional.entropy import vn_entropy
from vne_kernels.functional.loss import doe_loss


class _OverProcesses(nn.Module):
    """What may be taken of the batches of all processes together."""

    def __init__(self, gather_distributed: bool, group: Any, max_rows: int | None) -> None:
        super().__init__()
        self.gather_distributed = gather_distributed
        self.group = group
        self.max_rows = checks.max_rows(max_rows)

    def __prepare_scriptable__(self) -> NoReturn:
        refused_by_script(type(self).__name__)()

    def _group(self) -> Any:
        if not self.gather_distributed:
            return None
        return default_group() if self.group is None else self.group

    def extra_repr(self) -> str:
        bound = "" if self.max_rows is None else f", max_rows={self.max_rows}"
        return f"gather_distributed={self.gather_distributed}{bound}"


class VNEntropy(_OverProcesses):
    """Von Neumann entropy of a batch of representations; see `vne_kernels.vn_entropy`.

    Args:
        normalize, method, eps, base: as for `vne_kernels.vn_entropy`.
        gather_distributed: S of the batches of all processes together, if torch.distributed is
            initialized. The gradient, averaged over the processes as DistributedDataParallel does,
            is that of one process with the whole batch.
        group, max_rows: as for `vne_kernels.vn_entropy`, for ``gather_distributed``; a group of
            None: all processes.

    Shape:
        z (..., n, d), and weights (..., n) as for `vne_kernels.vn_entropy` -> S (...), in nats.
        Subtract it from a loss to maximize it.

    Example:
        >>> entropy = VNEntropy()
        >>> z = torch.randn(32, 16, requires_grad=True)
        >>> (-entropy(z)).backward()
    """

    def __init__(
        self,
        normalize: bool = True,
        method: str = "auto",
        eps: float = 1e-12,
        gather_distributed: bool = False,
        group: Any = None,
        max_rows: int | None = None,
        base: float | None = None,
    ) -> None:
        super().__init__(gather_distributed, group, max_rows)
        checks.normalize(normalize)
        checks.method(method)
        checks.base(base)
        self.normalize = normalize
        self.method = method
        self.eps = checks.eps(eps)
        self.base = base

    def forward(self, z: Tensor, weights: Tensor | None = None) -> Tensor:
        return vn_entropy(
            z,
            normalize=self.normalize,
            weights=weights,
            method=self.method,
            eps=self.eps,
            group=self._group(),
            max_rows=self.max_rows,
            base=self.base,
        )

    def extra_repr(self) -> str:
        own = f"normalize={self.normalize}, method={self.method!r}, eps={self.eps}"
        own += "" if self.base is None else f", base={self.base}"
        return f"{own}, {super().extra_repr()}"


class DoELoss(_OverProcesses):
    """Difference-of-entropies loss; see `vne_kernels.doe_loss`.

    Args:
        beta: weight of the cosine similarity; may be set at any step, as the paper's schedule does.
        method: as for `vne_kernels.vn_entropy`.
        gather_distributed, group, max_rows: as for `VNEntropy`.

    Shape:
        z1, z2 (..., n, d), and weights (..., n) as for `vne_kernels.doe_loss` -> (...).

    Example:
        >>> loss = DoELoss(beta=10.0)
        >>> z1, z2 = torch.randn(32, 16, requires_grad=True), torch.randn(32, 16)
        >>> loss(z1, z2).backward()
    """

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        method: str = "auto",
        gather_distributed: bool = False,
        group: Any = None,
        max_rows: int | None = None,
    ) -> None:
        super().__init__(gather_distributed, group, max_rows)
        checks.method(method)
        self.beta = checks.beta(beta)
        self.method = method

    def forward(self, z1: Tensor, z2: Tensor, weights: Tensor | None = None) -> Tensor:
        loss = doe_loss(
            z1,
            z2,
            beta=self.beta,
            weights=weights,
            method=self.method,
            group=self._group(),
            max_rows=self.max_rows,
        )
        assert isinstance(loss, Tensor)
        return loss

    def extra_repr(self) -> str:
        return f"beta={self.beta}, method={self.method!r}, {super().extra_repr()}"
