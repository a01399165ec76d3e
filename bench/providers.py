"""The entropies that are compared: what people write today, the vendor's eigensolvers, and ours.

The baselines are functions of `vne_kernels.reference`. `why_not` says where a provider cannot run;
one that fails all the same stays in the table with its message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cusolver
import torch
from torch import Tensor

import vne_kernels
from vne_kernels import reference

Entropy = Callable[[Tensor], Tensor]  # (..., n, d) -> (...)
Result = tuple[Tensor, Tensor | None]  # S, and dS/dz with the gradient
BASELINE = "gram"


def evaluate(entropy: Entropy, gradient: bool, z: Tensor) -> Result:
    """The timed work. A training step asks for the same: z is no leaf there."""
    with torch.set_grad_enabled(gradient):
        s = entropy(z)
    return s, torch.autograd.grad(s.sum(), z)[0] if gradient else None


@dataclass(frozen=True)
class Provider:
    """An entropy under the name that the rows have."""

    name: str
    function: Entropy
    batched: bool = True  # takes (batch, n, d) at once; otherwise looped over, as its users do
    compiled: bool = False  # by torch.compile, once for each case
    method: str = ""  # of ours, which take half precision; the users of the others upcast
    routine: str = ""  # of cuSOLVER

    def why_not(self, device: torch.device) -> str | None:
        """Returns why it cannot run on the device; None if it can."""
        if self.routine and device.type != "cuda":
            return "needs a GPU"
        return cusolver.why_not(self.routine) if self.routine else None

    def entropy(self, dtype: torch.dtype) -> Entropy:
        """Returns the function that is timed: of (n, d) or (batch, n, d) in this dtype."""
        one = _compile(self.function) if self.compiled else self.function
        if dtype.itemsize == 2 and not self.method:
            full = one
            one = lambda z: full(z.float())  # noqa: E731
        if self.batched:
            return one
        return lambda z: one(z) if z.ndim == 2 else torch.stack([one(sample) for sample in z])

    def not_captured(self, dtype: torch.dtype, m: int) -> str | None:
        """Returns why no CUDA graph of its calls is tried; None for the poles.

        No kernel of theirs waits for the host. A failed capture can cost the process the device.
        """
        if self.method not in ("auto", "poles"):
            return "not captured: only poles are sure not to wait for the host"
        serving = vne_kernels.available_backends().serving.get("cuda", "cuda")
        largest = 4096 if serving.startswith("cuda") else 1024  # m of Triton's poles
        if m > largest or (self.method == "auto" and dtype == torch.float64):
            return "not captured: an eigensolver serves this size and dtype"
        return None


def _compile(entropy: Entropy) -> Entropy:
    from torch._inductor import config

    torch.compiler.reset()
    # Part of the key of the compiler's cache: code for another number is not reused.
    config.cpp.threads = torch.get_num_threads()
    compiled: Entropy = torch.compile(entropy, fullgraph=True, dynamic=False)
    return compiled


PROVIDERS = (
    Provider("algorithm1", reference.algorithm1, batched=False),
    Provider("algorithm1+compile", reference.algorithm1, batched=False, compiled=True),
    Provider("svd", reference.official_svd, batched=False),
    Provider("svd+compile", reference.official_svd, batched=False, compiled=True),
    Provider(BASELINE, reference.gram),
    Provider("gram+compile", reference.gram, compiled=True),
    *(
        Provider(name, partial(reference.gram, eigvalsh=cusolver.eigvalsh(name)), routine=name)
        for name in cusolver.ROUTINES
    ),
    *(
        Provider(name, partial(vne_kernels.vn_entropy, method=method), method=method)
        for name, method in (("ours", "auto"), ("ours-eigh", "eigh"), ("ours-poles", "poles"))
    ),
)
