"""The figures that the library is held to, all from one run, as a table.

    python benchmarks/targets.py [--out FILE.csv] [--sizes LIST] [--peers LIST] [--repeats N]

Dice + cross-entropy on the phantom torso, labels in uint8, the gradient into a buffer that is
used again. Implementations take turns; every figure is a median.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import fastloss
from fastloss.bench import results, table
from fastloss.bench.bandwidth import Bandwidth
from fastloss.bench.errors import BadArgument, Unavailable, reason
from fastloss.bench.implementations import (
    PEERS,
    TITLES,
    Call,
    backends_that_run,
    make_call,
)
from fastloss.bench.inputs import (
    SIZES,
    Case,
    channels_last,
    dense,
    phantom_case,
    with_dtype,
)
from fastloss.bench.machine import machine, threads
from fastloss.bench.measure import Timed, forward, forward_backward, interleave
from fastloss.bench.nnunet_peer import nnunet_source
from fastloss.bench.results import Figure

LOSS = "dice_ce"

_SMALL = "B1C2-16"
_UNITS = {
    "ns_per_logit": "ns",
    "speedup": "×",
    "share_of_limit": "1",
    "value_share_of_limit": "1",
    "bfloat16_ratio": "×",
    "float16_ratio": "×",
    "channels_last_ratio": "×",
    "dense_ratio_per_byte": "×",
    "numba_ratio": "×",
    "torch_speedup": "×",
    "torch_over_new_gradient": "×",
    "torch_bfloat16_ratio": "×",
}
"""Figures of one size beside its times, with their units."""


def title(size: str) -> str:
    """A size as a reader would write it."""
    batch, classes, edge = SIZES[size]
    return f"B{batch} C{classes} {edge}³"


def forgetting(call: Call) -> Callable[[], None]:
    """Value and gradient, and nothing left of them."""

    def run() -> None:
        call.forward_backward()
        call.reset()

    return run


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Run:
    """What all the measurements of one run share."""

    def __init__(self, peers: tuple[str, ...], repeats: int) -> None:
        self.peers, self.repeats = peers, repeats
        self.threads = threads()
        fastloss.set_num_threads(self.threads)  # for all backends alike
        self.bandwidth = Bandwidth(self.threads)
        self.backends = backends_that_run()
        self.backend = self.backends[0]
        self.missing: list[str] = []

    def prepare(self, name: str, make: Callable[[], Case]) -> tuple[Case, Call] | None:
        """A call that has run once; None, and a note, where it cannot."""
        say(f"  preparing {name}")
        try:
            case = make()
            call = make_call(name, case, LOSS, self.threads)
            with call.active():
                call.forward_backward()
            call.reset()
        except (Unavailable, BadArgument) as error:
            why = str(error)
        except Exception as error:  # a peer may fail in any way, which must not end the run
            why = reason(error)
        else:
            return case, call
        note = f"{TITLES.get(name, name)}: {why}"
        if note not in self.missing:
            self.missing.append(note)
        return None

    def measure(self, size: str) -> dict[str, Any]:
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

        copies: list[float] = []
        reads: list[float] = []

        def measure_bandwidth() -> None:
            copies.append(self.bandwidth.copy())
            reads.append(self.bandwidth.read())

        say(f"{size}: timing {', '.join(timed)}")
        seconds = interleave(timed, self.repeats, also=measure_bandwidth)
        copy, read = median(copies), median(reads)
        ours = seconds["fastloss"]
        peers = {name: seconds[name] for name in self.peers if name in seconds}
        fastest = min(peers, key=peers.__getitem__) if peers else None

        def between(a: float | None, b: float | None) -> float | None:
            return a / b if a and b else None

        def ratio(name: str, factor: float = 1.0) -> float | None:
            return seconds[name] / ours * factor if name in seconds else None

        return {
            "size": size,
            "logits": plain.count,
            "copy_bandwidth": copy,
            "read_bandwidth": read,
            "seconds": seconds,
            "fastloss": ours,
            "ns_per_logit": ours / plain.count * 1e9,
            "fastest_peer": fastest,
            "fastest_peer_seconds": None if fastest is None else peers[fastest],
            "speedup": None if fastest is None else peers[fastest] / ours,
            "share_of_limit": 3 * plain.nbytes / copy / ours,
            "value_share_of_limit": plain.nbytes / read / seconds["value"],
            "bfloat16_ratio": ratio("bfloat16"),
            "float16_ratio": ratio("float16"),
            "channels_last_ratio": ratio("channels_last"),
            # Two passes read a dense float32 target as well: 16 bytes a logit in place of 8.
            "dense_ratio_per_byte": ratio("dense", 8 / 16),
            "numba_ratio": ratio("numba"),
            "torch_seconds": seconds.get("torch"),
            "torch_speedup": between(peers.get(fastest or ""), seconds.get("torch")),
            "torch_over_new_gradient": between(seconds.get("torch"), seconds.get("new_gradient")),
            "torch_bfloat16_ratio": between(seconds.get("torch_bfloat16"), seconds.get("torch")),
        }

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
            # A loop would add up gradients: the logits forget theirs, which takes no time.
            timed["torch"] = Timed(forgetting(prepared[1]), number=number)
        return interleave(timed, max(self.repeats, 9))


def figures(sizes: list[dict[str, Any]], small: dict[str, float]) -> list[Figure]:
    """What the table of results keeps of a run."""
    found = []
    for size in sizes:
        row = size["size"]
        for name in ("copy", "read"):
            rate = size[f"{name}_bandwidth"] / 1e9
            found.append(Figure(row, f"{name} bandwidth", rate, "GB/s"))
        for name, seconds in size["seconds"].items():
            found.append(Figure(row, f"time {name}", seconds * 1e3, "ms"))
        for name, unit in _UNITS.items():
            found.append(Figure(row, name, size.get(name), unit))
    for name, seconds in small.items():
        found.append(Figure(_SMALL, f"time {name}", seconds * 1e6, "µs"))
    if "torch" in small:
        over = small["torch"] - small["new_gradient"]
        found.append(Figure(_SMALL, "torch_overhead", over * 1e6, "µs"))
    return found


def render(sizes: list[dict[str, Any]], small: dict[str, float], run: Run) -> str:
    """The report in Markdown."""
    made = machine()
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
            title(r["size"]),
            "-" if r["fastest_peer"] is None else TITLES[r["fastest_peer"]],
            table.number(r["fastest_peer_seconds"] and r["fastest_peer_seconds"] * 1e3),
            table.milliseconds(r["fastloss"]),
            table.times(r["speedup"]),
            table.number(r["ns_per_logit"]),
            table.percent(r["share_of_limit"]),
            table.percent(r["value_share_of_limit"]),
            table.number(r["copy_bandwidth"] / 1e9),
            table.number(r["read_bandwidth"] / 1e9),
        )
        for r in sizes
    ]
    variants = {
        "bfloat16_ratio": "bfloat16, per logit",
        "float16_ratio": "float16, per logit",
        "channels_last_ratio": "channels-last logits",
        "dense_ratio_per_byte": "dense float32 target, per byte read",
        "numba_ratio": "Numba backend",
    }
    ratios = [(title, *(table.times(r[name]) for r in sizes)) for name, title in variants.items()]
    torch_rows = [
        (
            title(r["size"]),
            table.milliseconds(r["torch_seconds"]),
            table.times(r["torch_speedup"]),
            table.times(r["torch_over_new_gradient"]),
            table.times(r["torch_bfloat16_ratio"]),
        )
        for r in sizes
        if r["torch_seconds"] is not None
    ]
    torch_header = (
        "",
        "ms",
        "fastest peer, over it",
        "over NumPy with a new gradient",
        "bfloat16 over float32",
    )
    isa = f", {made['instruction_set']}" if made["instruction_set"] else ""
    parts = [
        f"{made['processor']}, {made['cores']} cores, {made['threads']} threads{isa}; Python "
        f"{made['python']}, NumPy {made['numpy']}; {TITLES[run.backend]}; bandwidth measured with "
        f"{run.bandwidth.method}.",
        "Value and gradient, float32:",
        table.markdown_table(header, rows),
        "Time over that of fastloss on contiguous float32 logits and a label map:",
        table.markdown_table(("", *(title(r["size"]) for r in sizes)), ratios),
        f"One call on 16³ voxels, two classes: value {table.number(small['value'] * 1e6)} µs, "
        f"value and gradient {table.number(small['gradient'] * 1e6)} µs.",
    ]
    if torch_rows:
        parts += [
            "Through PyTorch's autograd, forward and `.backward()` into a new gradient:",
            table.markdown_table(torch_header, torch_rows),
        ]
    if "torch" in small:
        overhead = small["torch"] - small["new_gradient"]
        parts.append(
            f"On 16³ voxels autograd takes {table.number(small['torch'] * 1e6)} µs, of which "
            f"{table.number(overhead * 1e6)} are over NumPy with a new gradient."
        )
    if any(name.startswith("nnunet") for name in run.peers):
        parts.append(nnunet_source() + ".")
    if run.missing:
        parts.append("Not measured:\n\n" + "\n".join(f"- {note}" for note in run.missing))
    return "\n\n".join(parts) + "\n"


def names(choices: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A comma-separated choice; "all" and "none" as well."""

    def convert(text: str) -> tuple[str, ...]:
        if text in ("all", "none"):
            return tuple(choices) if text == "all" else ()
        chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for one in chosen:
            if one not in choices:
                raise argparse.ArgumentTypeError(
                    f"expected some of {', '.join(choices)}, got {one!r}"
                )
        return chosen

    return convert


def main() -> int:
    parser = argparse.ArgumentParser(
        description="The library's target figures, measured in one run."
    )
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="table to add rows to")
    parser.add_argument("--run", default="", help="name of the run there; the time of day if none")
    parser.add_argument("--sizes", type=names(SIZES), default="all", help=", ".join(SIZES))
    parser.add_argument("--peers", type=names(PEERS), default="all", help=", ".join(PEERS))
    parser.add_argument("--repeats", type=int, default=9, help="samples of each time")
    options = parser.parse_args()
    if not options.sizes:
        parser.error("argument --sizes: expected at least one size")
    if options.repeats < 1:
        parser.error(f"argument --repeats: expected at least 1, got {options.repeats}")
    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        # Better said now than after minutes of measuring.
        parser.error(f"argument --out: expected a CSV file in a folder there is: {options.out}")

    warnings.simplefilter("ignore")  # of the peers' own making
    run = Run(options.peers, options.repeats)
    sizes = [run.measure(size) for size in options.sizes]
    small = run.small()
    print(render(sizes, small, run))
    if options.out is not None:
        results.Table(options.out, machine(), options.run).add(figures(sizes, small))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
