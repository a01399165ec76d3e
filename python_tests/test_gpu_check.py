"""bench/gpu_check.py on the CPU: a check that passes, and one that has too little time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def test_a_rehearsal_without_time(tmp_path: Path) -> None:
    command = (str(BENCH / "gpu_check.py"), "--device", "cpu", "--minutes", "1e-6")
    done = subprocess.run([sys.executable, *command, "--out", "out"], cwd=tmp_path)
    assert done.returncode == 1
    results = {
        s["name"]: s["result"] for s in json.loads((tmp_path / "out/check.json").read_text())
    }
    on_cpu = ("smoke", "table", "device", "float32", "float64")
    on_gpu = ("graphs", "memcheck", "racecheck")
    assert results == {**dict.fromkeys(on_cpu, "out of time"), **dict.fromkeys(on_gpu, "not run")}


@pytest.mark.slow
def test_results_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smoke program passes; a hang is out of time, and a crash after a check is a failure."""
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_check

    (smoke,) = next(gpu_check.plan("cpu", tmp_path, 0.0))
    crash = "import os; print('check one: ok, 1\\ncheck two: ', end='', flush=True); os.abort()"
    steps = [
        smoke,
        gpu_check.Step("crash", [sys.executable, "-c", crash], 60),
        gpu_check.Step("hang", [sys.executable, "-c", "import time; time.sleep(60)"], 1),
    ]
    for _ in gpu_check.run(steps, tmp_path, float("inf")):
        pass
    assert [step.result for step in steps] == ["passed", "failed", "out of time"]
    assert steps[1].ended_by in steps[1].failures == {"two": "ended its process"}
    assert steps[0].counts["passed"] > 20
