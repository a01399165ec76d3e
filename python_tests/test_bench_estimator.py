"""bench/estimator.py: matrices with the spectrum they are given, rows, resuming, the table."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import gaussian, generator

from vne_kernels import reference

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def estimator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import estimator

    return estimator


def test_matrices(estimator: ModuleType) -> None:
    for name, spectrum in estimator.SPECTRA.items():
        eigenvalues = spectrum(100)
        z = estimator.dense(eigenvalues, generator(0))
        assert (z != 0).float().mean() > 0.9, name
        found = torch.linalg.svdvals(z.double()).square()
        expected = eigenvalues.sort(descending=True).values
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected[0]))


def test_iid_is_that_of_gaussian_rows(estimator: ModuleType) -> None:
    eigenvalues = estimator.iid(400)
    s = torch.special.entr(eigenvalues / eigenvalues.sum()).sum()
    drawn = reference.oracle(gaussian(400, 400, generator(0)))
    assert abs(float(s - drawn)) <= 0.01  # measured 2e-3


def test_run(estimator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "estimator.csv"
    arguments = ["--trials", "2", "--spectra", "iid", "low_rank", "--out", str(out)]
    assert estimator.main(["--m", "390", *arguments]) == 0
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(estimator.COLUMNS)
    kinds = [(row["spectrum"], row["trial"]) for row in rows]
    trials = [(s, t) for t in "01" for s in ("iid", "low_rank")]
    assert kinds == [("exact", "0"), *trials, ("exact", "1")]
    for row in rows:
        off = abs(float(row["estimate"]) - float(row["entropy"]))
        limit = 1e-4 if row["spectrum"] == "exact" else 2 * float(row["error"])
        assert off <= limit
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[1:]] == [["iid", "390"], ["low_rank", "390"]]

    # Interrupted after the first three rows: only the others are measured again, other m stay.
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    partial = out.with_suffix(".csv.partial")
    marked = [line.replace(",390,0,", ",390,0,7") if "iid" in line else line for line in lines[:4]]
    partial.write_text("".join(marked), encoding="utf-8")
    out.write_text(lines[0] + lines[1].replace(",390,", ",385,"), encoding="utf-8")
    assert estimator.main(["--m", "390", "--resume", *arguments]) == 0
    with out.open(newline="", encoding="utf-8") as file:
        again = list(csv.DictReader(file))
    assert [row["m"] for row in again] == ["385", *["390"] * 6]
    assert again[2]["entropy"].startswith("7")  # as it was left, not measured anew
    assert not partial.exists()
