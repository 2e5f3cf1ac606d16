"""What the library takes on a GPU, beside MONAI and nnU-Net, in one run.

    python benchmarks/gpu/bench.py [--sizes LIST] [--peers all|eager|none] [--out FILE.csv]

Dice + cross-entropy, value and gradient. README.md beside this file says what is measured and how.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results.csv"
PARTS = ("host", "graph", "startup", "times")

try:
    import torch

    import fastloss as fl
except ImportError as error:
    raise SystemExit(f"bench.py: {error}; run it by benchmarks/gpu/run.sh bench") from None

import machine  # noqa: E402
import report  # noqa: E402
from clock import Clock  # noqa: E402
from implementations import COMPILED, EAGER, OURS, Call, Output  # noqa: E402
from inputs import MAIN, SIZES, Case, all_cases, make  # noqa: E402
from truth import Truth, check_against_reference  # noqa: E402

from fastloss.bench.errors import Unavailable, reason  # noqa: E402
from fastloss.bench.results import Table  # noqa: E402

LOSS = fl.Dice() + fl.CrossEntropy()
_WRONG = 1e-4
"""A relative error of the value beyond which our own row makes the run fail."""


@dataclass
class Row:
    """One implementation on one input. Times are medians in seconds; memory is in bytes."""

    case: Case
    implementation: str
    forward: float | None = None
    both: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    memory: int | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    note: str = ""
    took: float = 0.0
    """Seconds to prepare, compile, check and measure all this."""


@dataclass
class Report:
    machine: dict[str, Any]
    smoke: bool
    bandwidth: float = 0.0
    bandwidths: list[float] = field(default_factory=list)
    truth: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    reuse_memory: dict[str, int | None] = field(default_factory=dict)
    host: dict[str, dict[str, Any]] = field(default_factory=dict)
    graph: dict[str, Any] = field(default_factory=dict)
    startup: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Run:
    """What the measurements share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.start = perf_counter()
        self.device = torch.device(options.device)
        self.smoke = self.device.type == "cpu"
        self.clock = Clock(self.device)
        self.report = Report(machine.describe(self.device), self.smoke)
        self.kept = 0  # rows that are in the table of results
        self.table = options.out and Table(options.out, self.report.machine, options.run)
        self.copied = (8 << 20) if self.smoke else (1 << 30)
        self._truth: dict[Case, Truth] = {}

    def say(self, message: str) -> None:
        print(f"[{perf_counter() - self.start:6.1f} s] {message}", file=sys.stderr, flush=True)

    def left(self) -> float:
        return float(self.options.budget - (perf_counter() - self.start))

    def bandwidth(self) -> None:
        self.report.bandwidths.append(self.clock.copy_bandwidth(self.copied))
        self.report.bandwidth = median(self.report.bandwidths)
        self.clear()

    def clear(self) -> None:
        """Give back what nobody holds: one implementation's memory must not fail the next."""
        if not self.smoke:
            gc.collect()
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ times

    def stages(self) -> Iterator[tuple[Case, tuple[str, ...]]]:
        """What is measured, the most telling first: it may be cut where the time runs out."""
        cases = all_cases(self.options.sizes, self.smoke)
        plain = [c for c in cases if c == Case(c.size, c.edge)]
        others = [c for c in cases if c not in plain]
        fair = [c for c in others if c.labels == "uint8"]  # peers have their own dtype in any case
        mine, peers = OURS[:2], self.options.peers
        eager = EAGER if peers != "none" else ()
        compiled = COMPILED if peers == "all" else ()  # which takes seconds for every input
        main_first = sorted(plain, key=lambda c: c.size != MAIN)
        yield from ((case, mine + eager) for case in plain)
        yield from ((case, compiled) for case in main_first[:1])
        yield from ((case, mine) for case in others)
        yield from ((case, compiled) for case in main_first[1:])
        yield from ((case, OURS[2:] if compiled else ()) for case in plain)
        yield from ((case, eager) for case in fair)
        yield from ((case, compiled) for case in fair if case.size == MAIN)

    def times(self) -> None:
        for case, names in self.stages():
            if not names:
                continue
            logits = labels = None
            for name in names:
                if self.left() <= 0:
                    self.report.rows.append(Row(case, name, note="left out: the time was up"))
                    continue
                if logits is None:
                    logits, labels = make(case, self.device)
                self.report.rows.append(self.one(case, name, logits, labels))
                self.clear()
            if logits is not None and case == Case(case.size, case.edge) and names[0] == OURS[0]:
                self.reuse(case, logits, labels)
                self.bandwidth()
            logits = labels = None
            self._truth.clear()
            self.clear()
            self.keep()

    def one(self, case: Case, name: str, logits: Any, labels: Any) -> Row:
        row, start = Row(case, name), perf_counter()
        call = None
        try:
            call = Call(name, logits, labels)
            if call.note and call.note not in self.report.notes:
                self.report.notes.append(call.note)
            value = float(call.forward_backward()) + call.offset
            truth = self.truth(case, logits, labels)
            row.value_error = truth.value_error(value)
            row.gradient_error = truth.gradient_error(call.gradient)
            row.memory = self.clock.peak_memory(call.forward_backward, call.reset)
            both = self.clock.time(call.forward_backward, call.reset)
            row.both, row.low, row.high, row.samples = both.median, both.low, both.high, both.count
            if "compiled" not in name and "out=" not in name:
                # Without the graph's memory; compiled, it would be compiled once more.
                row.forward = self.clock.time(call.forward, call.reset).median
        except Unavailable as error:
            row.note = str(error)
        except torch.cuda.OutOfMemoryError:
            row.note = "out of memory"
        except Exception as error:  # a peer may fail in any way, which must not end the run
            row.note = f"failed: {reason(error)}"
            if name in OURS:
                self.report.problems.append(f"{case.title}, {name}: {row.note}")
        finally:
            if call is not None:
                call.reset()
        if name in OURS and row.value_error is not None and not row.value_error < _WRONG:
            self.report.problems.append(f"{case.title}, {name}: value off by {row.value_error:.1e}")
        row.took = perf_counter() - start
        times = f"{row.both * 1e3:.3f} ms" if row.both is not None else row.note
        self.say(f"{case.title}, {name}: {times} (took {row.took:.1f} s)")
        return row

    def truth(self, case: Case, logits: Any, labels: Any) -> Truth:
        if case not in self._truth:
            self._truth[case] = Truth(logits, labels)
        return self._truth[case]

    def reuse(self, case: Case, logits: Any, labels: Any) -> None:
        """The memory of a backward pass that writes over the logits."""
        import fastloss.torch

        module = fastloss.torch.DiceCE(reuse_logits=True)
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        try:
            self.report.reuse_memory[case.title] = self.clock.peak_memory(
                lambda: module(Output.apply(anchor, logits), labels).backward(), lambda: None
            )
        except Exception as error:
            self.report.problems.append(f"reuse_logits, {case.title}: {reason(error)}")

    # ------------------------------------------------------------------ small calls

    def host(self) -> None:
        """The host's time per call on 32³ voxels of two classes."""
        edge = 8 if self.smoke else 32
        logits, labels = make(Case("B2C2-128", edge), self.device)
        logits, labels = logits[:1].contiguous(), labels[:1].contiguous()
        calls = 20 if self.smoke else 1000

        def measure(name: str, prepare: Callable[[], Callable[[], object]], calls: int) -> None:
            try:
                result = self.clock.host_time(prepare(), calls)
            except (Unavailable, ImportError) as error:
                self.report.missing.append(f"host time of {name}: {error}")
                return
            except Exception as error:
                self.report.problems.append(f"host time of {name}: {reason(error)}")
                return
            self.report.host[name] = result
            self.say(f"host, {name}: {result['host'] * 1e6:.1f} µs")

        def through(name: str) -> Callable[[], object]:
            call = Call(name, logits, labels)

            def run() -> None:
                call.reset()
                call.forward_backward()

            return run

        def value() -> Callable[[], object]:
            return Call("fastloss", logits, labels).forward

        def cupy_call(with_out: bool) -> Callable[[], object]:
            if self.smoke:
                raise Unavailable("CuPy's arrays are on a GPU")
            import cupy

            x, y = cupy.from_dlpack(logits.detach()).copy(), cupy.from_dlpack(labels).copy()
            out = cupy.empty_like(x) if with_out else None
            return lambda: LOSS.value_and_grad(x, y, out=out)

        measure("PyTorch, forward and backward", lambda: through("fastloss"), calls)
        measure("PyTorch, value alone", value, calls)
        measure("PyTorch, value_and_grad(out=)", lambda: through("fastloss out="), calls)
        measure("CuPy, value_and_grad", lambda: cupy_call(False), calls)
        measure("CuPy, value_and_grad(out=)", lambda: cupy_call(True), calls)
        if self.options.peers != "none":
            for name in EAGER:
                measure(name, lambda name=name: through(name), calls // 5)  # type: ignore[misc]

    def graph(self) -> None:
        """Forward and backward captured once, replayed on new data, and compared with eager."""
        if self.smoke:
            self.report.missing.append("CUDA graph: needs a GPU")
            return
        case = Case("B2C4-128", 32)
        x, labels = make(case, self.device)
        leaf = x.detach().clone().requires_grad_()

        def step() -> Any:
            leaf.grad = None
            value = LOSS(leaf, labels)
            value.backward()
            return value.detach()

        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            leaf.grad = None
            with torch.cuda.graph(graph):
                value = LOSS(leaf, labels)
                value.backward()
            gradient = leaf.grad
            new, new_labels = make(case, self.device, seed=1)
            with torch.no_grad():
                leaf.copy_(new)
            labels.copy_(new_labels.flip(1))
            graph.replay()
            replayed = value.detach().clone(), gradient.clone()
            expected = step(), leaf.grad
            same = all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))
            eager = self.clock.time(step, lambda: None).median
            seconds = self.clock.time(graph.replay, lambda: None).median
            host = self.clock.host_time(graph.replay, 1000)["host"]
        except Exception as error:
            self.report.problems.append(f"CUDA graph: {reason(error)}")
            return
        self.report.graph = {
            "input": case.title,
            "same_bits_as_eager": same,
            "eager": eager,
            "replay": seconds,
            "replay_host": host,
        }
        if not same:
            self.report.problems.append("CUDA graph: a replay differs from eager")
        self.say(f"CUDA graph: same bits {same}, replay {seconds * 1e6:.1f} µs")

    def startup(self) -> None:
        """The first call of a process, its kernels to be compiled or in the cache."""
        with tempfile.TemporaryDirectory() as folder:
            # The driver has a cache of its own.
            caches = {"CUPY_CACHE_DIR": f"{folder}/cupy", "CUDA_CACHE_PATH": f"{folder}/driver"}
            for name in ("cold", "cached"):
                result = subprocess.run(
                    [sys.executable, str(HERE / "startup.py"), self.options.device],
                    env={**os.environ, **caches},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if result.returncode != 0:
                    last = (result.stderr.strip().splitlines() or ["no message"])[-1]
                    self.report.problems.append(f"start, {name}: {last}")
                    return
                self.report.startup[name] = json.loads(result.stdout.splitlines()[-1])
                both = [self.report.startup[name][f"first {w}"] for w in ("value", "gradient")]
                self.say(f"start, {name}: value {both[0]:.2f} s, gradient {both[1]:.2f} s")

    # ------------------------------------------------------------------ all of it

    def all(self) -> int:
        self.say(f"{self.report.machine['device']}; budget {self.options.budget:.0f} s")
        self.bandwidth()
        self.say(f"copy: {self.report.bandwidth / 1e9:.0f} GB/s")
        logits, labels = make(Case("B2C4-128", 8 if self.smoke else 128), self.device)
        self.report.truth = check_against_reference(logits, labels)
        if not max(self.report.truth[k] for k in ("value_error", "gradient_error")) < 1e-6:
            self.report.problems.append(
                f"the float64 formula and the reference differ: {self.report.truth}"
            )
        del logits, labels
        for part in PARTS:
            if part in self.options.parts:
                getattr(self, part)()
        self.report.machine["seconds"] = perf_counter() - self.start
        if self.table:
            self.table.add(report.other_figures(self.report))
        print(report.render(self.report))
        for problem in self.report.problems:
            print(f"problem: {problem}", file=sys.stderr)
        return 1 if self.report.problems else 0

    def keep(self) -> None:
        """Add the new rows to the table of results, so that a run that is ended leaves them."""
        if self.table:
            for row in self.report.rows[self.kept :]:
                self.table.add(report.row_figures(self.report, row))
        self.kept = len(self.report.rows)


def names(choices: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A comma-separated choice of these."""

    def convert(text: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for one in chosen:
            if one not in choices:
                raise argparse.ArgumentTypeError(
                    f"expected some of {', '.join(choices)}, got {one!r}"
                )
        return chosen

    return convert


def main() -> int:
    parser = argparse.ArgumentParser(description="The library on a GPU, measured in one run.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, …; cpu: a smoke run")
    parser.add_argument("--sizes", type=names(tuple(SIZES)), default=tuple(SIZES),
                        metavar="LIST", help=", ".join(SIZES))  # fmt: skip
    parser.add_argument("--peers", choices=("all", "eager", "none"), default="all")
    parser.add_argument("--parts", type=names(PARTS), default=PARTS,
                        metavar="LIST", help=", ".join(PARTS))  # fmt: skip
    parser.add_argument("--budget", type=float, default=270,
                        help="seconds after which no other case is begun")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.csv",
                        help="table to add rows to (default: benchmarks/results.csv)")  # fmt: skip
    parser.add_argument("--run", default="",
                        help="name of the run there (default: the time of day)")  # fmt: skip
    options = parser.parse_args()
    if not options.budget > 0:
        parser.error(f"argument --budget: expected more than 0, got {options.budget}")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        parser.error(f"argument --device: expected cuda, cuda:N or cpu, got {options.device!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            parser.error(
                f"argument --device: {options.device} is not there, PyTorch {torch.__version__} "
                f"sees {count} CUDA devices; --device cpu makes a smoke run"
            )
        torch.cuda.set_device(device)
        if options.out is None:
            options.out = RESULTS
    elif options.out is not None and options.out.resolve() == RESULTS:
        parser.error("argument --out: a smoke run on a CPU does not go into benchmarks/results.csv")
    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        parser.error(f"argument --out: expected a CSV file in a folder there is: {options.out}")
    warnings.simplefilter("ignore")  # of the peers' own making
    return Run(options).all()


if __name__ == "__main__":
    raise SystemExit(main())
