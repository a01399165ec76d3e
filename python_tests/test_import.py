"""What importing the package costs, in fresh interpreters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import run_python

import vne_kernels

#: What takes tens of megabytes and tenths of a second, and is for compilers or processes alone.
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed._functional_collectives",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx",
    "numpy.testing",
    "scipy",
    "sympy",
    "triton",
)
#: Beyond `import torch`.
CPU_SECONDS, MEGABYTES = 0.15, 15
CHOICES = ("TRITON_INTERPRET", "VNE_KERNELS_BACKEND")

IMPORT = """
import json, sys, time
import torch

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

modules, seconds, kilobytes = set(sys.modules), time.process_time(), peak()
import vne_kernels
seconds, kilobytes = time.process_time() - seconds, peak() - kilobytes
"""

CALLS = """
from vne_kernels import *

z, rho = torch.randn(8, 4, requires_grad=True), torch.eye(4) / 4
with torch.no_grad():
    vn_entropy(z)
vn_entropy(z).backward()
doe_loss(z, z).backward()
spectrum(z).sum().backward()
vn_entropy_from_density(rho)
effective_rank(z)
rankme(z)
vendi_score(z)
renyi_entropy(z, 2)
mutual_information(rho, (2, 2))
VNEntropy(gather_distributed=True)(z)
DoELoss(gather_distributed=True)(z, z)
DensityAccumulator(4).update(z.detach())
estimate_vn_entropy(z.detach())
available_backends()
vne_kernels.distributed.gather(z)
"""

PROCESSES = """
import torch.distributed as dist
from vne_kernels import distributed

def entropy(z):
    share = distributed.make_share(z, None, dist.group.WORLD, None)
    return distributed.vn_entropy(z, None, share, normalize=True, method="auto", eps=1e-12)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
z = torch.eye(4, requires_grad=True)
entropy(z).backward()
assert "torch._dynamo" not in sys.modules
found = torch.compile(entropy, backend="aot_eager")(z)
torch.testing.assert_close(found, torch.tensor(4).log())
assert list(torch._dynamo.utils.counters["graph_break"]), "the sizes are read by the host"
"""

TELL = """
print(json.dumps([seconds, kilobytes / 1024, sorted(set(sys.modules) - modules)]))
"""


def in_a_fresh_interpreter(script: str, folder: Path) -> tuple[float, float, list[str]]:
    """CPU seconds and megabytes that the package takes beyond torch, and the new modules."""
    done = run_python(script, cwd=folder, without=CHOICES)
    seconds, megabytes, modules = json.loads(done.stdout)
    return seconds, megabytes, modules


def test_importing_costs_little(tmp_path: Path) -> None:
    """The least of several, as the machine may be busy."""
    costs = [in_a_fresh_interpreter(IMPORT + TELL, tmp_path)[:2] for _ in range(3)]
    assert min(seconds for seconds, _ in costs) <= CPU_SECONDS
    assert min(megabytes for _, megabytes in costs) <= MEGABYTES


@pytest.mark.parametrize("calls", ["", CALLS], ids=["import", "calls"])
def test_neither_import_nor_calls_load_what_is_heavy(calls: str, tmp_path: Path) -> None:
    *_, modules = in_a_fresh_interpreter(IMPORT + calls + TELL, tmp_path)
    assert "vne_kernels" in modules
    assert [name for name in modules if name.startswith(HEAVY)] == []


def test_sizes_are_exchanged_without_the_compiler_and_under_it(tmp_path: Path) -> None:
    in_a_fresh_interpreter(IMPORT + PROCESSES + TELL, tmp_path)


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("vne_kernels.metrics", "torchmetrics"),
        ("vne_kernels.callbacks", "lightning"),
        ("vne_kernels.callbacks", "torchmetrics"),  # which lightning imports
    ],
)
def test_a_missing_extra_is_named(module: str, missing: str, tmp_path: Path) -> None:
    script = f"""
        import importlib.abc, sys

        class Missing(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] == {missing!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Missing())
        try:
            import {module}
        except ModuleNotFoundError as error:
            assert error.name.split(".")[0] == {missing!r}
            print(error)
    """
    done = run_python(script, cwd=tmp_path)
    for part in (missing, module, "pip install 'vne_kernels[metrics]'"):
        assert part in done.stdout


def test_programs_import_what_the_tests_do() -> None:
    """Without a working folder of their own, in a clone as elsewhere."""
    done = run_python("import vne_kernels; print(vne_kernels.__file__)")
    assert done.stdout.strip() == vne_kernels.__file__
