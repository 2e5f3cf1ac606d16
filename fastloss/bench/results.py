"""Figures of runs, in one table that every run appends to: a CSV file, one figure per line."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastloss.bench.machine import versions_text

COLUMNS = (
    "date",
    "commit",
    "machine",
    "device",
    "versions",
    "run",
    "row",
    "figure",
    "value",
    "unit",
)


_PACKAGES = ("torch", "triton", "monai", "jax", "numba", "nnunetv2", "cupy", "cuda", "driver")


@dataclass(frozen=True)
class Figure:
    """A number, its subject, and its unit: "×" for a ratio, "1" for a share."""

    row: str
    figure: str
    value: float | None
    unit: str


class Table:
    """A file of results, created if missing, and one run that appends to it.

    Args:
        path: the CSV file.
        made: the result of `machine`, where the run was.
        run: distinguishes it from others of the same day; empty: the time of day.
    """

    def __init__(self, path: Path, made: dict[str, Any], run: str = "") -> None:
        now = datetime.now(timezone.utc)
        self.path = path
        self._cells = (
            now.date().isoformat(),
            _commit(),
            f"{made['processor']}, {made['cores']} cores",
            device_text(made),
            versions_text(made, _PACKAGES),
            run or now.strftime("%H:%M:%S"),
        )

    def add(self, figures: Iterable[Figure]) -> None:
        """Write the figures; None is skipped."""
        new = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(COLUMNS)
            for one in figures:
                if one.value is not None:
                    value = f"{one.value:.6g}"
                    writer.writerow((*self._cells, one.row, one.figure, value, one.unit))


def device_text(made: dict[str, Any]) -> str:
    """The GPU's name, or the instruction set and threads of the CPU."""
    if made.get("gpu"):
        return str(made["gpu"])
    parts = ("CPU", made["instruction_set"], f"{made['threads']} threads")
    return ", ".join(filter(None, parts))


def _commit() -> str:
    """The commit of the checkout, with "+" if the library was modified; else empty."""
    folder = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder:
            return ""  # an installed package inside another project's repository
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--", "csrc", "fastloss") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
