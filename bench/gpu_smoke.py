"""Runs every kernel once against float64, one line each: the first program to run on a new GPU.

    python bench/gpu_smoke.py [--device cpu]    # the operators; on the CPU small matrices only
    python bench/gpu_smoke.py --graphs          # captured graphs, with the time of a replay

A line is the name of a check, then `ok`, `BAD` (a wrong result or an exception) or `FATAL` (the
process cannot go on: a CUDA error, or a failed capture, which leaves torch 2.11's allocator in
capture state). The exit status is 0, 1 or 3. `--after NAME` skips the checks up to that one: a new
process can then run what follows a fatal one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import vne_kernels
from vne_kernels import doe_loss, reference, renyi_entropy, spectrum, vn_entropy

Outcome = tuple[bool, str]  # whether the result is right, and figures
Check = tuple[str, Callable[[], Outcome]]

FLOAT32, FLOAT64 = torch.float32, torch.float64
HALF = (torch.bfloat16, torch.float16)
SIDES = {  # the sweep in registers up to m = 256, full and not, then panels
    FLOAT32: (7, 32, 64, 100, 128, 200, 256, 300, 520),
    FLOAT64: (7, 64, 128, 130),
    **dict.fromkeys(HALF, (33,)),
}
EIGH_SIDES = (20, 32, 33, 70, 128, 200, 300)  # syevjBatched, XsyevBatched, Xsyevd
TOLERANCES = {  # of the value and of the gradient: above rounding, and far below a fault's error
    FLOAT64: (1e-11, 1e-9),
    FLOAT32: (2e-5, 2e-4),
    **dict.fromkeys(HALF, (2e-5, 2e-2)),
}
GRAPHS = ((32, 128), (64, 256), (128, 512), (256, 1024), (512, 128), (512, 2048), (64, 128, 512))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().cpu().double() - exact.detach()).norm() / exact.detach().norm())


def entropy(device: str, shape: tuple[int, ...], dtype: torch.dtype, method: str) -> Outcome:
    """S and dS/dz: normalized rows, then rows as they are, with weights."""
    z = (normal(*shape) / shape[-1] ** 0.5).to(dtype)
    weights = torch.softmax(normal(*shape[:-1], seed=1), dim=-1)
    weights = weights.to(FLOAT64 if dtype == FLOAT64 else FLOAT32)
    worst = torch.zeros(2)
    for normalize, p in ((True, None), (False, weights)):
        leaf, on_device = z.to(device).requires_grad_(), None if p is None else p.to(device)
        s = vn_entropy(leaf, method=method, normalize=normalize, weights=on_device)
        (grad,) = torch.autograd.grad(s.sum(), leaf)
        exact = reference.oracle(z, weights=p, normalize=normalize)
        exact_grad = reference.oracle_grad(z, weights=p, normalize=normalize)
        errors = (relative_error(s, exact), relative_error(grad, exact_grad))
        worst = torch.maximum(worst, torch.tensor(errors))  # NaN stays
    right = bool((worst <= torch.tensor(TOLERANCES[dtype])).all())
    return right, "value {:.1e} gradient {:.1e}".format(*worst.tolist())


def other_operators(device: str) -> Outcome:
    """The gradient of a sum of the other functions, against that of the CPU in float64."""

    def total(z: Tensor) -> Tensor:
        u = torch.nn.functional.normalize(z, dim=-1)
        density = vne_kernels.vn_entropy_from_density(u.mT @ u / z.shape[-2], method="poles")
        losses = doe_loss(z, z.flip(-1), beta=2.0) + renyi_entropy(z, 2)
        return (losses + density + spectrum(z).square().sum(-1)).sum()

    exact_leaf = normal(2, 40, 70).requires_grad_()
    leaf = exact_leaf.detach().float().to(device).requires_grad_()
    (grad,), (exact,) = (torch.autograd.grad(total(z), z) for z in (leaf, exact_leaf))
    error = relative_error(grad, exact)
    return error <= 2e-4, f"gradient {error:.1e}"


def nan_in_a_batch(device: str) -> Outcome:
    z = normal(3, 20, 30).float()
    z[1, 2, 3] = float("nan")
    found = vn_entropy(z.to(device), method="poles").isnan().tolist()
    return found == [False, True, False], str(found)


def hessian_vector_product(device: str) -> Outcome:
    z, v = normal(20, 30), normal(20, 30, seed=1)
    function = partial(vn_entropy, method="poles")
    _, product = torch.autograd.functional.vhp(function, z.to(device), v.to(device))
    slope = reference.oracle_grad(z + 1e-5 * v) - reference.oracle_grad(z - 1e-5 * v)
    error = relative_error(product, slope / 2e-5)
    return error <= 1e-6, f"{error:.1e}"


def accumulator_and_estimate(device: str) -> Outcome:
    rows, wide = normal(3000, 50).float().to(device), normal(600, 700).float().to(device)
    sums = vne_kernels.DensityAccumulator(50, device=device).update(rows)
    error = abs(float(sums.entropy() - vn_entropy(rows)))
    value, bar, _ = vne_kernels.estimate_vn_entropy(
        wide, generator=torch.Generator().manual_seed(1)
    )
    off = abs(float(value - vn_entropy(wide)))
    return error <= 1e-4 and off <= float(bar), f"{error:.1e}, {off:.1e} of {float(bar):.1e}"


def operator_checks(device: str) -> Iterator[Check]:
    def check(shape: tuple[int, ...], dtype: torch.dtype, method: str) -> Check:
        work = partial(entropy, device, shape, dtype, method)
        return f"{method} {shape} {str(dtype).removeprefix('torch.')}", work

    largest = 64 if device == "cpu" else 1024
    for dtype, sides in SIDES.items():
        for m in (side for side in sides if side <= largest):
            yield check((m, m + 9), dtype, "poles")
            yield check((2, m + 9, m), dtype, "poles")
    for m in (side for side in EIGH_SIDES if side <= largest):
        yield check((m, m + 9), FLOAT32, "eigh")
        yield check((m, m + 9), FLOAT64, "eigh")
    yield check((64, 70, 79), FLOAT32, "eigh")
    yield check((32, 5000), FLOAT32, "poles")
    functions = (other_operators, nan_in_a_batch, hessian_vector_product, accumulator_and_estimate)
    for function in functions:
        yield function.__name__, partial(function, device)


def graph(shape: tuple[int, ...]) -> Outcome:
    """A replay gives the same bits as an eager call."""
    z = normal(*shape).float().cuda().requires_grad_()

    def work() -> tuple[Tensor, Tensor]:
        s = vn_entropy(z, method="poles")
        return s.detach(), *torch.autograd.grad(s.sum(), z)

    side = torch.cuda.Stream()  # warm-up, as torch's notes on graphs ask for
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = work()
    expected = work()
    for result in results:
        result.fill_(float("nan"))
    captured.replay()
    same = all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(200):
        captured.replay()
    end.record()
    torch.cuda.synchronize()
    return same, f"{start.elapsed_time(end) * 5:.1f} us a replay"


def is_lost(device: str) -> bool:
    """Whether no kernel can run in this process any more."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--after", metavar="NAME", help="skip the checks up to this one")
    options = parser.parse_args()
    checks = operator_checks(options.device)
    if options.graphs:
        checks = ((f"graph {shape}", partial(graph, shape)) for shape in GRAPHS)
    else:  # before CUDA starts: an error then appears in the check that causes it
        os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
    if options.after:
        next(name for name, _ in checks if name == options.after)
    print(f"torch {torch.__version__}\n{vne_kernels.available_backends()}", flush=True)
    if options.device == "cuda":
        print(torch.cuda.get_device_name(), torch.ops.vne_kernels.cuda_build_info(), flush=True)
    begin, passed, failed, fatal = time.perf_counter(), 0, 0, False
    for name, check in checks:
        print(f"check {name}", end=": ", flush=True)  # before the check, which may end the process
        try:
            right, text = check()
        except Exception as error:
            right, text = False, f"{type(error).__name__}: {error}".splitlines()[0][:300]
            fatal = options.graphs or is_lost(options.device)
        passed, failed = passed + right, failed + (not right)
        print("ok" if right else "FATAL" if fatal else "BAD", text, sep=", ")
        if not right:
            print(f"FAILED {name} - {text}", flush=True)
        if fatal:
            break
    print(f"{passed} passed, {failed} failed in {time.perf_counter() - begin:.2f}s")
    return 3 if fatal else int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
