"""The entropies that are compared: what people write today, the vendor's eigensolvers, and ours.

The baselines are functions of `vne_kernels.reference`. `why_not` says where a provider cannot run;
one that fails all the same stays in the table with its message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cusolver
import torch
from torch import Tensor

import vne_kernels
from vne_kernels import reference

Entropy = Callable[[Tensor], Tensor]  # (..., n, d) -> (...)

BASELINE = "gram"
OURS = "ours"
Result = tuple[Tensor, Tensor | None]  # S, and dS/dz with the gradient


def evaluate(entropy: Entropy, gradient: bool, z: Tensor) -> Result:
    """The timed work. A training step asks for the same: z is no leaf there."""
    if not gradient:
        with torch.no_grad():
            return entropy(z), None
    s = entropy(z)
    (grad,) = torch.autograd.grad(s.sum(), z)
    return s, grad


def _anywhere(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """`build` gives a new callable for each case, so that a compiled one is compiled for it."""

    name: str
    build: Callable[[], Entropy]
    batched: bool = True  # takes (batch, n, d) at once; otherwise looped over, as its users do
    compiled: bool = False  # by torch.compile: seconds before the first call
    takes_half: bool = False  # otherwise its users upcast, as is done here
    capturable: bool = False  # a CUDA graph may hold it: it does not wait for the host
    linalg: str = "default"  # torch.backends.cuda.preferred_linalg_library
    triton: bool = False  # whether the Triton kernels serve, whatever is chosen otherwise
    why_not: Callable[[torch.device], str | None] = _anywhere

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)

    def prepare(self) -> None:
        """Chooses the library behind torch.linalg on a GPU, and the backend of the package."""
        torch.backends.cuda.preferred_linalg_library(self.linalg)
        _serve_by_triton(self.triton)

    def entropy(self, dtype: torch.dtype) -> Entropy:
        one = self.build()
        if dtype.itemsize == 2 and not self.takes_half:
            full = one
            one = lambda z: full(z.float())  # noqa: E731
        if self.batched:
            return one
        return lambda z: one(z) if z.ndim == 2 else torch.stack([one(sample) for sample in z])


def _compiled(entropy: Entropy) -> Callable[[], Entropy]:
    def build() -> Entropy:
        from torch._inductor import config

        torch.compiler.reset()
        # Part of the key of the compiler's cache: code for another number is not reused.
        config.cpp.threads = torch.get_num_threads()
        compiled: Entropy = torch.compile(entropy, fullgraph=True, dynamic=False)
        return compiled

    return build


def _gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a GPU"


def _magma(device: torch.device) -> str | None:
    missing = None if torch.cuda.has_magma else f"torch {torch.__version__} is built without MAGMA"
    return _gpu(device) or missing


def _triton(device: torch.device) -> str | None:
    return _gpu(device) or vne_kernels.available_backends()["triton"]


_chosen: list[vne_kernels.use_backend] = []


def _serve_by_triton(wanted: bool) -> None:
    """Switches to the Triton kernels or back, if the others serve at the moment."""
    if wanted and not _chosen:
        _chosen.append(vne_kernels.use_backend("triton"))
    elif not wanted and _chosen:
        _chosen.pop().__exit__(None, None, None)


def _gram_by(routine: str) -> Provider:
    return Provider(
        routine,
        lambda: partial(reference.gram, eigvalsh=cusolver.eigvalsh(routine)),
        capturable=True,
        why_not=lambda device: _gpu(device) or cusolver.why_not(routine),
    )


def _ours(name: str, method: str, **more: Any) -> Provider:
    entropy = partial(vne_kernels.vn_entropy, method=method)
    return Provider(name, lambda: entropy, takes_half=True, capturable=True, **more)


PROVIDERS = (
    Provider("algorithm1", lambda: reference.algorithm1, batched=False),
    Provider("algorithm1+compile", _compiled(reference.algorithm1), batched=False, compiled=True),
    Provider("svd", lambda: reference.official_svd, batched=False),
    Provider("svd+compile", _compiled(reference.official_svd), batched=False, compiled=True),
    Provider(BASELINE, lambda: reference.gram),
    Provider("gram+compile", _compiled(reference.gram), compiled=True),
    Provider("gram@cusolver", lambda: reference.gram, linalg="cusolver", why_not=_gpu),
    Provider("gram@magma", lambda: reference.gram, linalg="magma", why_not=_magma),
    *(_gram_by(routine) for routine in cusolver.ROUTINES),
    _ours(OURS, "auto"),
    _ours("ours-eigh", "eigh"),
    _ours("ours-poles", "poles"),
    _ours("ours-triton", "poles", triton=True, why_not=_triton),
)
