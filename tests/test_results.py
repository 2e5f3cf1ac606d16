"""The table to which benchmark runs append their figures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from support import ROOT

from fastloss.bench.machine import machine
from fastloss.bench.results import COLUMNS, Figure, Table


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_runs_add_to_a_table(tmp_path: Path) -> None:
    """Runs share one header; a figure that could not be measured has no row."""
    path = tmp_path / "results.csv"
    Table(path, machine(), "first").add([Figure("B1C4-128", "time fastloss", 2.0663, "ms")])
    second = Table(path, machine())
    second.add([Figure("B1C4-128", "speedup", None, "×"), Figure("B1C4-128", "ratio", 1 / 3, "×")])
    first, other = read(path)
    assert list(first) == list(COLUMNS)
    assert (first["run"], first["figure"], first["value"]) == ("first", "time fastloss", "2.0663")
    assert (other["figure"], other["value"], other["unit"]) == ("ratio", "0.333333", "×")
    assert other["run"]
    assert "fastloss" in other["versions"]


def test_the_kept_table() -> None:
    """Every line has a number, and no run has a figure twice."""
    rows = read(ROOT / "benchmarks" / "results.csv")
    keys = [
        tuple(row[c] for c in COLUMNS if c not in ("value", "unit", "versions")) for row in rows
    ]
    assert len(set(keys)) == len(keys) > 3000
    assert all(float(row["value"]) >= 0 and row["unit"] for row in rows)


@pytest.mark.parametrize("size", ["B2C2-96", "B1C4-128", "B1C14-128", "B1C105-64"])
def test_ratios_are_those_of_the_times(size: str) -> None:
    """The fastest peer's time over the library's, in each run."""
    runs: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in read(ROOT / "benchmarks" / "results.csv"):
        if row["row"] == size:
            run = runs.setdefault((row["date"], row["machine"], row["run"]), {})
            run[row["figure"]] = float(row["value"])
    assert runs
    peers = ("monai", "monai-compile", "nnunet", "nnunet-compile", "jax")
    for figures in runs.values():
        if "speedup" in figures:
            fastest = min(figures[f"time {p}"] for p in peers if f"time {p}" in figures)
            assert figures["speedup"] == pytest.approx(fastest / figures["time fastloss"], rel=1e-4)
