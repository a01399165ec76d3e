"""Pages of tables and pictures are made from results files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
COLUMNS = (
    "provider,n,launch,m,d,batch,threads,mode,p20_ms,p50_ms,p80_ms,grad_rel_error,device,l2,dtype,"
    "floor_ms,value_rel_error,peak_mib,note,device_name,torch"
)
REST = "32,1,1,forward+backward,1,2,3,1e-6,cuda,hot,float32,,,,,card,2"


@pytest.mark.slow
def test_pages_and_pictures(
    needs: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("tabulate")
    needs("matplotlib")
    monkeypatch.syspath_prepend(str(BENCH))
    import plot
    import tables

    # The committed results.
    results = shutil.copytree(BENCH / "results", tmp_path / "results")
    pages = {path: path.unlink() for path in results.glob("*.md")}
    options = ["--check"], [], ["--check"]
    assert [tables.main([str(results), *option]) for option in options] == [1, 0, 0]
    assert set(results.glob("*.md")) == set(pages)
    assert plot.main([str(results / "scaling.csv"), str(results / "reliability/memory.csv")]) == 0

    # A GPU that does not exist.
    cases = product(("gram", "ours"), (8, 16), ("eager", "graph"))
    rows = [f"{p},{n},{how},{n},{REST}" for p, n, how in cases]
    (tmp_path / "card.csv").write_text("\n".join([COLUMNS, *rows]), encoding="utf-8")
    assert tables.main([str(tmp_path)]) == plot.main([str(tmp_path / "card.csv")]) == 0
    assert {path.name for path in tmp_path.glob("card*")} == {
        *("card.csv", "card.md", "card-time.png", "card-speedup.png", "card-error.png")
    }
