"""The results of a run on a CPU or a GPU, and their report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from fastloss.bench import table
from fastloss.bench.implementations import PEERS, TITLES
from fastloss.bench.inputs import Spec
from fastloss.bench.results import Figure

OWN = ("cpu", "numba", "torch")
"""The baseline of ratios: the first of these that was measured."""

HEADER = (
    "with\ngradient ms",
    "time vs\nfastloss",
    "peak extra\nMiB",
    "over\nlogits",
    "of\nlimit",
    "forward\nms",
    "of\nlimit",
    "ns per\nlogit",
    "value",
    "value\nerror",
    "gradient\nerror",
    "",
)

EXPLANATION = """\
Times are medians. Peak extra is the memory that one call adds to its inputs, gradient included;
the gradient alone is 1.00× the logits. The limit reads the logits twice and writes the gradient
once, or reads them once for the value, at this run's bandwidth; a volume that fits in the caches
can pass 100%. Errors are relative to float64 on the same logits."""


@dataclass
class Row:
    """One implementation on one input. Times are medians in seconds, memory is in bytes."""

    spec: Spec
    loss: str
    implementation: str
    value: float | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    forward: float | None = None
    forward_backward: float | None = None
    low: float | None = None
    high: float | None = None
    """The 10 % and 90 % quantiles of ``forward_backward``."""
    peak_memory: int | None = None
    note: str = ""


@dataclass
class Missing:
    """An implementation that was not measured, or only in part."""

    loss: str
    implementation: str
    reason: str


@dataclass
class Report:
    machine: dict[str, Any]
    copies: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    """Bytes per second, measured repeatedly during the run."""
    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def copy_bandwidth(self) -> float:
        return median(self.copies) if self.copies else math.nan

    @property
    def read_bandwidth(self) -> float:
        return median(self.reads) if self.reads else math.nan

    def share_of_limit(self, row: Row) -> float | None:
        """The least possible time for value and gradient, over the measured time."""
        if row.forward_backward is None or not self.copies:
            return None
        return 3 * row.spec.nbytes / self.copy_bandwidth / row.forward_backward

    def forward_share_of_limit(self, row: Row) -> float | None:
        """The same for the value alone."""
        if row.forward is None or not self.reads:
            return None
        return row.spec.nbytes / self.read_bandwidth / row.forward

    def speedup_over_slowest(self, row: Row) -> float | None:
        """The slowest implementation's time over this one's, on the same input and loss.

        The reference is not written to be fast, and counts only where nothing else was measured.
        """
        if row.forward_backward is None:
            return None
        alike = list(self._alike(row))
        others = [r for r in alike if r.implementation != "reference"] or alike
        return max(r.forward_backward or math.nan for r in others) / row.forward_backward

    def own(self, like: Row) -> Row | None:
        """The library's own row of the same input and loss."""
        found = {r.implementation: r for r in self._alike(like)}
        return next((found[name] for name in OWN if name in found), None)

    def ratio_to_fastloss(self, row: Row) -> float | None:
        own = self.own(row)
        if row.forward_backward is None or own is None or own.forward_backward is None:
            return None
        return row.forward_backward / own.forward_backward

    def fastest(self, like: Row, names: Sequence[str] = PEERS) -> Row | None:
        """The fastest of these on the same input and loss."""
        return min(
            (r for r in self._alike(like) if r.implementation in names),
            key=lambda r: r.forward_backward or math.inf,
            default=None,
        )

    def _alike(self, like: Row) -> Iterable[Row]:
        return (
            r
            for r in self.rows
            if r.spec == like.spec and r.loss == like.loss and r.forward_backward is not None
        )

    def cells(self, row: Row) -> tuple[str, ...]:
        """The row for a table under `HEADER`."""
        both, memory = row.forward_backward, row.peak_memory
        return (
            table.milliseconds(both),
            table.times(self.ratio_to_fastloss(row)),
            table.mebibytes(memory),
            table.times(None if memory is None else memory / row.spec.nbytes),
            table.percent(self.share_of_limit(row)),
            table.milliseconds(row.forward),
            table.percent(self.forward_share_of_limit(row)),
            table.number(_ns_per_logit(row)),
            "-" if row.value is None else f"{row.value:.6f}",
            table.error(row.value_error),
            table.error(row.gradient_error),
            row.note,
        )

    def figures(self, row: Row) -> list[Figure]:
        """The figures of a row for the table of results."""
        memory = row.peak_memory
        name = row.implementation
        found = (
            (f"time {name}", _milli(row.forward_backward), "ms"),
            (f"time {name}, 10 %", _milli(row.low), "ms"),
            (f"time {name}, 90 %", _milli(row.high), "ms"),
            (f"time {name}, value alone", _milli(row.forward), "ms"),
            (f"share_of_limit {name}", self.share_of_limit(row), "1"),
            (f"peak memory {name}", None if memory is None else memory / 2**20, "MiB"),
            (f"value error {name}", row.value_error, "1"),
            (f"gradient error {name}", row.gradient_error, "1"),
        )
        return [Figure(row.spec.title, *one) for one in found]

    def as_json(self) -> dict[str, Any]:
        """Everything; non-finite numbers, which JSON lacks, are null."""
        rows = [
            asdict(row)
            | {
                "share_of_limit": self.share_of_limit(row),
                "forward_share_of_limit": self.forward_share_of_limit(row),
                "ns_per_logit": _ns_per_logit(row),
                "ratio_to_fastloss": self.ratio_to_fastloss(row),
                "speedup_over_slowest": self.speedup_over_slowest(row),
            }
            for row in self.rows
        ]
        bandwidth = {"copy_bandwidth": self.copy_bandwidth, "read_bandwidth": self.read_bandwidth}
        finite: dict[str, Any] = _finite(asdict(self) | bandwidth | {"rows": rows})
        return finite


def missing_lines(missing: Sequence[Missing], losses: int) -> list[tuple[str, str]]:
    """The loss that lacks something, empty if all of several do, and a line about it."""
    notes: dict[tuple[str, str], list[str]] = {}
    for one in missing:
        notes.setdefault((one.implementation, one.reason), []).append(one.loss)
    lines = []
    for (name, why), found in notes.items():
        line = f"  - {TITLES.get(name, name)}: {why}"
        lines += [("", line)] if len(found) == losses else [(loss, line) for loss in found]
    return lines


def _ns_per_logit(row: Row) -> float | None:
    both = row.forward_backward
    return None if both is None else both / row.spec.count * 1e9


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
