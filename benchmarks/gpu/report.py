"""The report in Markdown: against the targets first, then every figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implementations import COMPILED, OURS

from fastloss.bench import table
from fastloss.bench.results import Figure

LARGE = 200_000_000
"""Bytes of logits from which the share of the limit is a target."""
TARGETS = {"share": 0.8, "eager": 10.0, "compiled": 4.0, "host": 60e-6, "spare": 1 << 20}
SMALL_CALL = "PyTorch, forward and backward"


def row_figures(report: Any, row: Any) -> list[Figure]:
    """What the table of results keeps of one implementation on one input."""
    found = [
        ("forward", row.forward and row.forward * 1e3, "ms"),
        ("with gradient", row.both and row.both * 1e3, "ms"),
        ("with gradient, 10 % quantile", row.low and row.low * 1e3, "ms"),
        ("with gradient, 90 % quantile", row.high and row.high * 1e3, "ms"),
        ("share of limit", _share(report, row), "1"),
        ("peak memory", None if row.memory is None else row.memory / 2**20, "MiB"),
        ("value error", row.value_error, "1"),
        ("gradient error", row.gradient_error, "1"),
    ]
    return [
        Figure(row.case.title, f"{row.implementation}: {name}", value, unit)
        for name, value, unit in found
    ]


def other_figures(report: Any) -> list[Figure]:
    """… and of everything else."""
    found = [Figure("", "copy bandwidth", report.bandwidth / 1e9, "GB/s")]
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


def render(report: Any) -> str:
    made = report.machine
    parts = []
    if report.smoke:
        parts.append("**CPU smoke run, no figure means anything.**")
    packages = [f"{k} {v}" for k, v in made["packages"].items() if v]
    parts += [
        f"# {made['device']}, {made['date'][:10]}",
        f"Driver {made['driver'] or '-'}, CUDA {made['cuda'] or '-'}, CuPy {made['cupy'] or '-'}, "
        f"{', '.join(packages)}; Python {made['python']}, NumPy {made['numpy']}, "
        f"fastloss {made['fastloss']}; {made['processor']}.",
        f"Dice + cross-entropy. Copy bandwidth in this run, bytes read and written: "
        f"{table.number(report.bandwidth / 1e9)} GB/s. Limit: the logits read twice and the "
        f"gradient written once, at that bandwidth.",
        "## Against the targets",
        table.markdown_table(("target", "worst seen", "where", "met"), _targets(report)),
        "## Every input",
        "ms: medians of forward and backward. Errors are relative, against float64. Memory is what "
        "a step holds beside its input at the peak, over the size of the logits; the gradient "
        "alone is 1.",
        table.markdown_table(
            (
                "input", "implementation", "forward ms", "with gradient ms", "of limit",
                "over fastloss", "memory", "value error", "gradient error", "note",
            ),
            _rows(report),
        ),
    ]  # fmt: skip
    parts += report.notes
    if report.host:
        parts += [
            "## Small calls",
            "Host time per call on 1×2×32³, the device not waited for; and with the wait at the "
            "end of the loop.",
            table.markdown_table(
                ("", "host µs", "with the device µs"),
                [
                    (name, _micro(found["host"]), _micro(found["with_device"]))
                    for name, found in report.host.items()
                ],
            ),
        ]
    if report.graph:
        g = report.graph
        parts.append(
            f"CUDA graph of forward and backward ({g['input']}): replayed on new data "
            f"{'the same bits as' if g['same_bits_as_eager'] else '**other results than**'} eager; "
            f"{_micro(g['replay'])} µs on the device (eager {_micro(g['eager'])} µs), "
            f"{_micro(g['replay_host'])} µs of the host."
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
        parts.append("Not measured:\n\n" + "\n".join(f"- {note}" for note in report.missing))
    if report.problems:
        parts.append("**Problems:**\n\n" + "\n".join(f"- {note}" for note in report.problems))
    parts.append(f"The run took {made.get('seconds', 0):.0f} s.")
    return "\n\n".join(parts) + "\n"


def _micro(seconds: float | None) -> str:
    return "-" if seconds is None else table.number(seconds * 1e6)


def _share(report: Any, row: Any) -> float | None:
    if row.both is None or not report.bandwidth:
        return None
    return float(3 * row.case.nbytes / report.bandwidth / row.both)


def _ours(report: Any) -> dict[Any, Any]:
    """The plain calls of the library, by input."""
    return {r.case: r for r in report.rows if r.implementation == OURS[0] and r.both is not None}


def _rows(report: Any) -> list[tuple[str, ...]]:
    ours = _ours(report)
    rows = []
    order = {row.case: i for i, row in reversed(list(enumerate(report.rows)))}
    for row in sorted(report.rows, key=lambda row: order[row.case]):
        own = ours.get(row.case)
        ratio = row.both / own.both if row.both is not None and own is not None else None
        memory = None if row.memory is None else row.memory / row.case.nbytes
        rows.append(
            (
                row.case.title,
                row.implementation,
                "-" if row.forward is None else table.milliseconds(row.forward),
                "-" if row.both is None else table.milliseconds(row.both),
                table.percent(_share(report, row)),
                table.times(ratio),
                table.number(memory),
                "-" if row.value_error is None else f"{row.value_error:.0e}",
                "-" if row.gradient_error is None else f"{row.gradient_error:.0e}",
                row.note,
            )
        )
    return rows


def _targets(report: Any) -> list[tuple[str, str, str, str]]:
    """One line for each: the worst that was seen, and where."""
    ours = _ours(report)
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

    for layout, text in (("contiguous", ""), ("channels_last_3d", ", channels-last")):
        line(
            f"≥ {TARGETS['share']:.0%} of the limit from 0.2 GB{text}",
            [
                (_share(report, row) or 0.0, case.title)
                for case, row in ours.items()
                if case.nbytes >= LARGE and case.layout == layout
            ],
            lambda share: share >= TARGETS["share"],
            table.percent,
        )
    line(
        f"≥ {TARGETS['eager']:.0f}× MONAI, eager",
        [
            (row.both / ours[row.case].both, row.case.title)
            for row in report.rows
            if row.implementation == "MONAI" and row.both is not None and row.case in ours
        ],
        lambda ratio: ratio >= TARGETS["eager"],
        table.times,
    )
    fastest: dict[Any, Any] = {}
    for row in report.rows:
        if row.implementation in COMPILED and row.both is not None and row.case in ours:
            known = fastest.get(row.case)
            fastest[row.case] = row if known is None or row.both < known.both else known
    line(
        f"≥ {TARGETS['compiled']:.0f}× the fastest compiled peer",
        [
            (row.both / ours[case].both, f"{case.title}: {row.implementation}")
            for case, row in fastest.items()
        ],
        lambda ratio: ratio >= TARGETS["compiled"],
        table.times,
    )
    spare = TARGETS["spare"]
    line(
        "memory: the gradient alone (beyond it, within 1 MiB)",
        [
            (row.memory - case.nbytes, case.title)
            for case, row in ours.items()
            if row.memory is not None
        ],
        lambda beyond: beyond <= spare,
        lambda beyond: f"{table.mebibytes(beyond)} MiB",
        max,
    )
    without = [
        (row.memory, f"{row.case.title}, out=")
        for row in report.rows
        if row.implementation == OURS[1] and row.memory is not None
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
        lambda seconds: f"{_micro(seconds)} µs",
        max,
    )
    return lines
