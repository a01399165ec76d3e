"""The operators inside torch: opcheck, compile, export, vmap, autocast, modules, threads.

`torch.func.grad` is not here: torch gives no operator registered with `register_autograd` one.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from cases import (
    DTYPES,
    GRADIENT_FLOAT64,
    GRADIENT_OF_EIGH,
    GRADIENT_WELL_CONDITIONED,
    SPECTRA,
    VALUE,
    VALUE_DEFICIENT,
    absolute_error,
    assert_value,
    eigh_error,
    gaussian,
    generator,
    gradient,
    relative_error,
    result_dtype,
    spectrum_case,
    views,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from vne_kernels import DoELoss, VNEntropy, doe_loss, reference, spectrum, vn_entropy
from vne_kernels._core import ops

FLOAT32, FLOAT64 = torch.float32, torch.float64
EPS = 1e-12


# ---------------------------------------------------------------------------------------------
# opcheck: one builder of arguments per operator; (z, weights, method) -> arguments
# ---------------------------------------------------------------------------------------------


def other_view(z: Tensor) -> Tensor:
    """A leaf like z, so that the second view has a gradient of its own."""
    return (2 * z.roll(1, dims=-1)).detach().requires_grad_(z.requires_grad)


def spectrum_backward_arguments(z: Tensor, weights: Tensor | None, method: str) -> tuple:
    with torch.no_grad():
        eig_val, vectors = torch.ops.vne_kernels.spectrum_eigh(z, weights, True, EPS)
    return (torch.ones_like(eig_val), z, vectors, weights, True, EPS)


def doe_loss_backward_arguments(z: Tensor, weights: Tensor | None, method: str) -> tuple:
    with torch.no_grad():
        entropy, cosine, grad, stats = torch.ops.vne_kernels.doe_loss_grad(
            z, other_view(z), method, EPS
        )
    return (torch.ones_like(entropy), torch.ones_like(cosine), z, other_view(z), grad, stats)


def density_backward_arguments(z: Tensor, weights: Tensor | None, method: str) -> tuple:
    with torch.no_grad():
        rho = torch.ops.vne_kernels.density(z, weights, True, EPS)
    return (rho, z, weights, True, EPS)


def density_of(z: Tensor, weights: Tensor | None) -> Tensor:
    """A leaf like z."""
    with torch.no_grad():
        rho = torch.ops.vne_kernels.density(z, weights, True, EPS)
    return rho.requires_grad_(z.requires_grad)


def functional_arguments(name: str, z: Tensor, weights: Tensor | None, method: str) -> tuple:
    """Of a function of the spectrum; its own parameters are numbers."""
    given = {"z": z, "weights": weights, "normalize": True, "method": method, "eps": EPS}
    return tuple(given.get(argument, 0.5) for argument in ops.OPERATORS[name].arguments)


OPERATORS: dict[str, Callable[[Tensor, Tensor | None, str], tuple]] = {
    "vn_entropy_hvp": lambda z, w, method: (z, torch.ones_like(z), w, w, True, EPS),
    "spectrum": lambda z, w, method: (z, w, True, EPS),
    "spectrum_eigh": lambda z, w, method: (z, w, True, EPS),
    "spectrum_backward": spectrum_backward_arguments,
    "doe_loss": lambda z, w, method: (z, other_view(z), method, EPS),
    "doe_loss_grad": lambda z, w, method: (z, other_view(z), method, EPS),
    "doe_loss_backward": doe_loss_backward_arguments,
    "cosine": lambda z, w, method: (z, other_view(z), EPS),
    "scaled_gradient": lambda z, w, method: (
        z.new_ones(z.shape[:-2]),
        torch.ones_like(z),
        z.detach().requires_grad_(z.requires_grad),
    ),
    "density": lambda z, w, method: (z, w, True, EPS),
    "density_backward": density_backward_arguments,
    "density_entropy": lambda z, w, method: (density_of(z, w), method),
    "density_entropy_grad": lambda z, w, method: (density_of(z, w), method),
}
OF_MATRICES: dict[str, Callable[[Tensor, Tensor | None], tuple]] = {
    "matrix_entropy": lambda z, w: (
        density_of(z, w),
        None if w is None else z.new_ones(z.shape[:-2] + z.shape[-1:]).to(density_of(z, w).dtype),
        "tsallis",
        1.7,
    ),
    "parts_entropy": lambda z, w: (density_of(z, w), 1, z.shape[-1], 0.5, 2.0, -1.0),
    "relative_entropy": lambda z, w: (density_of(z, w), density_of(other_view(z), w)),
}
OPERATORS |= {
    name: lambda z, w, method, make=make: make(z, w)
    for function, make in OF_MATRICES.items()
    for name in (function, f"{function}_grad")
}
OPERATORS |= {
    name: partial(functional_arguments, name)
    for functional in ops.FUNCTIONALS
    for name in (functional, f"{functional}_grad")
}
NOT_DIFFERENTIABLE = {name for name, operator in ops.OPERATORS.items() if operator.once}
"""Gradients of gradients, and `cosine`."""


def test_every_operator_has_an_opcheck_case() -> None:
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.split("::")[1] for name in names if name.startswith("vne_kernels::")}
    ours = {name.split(".")[0] for name in ours}
    # What tells of a build, and what serves backends: no caller of the package meets these.
    ours -= {"cuda_build_info", "pole_table"} | {f"check_{name}" for name in ours}
    assert ours == set(OPERATORS) == set(ops.OPERATORS)


@pytest.mark.parametrize(
    ("shape", "dtype", "weighted", "needs_grad", "method"),
    [
        ((5, 8), FLOAT32, False, True, "eigh"),
        ((2, 8, 5), FLOAT64, True, False, "eigh"),
        ((3, 5, 8), FLOAT32, True, True, "poles"),
        ((0, 5, 8), FLOAT32, False, False, "poles"),
        ((5, 8), torch.bfloat16, False, False, "auto"),
        ((2, 8, 5), torch.float16, False, True, "auto"),
    ],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weighted: bool,
    needs_grad: bool,
    method: str,
) -> None:
    z = torch.randn(shape, generator=generator(0)).to(dtype)
    weights = torch.full(shape[:-1], 1 / shape[-2], dtype=dtype) if weighted else None
    z.requires_grad_(needs_grad and name not in NOT_DIFFERENTIABLE)
    operator = getattr(torch.ops.vne_kernels, name).default
    torch.library.opcheck(operator, OPERATORS[name](z, weights, method))


# ---------------------------------------------------------------------------------------------
# torch.compile and torch.export
# ---------------------------------------------------------------------------------------------


def loss_of_a_network(z: Tensor, method: str) -> Tensor:
    """Every public function, between operations that a compiler would fuse."""
    u = torch.tanh(z) + 0.1 * z
    p = torch.softmax(z.sum(dim=-1), dim=-1)
    total = vn_entropy(u, method=method) + vn_entropy(u, weights=p, method=method)
    total = total + doe_loss(u, z.sin(), beta=2.0, method=method)
    return (total * 3 + spectrum(u).square().sum(dim=-1)).sum()


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_graph_break(backend: str, method: str) -> None:
    compiled = torch.compile(
        partial(loss_of_a_network, method=method), fullgraph=True, dynamic=True, backend=backend
    )
    for shape in ((6, 9), (12, 20), (20, 12)):
        z = gaussian(*shape, generator(0))
        assert_value(compiled(z), loss_of_a_network(z, method), VALUE[FLOAT64])
        expected = gradient(loss_of_a_network, z, method=method)
        assert relative_error(gradient(compiled, z), expected) <= GRADIENT_FLOAT64


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_dynamic_shapes_compiles_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vn_entropy, fullgraph=True, dynamic=True, backend=counter)
    compiled(gaussian(5, 8, generator(0)))
    after_the_first = counter.frame_count
    for n, d in ((6, 9), (7, 11), (40, 64), (100, 128)):
        z = gaussian(n, d, generator(0))
        assert_value(compiled(z), reference.oracle(z), VALUE[FLOAT64])
    assert counter.frame_count == after_the_first


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_modules_follows_beta() -> None:
    z1, z2 = views("iid", (6, 9), FLOAT32)
    module = DoELoss(beta=1.0)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for beta in (1.0, 4.0):
        module.beta = beta
        assert_value(compiled(z1, z2), reference.oracle_doe(z1, z2, beta), VALUE[FLOAT32])


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_under_autocast() -> None:
    model = nn.Sequential(nn.Linear(9, 5), VNEntropy())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 9, generator=generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_value(compiled(x), model(x).detach(), VALUE[FLOAT32])


class Features(nn.Module):
    """What would be exported: a monitor of a network's features."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.projector = nn.Linear(8, 5)
        self.entropy = VNEntropy(method=method)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projector(x)
        return self.entropy(z), spectrum(z)


def test_export_with_a_dynamic_batch(method: str) -> None:
    model = Features(method)
    n = torch.export.Dim("n", min=2, max=512)
    example = (torch.randn(32, 8, generator=generator(0)),)
    program = torch.export.export(model, example, dynamic_shapes=({0: n},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("vne_kernels" in target for target in targets)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    exported = torch.export.load(buffer).module()
    x = torch.randn(77, 8, generator=generator(1))
    for out, expected in zip(exported(x), model(x), strict=True):
        assert_value(out, expected.detach(), VALUE[FLOAT32])


# ---------------------------------------------------------------------------------------------
# vmap
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
@pytest.mark.parametrize("function", ["vn_entropy", "spectrum", "doe_loss"])
def test_vmap_over_the_batch(function: str, in_dim: int, method: str) -> None:
    call = {
        "vn_entropy": partial(vn_entropy, method=method),
        "spectrum": spectrum,
        "doe_loss": lambda z: doe_loss(z, z.sin(), method=method),
    }[function]
    z = spectrum_case("iid", (4, 6, 9), FLOAT64)
    mapped = torch.vmap(call, in_dims=in_dim)(z.movedim(0, in_dim))
    assert_value(mapped, call(z), VALUE[FLOAT64])


def test_vmap_in_a_vmap(method: str) -> None:
    z = spectrum_case("iid", (2, 3, 6, 9), FLOAT64)
    entropy = partial(vn_entropy, method=method)
    assert_value(torch.vmap(torch.vmap(entropy))(z), entropy(z), VALUE[FLOAT64])


def test_vmap_of_one_view_or_of_the_weights_alone(method: str) -> None:
    z = spectrum_case("iid", (6, 9), FLOAT64)
    others = spectrum_case("relu", (4, 6, 9), FLOAT64)
    losses = torch.vmap(partial(doe_loss, method=method), in_dims=(None, 0))(z, others)
    expected = torch.stack([doe_loss(z, other, method=method) for other in others])
    assert_value(losses, expected, VALUE[FLOAT64])
    weights = torch.rand(4, 6, generator=generator(1), dtype=FLOAT64)
    weights = weights / weights.sum(-1, keepdim=True)
    entropies = torch.vmap(lambda p: vn_entropy(z, weights=p, method=method))(weights)
    assert_value(entropies, reference.oracle(z.expand(4, 6, 9), weights=weights), VALUE[FLOAT64])


def test_vectorized_jacobian(method: str) -> None:
    """vmap over the backward."""
    z = spectrum_case("iid", (3, 6, 9), FLOAT64)
    entropy = partial(vn_entropy, method=method)
    jacobian = torch.autograd.functional.jacobian(entropy, z, vectorize=True)
    exact = reference.oracle_grad(z)
    for i in range(3):
        assert relative_error(jacobian[i, i], exact[i]) <= GRADIENT_FLOAT64
        assert (jacobian[i, (i + 1) % 3] == 0).all()
    of_eigenvalues = torch.autograd.functional.jacobian(spectrum, z[0], vectorize=True)
    of_entropy = torch.tensordot(-spectrum(z[0]).log() - 1, of_eigenvalues, dims=1)
    assert relative_error(of_entropy, exact[0]) <= GRADIENT_FLOAT64


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 5, 5)])
def test_hessian_vector_product(shape: tuple[int, ...], method: str) -> None:
    """Against central differences of the exact gradient."""
    z = spectrum_case("iid", shape, FLOAT64)
    direction = torch.randn(shape, generator=generator(5), dtype=FLOAT64)
    entropy = partial(vn_entropy, method=method)
    _, product = torch.autograd.functional.vhp(lambda z: entropy(z).sum(), z, direction)
    step = 1e-5 * direction
    slope = (reference.oracle_grad(z + step) - reference.oracle_grad(z - step)) / 2e-5
    assert relative_error(product, slope) <= 1e-7


def test_functional_call_per_sample_entropy(method: str) -> None:
    """An ensemble: parameters stacked, one entropy each."""
    models = [nn.Linear(9, 5, dtype=FLOAT64) for _ in range(3)]
    params, _ = torch.func.stack_module_state(models)
    x = gaussian(16, 9, generator(0))

    def entropy(params: dict[str, Tensor]) -> Tensor:
        return vn_entropy(torch.func.functional_call(models[0], params, (x,)), method=method)

    expected = torch.stack([reference.oracle(model(x)) for model in models])
    assert_value(torch.vmap(entropy)(params), expected, VALUE[FLOAT64])


# ---------------------------------------------------------------------------------------------
# Autocast and matrix-product precision
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype, autocast: torch.dtype, method: str) -> None:
    z = spectrum_case("relu", (65, 64), dtype)
    plain = vn_entropy(z, method=method)
    with torch.autocast("cpu", dtype=autocast):
        cast = vn_entropy(z, method=method)
        eig_val = spectrum(z)
        loss = doe_loss(z, z.sin(), method=method)
        grad = gradient(vn_entropy, z, method=method)
    assert cast.dtype == eig_val.dtype == loss.dtype == result_dtype(dtype)
    assert torch.equal(cast, plain)
    assert grad.dtype == dtype
    assert torch.equal(grad, gradient(vn_entropy, z, method=method))


def test_autocast_behind_a_linear_layer(method: str) -> None:
    """bfloat16 arrives, S is float32, the layer's float32 weights get their gradient."""
    layer = nn.Linear(32, 24)
    x = torch.randn(17, 32, generator=generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
        s = vn_entropy(z, method=method)
        components = doe_loss(z, layer(-x), method=method, return_components=True)
    assert z.dtype == torch.bfloat16
    assert s.dtype == components.loss.dtype == torch.float32
    assert_value(s.detach(), reference.oracle(z.detach()), VALUE[torch.bfloat16])
    assert_value(components.entropy.detach(), s.detach(), VALUE[torch.bfloat16])
    z.retain_grad()
    s.backward(retain_graph=True)
    assert z.grad.dtype == torch.bfloat16
    assert relative_error(z.grad, reference.oracle_grad(z.detach())) <= 2.0**-8
    weight_grad = layer.weight.grad.clone()
    assert weight_grad.dtype == torch.float32
    assert weight_grad.norm() > 0
    components.loss.backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.usefixtures("bf16_matmul")
@pytest.mark.parametrize("name", SPECTRA)
def test_float32_matmul_precision_medium_changes_no_accuracy(name: str, method: str) -> None:
    z = spectrum_case(name, (128, 512), FLOAT32)
    assert_value(vn_entropy(z, method=method), reference.oracle(z), VALUE_DEFICIENT[FLOAT32])
    error = absolute_error(gradient(vn_entropy, z, method=method), reference.oracle_grad(z))
    torch.set_float32_matmul_precision("highest")  # the yardstick itself uses torch's products
    allowed = GRADIENT_OF_EIGH * eigh_error(z) + GRADIENT_WELL_CONDITIONED * z.norm() * 1e-6
    assert error <= allowed


# ---------------------------------------------------------------------------------------------
# Modules, modes, threads
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        VNEntropy(normalize=False, method="poles", eps=1e-6),
        DoELoss(beta=3.5, method="poles", gather_distributed=True),
    ],
)
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_copies_of_modules_keep_their_options(module: nn.Module, copied: Callable) -> None:
    options = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    assert options
    twin = copied(module)
    assert {k: v for k, v in vars(twin).items() if not k.startswith("_")} == options
    z = spectrum_case("iid", (6, 9), FLOAT64)
    arguments = (z, z.sin()) if isinstance(module, DoELoss) else (z,)
    assert torch.equal(twin(*arguments), module(*arguments))


def test_state_dict_of_a_model_with_the_loss_inside() -> None:
    model = nn.Sequential(nn.Linear(9, 5), VNEntropy())
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    twin = nn.Sequential(nn.Linear(9, 5), VNEntropy())
    twin.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(6, 9, generator=generator(0))
    assert torch.equal(twin(x), model(x))
    assert model.to(FLOAT64)(x.double()).dtype == FLOAT64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_the_value_does_not_depend_on_who_needs_a_gradient(
    name: str, dtype: torch.dtype, method: str
) -> None:
    z = spectrum_case(name, (17, 33), dtype)
    plain = vn_entropy(z, method=method)
    with_grad = vn_entropy(z.clone().requires_grad_(), method=method)
    assert with_grad.requires_grad
    with torch.no_grad():
        without = vn_entropy(z.clone().requires_grad_(), method=method)
    with torch.inference_mode():
        inference = vn_entropy(z.clone(), method=method)
    assert not without.requires_grad
    torch.testing.assert_close(without, plain, rtol=0, atol=0)
    torch.testing.assert_close(inference, plain, rtol=0, atol=0)
    assert_value(with_grad.detach(), plain, VALUE_DEFICIENT[dtype])


def test_inference_mode_of_the_rest() -> None:
    with torch.inference_mode():
        z = spectrum_case("iid", (2, 6, 9), FLOAT64)
        loss, eig_val = doe_loss(z, z.sin()), spectrum(z)
    assert loss.is_inference()
    assert_value(torch.special.entr(eig_val).sum(dim=-1), reference.oracle(z), VALUE[FLOAT64])


def test_threads(method: str) -> None:
    """Eight threads, each with inputs of its own: value and gradient as in one thread."""
    inputs = [spectrum_case("relu", (3, 24 + i, 40), FLOAT32, seed=i) for i in range(16)]

    def both(z: Tensor) -> tuple[Tensor, Tensor]:
        return vn_entropy(z, method=method), gradient(vn_entropy, z, method=method)

    alone = [both(z) for z in inputs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(both, inputs * 4))
    for (s, grad), (s_alone, grad_alone) in zip(together, alone * 4, strict=True):
        assert torch.equal(s, s_alone)
        assert torch.equal(grad, grad_alone)


def test_default_dtype_does_not_matter(method: str) -> None:
    z = spectrum_case("iid", (17, 33), FLOAT32)
    plain = vn_entropy(z, method=method)
    torch.set_default_dtype(FLOAT64)
    try:
        assert torch.equal(vn_entropy(z, method=method), plain)
    finally:
        torch.set_default_dtype(FLOAT32)
