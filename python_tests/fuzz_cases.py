"""Random uses of the operators, as Hypothesis draws them: cases, and the tensors they make.

`fuzz_contract.py` checks the result of a case; `fuzz_operators.py` runs the cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from cases import generator
from hypothesis import strategies as st
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REFUSED = (
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
)
REFUSED_WEIGHTS = tuple(
    dtype for dtype in REFUSED if dtype.is_complex or dtype == torch.float8_e4m3fn
)
BATCHES = ((), (1,), (3,), (2, 2), (0,), (2, 0))
LARGEST = 300
"""Rows and features that a case has at most."""
EPS = (1e-12, 0.0, 1e-30, 1e-6, 0.5, 1e10)


@dataclass(frozen=True)
class Case:
    """One use. `fault` is what is wrong with the call; every other field is legal by itself."""

    function: str = "vn_entropy"
    fault: str = "none"
    batch: tuple[int, ...] = ()
    n: int = 2
    d: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    content: str = "gaussian"
    spoiled: float | None = None  # the value of one entry of the first sample
    weights: str = "none"
    normalize: bool = True
    method: str = "auto"
    eps: float = 1e-12
    beta: float = 1.0
    requires_grad: bool = True
    mode: str = "plain"
    call: str = "direct"
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.batch, self.n, self.d)

    @property
    def m(self) -> int:
        return min(self.n, self.d)


# ---------------------------------------------------------------------------------------------
# Content: (shape, generator, magnitude of the dtype) -> float64
# ---------------------------------------------------------------------------------------------


def _gaussian(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _integers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(-2, 3, shape, generator=g).double()


def _scattered(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Every row of a magnitude of its own, over sixty decades."""
    decades = 60 * torch.rand((*shape[:-1], 1), generator=g, dtype=torch.float64) - 30
    return _gaussian(shape, g) * 10**decades


def _some_rows_zero(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _gaussian(shape, g) * (torch.rand((*shape[:-1], 1), generator=g) < 0.6)


def _duplicated(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    z = _gaussian(shape, g)
    return z[..., torch.randint(0, (shape[-2] + 1) // 2, (shape[-2],), generator=g), :]


def _collapsed(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _gaussian((*shape[:-2], 1, shape[-1]), g) + 1e-4 * _gaussian(shape, g)


def _one_hot(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    hot = torch.randint(0, shape[-1], shape[:-1], generator=g)
    return torch.nn.functional.one_hot(hot, shape[-1]).double()


CONTENTS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "integers": _integers,
    "zeros": lambda shape, g: torch.zeros(shape, dtype=torch.float64),
    "ones": lambda shape, g: torch.ones(shape, dtype=torch.float64),
    "some_rows_zero": _some_rows_zero,
    "duplicated": _duplicated,
    "collapsed": _collapsed,
    "one_hot": _one_hot,
    "scattered": _scattered,
    "huge": _gaussian,
    "tiny": _gaussian,
    "subnormal": _integers,
}


def _magnitude(content: str, dtype: torch.dtype) -> float:
    """Factor that brings content of order one to the edge of the dtype's range."""
    info = torch.finfo(dtype)
    subnormal = info.tiny * info.eps
    return {"huge": info.max / 8, "tiny": 8 * info.tiny, "subnormal": 5 * subnormal}.get(content, 1)


# ---------------------------------------------------------------------------------------------
# Layouts: a contiguous tensor -> a view of its shape, of the same values but for those that share
# ---------------------------------------------------------------------------------------------


class Plain(torch.Tensor):
    """A subclass that overrides nothing, as users have them."""


def _sliced(z: Tensor) -> Tensor:
    """From the middle of a larger one that is NaN elsewhere: what is read from there is seen."""
    larger = torch.full((*z.shape[:-2], z.shape[-2] + 2, 2 * z.shape[-1] + 1), math.nan).to(z.dtype)
    view = larger[..., 1:-1, 1::2]
    view.copy_(z)
    return view


def _offset(z: Tensor) -> Tensor:
    """At an address that no vector instruction is aligned to."""
    storage = torch.full((z.numel() + 5,), math.nan).to(z.dtype)
    view = storage[3 : 3 + z.numel()].view(z.shape)
    view.copy_(z)
    return view


def _overlapping(z: Tensor) -> Tensor:
    """Each row begins one entry after the row before it."""
    n, d = z.shape[-2:]
    flat = torch.cat([z.flatten(), z.flatten(), z.new_zeros(n + d)])
    batch_strides = [0] * (z.dim() - 2)
    return flat.as_strided(z.shape, (*batch_strides, 1, 1))


def _batch_inside(z: Tensor) -> Tensor:
    """Memory in the reverse order of the dimensions."""
    order = tuple(reversed(range(z.dim())))
    return z.permute(order).contiguous().permute(order)


def _channels_last(z: Tensor) -> Tensor:
    return z.to(memory_format=torch.channels_last) if z.dim() == 4 else _batch_inside(z)


def _conjugate_view(z: Tensor) -> Tensor:
    """The imaginary part of a lazily conjugated tensor: strided, and with the negative bit."""
    if z.dtype not in (torch.float32, torch.float64):
        return _negative_view(z)
    return torch.complex(torch.zeros_like(z), -z).conj().imag


def _negative_view(z: Tensor) -> Tensor:
    return torch._neg_view(-z)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda z: z,
    "transposed": lambda z: z.mT.contiguous().mT,
    "sliced": _sliced,
    "offset": _offset,
    "expanded_rows": lambda z: z[..., :1, :].expand(z.shape),
    "expanded_columns": lambda z: z[..., :1].expand(z.shape),
    "overlapping": _overlapping,
    "batch_inside": _batch_inside,
    "channels_last": _channels_last,
    "conjugate_view": _conjugate_view,
    "negative_view": _negative_view,
    "subclass": lambda z: z.as_subclass(Plain),
    "parameter": lambda z: torch.nn.Parameter(z, requires_grad=False),
}


def make_samples(case: Case, stream: int = 0) -> Tensor:
    """z of a case, not yet a leaf of autograd; another one for every stream."""
    g = generator(2 * case.seed + stream)
    content = CONTENTS[case.content](case.shape, g) * _magnitude(case.content, case.dtype)
    info = torch.finfo(case.dtype)
    z = content.clamp(info.min, info.max).to(case.dtype)
    if case.spoiled is not None and z.numel() and stream == 0:
        z.view(-1)[int(torch.randint(0, case.n * case.d, (), generator=g))] = case.spoiled
    return LAYOUTS[case.layout](z)


# ---------------------------------------------------------------------------------------------
# Weights: (shape of z without features, generator) -> tensor
# ---------------------------------------------------------------------------------------------


def _softmax(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g).softmax(-1)


def _steep(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Down to where a float32 is no normal number any more."""
    return (40 * torch.randn(shape, generator=g)).softmax(-1)


def _some_zero(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    weights = _softmax(shape, g)
    return weights * (torch.rand(shape, generator=g) < 0.6)


def _one_negative(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    weights = _softmax(shape, g)
    weights[..., :1] = -0.25
    return weights


def _one_nan(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    weights = _softmax(shape, g)
    weights[..., -1:] = math.nan
    return weights


WEIGHTS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "softmax": _softmax,
    "steep": _steep,
    "float64": lambda shape, g: _softmax(shape, g).double(),
    "bfloat16": lambda shape, g: _softmax(shape, g).bfloat16(),
    "one_number": lambda shape, g: torch.full((1,), 1 / shape[-1]),
    "last_axis": lambda shape, g: _softmax(shape[-1:], g),
    "ones_before": lambda shape, g: _softmax((*(1 for _ in shape[:-1]), shape[-1]), g),
    "sum_is_not_one": lambda shape, g: 3.7 * torch.rand(shape, generator=g),
    "some_zero": _some_zero,
    "mask": lambda shape, g: torch.rand(shape, generator=g) < 0.6,
    "attention_mask": lambda shape, g: (torch.rand(shape, generator=g) < 0.6).long(),
    "counts": lambda shape, g: torch.randint(0, 5, shape, generator=g, dtype=torch.uint8),
    "all_zero": lambda shape, g: torch.zeros(shape),
    "tiny": lambda shape, g: 1e-38 * _softmax(shape, g),
    "one_negative": _one_negative,
    "one_nan": _one_nan,
}


def make_weights(case: Case) -> Tensor | None:
    if case.weights == "none":
        return None
    return WEIGHTS[case.weights](case.shape[:-1], generator(2 * case.seed + 1))


# ---------------------------------------------------------------------------------------------
# Strategies
# ---------------------------------------------------------------------------------------------

FUNCTIONS = ("vn_entropy", "vn_entropy", "spectrum", "doe_loss")
MODES = ("plain", "plain", "plain", "no_grad", "inference", "after_inference", "autocast", "vmap",
         "meta", "fake")  # fmt: skip
MODULE_CALLS = ("module", "deepcopy", "pickle", "torch_save", "weights_only", "functional_call")
CALLS = ("direct", "direct", "direct", "threads", *MODULE_CALLS)
FAULTS = (
    "no_rows",
    "no_features",
    "one_dimension",
    "no_dimension",
    "dtype",
    "not_a_tensor",
    "sparse",
    "method",
    "eps_sign",
    "eps_nan",
    "eps_type",
    "normalize_type",
    "weights_shape",
    "weights_dtype",
    "weights_type",
    "other_shape",
    "other_dtype",
    "other_device",
)
#: what a fault needs of the function; others can be made of any
OF_FUNCTION = {
    "method": ("vn_entropy", "doe_loss"),
    "eps": ("vn_entropy",),
    "normalize": ("vn_entropy", "spectrum"),
    "other": ("doe_loss",),
}


def applies(fault: str, function: str) -> bool:
    return function in OF_FUNCTION.get(fault.partition("_")[0], FUNCTIONS)


@st.composite
def _sizes(draw: st.DrawFn, largest: int) -> tuple[tuple[int, ...], int, int]:
    """(batch, n, d): small; now and then beyond the sizes where the kernels change their ways."""
    if draw(st.integers(0, 39)) == 39:
        batch = draw(st.sampled_from(((), (2,))))
        n, d = draw(st.integers(130, 200)), draw(st.integers(120, 300))
    else:
        sizes = st.integers(1, draw(st.sampled_from((4, 12, 40))))
        batch, n, d = draw(st.sampled_from(BATCHES)), draw(sizes), draw(sizes)
    return batch, min(n, largest), min(d, largest)


def _consistent(case: Case) -> Case:
    """Without what the function does not take, or the mode cannot have."""
    if case.function != "vn_entropy":
        case = replace(case, eps=1e-12)
    if case.function == "spectrum":
        case = replace(case, method="auto")
    if case.function == "doe_loss":
        case = replace(case, normalize=True)
    if case.call in MODULE_CALLS and case.function == "spectrum":
        case = replace(case, call="direct")
    if case.function == "doe_loss" and case.weights != "none" and case.mode == "after_inference":
        case = replace(
            case, mode="plain"
        )  # whether z is saved for a backward depends on the weights
    if case.mode == "vmap" and (not case.batch or case.batch[0] == 0):
        case = replace(case, mode="plain")
    if case.mode in ("no_grad", "inference"):
        case = replace(case, requires_grad=False)
    if case.fault != "none":
        case = replace(case, mode="plain", call="direct", spoiled=None, requires_grad=False)
    return case


@st.composite
def cases(draw: st.DrawFn, largest: int = LARGEST) -> Case:
    """A use whose samples have at most so many rows and features."""

    def one(values: tuple[object, ...] | dict[str, object]) -> object:
        return draw(st.sampled_from(tuple(values)))

    function = one(FUNCTIONS)
    wrong = draw(st.integers(0, 4)) == 4
    faults = tuple(fault for fault in FAULTS if applies(fault, function))
    batch, n, d = draw(_sizes(largest))
    has_weights = draw(st.booleans())
    return _consistent(
        Case(
            function=function,
            fault=one(faults) if wrong else "none",
            batch=batch,
            n=n,
            d=d,
            dtype=one(FLOATING),
            layout=one(LAYOUTS),
            content=one(CONTENTS),
            spoiled=one((None, None, None, None, math.nan, math.inf, -math.inf)),
            weights=one(WEIGHTS) if has_weights else "none",
            normalize=draw(st.integers(0, 3)) < 3,
            method=one(("auto", "eigh", "poles")),
            eps=one(EPS) if draw(st.booleans()) else 1e-12,
            beta=one((1.0, 0.0, 10.0, -2.5)),
            requires_grad=draw(st.integers(0, 3)) < 3,
            mode=one(MODES),
            call=one(CALLS),
            seed=draw(st.integers(0, 2**20)),
        )
    )
