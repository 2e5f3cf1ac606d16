"""The report of a GPU in Markdown: against the targets first, then every figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import train_step
from cases import SIZES, is_plain
from train_step import Step

from fastloss.bench import table
from fastloss.bench.implementations import TITLES
from fastloss.bench.machine import machine_text, versions_text
from fastloss.bench.report import EXPLANATION, HEADER, Report, missing_lines
from fastloss.bench.results import Figure

LARGE = 200_000_000
"""Bytes of logits from which the share of the limit is a target."""
SHARES = {
    "from 0.2 GB": (0.85, lambda spec: spec.nbytes >= LARGE and spec.layout == "contiguous"),
    "from 0.2 GB, channels-last": (
        0.75,
        lambda spec: spec.nbytes >= LARGE and spec.layout == "channels_last",
    ),
    "on B2 C2 128³, float32": (
        0.80,
        lambda spec: is_plain(spec) and spec.shape[:2] == SIZES["B2C2-128"][:2],
    ),
}
"""The least share of the limit, and the inputs that it holds for."""
TARGETS = {"eager": 10.0, "compiled": 4.0, "host": 1.0, "spare": 1 << 20}
SMALL_CALL = "PyTorch, forward and backward"
BESIDE = "F.cross_entropy, forward and backward"
"""The small call that ours is compared with: no PyTorch loss does less."""
EAGER = ("monai", "nnunet")
COMPILED = ("nnunet-compile", "jax", "monai-compile")


@dataclass
class GpuReport(Report):
    """A report with the measurements that are specific to a GPU."""

    smoke: bool = False
    steps: list[Step] = field(default_factory=list)
    reuse_memory: dict[str, int | None] = field(default_factory=dict)
    host: dict[str, dict[str, Any]] = field(default_factory=dict)
    graph: dict[str, Any] = field(default_factory=dict)
    startup: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def other_figures(report: GpuReport) -> list[Figure]:
    """The figures outside any row, for the table of results."""
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
    for one in report.steps:
        milli = None if one.seconds is None else one.seconds * 1e3
        found.append(Figure(one.title, f"time {one.loss}", milli, "ms"))
        peak = None if one.peak is None else one.peak / 2**30
        found.append(Figure(one.title, f"peak memory {one.loss}", peak, "GiB"))
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
        *training(report.steps),
        "## Against the targets",
        table.markdown_table(("target", "worst seen", "where", "met"), targets(report)),
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


def training(steps: list[Step]) -> list[str]:
    """The training step: in a sentence, and in a table."""
    if not steps:
        return []
    without = {one.classes: one for one in steps if one.loss == "none"}

    def beyond(one: Step) -> tuple[float | None, float | None]:
        """Seconds and bytes beyond those of the step without a loss."""
        none = without[one.classes]
        seconds = peak = None
        if one.seconds is not None and none.seconds is not None:
            seconds = one.seconds - none.seconds
        if one.peak is not None and none.peak is not None:
            peak = one.peak - none.peak
        return seconds, peak

    sentences = []
    for classes in without:
        parts = []
        for one in steps:
            seconds, peak = beyond(one)
            if one.classes == classes and one is not without[classes] and seconds is not None:
                parts.append(
                    f"{train_step.TITLES[one.loss]} {seconds * 1e3:.1f} ms"
                    + ("" if peak is None else f" and {peak / 2**30:.2f} GiB")
                )
        if parts:
            sentences.append(f"With {classes} classes a loss adds to a step: {', '.join(parts)}.")
    rows = []
    for one in steps:
        seconds, peak = beyond(one)
        rows.append(
            (
                one.title.removeprefix("training step, "),
                train_step.TITLES[one.loss],
                table.milliseconds(one.seconds),
                "-" if one is without[one.classes] else table.milliseconds(seconds),
                _gibibytes(one.peak),
                "-" if one is without[one.classes] else _gibibytes(peak),
                one.note,
            )
        )
    header = ("network's output", "loss", "step ms", "loss ms", "peak GiB", "loss GiB", "")
    return [
        "## A training step",
        "MONAI's BasicUNet, SGD; every loss in turn on the same network. Without a loss, the "
        "backward pass begins from a constant gradient.",
        *sentences,
        table.markdown_table(header, rows),
    ]


def _gibibytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f}"


def targets(report: GpuReport) -> list[tuple[str, str, str, str]]:
    """One line each: target, the worst measurement, its input, and whether the target is met."""
    rows = [row for row in report.rows if row.forward_backward is not None]
    ours = {row.spec: row for row in rows if row.implementation == "torch"}
    lines = []

    def line(
        target: str,
        found: list[tuple[float, str]],
        met: Callable[[float], bool],
        show: Callable[[float], str],
        worst: Callable[..., Any] = min,
        seen: int = 0,
        wanted: int = 0,
    ) -> None:
        """``seen``: how many of the ``wanted`` sizes were measured."""
        if not found:
            lines.append((target, "-", "not measured", "-"))
            return
        value, where = worst(found, key=lambda pair: pair[0])
        yes = f"so far, on {seen} of {wanted} sizes" if seen < wanted else "yes"
        lines.append((target, show(value), where, yes if met(value) else "**no**"))

    for where, (least, applies) in SHARES.items():
        line(
            f"≥ {least:.0%} of the limit {where}",
            [
                (report.share_of_limit(row) or 0.0, spec.title)
                for spec, row in ours.items()
                if applies(spec)
            ],
            lambda share, least=least: share >= least,  # type: ignore[misc]
            table.percent,
        )
    plain = {spec for spec in ours if is_plain(spec)}
    for title, names, least in (
        (f"≥ {TARGETS['eager']:.0f}× the fastest eager peer", EAGER, TARGETS["eager"]),
        (f"≥ {TARGETS['compiled']:.0f}× the fastest compiled peer", COMPILED, TARGETS["compiled"]),
    ):
        fastest = [
            row for row in rows
            if row.implementation in names and row.spec in ours
            and row is report.fastest(row, names)
        ]  # fmt: skip
        line(
            title,
            [
                (
                    report.ratio_to_fastloss(row) or 0.0,
                    f"{row.spec.title}: {TITLES[row.implementation]}",
                )
                for row in fastest
            ],
            lambda ratio, least=least: ratio >= least,  # type: ignore[misc]
            table.times,
            seen=sum(row.spec in plain for row in fastest),
            wanted=len(plain),
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
    small, beside = (report.host.get(name) for name in (SMALL_CALL, BESIDE))
    line(
        "host: at most the time of F.cross_entropy, forward and backward on 1×2×32³",
        [
            (
                small["host"] / beside["host"],
                f"{table.microseconds(small['host'])} and {table.microseconds(beside['host'])} µs",
            )
        ]
        if small and beside
        else [],
        lambda ratio: ratio <= TARGETS["host"],
        table.times,
        max,
    )
    return lines
