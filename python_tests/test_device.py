"""What only a device can show: results where they were asked for, graphs, streams, threads, memory.

`--backend` chooses the device: on `cuda` the public functions are called with CUDA tensors. On the
CPU the same tests run wherever they mean something, so that they are known to be right themselves;
the others are skipped with a reason. The oracle is always float64 on the CPU.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import backends
import pytest
import torch
from cases import (
    AVERAGED_M,
    DTYPES,
    FEW_SHAPES,
    GRADIENT_FLOAT64,
    GRADIENT_OF_EIGH,
    GRADIENT_OF_EIGH_TINY,
    GRADIENT_WELL_CONDITIONED,
    LAYOUT_BASE_SHAPE,
    LAYOUTS,
    METHODS,
    ROUNDING,
    SINGLE_DRAW,
    SPECTRA,
    VALUE,
    VALUE_DEFICIENT,
    absolute_error,
    assert_value,
    eigh_error,
    generator,
    gradient_floor,
    gradient_scale,
    is_well_conditioned,
    relative_error,
    result_dtype,
    spectrum_case,
    views,
)
from test_value import EIGENVALUE_TOLERANCE, eigenvalues, value_tolerance, weights_case
from torch import Tensor, nn

from vne_kernels import DoELoss, VNEntropy, doe_loss, reference, renyi_entropy, spectrum, vn_entropy

FLOAT32, FLOAT64 = torch.float32, torch.float64
LARGE_SHAPES = ((300, 301), (301, 300), (32, 4096))
"""Beyond what one block sweeps in registers, on either side; a Gram matrix summed in parts."""

BIT_SHAPES = ((17, 33), (128, 512), (512, 128), (300, 310), (4, 64, 256))
"""Where results are compared bit for bit."""

Work = Callable[[Tensor], tuple[Tensor, ...]]  # an input -> value and gradients


def differentiate(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The value and the gradients of its sum."""
    leaves = [z.detach().requires_grad_() for z in inputs]
    value = function(*leaves)
    return (value.detach(), *torch.autograd.grad(value.sum(), leaves))


def entropy_work(method: str) -> Work:
    return partial(differentiate, partial(vn_entropy, method=method))


def weighted_work(z: Tensor) -> tuple[Tensor, ...]:
    p = torch.softmax(z[..., 0], dim=-1)
    return differentiate(lambda z, p: vn_entropy(z, weights=p, method="poles"), z, p)


def doe_work(z: Tensor) -> tuple[Tensor, ...]:
    return differentiate(DoELoss(beta=2.5, method="poles"), z, 2 * z.flip(-1))


def entropy_of_density(z: Tensor, weights: Tensor | None, method: str) -> Tensor:
    """S by the stages that processes share, of one part that is the whole."""
    rho = torch.ops.vne_kernels.density(z, weights, True, 1e-12)
    return torch.ops.vne_kernels.density_entropy_grad(rho, method)[0]


def density_work(z: Tensor) -> tuple[Tensor, ...]:
    """Of the first features: rho is as large as they are many."""
    p = torch.softmax(z[..., 0], dim=-1)
    few = z[..., :70]
    cosines = torch.ops.vne_kernels.cosine(few, 2 * few.flip(-1), 1e-12)
    return *differentiate(lambda z, p: entropy_of_density(z, p, "poles"), few, p), *cosines


WORK: dict[str, Work] = {
    "poles": entropy_work("poles"),
    "eigh": entropy_work("eigh"),
    "weights": weighted_work,
    "spectrum": partial(differentiate, spectrum),
    "doe_loss": doe_work,
    "density": density_work,
}
OWN_KERNELS = ("poles", "weights", "doe_loss", "density")
"""Those of WORK without a routine of cuSOLVER, of which none is documented for graph capture."""


def inputs(
    count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = FLOAT32
) -> list[Tensor]:
    return [spectrum_case("relu", shape, dtype, seed).to(device) for seed in range(count)]


def assert_same_bits(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


# ---------------------------------------------------------------------------------------------
# Against float64
# ---------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda z: z,
    "transposed": lambda z: z.mT.contiguous().mT,
    "sliced": lambda z: nn.functional.pad(z, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "offset": lambda z: nn.functional.pad(z.flatten(), (1, 0))[1:].view(z.shape),
}
"""The same values in another layout; "offset" is contiguous, and not aligned for vector loads."""


def typical_eigh_error(z: Tensor, **options: object) -> float:
    """The largest error of `eigh` over reflections of the features: rounding is lucky at times."""
    if min(z.shape[-2:]) > AVERAGED_M:
        return eigh_error(z.float(), **options)
    reflected, g = [z.float()], generator(0)
    for _ in range(8):
        v = nn.functional.normalize(torch.randn(z.shape[-1], generator=g, dtype=FLOAT64), dim=0)
        reflected.append((z.double() - 2 * (z.double() @ v)[..., None] * v).float())
    return SINGLE_DRAW * max(eigh_error(each, **options) for each in reflected)


def gradient_tolerance(z: Tensor, exact: Tensor, **options: object) -> float:
    """As in test_gradient.py: the error of `eigh` by its factor, and what rounding brings."""
    size = float(exact.norm())
    if z.dtype == FLOAT64:
        return GRADIENT_FLOAT64 * max(gradient_scale(z), size)
    factor = GRADIENT_OF_EIGH_TINY if min(z.shape[-2:]) <= 3 else GRADIENT_OF_EIGH
    share = GRADIENT_WELL_CONDITIONED + ROUNDING.get(z.dtype, 0.0)
    return factor * typical_eigh_error(z, **options) + share * size + gradient_floor(z)


def check_entropy(
    device: torch.device,
    name: str,
    z: Tensor,
    method: str,
    *,
    view: str = "contiguous",
    weights: Tensor | None = None,
    normalize: bool = True,
) -> None:
    """S, alone and with dS/dz, on the device, of an input of the spectrum `name`."""
    options = {"weights": weights, "normalize": normalize}
    there = VIEWS[view](z.to(device)).detach()
    p = None if weights is None else weights.to(device)
    alone = vn_entropy(there, method=method, weights=p, normalize=normalize)
    s = vn_entropy(there.requires_grad_(), method=method, weights=p, normalize=normalize)
    assert alone.device == s.device == there.device
    assert alone.dtype == s.dtype == result_dtype(z.dtype)
    lacks_rank = not is_well_conditioned(z) or (weights is not None and bool((weights == 0).any()))
    tolerance = VALUE_DEFICIENT[z.dtype] if lacks_rank else value_tolerance(name, z.dtype)
    expected = reference.oracle(z, **options)
    assert_value(alone.cpu(), expected, tolerance)
    assert_value(s.detach().cpu(), expected, tolerance)

    exact = reference.oracle_grad(z, **options)
    largest = exact.abs().max().clamp_min(1e-6)
    scale = 2.0 ** float(10 - largest.log2().ceil())  # as GradScaler does: float16 is narrow
    (grad,) = torch.autograd.grad(s, there, torch.full_like(s, scale))
    assert grad.device == there.device
    assert grad.dtype == z.dtype
    error = absolute_error(grad.cpu().double() / scale, exact)
    allowed = gradient_tolerance(z, exact, **options)
    assert error <= allowed, f"the gradient is {error:.3g} off, {allowed:.3g} is allowed"


def check_spectrum(device: torch.device, z: Tensor) -> None:
    """Eigenvalues, and by their gradient that of the entropy."""
    there = z.to(device).detach().requires_grad_()
    eig_val = spectrum(there)
    assert eig_val.device == there.device
    torch.testing.assert_close(
        eig_val.detach().cpu().double(), eigenvalues(z), rtol=0, atol=EIGENVALUE_TOLERANCE[z.dtype]
    )
    (grad,) = torch.autograd.grad(torch.special.entr(eig_val).sum(), there)
    assert grad.device == there.device
    tolerance = GRADIENT_FLOAT64 if z.dtype == FLOAT64 else GRADIENT_WELL_CONDITIONED
    assert relative_error(grad.cpu(), reference.oracle_grad(z)) <= tolerance


def check_doe_loss(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, method: str
) -> None:
    z1, z2 = views("iid", shape, dtype)
    loss = partial(doe_loss, beta=2.5, method=method)
    value, *grads = differentiate(loss, z1.to(device), z2.to(device))
    assert value.device.type == device.type
    assert_value(value.cpu(), reference.oracle_doe(z1, z2, 2.5), VALUE[dtype])
    leaf1, leaf2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    of_cosine = torch.autograd.grad(
        2.5 * reference.oracle_cosine(leaf1, leaf2).sum(), [leaf1, leaf2]
    )
    exact = (-reference.oracle_grad(z1) - of_cosine[0], -of_cosine[1])
    tolerance = GRADIENT_FLOAT64 if dtype == FLOAT64 else GRADIENT_WELL_CONDITIONED
    for grad, want in zip(grads, exact, strict=True):
        assert grad.device.type == device.type
        assert grad.dtype == dtype
        assert relative_error(grad.cpu(), want) <= tolerance + ROUNDING.get(dtype, 0.0)


ON_A_DEVICE = pytest.mark.device_only("test_emulation.py and the table run the emulated kernels")
SANITIZE = pytest.mark.sanitize


def marked(mark: pytest.MarkDecorator, shapes: list[tuple[int, ...]], *dtypes: torch.dtype) -> list:
    return [pytest.param(shape, dtype, marks=mark) for shape in shapes for dtype in dtypes]


@ON_A_DEVICE
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, torch.bfloat16])
@pytest.mark.parametrize("shape", [*FEW_SHAPES, *LARGE_SHAPES])
@pytest.mark.parametrize("name", ["iid", "relu", "rank3", "collapse"])
def test_entropy(
    name: str, shape: tuple[int, int], dtype: torch.dtype, method: str, device: torch.device
) -> None:
    check_entropy(device, name, spectrum_case(name, shape, dtype), method)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    marked(ON_A_DEVICE, [(17, 33), (128, 512), (200, 100)], FLOAT32, FLOAT64)
    + marked(SANITIZE, [(20, 34), (2, 70, 40)], FLOAT32),
)
def test_spectrum(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_spectrum(device, spectrum_case("iid", shape, dtype))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    marked(
        ON_A_DEVICE,
        [(17, 33), (33, 17), (128, 512), (3, 40, 90)],
        *(FLOAT32, FLOAT64, torch.bfloat16),
    )
    + marked(SANITIZE, [(20, 34), (2, 34, 20)], FLOAT32, torch.bfloat16),
)
def test_doe_loss(
    shape: tuple[int, ...], dtype: torch.dtype, method: str, device: torch.device
) -> None:
    check_doe_loss(device, shape, dtype, method)


def check_density(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, method: str
) -> None:
    """S and its gradients by way of rho, with weights of which some are 0."""
    z = spectrum_case("iid", shape, dtype)
    weights = weights_case("zeros", shape[:-1], result_dtype(dtype))
    value, grad, grad_weights = differentiate(
        partial(entropy_of_density, method=method), z.to(device), weights.to(device)
    )
    assert value.device.type == device.type
    assert grad.dtype == dtype
    assert_value(value.cpu(), reference.oracle(z, weights=weights), VALUE_DEFICIENT[dtype])
    exact = reference.oracle_grad(z, weights=weights)
    assert absolute_error(grad.cpu(), exact) <= gradient_tolerance(z, exact, weights=weights)
    exact_grad_weights = reference.oracle_weights_grad(z, weights=weights, relative=False)
    tolerance = GRADIENT_FLOAT64 if dtype == FLOAT64 else GRADIENT_WELL_CONDITIONED
    assert relative_error(grad_weights.cpu(), exact_grad_weights) <= tolerance
    z1, z2 = (z.to(device) for z in views("iid", shape, dtype))
    cosine, _ = torch.ops.vne_kernels.cosine(z1, z2, 1e-12)
    assert_value(cosine.cpu(), reference.oracle_cosine(z1.cpu(), z2.cpu()), VALUE[dtype])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    marked(ON_A_DEVICE, [(3, 33, 17), (2, 90, 65), (600, 200)], FLOAT32, FLOAT64, torch.bfloat16)
    + marked(SANITIZE, [(34, 20), (2, 90, 65)], FLOAT32, torch.bfloat16),
)
def test_density(
    shape: tuple[int, ...], dtype: torch.dtype, method: str, device: torch.device
) -> None:
    check_density(device, shape, dtype, method)


@ON_A_DEVICE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, dtype: torch.dtype, method: str, device: torch.device) -> None:
    z = spectrum_case("iid", (2, 24, 40), dtype)
    check_entropy(device, "iid", z, method, view=view)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_table_reaches_the_gpu_in_the_layout_of_its_inputs(
    name: str, device: torch.device
) -> None:
    """`--backend cuda` copies CPU tensors: neither strides nor alignment may be lost on the way."""
    tensor = LAYOUTS[name](torch.arange(192.0).view(LAYOUT_BASE_SHAPE))
    there = backends.copy_as_it_lies(tensor, device)
    assert there.device.type == device.type
    assert there.stride() == tensor.stride()
    assert there.data_ptr() % 16 == 4 * tensor.storage_offset() % 16
    assert torch.equal(there.cpu(), tensor)


# ---------------------------------------------------------------------------------------------
# Random cases
# ---------------------------------------------------------------------------------------------

CHUNKS = 20
"""Tests that the random cases are spread over."""


@dataclass(frozen=True)
class RandomCase:
    """One draw; `index` alone determines it, for a given largest size."""

    index: int
    name: str
    batch: tuple[int, ...]
    n: int
    d: int
    dtype: torch.dtype
    normalize: bool
    weights: str | None
    method: str
    view: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.batch, self.n, self.d)


def random_case(index: int, on_gpu: bool) -> RandomCase:
    draw = random.Random(index)
    largest = 1500 if on_gpu and draw.random() < 0.03 else 600
    n, d = (int((largest + 1) ** draw.random()) for _ in range(2))  # log-uniform
    weights = (None, None, "uneven", "partial", *(["zeros"] if n > 1 else []))  # not all are zero
    return RandomCase(
        index=index,
        name=draw.choice(tuple(SPECTRA)),
        batch=draw.choice(((), (1,), (3,), (2, 2), (7,))),
        n=n,
        d=d,
        dtype=draw.choice(DTYPES),
        normalize=draw.random() < 0.75,
        weights=draw.choice(weights),
        method=draw.choice(METHODS),
        view=draw.choice(tuple(VIEWS)),
    )


def check_random_case(case: RandomCase, device: torch.device) -> None:
    z = spectrum_case(case.name, case.shape, FLOAT64, seed=case.index)
    if not case.normalize:  # a trace of about 1: S is then the entropy of something
        z = z / z.square().sum(dim=-1).mean().sqrt()
    weights = None
    if case.weights is not None:
        weights = weights_case(case.weights, (*case.batch, case.n), result_dtype(case.dtype))
    check_entropy(
        device,
        case.name,
        z.to(case.dtype),
        case.method,
        view=case.view,
        weights=weights,
        normalize=case.normalize,
    )


@ON_A_DEVICE
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_shapes(chunk: int, device: torch.device, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--random-shapes")
    failures = []
    for index in range(chunk, count, CHUNKS):
        case = random_case(index, device.type == "cuda")
        try:
            check_random_case(case, device)
        except (AssertionError, RuntimeError) as error:
            failures.append(f"{case}:\n{error}")
    assert not failures, "\n\n".join(failures)


# ---------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------


failed_captures: list[str] = []
"""Of this process. torch 2.11's allocator stays in capture state, and later tests fail for that."""


@pytest.fixture(autouse=True)
def _skip_after_a_failed_capture() -> None:
    if failed_captures:
        pytest.skip(f"a graph capture failed before in this process: {failed_captures[0]}")


def capture(
    work: Work, static: Tensor, device: torch.device
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """`replay` and the results that it writes to, for work on `static`, which stays where it is.

    On the CPU a stand-in that computes again at every replay.
    """
    if device.type != "cuda":
        results = work(static)

        def rerun() -> None:
            for result, fresh in zip(results, work(static), strict=True):
                result.copy_(fresh)

        return rerun, results
    side = torch.cuda.Stream()  # warm-up, as torch's notes on graphs ask for
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = work(static)
    except Exception as error:
        failed_captures.append(repr(error)[:200])
        raise
    return graph.replay, results


@pytest.mark.xdist_group("graphs")  # in one process, so that a failure costs no other process
@pytest.mark.device_only("the emulation has no graphs")
@pytest.mark.parametrize("shape", BIT_SHAPES)
@pytest.mark.parametrize("name", OWN_KERNELS)
def test_a_captured_graph_replays_what_eager_computes(
    name: str, shape: tuple[int, ...], device: torch.device
) -> None:
    work = WORK[name]
    first, *others = inputs(4, shape, device)
    static = first.clone()
    replay, results = capture(work, static, device)
    for z in (*others, first):
        static.copy_(z)
        replay()
        assert_same_bits(results, work(z))


# ---------------------------------------------------------------------------------------------
# The host does not wait
# ---------------------------------------------------------------------------------------------


@contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """torch raises wherever it would wait for the device. It does not see into cuSOLVER."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.device_only("the emulation has no queue")
@pytest.mark.parametrize("shape", [(17, 33), (512, 128), (300, 310)])
@pytest.mark.parametrize("name", WORK)
def test_torch_does_not_wait_for_the_device(
    name: str, shape: tuple[int, ...], device: torch.device
) -> None:
    (z,) = inputs(1, shape, device)
    expected = WORK[name](z)
    with no_synchronisation(device):
        results = WORK[name](z)
    assert_same_bits(results, expected)


@pytest.mark.device_only("the emulation has no queue")
@pytest.mark.parametrize("shape", [(17, 33), (512, 128), (300, 310)])
@pytest.mark.parametrize("name", OWN_KERNELS)
def test_the_host_is_back_before_the_device_is_done(
    name: str, shape: tuple[int, ...], device: torch.device
) -> None:
    """Whatever the library that would wait: the queue is held up, and the call returns."""
    if device.type != "cuda":
        pytest.skip("needs a GPU: a CPU has no queue")
    (z,) = inputs(1, shape, device)
    WORK[name](z)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
    results = WORK[name](z)
    returned_first = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert returned_first
    assert_same_bits(results, WORK[name](z))


# ---------------------------------------------------------------------------------------------
# Streams and threads
# ---------------------------------------------------------------------------------------------


def on_own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Work inside is queued on a stream of its own, after what the caller has queued."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


@pytest.mark.device_only("the emulation has no streams")
@pytest.mark.parametrize("shape", BIT_SHAPES)
@pytest.mark.parametrize("name", WORK)
def test_two_streams_at_the_same_time(
    name: str, shape: tuple[int, ...], device: torch.device
) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: a CPU has no streams")
    work, both = WORK[name], inputs(2, shape, device)
    expected = [work(z) for z in both]
    caller = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in both]
    for stream in streams:
        stream.wait_stream(caller)
    done: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(30):
        for stream, z, results in zip(streams, both, done, strict=True):
            with torch.cuda.stream(stream):
                results.append(work(z))
                z.record_stream(stream)
    for stream, results in zip(streams, done, strict=True):
        caller.wait_stream(stream)
        for tensor in (tensor for result in results for tensor in result):
            tensor.record_stream(caller)
    for results, want in zip(done, expected, strict=True):
        for result in results:
            assert_same_bits(result, want)


@pytest.mark.device_only("the emulation takes one thread at a time")
@pytest.mark.parametrize("shape", BIT_SHAPES)
@pytest.mark.parametrize("name", WORK)
def test_two_threads_each_with_its_own_stream(
    name: str, shape: tuple[int, ...], device: torch.device
) -> None:
    work, both = WORK[name], inputs(2, shape, device)
    expected = [work(z) for z in both]
    if device.type == "cuda":
        torch.cuda.synchronize()  # a thread has a current stream of its own

    def repeatedly(z: Tensor) -> list[tuple[Tensor, ...]]:
        with on_own_stream(device):
            results = [work(z) for _ in range(5)]
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(2) as pool:
        for results, want in zip(pool.map(repeatedly, both), expected, strict=True):
            for result in results:
                assert_same_bits(result, want)


@pytest.mark.device_only("the emulation has no clock")
@pytest.mark.parametrize("shape", BIT_SHAPES)
@pytest.mark.parametrize("name", WORK)
def test_ten_runs_give_the_same_bits(
    name: str, shape: tuple[int, ...], device: torch.device
) -> None:
    (z,) = inputs(1, shape, device)
    first = WORK[name](z)
    for _ in range(9):
        assert_same_bits(WORK[name](z), first)


# ---------------------------------------------------------------------------------------------
# Several devices
# ---------------------------------------------------------------------------------------------


@pytest.mark.device_only("the emulation is one device")
@pytest.mark.parametrize("name", WORK)
def test_the_second_gpu_while_the_first_is_current(name: str, device: torch.device) -> None:
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if gpus < 2:
        pytest.skip(f"needs two GPUs, there are {gpus}")
    (z,) = inputs(1, (128, 512), device)
    expected = WORK[name](z)
    results = WORK[name](z.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in results)
    for result, want in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), want.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.device_only("the emulation is one device")
def test_views_on_two_devices_are_an_error(device: torch.device) -> None:
    z = spectrum_case("iid", (17, 33), FLOAT32)
    there, elsewhere = z.to(device), z.to("cpu" if device.type == "cuda" else "meta")
    with pytest.raises(ValueError, match=r"z1.*z2"):
        doe_loss(there, elsewhere)


@pytest.mark.device_only("the emulation is one device")
def test_weights_follow_their_samples_to_the_device(method: str, device: torch.device) -> None:
    """Weights on the CPU are taken along, and their gradient comes back."""
    z = spectrum_case("iid", (17, 33), FLOAT32)
    weights = weights_case("uneven", (17,), FLOAT32)
    value, grad_z, grad_weights = differentiate(
        lambda z, p: vn_entropy(z, weights=p, method=method), z.to(device), weights
    )
    assert (value.device.type, grad_z.device.type) == (device.type, device.type)
    assert grad_weights.device.type == "cpu"
    assert_value(value.cpu(), reference.oracle(z, weights=weights), VALUE[FLOAT32])
    exact = reference.oracle_weights_grad(z, weights=weights)
    assert relative_error(grad_weights, exact) <= GRADIENT_WELL_CONDITIONED


@pytest.mark.device_only("the emulation is one device")
@pytest.mark.parametrize("name", ["vn_entropy", "vn_entropy_grad", "spectrum", "spectrum_eigh"])
def test_the_raw_operators_refuse_weights_of_another_device(
    name: str, device: torch.device
) -> None:
    """A pointer into the host's memory would be an illegal access, which no process survives."""
    if device.type != "cuda":
        pytest.skip("needs a GPU: the CPU is one device")
    z, weights = torch.ones(4, 6, device=device), torch.full((4,), 0.25)
    options = (True, "poles", 1e-12) if name.startswith("vn_entropy") else (True, 1e-12)
    with pytest.raises(RuntimeError, match="weights"):
        getattr(torch.ops.vne_kernels, name)(z, weights, *options)
    assert torch.isfinite(vn_entropy(z))


# ---------------------------------------------------------------------------------------------
# Compiler, autocast, memory
# ---------------------------------------------------------------------------------------------


def loss_of_a_network(z: Tensor) -> Tensor:
    """Both public losses between operations that a compiler would fuse."""
    u = torch.tanh(z) + 0.1 * z
    return 2 * vn_entropy(u, method="poles") + doe_loss(u, z.sin(), beta=2.0, method="poles")


@pytest.mark.device_only("the emulation has no compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode: str, device: torch.device) -> None:
    """On a GPU "reduce-overhead" is inductor's CUDA graphs: recorded at the second call."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss_of_a_network, fullgraph=True, mode=mode)
    for z in inputs(4, (24, 40), device):
        torch.compiler.cudagraph_mark_step_begin()
        value, grad = (result.cpu() for result in differentiate(compiled, z))
        want, want_grad = (result.cpu() for result in differentiate(loss_of_a_network, z))
        assert_value(value, want, VALUE[FLOAT32])
        assert relative_error(grad, want_grad) <= GRADIENT_WELL_CONDITIONED
    if mode == "reduce-overhead" and device.type == "cuda":
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.device_only("the emulation is slow")
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(autocast: torch.dtype, method: str, device: torch.device) -> None:
    layer = nn.Linear(32, 24).to(device)
    x = spectrum_case("iid", (17, 32), FLOAT32).to(device)
    with torch.autocast(device.type, dtype=autocast):
        z = layer(x)
        s = vn_entropy(z, method=method)
        loss = doe_loss(z, layer(-x), method=method)
    assert z.dtype == autocast
    assert s.dtype == loss.dtype == FLOAT32
    assert_value(s.detach().cpu(), reference.oracle(z.detach().cpu()), VALUE[autocast])
    (loss - s).backward()
    assert layer.weight.grad.dtype == FLOAT32
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.norm() > 0


@pytest.mark.device_only("the emulation is slow")
def test_a_training_step_with_a_grad_scaler(device: torch.device) -> None:
    """The scaler's step is the step without it, to within the rounding of float16."""
    torch.manual_seed(0)
    layer, twin = nn.Linear(32, 24).to(device), nn.Linear(32, 24).to(device)
    twin.load_state_dict(layer.state_dict())
    x = spectrum_case("iid", (17, 32), FLOAT32).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12)
    with torch.autocast(device.type, dtype=torch.float16):
        z = layer(x)
        loss = doe_loss(z, layer(x.roll(1, dims=-1)), beta=2.0) - VNEntropy()(z)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**12  # no infinity was found

    z = twin(x)
    (doe_loss(z, twin(x.roll(1, dims=-1)), beta=2.0) - VNEntropy()(z)).backward()
    step = (layer.weight - twin.weight).detach().cpu()
    assert relative_error(step, -0.5 * twin.weight.grad.cpu()) <= 0.02


@pytest.mark.device_only("the emulation has no allocator")
@pytest.mark.parametrize("name", WORK)
def test_memory_stays_flat(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: torch does not count the CPU's memory")
    (z,) = inputs(1, (128, 512), device)
    for _ in range(3):
        WORK[name](z)
    gc.collect()  # what earlier tests left behind
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(200):
        WORK[name](z)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= allocated
    assert torch.cuda.memory_reserved() <= reserved


# ---------------------------------------------------------------------------------------------
# Every kernel once: under compute-sanitizer
# ---------------------------------------------------------------------------------------------

SIDES = ((7, 16), (32, 40), (64, 70), (128, 132), (200, 203), (256, 260), (300, 304))
"""m = 7 to 256: every size of the sweep in registers, full and not; m = 300: in panels."""


@pytest.mark.sanitize
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SIDES)
def test_poles_of_every_size(
    shape: tuple[int, int], transposed: bool, device: torch.device
) -> None:
    n, d = reversed(shape) if transposed else shape
    check_entropy(device, "iid", spectrum_case("iid", (n, d), FLOAT32), "poles")


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [FLOAT64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(20, 34), (34, 20), (65, 40)])
def test_poles_of_every_dtype(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    check_entropy(device, "iid", spectrum_case("iid", shape, dtype), "poles", view="sliced")


@pytest.mark.sanitize
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(2, 20, 34), (2, 34, 20)])
def test_weights_and_no_normalisation(
    shape: tuple[int, ...], normalize: bool, method: str, device: torch.device
) -> None:
    z = spectrum_case("iid", shape, FLOAT32) / shape[-1] ** 0.5
    weights = weights_case("zeros", shape[:-1], FLOAT32)
    check_entropy(device, "iid", z, method, weights=weights, normalize=normalize)
    check_entropy(device, "iid", z, method, normalize=normalize)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(20, 34), (3, 70, 64), (32, 4096), (300, 304)])
def test_eigh_by_every_routine(shape: tuple[int, ...], device: torch.device) -> None:
    check_entropy(device, "iid", spectrum_case("iid", shape, FLOAT32), "eigh")


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(20, 34), (2, 70, 40)])
def test_purity_and_its_backward(shape: tuple[int, ...], device: torch.device) -> None:
    z = spectrum_case("iid", shape, FLOAT32)
    leaf = z.to(device).requires_grad_()
    order_2 = renyi_entropy(leaf, 2)
    order_2.sum().backward()
    exact_leaf = z.detach().double().requires_grad_()
    u = torch.nn.functional.normalize(exact_leaf, dim=-1)
    exact = -((u @ u.mT / shape[-2]).square().sum((-1, -2))).log()
    exact.sum().backward()
    assert_value(order_2.detach().cpu(), exact.detach(), VALUE[FLOAT32])
    error = absolute_error(leaf.grad.cpu(), exact_leaf.grad)
    assert error <= GRADIENT_WELL_CONDITIONED * exact_leaf.grad.norm()
