"""Pages of tables and pictures are made from results files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("tabulate")
pytest.importorskip("matplotlib")

BENCH = Path(__file__).resolve().parents[1] / "bench"
COLUMNS = "provider,n,m,p20_ms,p50_ms,p80_ms,mode,d,batch,threads,grad_rel_error,device,launch"


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def test_committed_results(tmp_path: Path) -> None:
    import plot
    import tables

    results = shutil.copytree(BENCH / "results", tmp_path / "results")
    pages = {path.name for path in results.glob("*.md")}
    for path in results.glob("*.md"):
        path.unlink()
    assert [tables.main([str(results), *check]) for check in (["--check"], [], ["--check"])] == [
        1,
        0,
        0,
    ]
    assert {path.name for path in results.glob("*.md")} == pages
    files = [str(path) for path in (results / "scaling.csv", results / "reliability/memory.csv")]
    assert plot.main(files) == 0


def test_invented_results_of_a_gpu(tmp_path: Path) -> None:
    import plot
    import tables

    cases = [
        (name, n, launch)
        for name in ("gram", "ours")
        for n in (8, 16)
        for launch in ("eager", "graph")
    ]
    rows = [
        f"{name},{n},{n},1,2,3,forward+backward,64,1,1,1e-6,cuda,{launch}"
        for name, n, launch in cases
    ]
    (tmp_path / "card.csv").write_text("\n".join([COLUMNS, *rows]), encoding="utf-8")
    assert tables.main([str(tmp_path)]) == plot.main([str(tmp_path / "card.csv")]) == 0
    pictures = {f"card-{name}.png" for name in ("time", "speedup", "error")}
    assert {path.name for path in tmp_path.iterdir()} == {"card.csv", "card.md", *pictures}
