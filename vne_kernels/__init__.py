"""Von Neumann entropy of representations, as a fused operator for PyTorch."""

from vne_kernels._load import available_backends
from vne_kernels.accumulate import DensityAccumulator
from vne_kernels.functional import DoEComponents, doe_loss, spectrum, vn_entropy
from vne_kernels.losses import DoELoss, VNEntropy

__version__ = "0.1.0"

__all__ = [
    "DensityAccumulator",
    "DoEComponents",
    "DoELoss",
    "VNEntropy",
    "available_backends",
    "doe_loss",
    "spectrum",
    "vn_entropy",
]
