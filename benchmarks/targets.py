"""The figures that the library must reach, all from one run, as a table.

    python benchmarks/targets.py [--out FILE.csv] [--sizes LIST] [--peers LIST] [--repeats N]

Dice + cross-entropy on the phantom torso, with uint8 labels and the gradient in a reused buffer.
Implementations take turns; every figure is a median.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import fastloss
from fastloss.bench import table
from fastloss.bench.arguments import results_file, subset
from fastloss.bench.bandwidth import Bandwidth
from fastloss.bench.call import Call
from fastloss.bench.errors import BadArgument, Unavailable, reason
from fastloss.bench.implementations import PEERS, TITLES, backends_that_run, make_call
from fastloss.bench.inputs import (
    SIZES,
    Case,
    channels_last,
    dense,
    phantom_case,
    with_dtype,
)
from fastloss.bench.machine import machine, machine_text, threads, versions_text
from fastloss.bench.measure import Timed, forward, forward_backward, interleave
from fastloss.bench.nnunet_peer import nnunet_source
from fastloss.bench.report import Report, Row
from fastloss.bench.results import Figure, Table

LOSS = "dice_ce"

_SMALL = "B1C2-16"


@dataclass
class Measured:
    """One size, and its figures by their names in the table of results."""

    size: str
    fastest_peer: str | None
    figures: dict[str, float | None]

    def kept(self) -> list[Figure]:
        return [Figure(self.size, name, v, unit(name)) for name, v in self.figures.items()]


def unit(name: str) -> str:
    """The unit of a figure of one size."""
    for part, found in {"time ": "ms", "bandwidth": "GB/s", "ns_": "ns", "share_": "1"}.items():
        if part in name:
            return found
    return "×"


def title(size: str) -> str:
    """A size as text."""
    batch, classes, edge = SIZES[size]
    return f"B{batch} C{classes} {edge}³"


def forgetting(call: Call) -> Callable[[], None]:
    """Value and gradient, freed afterwards."""

    def run() -> None:
        call.forward_backward()
        call.reset()

    return run


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Run:
    """The state that all measurements of a run share."""

    def __init__(self, peers: tuple[str, ...], repeats: int) -> None:
        self.peers, self.repeats = peers, repeats
        self.threads = threads()
        fastloss.set_num_threads(self.threads)  # for all backends alike
        self.machine = machine()
        self.bandwidth = Bandwidth(self.threads)
        self.backends = backends_that_run()
        self.backend = self.backends[0]
        self.missing: list[str] = []

    def prepare(self, name: str, make: Callable[[], Case]) -> tuple[Case, Call] | None:
        """A call that has run once; None, with a note, if it cannot run."""
        say(f"  preparing {name}")
        try:
            case = make()
            call = make_call(name, case, LOSS, self.threads)
            with call.active():
                call.forward_backward()
            call.reset()
        except (Unavailable, BadArgument) as error:
            why = str(error)
        except Exception as error:  # no failure of a peer may end the run
            why = reason(error)
        else:
            return case, call
        note = f"{TITLES.get(name, name)}: {why}"
        if note not in self.missing:
            self.missing.append(note)
        return None

    def measure(self, size: str) -> Measured:
        """All the figures of one size."""
        say(f"{size}: making the input")
        batch, classes, edge = SIZES[size]
        plain = phantom_case(edge, classes, batch=batch)
        variants: dict[str, tuple[str, Callable[[], Case]]] = {
            "fastloss": (self.backend, lambda: plain),
            "bfloat16": (self.backend, lambda: with_dtype(plain, "bfloat16")),
            "float16": (self.backend, lambda: with_dtype(plain, "float16")),
            "channels_last": (self.backend, lambda: channels_last(plain)),
            "dense": (self.backend, lambda: dense(plain)),
        }
        if self.backend != "numba" and "numba" in self.backends:
            variants["numba"] = ("numba", lambda: plain)
        variants["new_gradient"] = (self.backend, lambda: plain)
        variants["torch"] = ("torch", lambda: plain)
        variants["torch_bfloat16"] = ("torch", lambda: with_dtype(plain, "bfloat16"))
        for peer in self.peers:
            variants[peer] = (peer, lambda: plain)

        timed: dict[str, Timed] = {}
        for variant, (name, make) in variants.items():
            prepared = self.prepare(name, make)
            if prepared is None:
                continue
            timed[variant] = forward_backward(prepared[1])
            if variant == "new_gradient":
                timed[variant] = Timed(prepared[1].with_new_gradient, active=prepared[1].active)
            if variant == "fastloss":
                timed["value"] = forward(prepared[1])

        report = Report(self.machine)

        def measure_bandwidth() -> None:
            report.copies.append(self.bandwidth.copy())
            report.reads.append(self.bandwidth.read())

        say(f"{size}: timing {', '.join(timed)}")
        seconds = interleave(timed, self.repeats, also=measure_bandwidth)
        report.rows = [
            Row(plain.spec, LOSS, name, forward_backward=seconds[name])
            for name in self.peers
            if name in seconds
        ]
        ours = Row(
            plain.spec,
            LOSS,
            self.backend,
            forward=seconds["value"],
            forward_backward=seconds["fastloss"],
        )
        fastest = report.fastest(ours)
        peer = fastest and fastest.forward_backward

        def between(a: float | None, b: float | None) -> float | None:
            return a / b if a and b else None

        def ratio(name: str, factor: float = 1.0) -> float | None:
            found = between(seconds.get(name), ours.forward_backward)
            return found and found * factor

        figures: dict[str, float | None] = {
            "copy bandwidth": report.copy_bandwidth / 1e9,
            "read bandwidth": report.read_bandwidth / 1e9,
            **{f"time {name}": one * 1e3 for name, one in seconds.items()},
            "ns_per_logit": seconds["fastloss"] / plain.count * 1e9,
            "speedup": between(peer, ours.forward_backward),
            "share_of_limit": report.share_of_limit(ours),
            "value_share_of_limit": report.forward_share_of_limit(ours),
            "bfloat16_ratio": ratio("bfloat16"),
            "float16_ratio": ratio("float16"),
            "channels_last_ratio": ratio("channels_last"),
            # Both passes also read a dense float32 target: 16 bytes per logit instead of 8.
            "dense_ratio_per_byte": ratio("dense", 8 / 16),
            "numba_ratio": ratio("numba"),
            "torch_speedup": between(peer, seconds.get("torch")),
            "torch_over_new_gradient": between(seconds.get("torch"), seconds.get("new_gradient")),
            "torch_bfloat16_ratio": between(seconds.get("torch_bfloat16"), seconds.get("torch")),
        }
        return Measured(size, fastest.implementation if fastest else None, figures)

    def small(self) -> dict[str, float]:
        """Seconds of one call on 16³ voxels and two classes."""
        say("small calls")
        case = phantom_case(16, 2)
        call = make_call(self.backend, case, LOSS, self.threads)
        number = 2 if self.backend == "reference" else 200
        timed = {
            "value": forward(call, number),
            "gradient": forward_backward(call, number),
        }
        again = make_call(self.backend, case, LOSS, self.threads)
        timed["new_gradient"] = Timed(again.with_new_gradient, active=again.active, number=number)
        prepared = self.prepare("torch", lambda: case)
        if prepared is not None:
            # Otherwise a loop would accumulate gradients. Dropping them takes no time.
            timed["torch"] = Timed(forgetting(prepared[1]), number=number)
        return interleave(timed, max(self.repeats, 9))


def small_figures(small: dict[str, float]) -> list[Figure]:
    """The same for the small calls."""
    found = [Figure(_SMALL, f"time {name}", one * 1e6, "µs") for name, one in small.items()]
    if "torch" in small:
        over = small["torch"] - small["new_gradient"]
        found.append(Figure(_SMALL, "torch_overhead", over * 1e6, "µs"))
    return found


def render(sizes: list[Measured], small: dict[str, float], run: Run) -> str:
    """The report in Markdown."""
    header = (
        "",
        "fastest peer",
        "its ms",
        "fastloss ms",
        "ratio",
        "ns per logit",
        "of limit",
        "value, of limit",
        "copy GB/s",
        "read GB/s",
    )
    rows = [
        (
            title(m.size),
            "-" if m.fastest_peer is None else TITLES[m.fastest_peer],
            table.number(m.figures.get(f"time {m.fastest_peer}")),
            table.number(m.figures["time fastloss"]),
            table.times(m.figures["speedup"]),
            table.number(m.figures["ns_per_logit"]),
            table.percent(m.figures["share_of_limit"]),
            table.percent(m.figures["value_share_of_limit"]),
            table.number(m.figures["copy bandwidth"]),
            table.number(m.figures["read bandwidth"]),
        )
        for m in sizes
    ]
    variants = {
        "bfloat16_ratio": "bfloat16, per logit",
        "float16_ratio": "float16, per logit",
        "channels_last_ratio": "channels-last logits",
        "dense_ratio_per_byte": "dense float32 target, per byte read",
        "numba_ratio": "Numba backend",
    }
    ratios = [
        (text, *(table.times(m.figures[name]) for m in sizes)) for name, text in variants.items()
    ]
    torch_rows = [
        (
            title(m.size),
            table.number(m.figures["time torch"]),
            table.times(m.figures["torch_speedup"]),
            table.times(m.figures["torch_over_new_gradient"]),
            table.times(m.figures["torch_bfloat16_ratio"]),
        )
        for m in sizes
        if "time torch" in m.figures
    ]
    torch_header = (
        "",
        "ms",
        "fastest peer, over it",
        "over NumPy with a new gradient",
        "bfloat16 over float32",
    )
    parts = [
        f"{machine_text(run.machine)}; {versions_text(run.machine, ())}; {TITLES[run.backend]}; "
        f"bandwidth measured with {run.bandwidth.method}.",
        "Value and gradient, float32:",
        table.markdown_table(header, rows),
        "Time over that of fastloss on contiguous float32 logits and a label map:",
        table.markdown_table(("", *(title(m.size) for m in sizes)), ratios),
        f"One call on 16³ voxels, two classes: value {table.microseconds(small['value'])} µs, "
        f"value and gradient {table.microseconds(small['gradient'])} µs.",
    ]
    if torch_rows:
        parts += [
            "Through PyTorch's autograd, forward and `.backward()` into a new gradient:",
            table.markdown_table(torch_header, torch_rows),
        ]
    if "torch" in small:
        parts.append(
            f"On 16³ voxels autograd takes {table.microseconds(small['torch'])} µs, of which "
            f"{table.microseconds(small['torch'] - small['new_gradient'])} are over NumPy with a "
            "new gradient."
        )
    if any(name.startswith("nnunet") for name in run.peers):
        parts.append(nnunet_source() + ".")
    if run.missing:
        parts.append("Not measured:\n\n" + "\n".join(f"- {note}" for note in run.missing))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="The library's target figures, measured in one run."
    )
    parser.add_argument("--out", type=results_file, metavar="FILE.csv", help="table to add rows to")
    parser.add_argument("--run", default="", help="name of the run there; the time of day if none")
    parser.add_argument(
        "--sizes", type=subset(tuple(SIZES), everything=True), default="all", help=", ".join(SIZES)
    )
    parser.add_argument(
        "--peers", type=subset(PEERS, everything=True), default="all", help=", ".join(PEERS)
    )
    parser.add_argument("--repeats", type=int, default=9, help="samples of each time")
    options = parser.parse_args()
    if not options.sizes:
        parser.error("argument --sizes: expected at least one size")
    if options.repeats < 1:
        parser.error(f"argument --repeats: expected at least 1, got {options.repeats}")
    warnings.simplefilter("ignore")  # from the peers
    run = Run(options.peers, options.repeats)
    sizes = [run.measure(size) for size in options.sizes]
    small = run.small()
    print(render(sizes, small, run))
    if options.out is not None:
        kept = Table(options.out, run.machine, options.run)
        kept.add([figure for one in sizes for figure in one.kept()] + small_figures(small))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
