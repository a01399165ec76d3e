"""Fuzzing of the operators: what the fuzzer found, its short form, memory, processes."""

from __future__ import annotations

import importlib
import json
import math
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fuzz_contract
import fuzz_operators
import pytest
import torch
from cases import GRADIENT_OF_EIGH, SINGLE_DRAW, absolute_error, eigh_error, gaussian, generator
from fuzz_cases import Case
from fuzz_operators import growth
from naming import exit_code, last_error
from programs import run_python
from torch import Tensor

import vne_kernels
from vne_kernels import doe_loss, reference, spectrum, vn_entropy

cpu_only = pytest.mark.cpu_only("memory, threads and processes of the CPU kernels")

# ---------------------------------------------------------------------------------------------
# What the fuzzer found
# ---------------------------------------------------------------------------------------------


def rounded_to_collapse(n: int, d: int, seed: int) -> Tensor:
    """One direction, all of whose noise is about the rounding of bfloat16."""
    g = generator(seed)
    return (gaussian(1, d, g) + 1e-4 * gaussian(n, d, g)).bfloat16().float()


@pytest.mark.parametrize("normalize", [True, False])
def test_inverses_do_not_grow_out_of_rounding(normalize: bool) -> None:
    """The poles' inverses grew, to 130,000 times the error of eigh; measured: mean 2.2, at
    most 5.3 times."""
    ratios = []
    for seed in range(8):
        z = rounded_to_collapse(200, 120, seed).requires_grad_()
        vn_entropy(z, normalize=normalize, method="poles").backward()
        leaf = z.detach()
        error = absolute_error(z.grad, reference.oracle_grad(leaf, normalize=normalize))
        ratios.append(error / eigh_error(leaf, normalize=normalize))
    assert sum(ratios) / len(ratios) <= SINGLE_DRAW * GRADIENT_OF_EIGH
    assert max(ratios) <= 10


def gradients_of_the_loss(z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    views = (z1.clone().requires_grad_(), z2.clone().requires_grad_())
    return torch.autograd.grad(doe_loss(*views).sum(), views)


@pytest.mark.parametrize(
    ("magnitude", "dtype"),
    [(2.0**80, torch.float32), (2.0**110, torch.float32), (2.0**1010, torch.float64)],
)
def test_gradient_of_the_loss_at_huge_rows(magnitude: float, dtype: torch.dtype) -> None:
    """It vanished with the product of two inverse norms."""
    z1, z2 = (gaussian(6, 9, generator(seed)).to(dtype) for seed in (0, 1))
    huge = gradients_of_the_loss(magnitude * z1, magnitude * z2)
    for own, expected in zip(huge, gradients_of_the_loss(z1, z2), strict=True):
        torch.testing.assert_close(magnitude * own, expected, rtol=1e-5, atol=1e-7)


def test_a_norm_beyond_float64_is_no_zero_row() -> None:
    z1, z2 = (gaussian(8, 64, generator(seed)).view(2, 4, 64) for seed in (0, 1))
    z2[0, 0] = 1e308
    loss = doe_loss(z1, z2)
    assert loss.isnan().tolist() == [True, False]
    for own in gradients_of_the_loss(z1, z2):
        assert own[0].isnan().all()
        assert own[1].isfinite().all()


@pytest.mark.parametrize("method", ["eigh", "poles"])
def test_rows_shorter_than_a_normal_number(method: str) -> None:
    """Without eps: neither an exception nor NaN, nor infinities that are not the gradient's."""
    subnormal = torch.full((3, 4), 5e-324, dtype=torch.float64, requires_grad=True)
    entropy = vn_entropy(subnormal, eps=0.0, method=method)
    entropy.backward()
    assert entropy.isfinite()
    assert subnormal.grad.isfinite().all()
    z = (1e-40 * gaussian(6, 9, generator(0))).float().requires_grad_()
    vn_entropy(z, eps=0.0, method=method).backward()
    assert not z.grad.isnan().any()
    exact = reference.oracle_grad(z.detach())
    beyond = exact.abs() > torch.finfo(torch.float32).max
    assert (z.grad[beyond] == math.inf * exact[beyond].sign()).all()


@pytest.mark.parametrize(
    "case",
    [
        Case(n=1, d=1, dtype=torch.float64),  # a scale of 2^1074
        Case(n=2, d=1),  # the scale of X, and then that of A, beyond the range of float32
        Case(n=3, d=3, dtype=torch.float64, weights="softmax", eps=0.0),  # 1 / eps and the trace
    ],
    ids=["scale", "two_scales", "weights"],
)
def test_subnormal_rows(case: Case) -> None:
    """NaN in the CUDA and Triton kernels."""
    fuzz_contract.check(replace(case, content="subnormal"))


@pytest.mark.parametrize("shape", [(6, 512), (30, 9)])
def test_a_weight_that_is_no_normal_number(shape: tuple[int, int]) -> None:
    """The square of a row of X, with nothing in it left, made NaN of its projection."""
    n, d = shape
    z = gaussian(n, d, generator(0)).float().requires_grad_()
    weights = torch.full((n,), 1 / (n - 1)).index_fill(0, torch.tensor(2), 1e-45)
    vn_entropy(z, weights=weights).backward()
    exact = reference.oracle_grad(z.detach(), weights=weights.double())
    torch.testing.assert_close(z.grad.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "seed"), [((130, 294), 145), ((64, 64), 1), ((100, 120), 0), ((200, 300), 5)]
)
def test_matrices_of_rank_one_that_lapack_fails_on(shape: tuple[int, int], seed: int) -> None:
    """With rows of zeros, MKL's float32 eigenvectors hold NaN, or it does not converge."""
    n, d = shape
    case = Case(n=n, d=d, layout="expanded_columns", content="some_rows_zero", seed=seed)
    z = fuzz_contract.make_samples(case).contiguous().requires_grad_()
    entropy = vn_entropy(z, method="eigh")
    entropy.backward()
    torch.testing.assert_close(entropy.double(), reference.oracle(z.detach()), rtol=0, atol=3e-5)
    assert z.grad.isfinite().all()
    spectrum(z).square().sum().backward()
    assert z.grad.isfinite().all()


def test_rows_of_zeros_are_eigenvectors() -> None:
    """Whatever the kernels do with them apart, the decomposition is whole and in order."""
    z = gaussian(12, 40, generator(0)).float()
    z[[0, 5, 11]] = 0
    z[7] = z[3]
    values, vectors = torch.ops.vne_kernels.spectrum_eigh(z, None, True, 1e-12)
    u = torch.nn.functional.normalize(z.double(), dim=-1)
    torch.testing.assert_close(
        (vectors * values.unsqueeze(-2)) @ vectors.mT, (u @ u.mT / 12).float()
    )
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(12))
    assert (values.diff() <= 0).all()


def test_second_derivative_at_zero_rows_without_eps() -> None:
    z = torch.zeros(6, 9, requires_grad=True)
    (grad,) = torch.autograd.grad(vn_entropy(z, eps=0.0), z, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), z)
    assert (second == 0).all()


# ---------------------------------------------------------------------------------------------
# Random cases
# ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_random_cases(backend: str) -> None:
    tally = fuzz_operators.Tally()
    if backend == "triton":  # the interpreter takes half a second a case
        fuzz_operators.run_cases(60, 1, tally, backend, largest=12)
    else:
        fuzz_operators.run_cases(300, 1, tally, backend)
    kinds = ("values", "errors", "shapes", "nan_samples", "gradients", "from_threads")
    assert all(tally.counts[kind] > 0 for kind in kinds), tally.counts


@pytest.mark.slow
@cpu_only
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("vn_entropy", lambda z, **options: 1.001 * vn_entropy(z, **options)),
        ("vn_entropy", lambda z, **options: vn_entropy(z, **options).nan_to_num()),
        ("vn_entropy", lambda z, **options: vn_entropy(z.detach(), **options)),
        ("spectrum", lambda z, **options: spectrum(z, **options).flip(-1)),
    ],
    ids=["value", "nan", "gradient", "order"],
)
def test_a_broken_operator_is_found(
    name: str, broken: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_contract.vne_kernels, name, broken)
    with pytest.raises(AssertionError):
        fuzz_operators.run_cases(600, 1, fuzz_operators.Tally())


@cpu_only
@pytest.mark.filterwarnings("ignore")
def test_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "results" / "cases.json"
    assert fuzz_operators.main(["--cases", "20", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert (figures["cases"], figures["failures"], figures["seed"]) == (20, 0, 0)
    assert list(out.parent.iterdir()) == [out]


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------

SHORT_BOUND = 60.0
"""MiB over 10^5 calls: a page that the allocator keeps weighs more in 3,000 calls than in 10^5."""


@pytest.mark.slow
@cpu_only
@pytest.mark.filterwarnings("ignore")
def test_memory_is_flat() -> None:
    fuzz_operators.watch_memory(1000, progress=False)
    rows = fuzz_operators.watch_memory(3000, every=100, progress=False)
    assert growth(rows) <= SHORT_BOUND
    assert growth(rows, "objects") <= 500  # of 5,000, were one left behind by one kind


@pytest.mark.slow
@cpu_only
def test_a_leak_is_found() -> None:
    """In a process of its own: one with a large heap has room for a leak before it grows."""
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import fuzz_operators, torch
        leaked = []
        fuzz_operators.memory_calls = lambda: [lambda: leaked.append(torch.ones(4096))]
        print(fuzz_operators.growth(fuzz_operators.watch_memory(500, every=50, progress=False)))"""
    done = run_python(code, Path(__file__).parent, options=["-W", "ignore"], cwd=Path("/"))
    assert float(done.stdout) > 10 * SHORT_BOUND


@cpu_only
def test_too_few_calls_to_see_growth(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(fuzz_operators.main, ["--memory", "10"]) == 2
    assert "--memory" in last_error(capsys)


# ---------------------------------------------------------------------------------------------
# Threads, interrupts, imports
# ---------------------------------------------------------------------------------------------


def value_and_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    entropy = vn_entropy(leaf)
    return entropy.detach(), torch.autograd.grad(entropy.sum(), leaf)[0]


def call_until_alarm(z: Tensor, seconds: float) -> None:
    """The alarm repeats: what it raises within a destructor, Python prints and forgets."""
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        while True:
            value_and_gradient(z)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@cpu_only
def test_an_interrupt_leaves_nothing_broken() -> None:
    """Ctrl-C at forty moments of a loop of calls, some of them within one."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    z = gaussian(64, 128, generator(0)).float()
    expected = value_and_gradient(z)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for moment in range(40):
            with pytest.raises(KeyboardInterrupt):
                call_until_alarm(z, 1e-3 + 1e-4 * moment)
            found = value_and_gradient(z)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        signal.signal(signal.SIGALRM, before)


@cpu_only
def test_reload_of_the_package() -> None:
    reloaded = importlib.reload(vne_kernels)
    assert reloaded.vn_entropy(torch.eye(4)) == vn_entropy(torch.eye(4))


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------


def run_script(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """In a fresh interpreter; a hang is a failure."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    command = [sys.executable, "-W", "ignore", str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)


def assert_quiet(done: subprocess.CompletedProcess[str], output: str) -> None:
    assert (done.returncode, done.stderr, done.stdout) == (0, "", output)


@cpu_only
def test_fork_after_use(tmp_path: Path) -> None:
    """With the parent's OpenMP threads in use; the child has none, and must not wait for them."""
    done = run_script(
        tmp_path,
        """
        import os, torch
        from vne_kernels import vn_entropy

        torch.set_num_threads(2)
        z = torch.randn(8, 64, 512, requires_grad=True)

        def compute(method):
            entropy = vn_entropy(z, method=method)
            return entropy.detach(), torch.autograd.grad(entropy.sum(), z)[0]

        expected = {method: compute(method) for method in ("poles", "eigh")}
        if child := os.fork():
            raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        torch.set_num_threads(1)
        same = all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6)
            for method in expected
            for a, b in zip(compute(method), expected[method])
        )
        os._exit(0 if same else 3)
        """,
    )
    assert_quiet(done, "")


@pytest.mark.slow
@cpu_only
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start: str, tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        f"""
        import torch
        from torch.utils.data import DataLoader, Dataset
        from vne_kernels import vn_entropy

        class Entropies(Dataset):
            def __len__(self):
                return 6

            def __getitem__(self, n):
                return vn_entropy(torch.eye(n + 2))

        if __name__ == "__main__":
            torch.set_num_threads(2)
            expected = torch.stack([Entropies()[n] for n in range(6)])
            loader = DataLoader(
                Entropies(), batch_size=3, num_workers=1, multiprocessing_context="{start}"
            )
            print(torch.equal(torch.cat(list(loader)), expected))
        """,
    )
    assert_quiet(done, "True\n")


@pytest.mark.slow
@cpu_only
def test_calls_while_the_interpreter_ends(tmp_path: Path) -> None:
    """In an exit handler, with the gradient; in __del__ of what the module's end deletes; with a
    thread still at work."""
    done = run_script(
        tmp_path,
        """
        import atexit, threading, torch
        from vne_kernels import vn_entropy

        z = torch.randn(16, 32, requires_grad=True)

        def at_exit():
            (grad,) = torch.autograd.grad(vn_entropy(z), z)
            print("exit handler", bool(grad.isfinite().all()), flush=True)

        class AtTheEnd:
            def __init__(self):
                self.entropy, self.z = vn_entropy, z.detach()

            def __del__(self):
                print("del", bool(self.entropy(self.z).isfinite()), flush=True)

        def work():
            for _ in range(200):
                torch.autograd.grad(vn_entropy(z), z)
            print("thread", flush=True)

        keep = AtTheEnd()
        atexit.register(at_exit)
        threading.Thread(target=work).start()
        """,
    )
    assert_quiet(done, "thread\nexit handler True\ndel True\n")
