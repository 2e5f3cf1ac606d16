"""The report of a GPU in Markdown: against the targets first, then every figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastloss.bench import table
from fastloss.bench.implementations import TITLES
from fastloss.bench.machine import machine_text, versions_text
from fastloss.bench.report import EXPLANATION, HEADER, Report, missing_lines
from fastloss.bench.results import Figure

LARGE = 200_000_000
"""Bytes of logits from which the share of the limit is a target."""
TARGETS = {"share": 0.8, "eager": 10.0, "compiled": 4.0, "host": 60e-6, "spare": 1 << 20}
SMALL_CALL = "PyTorch, forward and backward"
COMPILED = ("monai-compile", "nnunet-compile")


@dataclass
class GpuReport(Report):
    """A report with the measurements that only a GPU has."""

    smoke: bool = False
    reuse_memory: dict[str, int | None] = field(default_factory=dict)
    host: dict[str, dict[str, Any]] = field(default_factory=dict)
    graph: dict[str, Any] = field(default_factory=dict)
    startup: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def other_figures(report: GpuReport) -> list[Figure]:
    """The figures that belong to no row, for the table of results."""
    found = [Figure("", "copy bandwidth", report.copy_bandwidth / 1e9, "GB/s")]
    for title, memory in report.reuse_memory.items():
        value = None if memory is None else memory / 2**20
        found.append(Figure(title, "reuse_logits: peak memory", value, "MiB"))
    for name, host in report.host.items():
        found.append(Figure("1×2×32³", f"{name}: host", host["host"] * 1e6, "µs"))
        with_device = host["with_device"] * 1e6
        found.append(Figure("1×2×32³", f"{name}: host and device", with_device, "µs"))
    for name in ("eager", "replay", "replay_host"):
        if report.graph:
            title = f"CUDA graph, {report.graph['input']}"
            found.append(Figure(title, name, report.graph[name] * 1e6, "µs"))
    for kernels, steps in report.startup.items():
        found += [Figure(f"a first call, {kernels}", step, s, "s") for step, s in steps.items()]
    return found


def render(report: GpuReport) -> str:
    made = report.machine
    order = {row.spec: i for i, row in reversed(list(enumerate(report.rows)))}
    rows = [
        (row.spec.title, TITLES[row.implementation], *report.cells(row))
        for row in sorted(report.rows, key=lambda row: order[row.spec])
    ]
    parts = ["**CPU smoke run, no figure means anything.**"] if report.smoke else []
    parts += [
        f"# {made.get('gpu', made['processor'])}, {made['date'][:10]}",
        f"{machine_text(made)}; {versions_text(made, made['packages'])}.",
        f"Dice + cross-entropy. Copy bandwidth in this run, bytes read and written: "
        f"{table.number(report.copy_bandwidth / 1e9)} GB/s.",
        "## Against the targets",
        table.markdown_table(("target", "worst seen", "where", "met"), _targets(report)),
        "## Every input",
        EXPLANATION.replace("\n", " "),
        table.markdown_table(("input", "implementation", *HEADER), rows),
    ]
    parts += report.notes
    if report.host:
        parts += [
            "## Small calls",
            "Host time per call on 1×2×32³, the device not waited for; and with the wait at the "
            "end of the loop.",
            table.markdown_table(
                ("", "host µs", "with the device µs"),
                [
                    (
                        name,
                        table.microseconds(found["host"]),
                        table.microseconds(found["with_device"]),
                    )
                    for name, found in report.host.items()
                ],
            ),
        ]
    if report.graph:
        g = report.graph
        same = "the same bits as" if g["same_bits_as_eager"] else "**other results than**"
        replay, eager, host = (
            table.microseconds(g[name]) for name in ("replay", "eager", "replay_host")
        )
        parts.append(
            f"CUDA graph of forward and backward ({g['input']}): replayed on new data {same} "
            f"eager; {replay} µs on the device (eager {eager} µs), {host} µs of the host."
        )
    if report.startup:
        steps = list(next(iter(report.startup.values())))
        parts += [
            "## A first call",
            "Seconds in a new process, B1 C14 32³.",
            table.markdown_table(
                ("kernels", *steps),
                [
                    (name, *(table.number(seconds.get(step)) for step in steps))
                    for name, seconds in report.startup.items()
                ],
            ),
        ]
    if report.missing:
        lines = [line.strip() for _, line in missing_lines(report.missing, 1)]
        parts.append("Not measured:\n\n" + "\n".join(lines))
    if report.problems:
        parts.append("**Problems:**\n\n" + "\n".join(f"- {note}" for note in report.problems))
    parts.append(f"The run took {made.get('seconds', 0):.0f} s.")
    return "\n\n".join(parts) + "\n"


def _targets(report: GpuReport) -> list[tuple[str, str, str, str]]:
    """One line for each: the worst that was seen, and where."""
    rows = [row for row in report.rows if row.forward_backward is not None]
    ours = {row.spec: row for row in rows if row.implementation == "torch"}
    lines = []

    def line(
        target: str,
        found: list[tuple[float, str]],
        met: Callable[[float], bool],
        show: Callable[[float], str],
        worst: Callable[..., Any] = min,
    ) -> None:
        if not found:
            lines.append((target, "-", "not measured", "-"))
            return
        value, where = worst(found, key=lambda pair: pair[0])
        lines.append((target, show(value), where, "yes" if met(value) else "**no**"))

    for layout, text in (("contiguous", ""), ("channels_last", ", channels-last")):
        line(
            f"≥ {TARGETS['share']:.0%} of the limit from 0.2 GB{text}",
            [
                (report.share_of_limit(row) or 0.0, spec.title)
                for spec, row in ours.items()
                if spec.nbytes >= LARGE and spec.layout == layout
            ],
            lambda share: share >= TARGETS["share"],
            table.percent,
        )
    line(
        f"≥ {TARGETS['eager']:.0f}× MONAI, eager",
        [
            (report.ratio_to_fastloss(row) or 0.0, row.spec.title)
            for row in rows
            if row.implementation == "monai" and row.spec in ours
        ],
        lambda ratio: ratio >= TARGETS["eager"],
        table.times,
    )
    fastest = [
        row
        for row in rows
        if row.implementation in COMPILED
        and row.spec in ours
        and row is report.fastest(row, COMPILED)
    ]
    line(
        f"≥ {TARGETS['compiled']:.0f}× the fastest compiled peer",
        [
            (
                report.ratio_to_fastloss(row) or 0.0,
                f"{row.spec.title}: {TITLES[row.implementation]}",
            )
            for row in fastest
        ],
        lambda ratio: ratio >= TARGETS["compiled"],
        table.times,
    )
    spare = TARGETS["spare"]
    line(
        "memory: the gradient alone (beyond it, within 1 MiB)",
        [
            (row.peak_memory - spec.nbytes, spec.title)
            for spec, row in ours.items()
            if row.peak_memory is not None
        ],
        lambda beyond: beyond <= spare,
        lambda beyond: f"{table.mebibytes(beyond)} MiB",
        max,
    )
    without = [
        (row.peak_memory, f"{row.spec.title}, out=")
        for row in rows
        if row.implementation == "torch-out" and row.peak_memory is not None
    ]
    without += [
        (memory, f"{title}, reuse_logits")
        for title, memory in report.reuse_memory.items()
        if memory is not None
    ]
    line(
        "no memory with out= or reuse_logits (within 1 MiB)",
        without,
        lambda beyond: beyond <= spare,
        lambda beyond: f"{table.mebibytes(beyond)} MiB",
        max,
    )
    small = report.host.get(SMALL_CALL)
    line(
        f"host < {TARGETS['host'] * 1e6:.0f} µs, forward and backward on 1×2×32³",
        [(small["host"], SMALL_CALL)] if small else [],
        lambda seconds: seconds < TARGETS["host"],
        lambda seconds: f"{table.microseconds(seconds)} µs",
        max,
    )
    return lines
