"""The result that each fuzzed case must have, by section "What every input gives" of the README.

`check` runs one case and raises AssertionError where the result differs. Exact results are
computed in float64 by `vne_kernels.reference` from rows that were brought to unit length first, so
that the reference meets no overflow of its own.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
from cases import ROUNDING, generator, result_dtype
from fuzz_cases import REFUSED, REFUSED_WEIGHTS, Case, make_samples, make_weights
from naming import naming
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vne_kernels
from vne_kernels import DoEComponents, DoELoss, VNEntropy, reference

THREADS = 3

VALUE = {torch.float64: 1e-12, torch.float32: 3e-5}
"""|error| of S, over tau (1 + |log tau|), tau the trace of rho: 1 for weights that sum to 1."""
GRADIENT = {torch.float64: 1e-7, torch.float32: 2e-3}
"""|error| of a gradient times the rows' lengths, over the size of the terms that it is the sum of:
loose, for near collapse; `test_gradient.py` holds each spectrum to its own."""

SUBNORMAL = 1e-14
"""Absolute error that is allowed in addition, of S and of a gradient times length: float64 rounds
numbers below its smallest normal number coarsely, and so it does the norms of such rows."""


@dataclass(frozen=True)
class Outcome:
    """What a case was found to give, as it must."""

    kind: str  # "value", "error" or "shape"
    nan_samples: int = 0
    gradients: int = 0


@dataclass(frozen=True)
class Arguments:
    """z, the second view of doe_loss, and the weights: those a function takes."""

    z: Tensor
    other: Tensor | None
    weights: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.z, self.other, self.weights) if t is not None]


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------

Fault = tuple[Callable[[Case, Arguments], object], type[Exception], tuple[object, ...]]


def _call(case: Case, arguments: Arguments, **changed: object) -> object:
    """The public function, directly; `changed` replaces arguments by name."""
    z, weights = changed.pop("z", arguments.z), changed.pop("weights", arguments.weights)
    if case.function == "doe_loss":
        other = changed.pop("other", arguments.other if z is arguments.z else z)
        options = {
            "beta": case.beta,
            "weights": weights,
            "method": case.method,
            "return_components": True,
        }
        return vne_kernels.doe_loss(z, other, **{**options, **changed})
    options = {"normalize": case.normalize, "weights": weights}
    if case.function == "vn_entropy":
        options |= {"method": case.method, "eps": case.eps}
    return getattr(vne_kernels, case.function)(z, **{**options, **changed})


def _refused_dtype(case: Case) -> torch.dtype:
    return REFUSED[case.seed % len(REFUSED)]


def _faults(case: Case) -> dict[str, Fault]:
    """By name: the call, the exception and what its message must name."""
    batch, n, d = case.batch, case.n, case.d
    z = "z1" if case.function == "doe_loss" else "z"
    refused = torch.zeros(case.shape).to(_refused_dtype(case))
    refused_weights = REFUSED_WEIGHTS[case.seed % len(REFUSED_WEIGHTS)]
    another = torch.float64 if case.dtype != torch.float64 else torch.float32
    shapes = {
        "no_rows": (*batch, 0, d),
        "no_features": (*batch, n, 0),
        "one_dimension": (n,),
        "no_dimension": (),
    }
    other_shape = torch.ones(*batch, n, d + 1, dtype=case.dtype)
    elsewhere = torch.ones(case.shape, dtype=case.dtype, device="meta")
    sparse = {"z": torch.ones(n, d).to_sparse(), "weights": None}
    wrong: dict[str, tuple[dict[str, object], type[Exception], tuple[object, ...]]] = {
        **{
            name: ({"z": torch.zeros(shape, dtype=case.dtype)}, ValueError, (z, shape))
            for name, shape in shapes.items()
        },
        "dtype": ({"z": refused}, TypeError, (z, refused.dtype)),
        "not_a_tensor": ({"z": [[1.0]]}, TypeError, (z, "list")),
        "sparse": (sparse, TypeError, (z, "torch.sparse_coo")),
        "method": ({"method": "svd"}, ValueError, ("method", "'svd'")),
        "eps_sign": ({"eps": -1e-12}, ValueError, ("eps", "-1e-12")),
        "eps_nan": ({"eps": math.nan}, ValueError, ("eps", "nan")),
        "eps_type": ({"eps": "1"}, TypeError, ("eps", "str")),
        "normalize_type": ({"normalize": "yes"}, TypeError, ("normalize", "str")),
        "weights_shape": ({"weights": torch.ones(*batch, n + 1)}, ValueError, ("weights",)),
        "weights_dtype": (
            {"weights": torch.zeros(n).to(refused_weights)},
            TypeError,
            ("weights", refused_weights),
        ),
        "weights_type": ({"weights": [1.0]}, TypeError, ("weights", "list")),
        "other_shape": ({"other": other_shape}, ValueError, ("z1", "z2")),
        "other_dtype": (
            {"other": torch.ones(case.shape, dtype=another)},
            TypeError,
            ("z1", "z2", another),
        ),
        "other_device": ({"other": elsewhere}, ValueError, ("z1", "z2", "cpu", "meta")),
    }
    return {
        name: (partial(_call, **arguments), error, named)
        for name, (arguments, error, named) in wrong.items()
    }


def _check_error(call: Callable[[], object], exception: type[Exception], *named: object) -> None:
    try:
        result = call()
    except exception as error:
        message = str(error)
    else:
        raise AssertionError(f"wanted {exception.__name__} of {named}, got the result {result}")
    assert re.search(naming(*named), message), f"wanted {named}, got {message!r}"


# ---------------------------------------------------------------------------------------------
# Exact results
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows u of equation (1) in float64, the lengths they were divided by, and the weights p."""

    u: Tensor  # (..., n, d)
    length: Tensor  # (..., n, 1)
    projected: Tensor  # (..., n, 1): u moves on the sphere
    p: Tensor  # (..., n)
    is_zero: Tensor  # (..., n, 1)

    @property
    def trace(self) -> Tensor:
        return (self.p * self.u.square().sum(-1)).sum(-1)

    @property
    def valid(self) -> Tensor:
        """(...): S is a number. Beside NaN and Inf: what exceeds the range of float64 is one."""
        finite = self.u.isfinite().all(-1).all(-1) & self.length.isfinite().all(-1).all(-1)
        return finite & (self.p >= 0).all(-1) & self.trace.isfinite()

    @property
    def masked(self) -> Tensor:
        """u with zeros in place of what is not valid."""
        return torch.where(self.valid[..., None, None], self.u, 0)


def _effective_weights(case: Case, weights: Tensor) -> Tensor:
    """p (..., n): the weights over their sum where rows are normalized, otherwise as given."""
    dtype = result_dtype(case.dtype)
    given = weights.detach().to(dtype).double().expand(case.shape[:-1])
    if not case.normalize:
        return given
    total = given.sum(-1, keepdim=True)
    relative = torch.where((given >= 0).all(-1, keepdim=True), given / total, torch.nan)
    return torch.where(total == 0, given, relative).to(dtype).double()


def _rows(case: Case, z: Tensor, weights: Tensor | None) -> Rows:
    z = z.detach().as_subclass(Tensor).clone().double()
    p = torch.full(z.shape[:-1], 1 / case.n, dtype=torch.float64)
    if weights is not None:
        p = _effective_weights(case, weights)
        z = torch.where((p == 0).unsqueeze(-1), 0, z)  # absent, whatever it holds
    largest = z.abs().amax(-1, keepdim=True)
    is_zero = largest == 0
    if not case.normalize:
        no_row = torch.zeros_like(is_zero)
        return Rows(z, torch.ones_like(largest), no_row, p, is_zero)
    eps = max(case.eps, torch.finfo(torch.float64).tiny)
    scaled = z / torch.where(is_zero, 1, largest)
    length = scaled.norm(dim=-1, keepdim=True)
    projected = length * largest > eps
    u = torch.where(projected, scaled / torch.where(is_zero, 1, length), z / eps)
    return Rows(u, (length * largest).clamp_min(eps), projected, p, is_zero)


def _entropy(rows: Rows) -> Tensor:
    p = torch.where(rows.valid[..., None], rows.p, 0)
    exact = reference.oracle(rows.masked, normalize=False, weights=p)
    return torch.where(rows.valid, exact, torch.nan)


def _eigenvalues(rows: Rows) -> Tensor:
    p = torch.where(rows.valid[..., None], rows.p, 0)
    eig_val = torch.linalg.svdvals(p.sqrt().unsqueeze(-1) * rows.masked).square()
    return torch.where(rows.valid[..., None], eig_val, torch.nan)


def _cosine(rows1: Rows, rows2: Rows) -> Tensor:
    """Mean over the rows, weighted, NaN where a view is not valid."""
    exact = (rows1.p * (rows1.masked * rows2.masked).sum(-1)).sum(-1)
    return torch.where(rows1.valid & rows2.valid, exact, torch.nan)


def _times_length(rows: Rows, grad_u: Tensor) -> Tensor:
    """From d/du to d/dz times the length that the row was divided by: equation (4)."""
    radial = (grad_u * rows.masked).sum(-1, keepdim=True) * rows.masked
    grad_z = torch.where(rows.projected, grad_u - radial, grad_u)
    return torch.where(rows.is_zero, 0, grad_z)


def _entropy_grad(rows: Rows) -> Tensor:
    p = torch.where(rows.valid[..., None], rows.p, 0)
    return reference.oracle_grad(rows.masked, normalize=False, weights=p)


def _purity_grad(rows: Rows) -> Tensor:
    """Of the sum of squares of the eigenvalues, tr rho^2."""
    weighted = torch.where(rows.valid[..., None], rows.p, 0).unsqueeze(-1) * rows.masked
    return 4 * weighted @ (rows.masked.mT @ weighted)


def _exact_gradients(case: Case, rows: Rows, others: Rows | None) -> list[Tensor]:
    """Per tensor of (z, other): d/dz of each sample's result, times the length of the row."""
    valid = rows.valid[..., None, None]
    if case.function == "spectrum":
        return [torch.where(valid, _times_length(rows, _purity_grad(rows)), torch.nan)]
    entropy_grad_u = _entropy_grad(rows)
    if others is None:
        return [torch.where(valid, _times_length(rows, entropy_grad_u), torch.nan)]
    valid = valid & others.valid[..., None, None]
    slope = case.beta * torch.where(rows.valid[..., None], rows.p, 0).unsqueeze(-1)
    grad_z1 = _times_length(rows, -entropy_grad_u - slope * others.masked)
    grad_z2 = _times_length(others, -slope * rows.masked)
    return [torch.where(valid, grad_z, torch.nan) for grad_z in (grad_z1, grad_z2)]


def _gradient_scale(case: Case, rows: Rows) -> Tensor:
    """(...): the size of the terms that a gradient is the sum of."""
    size = (rows.p.unsqueeze(-1) * rows.masked).flatten(-2).norm(dim=-1)
    size, trace = (torch.where(rows.valid, t, 0) for t in (size, rows.trace))
    if case.function == "spectrum":
        return 4 * size * trace
    log_trace = trace.clamp_min(1e-300).log().abs()
    scale = 2 * size * (1 + math.log(case.m) + log_trace)
    if case.function == "doe_loss":
        scale = scale + abs(case.beta) * torch.where(rows.valid[..., None], rows.p, 0).norm(dim=-1)
    return scale


# ---------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------


def _module(case: Case) -> nn.Module:
    if case.function == "doe_loss":
        return DoELoss(beta=case.beta, method=case.method)
    return VNEntropy(normalize=case.normalize, method=case.method, eps=case.eps)


def _saved(module: nn.Module, *, weights_only: bool) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([VNEntropy, DoELoss, set, OrderedDict]):
        loaded: nn.Module = torch.load(buffer, weights_only=weights_only)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "module": lambda module: module,
    "functional_call": lambda module: module,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch_save": partial(_saved, weights_only=False),
    "weights_only": partial(_saved, weights_only=True),
}


def _mode(case: Case) -> AbstractContextManager[object]:
    return {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    }.get(case.mode, nullcontext)()


def _invoke(case: Case, arguments: Arguments) -> object:
    """The result of a case, called as it says."""
    with _mode(case):
        if case.call in COPIES:
            module = COPIES[case.call](_module(case))
            return (
                torch.func.functional_call(module, {}, tuple(arguments.tensors))
                if case.call == "functional_call"
                else module(*arguments.tensors)
            )
        if case.mode == "vmap":
            return _mapped(case, arguments)
        return _call(case, arguments)


def _mapped(case: Case, arguments: Arguments) -> object:
    """Over the first dimension of the batch."""
    weights = arguments.weights
    if weights is not None:
        weights = weights.expand(case.shape[:-1])
    given = {"z": arguments.z, "other": arguments.other, "weights": weights}
    names = [name for name, tensor in given.items() if tensor is not None]

    def call(*tensors: Tensor) -> object:
        own = dict.fromkeys(given) | dict(zip(names, tensors, strict=True))
        return _call(case, Arguments(**own))

    return torch.vmap(call)(*(given[name] for name in names))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS)


def _loss_and_entropy(result: object) -> tuple[Tensor, Tensor | None]:
    if isinstance(result, DoEComponents):
        return result.loss, result.entropy
    assert isinstance(result, Tensor)
    return result, None


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _check_threads(case: Case, arguments: Arguments, value: Tensor) -> None:
    futures = [_pool().submit(_invoke, case, arguments) for _ in range(THREADS)]
    for future in futures:
        assert _same(_loss_and_entropy(future.result())[0], value), "threads: another result"


# ---------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------


def _leaf(case: Case, tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    leaf = tensor.detach()
    may_require = leaf.is_floating_point() and not leaf.is_inference()
    return leaf.requires_grad_(case.requires_grad and may_require)


def _make_arguments(case: Case) -> Arguments:
    made_in = torch.inference_mode() if case.mode == "after_inference" else nullcontext()
    with made_in:
        z = make_samples(case)
    other = make_samples(case, 1) if case.function == "doe_loss" else None
    return Arguments(_leaf(case, z), _leaf(case, other), _leaf(case, make_weights(case)))


def _bytes(tensor: Tensor) -> Tensor:
    """A copy of all memory below a view."""
    storage = tensor.detach().as_subclass(Tensor).untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).clone()


def _assert_close(actual: Tensor, exact: Tensor, allowed: Tensor, what: str) -> None:
    """NaN in the same places, the rest within what is allowed, or beyond the dtype's range."""
    found = actual.double()
    beyond = exact.abs() + allowed > torch.finfo(actual.dtype).max
    close = (found - exact).abs() <= allowed
    same = torch.where(exact.isnan(), found.isnan(), close | (beyond & ~found.isnan()))
    assert same.all(), f"{what}: got {actual}, exact {exact}, allowed {allowed}"


def _agree(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _check_value(case: Case, rows: Rows, others: Rows | None, result: object) -> None:
    value, entropy = _loss_and_entropy(result)
    dtype = result_dtype(case.dtype)
    assert value.dtype == dtype, f"dtype: {value.dtype}"
    trace = rows.trace
    if case.function == "spectrum":
        assert value.shape == (*case.batch, case.m)
        allowed = (VALUE[dtype] * trace + SUBNORMAL).unsqueeze(-1)
        _assert_close(value.detach(), _eigenvalues(rows), allowed, "spectrum")
        assert not (value < 0).any(), "an eigenvalue below 0"
        assert not (value.diff(dim=-1) > 0).any(), "eigenvalues are not descending"
        return
    assert value.shape == case.batch
    exact = _entropy(rows)
    allowed = VALUE[dtype] * trace * (1 + trace.clamp_min(1e-300).log().abs()) + SUBNORMAL
    if others is None:
        _assert_close(value.detach(), exact, allowed, "entropy")
        _check_range(case, rows, value)
        return
    if entropy is not None:
        _assert_close(entropy.detach(), exact, allowed, "entropy")
        _check_range(case, rows, entropy)
    loss = -_entropy(rows) - case.beta * _cosine(rows, others)
    _assert_close(value.detach(), loss, allowed + VALUE[dtype] * abs(case.beta), "loss")


def _check_range(case: Case, rows: Rows, entropy: Tensor) -> None:
    """0 <= S <= log m for a rho of trace 1."""
    one = (rows.trace - 1).abs() <= torch.finfo(result_dtype(case.dtype)).eps
    inside = (entropy >= 0) & (entropy <= math.log(case.m) * (1 + 1e-6))
    assert (inside | ~one | ~rows.valid).all(), f"outside of [0, log {case.m}]: {entropy}"


def _check_gradient(
    case: Case, rows: Rows, grad: Tensor | None, exact: Tensor, scale: Tensor, what: str
) -> None:
    """grad against `exact`, both times the lengths of the rows; scale (...) is of the error."""
    assert grad is not None, f"{what}: no gradient"
    assert grad.shape == exact.shape, f"{what}: shape {tuple(grad.shape)}"
    assert grad.dtype == case.dtype, f"{what}: dtype {grad.dtype}"
    grad = grad.as_subclass(Tensor).double()
    # An absent row may have its 0 where the sample is not finite, too.
    absent = (rows.p == 0).unsqueeze(-1) & (grad == 0)
    exact = torch.where(absent, 0.0, exact)
    nan = exact.isnan()
    assert _agree(torch.where(nan, grad, 0.0), torch.where(nan, exact, 0.0)).all(), (
        f"{what}: {grad}"
    )
    zero_rows = (rows.is_zero | (rows.p == 0).unsqueeze(-1)) & ~nan
    if what != "gradient of z2":
        assert (torch.where(zero_rows, grad, 0.0) == 0).all(), f"{what}: a zero row has one"
    info = torch.finfo(case.dtype)
    allowed = GRADIENT[result_dtype(case.dtype)] * scale + SUBNORMAL
    # Beyond the range of the dtype an infinity is right.
    largest = exact.abs() + allowed[..., None, None]
    in_range = (largest / rows.length < 0.01 * info.max) & ~nan
    rounding = ROUNDING.get(case.dtype, 0.0) * exact.abs() + info.tiny * rows.length
    error = torch.where(in_range, (grad * rows.length - exact).abs() - rounding, 0.0).clamp_min(0)
    assert not error.isnan().any(), f"{what}: NaN in {grad}"
    worst = error.flatten(-2).norm(dim=-1)
    assert (worst <= allowed).all(), f"{what}: |error| {worst}, allowed {allowed}, got {grad}"


def _coefficients(case: Case) -> Tensor:
    """(...): the gradient that arrives at each sample's result."""
    g = generator(case.seed + 7)
    return torch.randn(case.batch, generator=g, dtype=result_dtype(case.dtype))


def _backward(case: Case, arguments: Arguments, result: object) -> list[Tensor | None]:
    value, _ = _loss_and_entropy(result)
    if case.function == "spectrum":
        value = value.square().sum(-1)
    grad_output = _coefficients(case).to(value.device)
    leaves = [tensor for tensor in arguments.tensors if tensor.requires_grad]
    return list(torch.autograd.grad(value, leaves, grad_output, allow_unused=True))


def _check_gradients(
    case: Case, arguments: Arguments, rows: Rows, others: Rows | None, result: object
) -> int:
    grads = _backward(case, arguments, result)
    coefficients = _coefficients(case).double()
    scale = _gradient_scale(case, rows) * coefficients.abs()
    exact = _exact_gradients(case, rows, others)
    for index, (grad_z, own) in enumerate(zip(exact, (rows, others), strict=False)):
        assert own is not None
        grad_z = grad_z * coefficients[..., None, None]
        _check_gradient(case, own, grads[index], grad_z, scale, f"gradient of z{index + 1}")
    if arguments.weights is not None and arguments.weights.requires_grad:
        _check_weights_gradient(case, arguments.weights, grads[-1], rows)
    return len(grads)


def _check_weights_gradient(case: Case, weights: Tensor, grad: Tensor | None, rows: Rows) -> None:
    assert grad is not None
    assert grad.shape == weights.shape
    assert grad.dtype == weights.dtype
    if rows.valid.all():
        assert not grad.isnan().any(), f"gradient of weights: {grad}"
    if weights.shape == rows.p.shape:
        absent = (weights == 0) & (grad == 0)
        assert (grad.isnan() | absent)[~rows.valid].all(), f"gradient of weights: {grad}"
        assert not grad[rows.valid].isnan().any(), f"gradient of weights: {grad}"
        if case.normalize and weights.dtype == torch.float32 and grad.isfinite().all():
            # A factor that all weights have in common changes nothing.
            along = (weights.detach().double() * grad.double()).sum(-1).abs()
            allowed = GRADIENT[torch.float32] * (1 + math.log(case.m)) * _coefficients(case).abs()
            assert (along <= allowed).all(), f"gradient of weights: {grad}, along them {along}"


def _without_data(case: Case, arguments: Arguments) -> Outcome:
    """On the meta device, or fake: shapes and dtypes alone, of the gradients too."""

    fake = FakeTensorMode()
    move = fake.from_tensor if case.mode == "fake" else partial(torch.Tensor.to, device="meta")

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        requires_grad = case.requires_grad and tensor.is_floating_point()
        return move(tensor.detach().as_subclass(Tensor)).requires_grad_(requires_grad)

    own = Arguments(*(moved(t) for t in vars(arguments).values()))
    with fake if case.mode == "fake" else nullcontext():
        result = _invoke(case, own)
        value, _ = _loss_and_entropy(result)
        wanted = (*case.batch, case.m) if case.function == "spectrum" else case.batch
        assert value.shape == wanted, f"{case.mode}: shape {tuple(value.shape)}"
        assert value.dtype == result_dtype(case.dtype)
        assert value.device == own.z.device
        if not case.requires_grad:
            return Outcome("shape")
        grads = _backward(case, own, result)
        leaves = [tensor for tensor in own.tensors if tensor.requires_grad]
        for tensor, grad in zip(leaves, grads, strict=True):
            assert grad is not None
            assert (grad.shape, grad.dtype) == (tensor.shape, tensor.dtype)
    return Outcome("shape", gradients=len(grads))


def check(case: Case) -> Outcome:
    """Run a case; AssertionError if it gives anything that it must not."""
    arguments = _make_arguments(case)
    if case.fault != "none":
        call, exception, named = _faults(case)[case.fault]
        _check_error(lambda: call(case, arguments), exception, *named)
        return Outcome("error")
    if case.mode in ("meta", "fake"):
        return _without_data(case, arguments)
    before = [_bytes(tensor) for tensor in arguments.tensors]
    is_needed = any(t.requires_grad for t in arguments.tensors)
    if case.mode == "after_inference" and is_needed:
        # A rule of torch, in its words.
        _check_error(lambda: _invoke(case, arguments), RuntimeError, "Inference tensors")
        return Outcome("error")
    result = _invoke(case, arguments)
    rows = _rows(case, arguments.z, arguments.weights)
    others = None if arguments.other is None else _rows(case, arguments.other, arguments.weights)
    _check_value(case, rows, others, result)
    value, _ = _loss_and_entropy(result)
    assert value.requires_grad == is_needed
    if case.call == "threads":
        _check_threads(case, arguments, value)
    gradients = 0
    if is_needed and not value.isinf().any():  # of an infinity torch's own gradients are NaN
        gradients = _check_gradients(case, arguments, rows, others, result)
    for tensor, bytes_before in zip(arguments.tensors, before, strict=True):
        assert torch.equal(_bytes(tensor), bytes_before), "an argument was written to"
    valid = rows.valid if others is None else rows.valid & others.valid
    return Outcome("value", int((~valid).sum()), gradients)
