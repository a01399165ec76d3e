"""The Triton backend: who serves, what torch.compile sees, what compiles without a GPU.

What the kernels compute is tested by the whole table, `pytest --backend triton`: here it is looked
at from outside, in processes of their own where Triton's interpreter is asked for.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import emulation
import pytest
import torch
from programs import run_python
from torch._dynamo.source import LocalSource
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

import vne_kernels
from vne_kernels import available_backends, backends, use_backend
from vne_kernels._core import load as _load

pytestmark = pytest.mark.cpu_only("it chooses backends itself")

ROOT = Path(__file__).resolve().parent.parent
NO_CUDA = pytest.mark.skipif(_load.cuda_reason is None, reason="the CUDA kernels are there")


def cuda_registration(name: str) -> str:
    """The file that registered the operator's kernel for CUDA tensors."""
    (file,) = re.findall(
        r"^CUDA: registered at (\S+):\d+", torch._C._dispatch_dump(f"vne_kernels::{name}"), re.M
    )
    return file


# ---- who serves --------------------------------------------------------------------------------


@NO_CUDA
@pytest.mark.parametrize("name", ["vn_entropy_grad", "doe_loss_backward", "density", "cosine"])
def test_without_cuda_kernels_triton_is_registered(name: str) -> None:
    assert backends.resolve("auto") == "triton"
    assert cuda_registration(name).endswith("backends.py")


def test_a_choice_is_registered_and_taken_back() -> None:
    before = cuda_registration("vn_entropy")
    with use_backend("triton"):
        assert cuda_registration("vn_entropy").endswith("backends.py")
        with use_backend("cpu"):
            assert backends.resolve(backends._asked) == "cpu"
        assert backends.resolve(backends._asked) == "triton"
    assert cuda_registration("vn_entropy") == before
    assert backends._asked == "auto"


def test_what_serves_is_said() -> None:
    found = available_backends()
    assert set(found) == {"cpu", "cuda", "triton"}
    assert found.serving["cpu"] == "cpu"
    assert len(str(found).splitlines()) == len(found) + len(found.serving)
    if not torch.cuda.is_available():
        assert "TRITON_INTERPRET=1" in str(found["triton"])


def test_a_gpu_is_told_of_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(_load, "cuda_reason", "there is no nvcc")
    reason = available_backends().serving["cuda"]
    assert all(part in reason for part in ("triton", "1024", "torch.linalg.eigh", "no nvcc"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert all(part in str(available_backends()["triton"]) for part in ("7.5", "7.0"))


def test_without_triton_the_host_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "cuda_reason", "there is no nvcc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(available_backends()["triton"])
    assert backends.resolve("auto") == "cpu"
    with pytest.raises(RuntimeError, match=r"use_backend.*'triton'"):
        use_backend("triton")


def test_bad_choices() -> None:
    with pytest.raises(ValueError, match=r"use_backend.*'gpu'"):
        use_backend("gpu")
    if _load.cuda_reason is not None:
        with pytest.raises(RuntimeError, match=r"use_backend.*'cuda'"):
            use_backend("cuda")
    assert backends._asked == "auto"
    with pytest.raises(AssertionError, match=r"ValueError: .*VNE_KERNELS_BACKEND.*'gpu'"):
        run_python("import vne_kernels", VNE_KERNELS_BACKEND="gpu")


# ---- the interpreter, as a user meets it ---------------------------------------------------------

SERVES = """
    import torch, vne_kernels
    from vne_kernels import available_backends, doe_loss, spectrum, use_backend, vn_entropy

    assert available_backends()["triton"] is None
    assert available_backends().serving["cpu"].startswith("triton")

    def results():
        z = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
        outputs = vn_entropy(z), doe_loss(z, z.flip(0)), *spectrum(z)[:2]
        return torch.stack(outputs), torch.autograd.grad(sum(outputs), z)[0]

    own = results()
    with use_backend("cpu"):
        assert available_backends().serving["cpu"] == "cpu"
        native = results()
    for a, b in zip(own, native):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        assert not torch.equal(a, b), "the same kernels served both"

    compiled = torch.compile(vn_entropy, fullgraph=True, backend="aot_eager")
    z = torch.randn(2, 5, 3)
    assert torch.equal(compiled(z), vn_entropy(z))
    try:
        torch.ops.vne_kernels.vn_entropy(z, None, True, "qr", 0.0)
    except RuntimeError as error:
        assert "method" in str(error) and "'qr'" in str(error)
    print("served from", vne_kernels.__file__)
"""


def test_the_interpreter_serves_tensors_of_the_host() -> None:
    done = run_python(SERVES, VNE_KERNELS_BACKEND="triton", TRITON_INTERPRET="1")
    assert "served from" in done.stdout


GPU_SIZES = """
    import torch, vne_kernels
    from vne_kernels import use_backend
    from vne_kernels._core.ops import POLE_TABLE
    from vne_kernels._triton import blocked, launch, poles

    launch.blocks_are_large = False
    ops = torch.ops.vne_kernels
    generator = torch.Generator().manual_seed(0)
    launches = {}

    def counting(kernel, grid, *args, **options):
        launches[kernel.__name__] = max(launches.get(kernel.__name__, 0), *grid)
        launch._launch_now(kernel, grid, *args, **options)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    def weights(*shape):
        return torch.rand(shape, generator=generator) / shape[-1]

    def spd(*shape):
        x = randn(*shape, 2 * shape[-1])
        a = x @ x.mT
        return a / a.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]

    def check(call, *tensors):
        own = call(*tensors)
        with use_backend("cpu"):
            native = call(*(None if x is None else x.double() for x in tensors))
        for got, wanted in zip(own, native):
            if wanted.numel():
                assert (got - wanted).abs().max() <= 1e-5 + 1e-4 * wanted.abs().max(), tensors

    def grad(method, normalize=True):
        return lambda z, p: ops.vn_entropy_grad(z, p, normalize, method, 1e-12)

    with launch.launching_by(counting):
        check(grad("poles"), randn(2, 17, 50), weights(2, 17))
        check(grad("poles", False), randn(2, 50, 18), weights(2, 50))
        check(grad("eigh"), randn(2, 40, 2100), None)
        views = randn(2, 18, 300), randn(2, 18, 300)
        check(lambda z1, z2: ops.doe_loss_grad(z1, z2, "eigh", 1e-12), *views)
        check(lambda z, p: [ops.density(z, p, True, 1e-12)], randn(2, 50, 40), weights(2, 50))

        # Panels, and their sum, by two poles: all of them take the interpreter a minute.
        matrices = spd(2, 130)
        swept = matrices.clone()
        norms = torch.linalg.matrix_norm(matrices)
        blocked.sweep_matrices(swept, norms[:1], 2)
        wanted = -torch.linalg.inv(matrices.double())
        assert (swept.tril() - wanted.tril()).norm() <= 1e-5 * wanted.norm()
        blocked.COUNT = {torch.float32: 2}
        a = spd(2, 40)
        w = blocked.log_by_blocked_poles(a)
        poles_of = [(t, w_k) for t, w_k in POLE_TABLE[torch.float32][1:3]]
        wanted = -sum(
            w_k * torch.linalg.inv(a.double() + t * torch.eye(40)) for t, w_k in poles_of
        )
        assert (w.terms.sum(1) - wanted).norm() <= 1e-5 * wanted.norm()
        torch.testing.assert_close(w.inner.sum(1), (a * wanted).sum((1, 2)), rtol=1e-5, atol=0)

    alone = {name for name, programs in launches.items() if programs == 1}
    assert not alone, alone

    # A batch that is taken in parts.
    a = spd(3, 20)
    blocked.PANEL = 16
    for log_by in poles.log_by_poles, blocked.log_by_blocked_poles:
        poles.WORKSPACE_BYTES = 2**30
        whole = poles.in_waves(log_by, a)
        poles.WORKSPACE_BYTES = 2 * 16 * 20 * 20 * 4
        parts = poles.in_waves(log_by, a)
        assert parts.terms.shape[1] == 1 and parts.constant == whole.constant
        torch.testing.assert_close(parts.terms.sum(1), whole.terms.sum(1))
        assert torch.equal(parts.inner, whole.inner)
    print("done")
"""


@pytest.mark.slow
def test_blocks_of_the_size_that_a_gpu_takes() -> None:
    """The interpreter gives a sample's work to one program, to be fast; a GPU to many."""
    done = run_python(GPU_SIZES, VNE_KERNELS_BACKEND="triton", TRITON_INTERPRET="1")
    assert "done" in done.stdout


@pytest.mark.slow
def test_an_install_without_nvcc_has_the_operators(tmp_path: Path) -> None:
    """Into a fresh environment; torch and triton, which are large, are those of this one."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "fresh")], check=True
    )
    python = tmp_path / "fresh/bin/python"
    (packages,) = (tmp_path / "fresh/lib").glob("python*/site-packages")
    here = {Path(torch.__file__).parents[1], Path(pytest.__file__).parents[1]}
    (packages / "others.pth").write_text("".join(f"{folder}\n" for folder in sorted(here)))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    scripts = str(Path(sys.executable).parent)  # cmake and ninja
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "VNE_KERNELS_CUDA": "0",
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
    }
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if name.startswith(("bench/results/", "python_tests/")) or not (ROOT / name).is_file():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [*pip, *options, str(source)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (packages / "vne_kernels").glob("_C*")] == ["_C.abi3.so"]
    (tmp_path / "serves.py").write_text(
        textwrap.dedent(SERVES) + "assert available_backends()['cuda'] is not None\n"
        "for name in vne_kernels.backends.names_with_kernels():\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key("
        "f'vne_kernels::{name}', 'CUDA')\n"
        "    assert 'backends.py' in torch._C._dispatch_dump(f'vne_kernels::{name}')\n"
    )
    done = subprocess.run(
        [str(python), str(tmp_path / "serves.py")],
        env={**environment, "VNE_KERNELS_BACKEND": "triton", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"served from {packages}" in done.stdout


# ---- torch.compile -------------------------------------------------------------------------------


class NoGpu:
    """A driver of Triton's that says which GPU to analyse kernels for."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 86, 32)


@pytest.fixture
def pretended_gpu() -> Iterator[None]:
    triton = pytest.importorskip("triton", reason="this torch is without Triton")
    before = triton.runtime.driver.__dict__.copy()
    triton.runtime.driver.set_active(NoGpu())
    yield
    triton.runtime.driver.__dict__.update(before)


class Gradient(torch.nn.Module):
    """S and its gradient in one call; a backward pass of fake CUDA tensors asks for a GPU."""

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.ops.vne_kernels.vn_entropy_grad(z, None, True, "poles", 1e-12)[:2]


def count_launches(module: torch.nn.Module, z: torch.Tensor) -> int:
    """Of Triton kernels, in the graph that Inductor would get; no operator is left in it."""
    graph, _ = aot_export_module(module, [z], trace_joint=False)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert not any("vne_kernels" in target for target in targets)
    return sum("triton_kernel_wrapper" in target for target in targets)


def test_compiled_operators_dissolve_into_launches(pretended_gpu: None) -> None:
    with use_backend("triton"), FakeTensorMode():
        assert count_launches(Gradient(), torch.empty(128, 512, device="cuda")) > 0


def broken_guards(n: int, d: int, method: str, others: list[tuple[int, int]]) -> list[str]:
    """What torch.compile holds to be true of z (n, d), both symbols, that other sizes are not."""
    environment = ShapeEnv()
    symbols = [
        environment.create_symbol(size, LocalSource(name), dynamic_dim=DimDynamic.DYNAMIC)
        for name, size in (("n", n), ("d", d))
    ]
    sizes = [
        environment.create_symintnode(symbol, hint=hint)
        for symbol, hint in zip(symbols, (n, d), strict=True)
    ]

    class Sized(torch.nn.Module):
        def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.ops.vne_kernels.vn_entropy_grad(z, None, True, method, 1e-12)[:2]

    with use_backend("triton"), FakeTensorMode(shape_env=environment):
        count_launches(Sized(), torch.empty(*sizes, device="cuda"))
    assert environment.guards
    return [
        str(guard.expr)
        for guard in environment.guards
        for other in [(n, d), *others]
        if not guard.expr.subs(dict(zip(symbols, other, strict=True)))
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "d", "others", "method"),
    [
        (100, 512, [(65, 257), (128, 512)], "poles"),
        (512, 100, [(257, 65)], "poles"),
        (100, 512, [(65, 257)], "eigh"),
        (300, 301, [(310, 320)], "poles"),
    ],
)
def test_sizes_are_compiled_for_ranges(
    pretended_gpu: None, n: int, d: int, others: list[tuple[int, int]], method: str
) -> None:
    """Not for one number each: a last batch that is smaller would be compiled again and again."""
    assert broken_guards(n, d, method, others) == []
    assert broken_guards(n, d, method, [(d, n)]) != []


def test_exported_operators_stay_whole(pretended_gpu: None) -> None:
    with use_backend("triton"), FakeTensorMode():
        program = torch.export.export(Gradient(), (torch.empty(6, 4, device="cuda"),))
    assert "vne_kernels.vn_entropy_grad.default" in str(program.graph)


# ---- compiled without a GPU ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    pytest.importorskip("triton", reason="this torch is without Triton")
    return emulation.import_module(ROOT / "bench" / "triton_resources.py")


@pytest.mark.slow
def test_every_kernel_is_launched_for_the_resources(resources: ModuleType) -> None:
    """bench/triton_resources.py compiles what is launched: a kernel that is not, it overlooks."""
    launched = {launch.kernel.__name__ for launch in resources.launches((torch.float32,))}
    defined = set()
    for path in (Path(vne_kernels.__file__).parent / "_triton").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for body in re.split(r"^@triton\.jit\n", text, flags=re.M)[1:]:
            if "tl.program_id" in body.partition("\n\n\n")[0]:
                defined.add(body.removeprefix("def ").partition("(")[0])
    assert launched == defined


@pytest.mark.slow
def test_a_kernel_that_spills_fails_the_check(resources: ModuleType) -> None:
    good, bad = {"local": 88, "spills": 0}, {"local": 8, "spills": 3}
    resources.check([good])
    for found in ([good, bad], []):
        with pytest.raises(SystemExit):
            resources.check(found)
