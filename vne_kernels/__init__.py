"""Von Neumann entropy of representations, as a fused operator for PyTorch."""

from types import FunctionType as _Function

from vne_kernels import backends as _backends
from vne_kernels._core.exporters import refused_by_script as _refused_by_script
from vne_kernels.accumulator import DensityAccumulator
from vne_kernels.backends import available_backends, use_backend
from vne_kernels.functional.density import vn_entropy_from_density
from vne_kernels.functional.entropy import get_vne, spectrum, vn_entropy
from vne_kernels.functional.estimate import (
    EntropyEstimate,
    estimate_vn_entropy,
    estimate_vn_entropy_from_density,
)
from vne_kernels.functional.families import (
    linear_entropy,
    renyi_entropy,
    renyi_entropy_from_density,
    tsallis_entropy,
    tsallis_entropy_from_density,
)
from vne_kernels.functional.logdet import logdet
from vne_kernels.functional.loss import DoEComponents, doe_loss
from vne_kernels.functional.quantum import (
    conditional_entropy,
    mutual_information,
    partial_trace,
    relative_entropy,
)
from vne_kernels.functional.scores import (
    effective_rank,
    participation_ratio,
    rankme,
    vendi_score,
)
from vne_kernels.nn import DoELoss, VNEntropy

__version__ = "0.1.0"

__all__ = [
    "DensityAccumulator",
    "DoEComponents",
    "DoELoss",
    "EntropyEstimate",
    "VNEntropy",
    "available_backends",
    "conditional_entropy",
    "doe_loss",
    "effective_rank",
    "estimate_vn_entropy",
    "estimate_vn_entropy_from_density",
    "get_vne",
    "linear_entropy",
    "logdet",
    "mutual_information",
    "partial_trace",
    "participation_ratio",
    "rankme",
    "relative_entropy",
    "renyi_entropy",
    "renyi_entropy_from_density",
    "spectrum",
    "tsallis_entropy",
    "tsallis_entropy_from_density",
    "use_backend",
    "vendi_score",
    "vn_entropy",
    "vn_entropy_from_density",
]

for _name in __all__:
    if isinstance(_function := globals()[_name], _Function):
        _function.__prepare_scriptable__ = _refused_by_script(_name)  # type: ignore[attr-defined]

_backends.register()
