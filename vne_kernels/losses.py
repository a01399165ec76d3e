"""The functions as modules, for a training loop."""

from __future__ import annotations

from torch import Tensor, nn

from vne_kernels.distributed import gather
from vne_kernels.functional import (
    _check_eps,
    _check_method,
    _check_normalize,
    doe_loss,
    vn_entropy,
)


class VNEntropy(nn.Module):
    """Von Neumann entropy of a batch of representations; see `vne_kernels.vn_entropy`.

    Args:
        normalize, method, eps: as for `vne_kernels.vn_entropy`.

    Shape:
        z (..., n, d) -> S (...), in nats. Subtract it from a loss to maximise it.

    Example:
        >>> entropy = VNEntropy()
        >>> z = torch.randn(32, 16, requires_grad=True)
        >>> (-entropy(z)).backward()
    """

    def __init__(self, normalize: bool = True, method: str = "auto", eps: float = 1e-12) -> None:
        super().__init__()
        _check_normalize(normalize)
        _check_method(method)
        _check_eps(eps)
        self.normalize = normalize
        self.method = method
        self.eps = eps

    def forward(self, z: Tensor) -> Tensor:
        return vn_entropy(z, normalize=self.normalize, method=self.method, eps=self.eps)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, method={self.method!r}, eps={self.eps}"


class DoELoss(nn.Module):
    """Difference-of-entropies loss; see `vne_kernels.doe_loss`.

    Args:
        beta: weight of the cosine similarity; may be set at any step, as the paper's schedule does.
        method: as for `vne_kernels.vn_entropy`.
        gather_distributed: compute the loss of the batches of all processes together, if
            torch.distributed is initialised. Every process needs the same batch size. The gradient,
            averaged over the processes as DistributedDataParallel does, is that of one process
            with the whole batch.

    Shape:
        z1, z2 (n, d) -> scalar.

    Example:
        >>> loss = DoELoss(beta=10.0)
        >>> z1, z2 = torch.randn(32, 16, requires_grad=True), torch.randn(32, 16)
        >>> loss(z1, z2).backward()
    """

    def __init__(
        self, beta: float = 1.0, method: str = "auto", gather_distributed: bool = False
    ) -> None:
        super().__init__()
        _check_method(method)
        self.beta = beta
        self.method = method
        self.gather_distributed = gather_distributed

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        if self.gather_distributed:
            z1, z2 = gather(z1), gather(z2)
        loss = doe_loss(z1, z2, beta=self.beta, method=self.method)
        assert isinstance(loss, Tensor)
        return loss

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, method={self.method!r}, "
            f"gather_distributed={self.gather_distributed}"
        )
