"""The entropies that are compared: what people write today, the vendor's eigensolvers, and ours.

The baselines are functions of `vne_kernels.reference`. A provider says by itself where it cannot
serve; one that fails nevertheless stays in the table with its message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cusolver
import torch
from torch import Tensor

import vne_kernels
from vne_kernels import functional, reference

Entropy = Callable[[Tensor], Tensor]  # (..., n, d) -> (...)

BASELINE = "gram"
OURS = "ours"


Result = tuple[Tensor, Tensor | None]  # S, and dS/dz with the gradient


def evaluate(entropy: Entropy, z: Tensor, gradient: bool) -> Result:
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
    """`build` gives a fresh callable for each case, so that a compiled one is compiled for it."""

    name: str
    build: Callable[[], Entropy]
    batched: bool = True  # takes (batch, n, d) at once; otherwise looped over, as its users do
    compiled: bool = False  # by torch.compile: seconds before the first call
    takes_half: bool = False  # otherwise its users upcast, as is done here
    linalg: str = "default"  # torch.backends.cuda.preferred_linalg_library
    why_not: Callable[[torch.device], str | None] = _anywhere

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


def _ours(method: str) -> Callable[[], Entropy]:
    return lambda: lambda z: vne_kernels.vn_entropy(z, method=method)


def _gram_by(routine: str) -> Provider:
    eigvalsh = cusolver.eigvalsh(routine)

    def why_not(device: torch.device) -> str | None:
        return cusolver.why_not(routine) if device.type == "cuda" else "needs a GPU"

    return Provider(
        routine, lambda: lambda z: reference.gram(z, eigvalsh=eigvalsh), why_not=why_not
    )


def _magma(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    return None if torch.cuda.has_magma else f"torch {torch.__version__} is built without MAGMA"


def _gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a GPU"


class _OfTriton(torch.autograd.Function):
    """The Triton kernels, whoever serves: as vn_entropy, the forward computes the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        from vne_kernels.triton.register import implementation

        s, grad, _ = implementation("vn_entropy_grad")(z, None, True, "poles", functional.EPS)
        ctx.save_for_backward(grad)
        ctx.dtype = z.dtype
        return s

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor) -> Tensor:
        (grad,) = ctx.saved_tensors
        return (grad_s[..., None, None] * grad).to(ctx.dtype)


def _by_triton() -> Entropy:
    from vne_kernels.triton.register import implementation

    value = implementation("vn_entropy")

    def entropy(z: Tensor) -> Tensor:
        if torch.is_grad_enabled() and z.requires_grad:
            return _OfTriton.apply(z)
        return value(z, None, True, "poles", functional.EPS)

    return entropy


def _triton(device: torch.device) -> str | None:
    return _gpu(device) or vne_kernels.available_backends()["triton"]


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
    Provider(OURS, _ours("auto"), takes_half=True),
    Provider("ours-eigh", _ours("eigh"), takes_half=True),
    Provider("ours-poles", _ours("poles"), takes_half=True),
    Provider("ours-triton", _by_triton, takes_half=True, why_not=_triton),
)


def available(device: torch.device, names: tuple[str, ...] | None = None) -> tuple[Provider, ...]:
    """Those that the device can have; of these, those named."""
    return tuple(
        p for p in PROVIDERS if p.why_not(device) is None and (names is None or p.name in names)
    )
