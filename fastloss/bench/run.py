"""A whole run: inputs, every implementation, times, errors and memory, and the report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter

import fastloss
from fastloss.backends import BACKENDS
from fastloss.bench import report, table
from fastloss.bench.apart import peak_memory, saved
from fastloss.bench.bandwidth import Bandwidth
from fastloss.bench.call import Call
from fastloss.bench.errors import Unavailable, reason
from fastloss.bench.implementations import FRAMEWORKS, TITLES, backends_that_run, make_call
from fastloss.bench.inputs import Case, make_case, size_text
from fastloss.bench.machine import available_memory, machine, machine_text
from fastloss.bench.machine import threads as count_threads
from fastloss.bench.measure import Timed, forward, forward_backward, interleave
from fastloss.bench.nnunet_peer import nnunet_source
from fastloss.bench.report import Missing, Row
from fastloss.bench.truth import Truth, find_truth
from fastloss.bench.volumes import load_volume

Progress = Callable[[str], None]


# The approximate peak memory of a call, in arrays of the size of the logits. The reference computes
# a sample at a time, in float64.
_ARRAYS = {"monai": 6, "nnunet": 6, "jax": 9, "reference": 14}

_WITHOUT_NUMBA = (
    "left out, as its kernels compile for half a minute; --backends cpu,numba,reference has it"
)


@dataclass(frozen=True)
class Options:
    """The options of a measurement, named as on the command line."""

    volume: str
    size: tuple[int, int, int] = (128, 128, 128)
    classes: int | None = None
    batch: int = 1
    dtype: str = "float32"
    losses: tuple[str, ...] = ("dice_ce",)
    backends: tuple[str, ...] | None = None
    """None: all, except Numba if the C++ kernels exist."""
    frameworks: tuple[str, ...] = FRAMEWORKS
    peers: tuple[str, ...] = ()
    repeats: int = 7


@dataclass
class Report(report.Report):
    """The report on one input."""

    options: Options = Options("phantom")
    logits_shape: tuple[int, ...] = ()
    bandwidth_method: str = ""


def run(options: Options, progress: Progress) -> Report:
    """Measure. Raises BadArgument for a volume that cannot be loaded."""
    progress(f"making the input from {options.volume}")
    volume = load_volume(options.volume, options.size, options.classes)
    if volume.note:
        progress(f"{volume.name}: {volume.note}")
    case = make_case(volume, batch=options.batch, dtype=options.dtype)
    threads = count_threads()
    fastloss.set_num_threads(threads)  # for all backends alike
    bandwidth = Bandwidth(threads)
    found = Report(
        machine(),
        options=options,
        logits_shape=case.logits.shape,
        bandwidth_method=bandwidth.method,
    )
    backends = options.backends
    if backends is None:
        there = backends_that_run()
        backends = BACKENDS
        if "cpu" in there and "numba" in there:
            backends = tuple(name for name in BACKENDS if name != "numba")
            found.missing += [Missing(loss, "numba", _WITHOUT_NUMBA) for loss in options.losses]
    names = (*backends, *options.frameworks, *options.peers)

    def measure_bandwidth() -> None:
        found.copies.append(bandwidth.copy())
        found.reads.append(bandwidth.read())

    with ExitStack() as stack:
        progress("writing the input for the memory measurements")
        folder = stack.enter_context(saved(case))
        for loss in options.losses:
            calls, rows = _prepare(case, loss, names, threads, found, progress)
            timed: dict[tuple[str, str], Timed] = {}
            for name, call in calls.items():
                timed[name, "forward"] = forward(call)
                timed[name, "both"] = forward_backward(call)
            if calls:
                progress(f"{loss}: timing {len(calls)} implementations, {options.repeats} rounds")
            seconds = interleave(timed, options.repeats, also=measure_bandwidth)
            calls.clear()
            timed.clear()
            for row in rows:
                name = row.implementation
                if (name, "both") in seconds:
                    row.forward, row.forward_backward = (
                        seconds[name, what] for what in ("forward", "both")
                    )
                progress(f"{loss}: memory of {name}, in a process of its own")
                try:
                    row.peak_memory = peak_memory(name, folder, loss, threads)
                except Unavailable as error:
                    found.missing.append(Missing(loss, name, f"memory not measured: {error}"))
            found.rows += rows
    return found


def _prepare(
    case: Case, loss: str, names: tuple[str, ...], threads: int, found: Report, progress: Progress
) -> tuple[dict[str, Call], list[Row]]:
    """The calls to be timed, already compiled, and a row with its errors for each that runs.

    The reference provides the true numbers: only the calls that compute them are timed.
    """
    progress(f"{loss}: the float64 reference")
    truth = find_truth(case, loss)
    calls: dict[str, Call] = {}
    rows = []
    for name in names:
        progress(f"{loss}: preparing {name}")
        row = Row(case.spec, loss, name)
        try:
            _check_memory(name, case)
            call = make_call(name, case, loss, threads)
            _first_calls(call, truth, row)
        except Unavailable as error:
            found.missing.append(Missing(loss, name, str(error)))
            continue
        except Exception as error:  # no failure of a peer may end the run
            found.missing.append(Missing(loss, name, f"failed: {reason(error)}"))
            continue
        rows.append(row)
        if name == "reference":
            row.note = "timed once"
        else:
            calls[name] = call
    return calls, rows


def _first_calls(call: Call, truth: Truth, row: Row) -> None:
    """Value, gradient and their errors; the times are those of first calls."""
    start = perf_counter()
    row.value, gradient = call.result()
    row.forward_backward = perf_counter() - start
    row.value_error, row.gradient_error = (
        truth.value_error(row.value),
        truth.gradient_error(gradient, call.loss_scale),
    )
    del gradient
    call.reset()
    with call.active():
        start = perf_counter()
        call.forward()  # some compile it separately
        row.forward = perf_counter() - start


def _check_memory(name: str, case: Case) -> None:
    """Refuse a run that the system would kill for lack of memory."""
    arrays, free = _ARRAYS.get(name.partition("-")[0], 2), available_memory()
    if name == "reference":
        needed = arrays * 8 * case.count // case.logits.shape[0]
    else:
        needed = arrays * case.nbytes
    if free is not None and needed > free:
        raise Unavailable(
            f"needs about {needed / 2**30:.0f} GiB of memory, of which {free / 2**30:.0f} are free"
        )


def render(found: Report) -> str:
    """The report as text, the most important figures first."""
    options = found.options
    batch, classes = found.logits_shape[:2]
    lines = [
        f"{options.volume}: batch {batch}, {classes} classes, "
        f"{size_text(found.logits_shape[2:])} voxels, {options.dtype}",
    ]
    notes = report.missing_lines(found.missing, len(options.losses))
    for loss in options.losses:
        rows = [row for row in found.rows if row.loss == loss]
        own = [line for where, line in notes if where == loss]
        if rows or own:
            lines += ["", f"{loss}, value and gradient:"]
        if rows:
            cells = [(TITLES[row.implementation], *found.cells(row)) for row in rows]
            lines += [*_headline(found, rows[0]), ""]
            lines.append(table.text_table(("", *report.HEADER), cells))
        lines += own
    everywhere = [line for where, line in notes if not where]
    lines += ["", "not measured:", *everywhere] if everywhere else []
    lines += ["", machine_text(found.machine)]
    if found.copies:
        lines.append(
            f"memory ({found.bandwidth_method}): copy {found.copy_bandwidth / 1e9:.1f} GB/s, read "
            f"{found.read_bandwidth / 1e9:.1f} GB/s"
        )
    lines += ["", report.EXPLANATION]
    if any(row.implementation.startswith("nnunet") for row in found.rows):
        lines.append(nnunet_source() + ".")
    return "\n".join(lines)


def _headline(found: Report, like: Row) -> list[str]:
    """The library against its fastest peer: ratio, time and memory."""
    own, peer = found.own(like), found.fastest(like)
    ratio = "" if peer is None else table.times(found.ratio_to_fastloss(peer))
    lines = []
    for row in filter(None, (own, peer)):
        who, memory = TITLES[row.implementation], row.peak_memory
        parts = [f"{table.milliseconds(row.forward_backward)} ms"]
        if row is peer:
            who = f"fastest peer, {who}"
        elif peer is not None:
            parts.insert(0, f"{ratio} as fast as the fastest peer")
        if memory is not None:
            share = table.times(memory / row.spec.nbytes)
            parts.append(f"{table.mebibytes(memory)} MiB of extra memory ({share} the logits)")
        lines.append(f"  {who}: {', '.join(parts)}")
    if peer is None:
        lines.append(
            "  no peer was measured: pip install 'fastloss[peers]' brings MONAI, PyTorch and JAX"
        )
    return lines
