"""The whole job: inputs, every implementation, times, errors and memory, and the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import fastloss
from fastloss.backends import BACKENDS
from fastloss.bench import table
from fastloss.bench.apart import peak_memory, saved
from fastloss.bench.bandwidth import Bandwidth
from fastloss.bench.errors import Unavailable, reason
from fastloss.bench.implementations import FRAMEWORKS, TITLES, Call, make_call
from fastloss.bench.inputs import Case, make_case, size_text
from fastloss.bench.machine import available_memory, machine
from fastloss.bench.machine import threads as count_threads
from fastloss.bench.measure import Timed, forward, forward_backward, interleave
from fastloss.bench.nnunet_peer import nnunet_source
from fastloss.bench.truth import Truth, find_truth
from fastloss.bench.volumes import load_volume

Progress = Callable[[str], None]


# What a call takes at its peak, roughly, in arrays of the size of the logits. The reference
# computes a sample at a time, in float64.
_ARRAYS = {"monai": 6, "nnunet": 6, "jax": 9, "reference": 14}


@dataclass(frozen=True)
class Options:
    """What to measure; the names are those of the command line."""

    volume: str
    size: tuple[int, int, int] = (128, 128, 128)
    classes: int | None = None
    batch: int = 1
    dtype: str = "float32"
    losses: tuple[str, ...] = ("dice_ce",)
    backends: tuple[str, ...] = BACKENDS
    frameworks: tuple[str, ...] = FRAMEWORKS
    peers: tuple[str, ...] = ()
    repeats: int = 7


@dataclass
class Row:
    """One implementation of one loss. Times are medians in seconds, memory in bytes."""

    loss: str
    implementation: str
    value: float
    value_error: float
    gradient_error: float
    forward: float
    forward_backward: float
    ns_per_logit: float
    forward_share_of_limit: float
    share_of_limit: float
    peak_memory: int | None
    speedup_over_slowest: float = math.nan
    ratio_to_fastloss: float | None = None


@dataclass
class Missing:
    """An implementation that was not measured, or not in full."""

    loss: str
    implementation: str
    reason: str


@dataclass
class Report:
    options: Options
    machine: dict[str, Any]
    logits_shape: tuple[int, ...]
    logits: int
    copy_bandwidth: float
    read_bandwidth: float
    bandwidth_method: str
    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything; numbers that are not finite, which JSON lacks, are null."""
        finite: dict[str, Any] = _finite(asdict(self))
        return finite


def run(options: Options, progress: Progress) -> Report:
    """Measure. Raises BadArgument for a volume that cannot be had."""
    progress(f"making the input from {options.volume}")
    volume = load_volume(options.volume, options.size, options.classes)
    if volume.note:
        progress(f"{volume.name}: {volume.note}")
    case = make_case(volume, batch=options.batch, dtype=options.dtype)
    threads = count_threads()
    fastloss.set_num_threads(threads)  # for all backends alike
    bandwidth = Bandwidth(threads)
    report = Report(options, machine(), case.logits.shape, case.count, 0.0, 0.0, bandwidth.method)
    copies: list[float] = []
    reads: list[float] = []

    def measure_bandwidth() -> None:
        copies.append(bandwidth.copy())
        reads.append(bandwidth.read())

    with ExitStack() as stack:
        progress("writing the input for the memory measurements")
        folder = stack.enter_context(saved(case))
        for loss in options.losses:
            calls, accuracy = _prepare(case, loss, options, threads, report, progress)
            if not calls:
                continue
            progress(f"{loss}: timing {len(calls)} implementations, {options.repeats} rounds")
            timed: dict[tuple[str, str], Timed] = {}
            for name, call in calls.items():
                timed[name, "forward"] = forward(call)
                timed[name, "both"] = forward_backward(call)
            seconds = interleave(timed, options.repeats, also=measure_bandwidth)
            calls.clear()
            timed.clear()
            rows = []
            for name, (value, value_error, gradient_error) in accuracy.items():
                progress(f"{loss}: memory of {name}, in a process of its own")
                memory = None
                try:
                    memory = peak_memory(name, folder, loss, threads)
                except Unavailable as error:
                    report.missing.append(Missing(loss, name, f"memory not measured: {error}"))
                once, both = seconds[name, "forward"], seconds[name, "both"]
                rows.append(
                    Row(
                        loss,
                        name,
                        value,
                        value_error,
                        gradient_error,
                        once,
                        both,
                        both / case.count * 1e9,
                        0.0,
                        0.0,
                        memory,
                    )
                )
            _compare(rows)
            report.rows += rows
    if not copies:
        measure_bandwidth()
    report.copy_bandwidth, report.read_bandwidth = median(copies), median(reads)
    for row in report.rows:
        row.forward_share_of_limit = case.nbytes / report.read_bandwidth / row.forward
        row.share_of_limit = 3 * case.nbytes / report.copy_bandwidth / row.forward_backward
    return report


def _prepare(
    case: Case, loss: str, options: Options, threads: int, report: Report, progress: Progress
) -> tuple[dict[str, Call], dict[str, tuple[float, float, float]]]:
    """The calls that run, compiled where they are, and value, value error and gradient error."""
    progress(f"{loss}: the float64 reference")
    truth = find_truth(case, loss)
    calls: dict[str, Call] = {}
    accuracy = {}
    for name in (*options.backends, *options.frameworks, *options.peers):
        progress(f"{loss}: preparing {name}")
        try:
            _check_memory(name, case)
            call = make_call(name, case, loss, threads)
            accuracy[name] = _accuracy(call, truth)
        except Unavailable as error:
            report.missing.append(Missing(loss, name, str(error)))
            continue
        except Exception as error:  # a peer may fail in any way, which must not end the run
            report.missing.append(Missing(loss, name, f"failed: {reason(error)}"))
            continue
        calls[name] = call
    return calls, accuracy


def _check_memory(name: str, case: Case) -> None:
    """Refuse what the system would end the whole run for."""
    arrays, free = _ARRAYS.get(name.partition("-")[0], 2), available_memory()
    if name == "reference":
        needed = arrays * 8 * case.count // case.logits.shape[0]
    else:
        needed = arrays * case.nbytes
    if free is not None and needed > free:
        raise Unavailable(
            f"needs about {needed / 2**30:.0f} GiB of memory, of which {free / 2**30:.0f} are free"
        )


def _accuracy(call: Call, truth: Truth) -> tuple[float, float, float]:
    value, gradient = call.result()
    errors = truth.value_error(value), truth.gradient_error(gradient)
    call.reset()
    with call.active():
        call.forward()  # which some compile on its own
    return value, *errors


def _compare(rows: list[Row]) -> None:
    """Fill in the ratios. The reference backend, made to be read, is no yardstick for speed."""
    others = [row for row in rows if row.implementation != "reference"] or rows
    slowest = max(row.forward_backward for row in others)
    ours = next((row for row in rows if row.implementation in ("cpu", "numba")), None)
    for row in rows:
        row.speedup_over_slowest = slowest / row.forward_backward
        if ours is not None:
            row.ratio_to_fastloss = row.forward_backward / ours.forward_backward


def render(report: Report) -> str:
    """The report for people."""
    made, options = report.machine, report.options
    batch, classes = report.logits_shape[:2]
    size = size_text(report.logits_shape[2:])
    lines = [
        f"{made['processor']}, {made['cores']} cores, {made['threads']} threads"
        + (f", {made['instruction_set']}" if made["instruction_set"] else ""),
        f"volume {options.volume}: batch {batch}, {classes} classes, {size} voxels, "
        f"{options.dtype}, {report.logits:,} logits",
        f"memory ({report.bandwidth_method}): copy {report.copy_bandwidth / 1e9:.1f} GB/s, read "
        f"{report.read_bandwidth / 1e9:.1f} GB/s",
    ]
    header = (
        "",
        "value",
        "value\nerror",
        "gradient\nerror",
        "forward\nms",
        "of\nlimit",
        "with\ngradient ms",
        "of\nlimit",
        "ns per\nlogit",
        "peak extra\nMiB",
        "speed-up\nvs slowest",
        "time vs\nfastloss",
    )
    notes = _notes(report)
    for loss in options.losses:
        rows = [
            (
                TITLES[row.implementation],
                f"{row.value:.6f}",
                f"{row.value_error:.0e}",
                f"{row.gradient_error:.0e}",
                table.milliseconds(row.forward),
                table.percent(row.forward_share_of_limit),
                table.milliseconds(row.forward_backward),
                table.percent(row.share_of_limit),
                table.number(row.ns_per_logit),
                table.mebibytes(row.peak_memory),
                table.times(row.speedup_over_slowest),
                table.times(row.ratio_to_fastloss),
            )
            for row in report.rows
            if row.loss == loss
        ]
        own = [line for where, line in notes if where == loss]
        if rows or own:
            lines += ["", f"{loss}:"]
        if rows:
            lines.append(table.text_table(header, rows))
        lines += own
    everywhere = [line for where, line in notes if not where]
    lines += ["", "not measured:", *everywhere] if everywhere else []
    lines += [
        "",
        "Errors are relative to the float64 reference on the same logits. The limit reads the",
        "logits once (forward), or reads them twice and writes the gradient once, at this run's",
        "bandwidth; a volume that fits in the caches can pass 100%. Peak extra is the resident",
        "memory that one call adds to its inputs, gradient included. The slowest is without the",
        "reference backend.",
    ]
    if any(row.implementation.startswith("nnunet") for row in report.rows):
        lines.append(nnunet_source() + ".")
    return "\n".join(lines)


def _notes(report: Report) -> list[tuple[str, str]]:
    """What is missing: the loss it is missing for, empty if for all of several, and a line."""
    notes: dict[tuple[str, str], list[str]] = {}
    for one in report.missing:
        notes.setdefault((one.implementation, one.reason), []).append(one.loss)
    several = len(report.options.losses)
    lines = []
    for (name, why), losses in notes.items():
        line = f"  - {TITLES[name]}: {why}"
        lines += [("", line)] if len(losses) == several else [(loss, line) for loss in losses]
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
