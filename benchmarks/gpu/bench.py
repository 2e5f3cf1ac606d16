"""Time and memory on a GPU, beside MONAI and nnU-Net, in one run.

    python benchmarks/gpu/bench.py [--sizes LIST] [--peers all|plain|eager|none] [--out FILE.csv]

Dice + cross-entropy, value and gradient. README.md in this folder describes the measurements.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results.csv"
PARTS = ("host", "graph", "startup", "times", "train")

try:
    import torch

    import fastloss as fl
except ImportError as error:
    raise SystemExit(f"bench.py: {error}; run it by benchmarks/gpu/run.sh bench") from None

import train_step  # noqa: E402
from cases import DTYPES, SIZES, all_specs, is_main, is_plain, spec_of  # noqa: E402
from clock import Clock  # noqa: E402
from report import BESIDE, COMPILED, EAGER, SMALL_CALL, GpuReport, other_figures, render  # noqa: E402

from fastloss.bench.arguments import device_name, results_file, subset  # noqa: E402
from fastloss.bench.call import Call  # noqa: E402
from fastloss.bench.errors import Unavailable, reason  # noqa: E402
from fastloss.bench.implementations import TITLES, make_call  # noqa: E402
from fastloss.bench.inputs import Case, Spec, device_case  # noqa: E402
from fastloss.bench.machine import machine, threads  # noqa: E402
from fastloss.bench.nnunet_peer import nnunet_source  # noqa: E402
from fastloss.bench.report import Missing, Row  # noqa: E402
from fastloss.bench.results import Table  # noqa: E402
from fastloss.bench.truth import Truth, check_formula, find_truth  # noqa: E402

OURS = ("torch", "torch-out", "torch-compile")

LOSS_NAME = "dice_ce"
LOSS = fl.Dice() + fl.CrossEntropy()
_TRAINING, _COMPILING = 25.0, 15.0
"""Seconds reserved for the training step, and the least seconds left to start a compiled peer."""
_WRONG = 1e-4
"""The relative error of the value above which our own row fails the run."""


def _of_torch(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name != "jax")


class Trivial(torch.autograd.Function):
    """No computation: the host's cost of a Python autograd function."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        return torch.empty_like(ctx.saved_tensors[0])


class Output(torch.autograd.Function):
    """Makes logits an intermediate result of a graph, like a network's output, without a copy."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        return None, None


class Run:
    """The state that the measurements share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.start = perf_counter()
        self.device = torch.device(options.device)
        self.smoke = self.device.type == "cpu"
        self.clock = Clock(self.device)
        self.reserve = _TRAINING if "train" in options.parts and not self.smoke else 0.0
        self.threads = threads()
        self.report = GpuReport(machine(self.device), smoke=self.smoke)
        self.kept = 0  # rows already in the table of results
        self.table = options.out and Table(options.out, self.report.machine, options.run)
        self.copied = (8 << 20) if self.smoke else (1 << 30)
        self._truth: Truth | None = None

    def say(self, message: str) -> None:
        print(f"[{perf_counter() - self.start:6.1f} s] {message}", file=sys.stderr, flush=True)

    def left(self) -> float:
        return float(self.options.budget - (perf_counter() - self.start))

    def bandwidth(self) -> None:
        self.report.copies.append(self.clock.copy_bandwidth(self.copied))
        self.clear()

    def clear(self) -> None:
        """Free cached memory, so that one implementation's does not fail the next."""
        if not self.smoke:
            gc.collect()
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ times

    def stages(self) -> Iterator[tuple[Spec, tuple[str, ...]]]:
        """The measurements, the most important first, as time may run out."""
        options = self.options
        specs = all_specs(options.sizes, options.dtypes, options.device, self.smoke)
        plain = [spec for spec in specs if is_plain(spec)]
        others = [spec for spec in specs if not is_plain(spec)]
        fair = [s for s in others if s.target == "uint8"]  # peers have their own label dtype anyway
        mine, peers = OURS[:2], options.peers
        eager = EAGER if peers != "none" else ()
        compiled = COMPILED if peers in ("all", "plain") else ()  # takes seconds per input
        main_first = sorted(plain, key=lambda spec: not (is_main(spec)))
        yield from ((spec, mine + eager) for spec in plain)
        yield from ((spec, mine) for spec in others)
        # One at a time, the fastest first.
        yield from ((spec, compiled[:1]) for spec in main_first)
        yield from ((spec, (name,)) for name in compiled[1:] for spec in main_first)
        yield from ((spec, OURS[2:] if compiled else ()) for spec in plain)
        if peers == "plain":
            return
        yield from ((spec, eager) for spec in fair)
        yield from ((spec, _of_torch(compiled)) for spec in fair if is_main(spec))

    def times(self) -> None:
        for spec, names in self.stages():
            case = None
            for name in names:
                if self.left() <= self.reserve + (_COMPILING if name in COMPILED else 0):
                    note = "left out: the time was up"
                    self.report.rows.append(Row(spec, LOSS_NAME, name, note=note))
                    continue
                if case is None:
                    case = device_case(spec)
                self.report.rows.append(self.one(case, name))
                self.clear()
            if case is not None and is_plain(spec) and names[0] == OURS[0]:
                self.reuse(case)
                self.bandwidth()
            case = self._truth = None
            self.clear()
            self.keep()

    def call(self, name: str, case: Case) -> Call:
        return make_call(name, case, LOSS_NAME, self.threads)

    def one(self, case: Case, name: str) -> Row:
        row, start = Row(case.spec, LOSS_NAME, name), perf_counter()
        title = f"{case.spec.title}, {TITLES[name]}"
        call = None
        try:
            call = self.call(name, case)
            row.value, gradient = call.result()
            if self._truth is None:
                self._truth = find_truth(case, LOSS_NAME)
            row.value_error = self._truth.value_error(row.value)
            row.gradient_error = self._truth.gradient_error(gradient, call.loss_scale)
            del gradient
            if call.own_stream:
                both = self.clock.wall_time(call.forward_backward, call.reset)
                row.note = "by the wall clock"
            else:
                row.peak_memory = self.clock.peak_memory(call.forward_backward, call.reset)
                both = self.clock.time(call.forward_backward, call.reset)
            row.forward_backward, row.low, row.high = both.median, both.low, both.high
            if not (call.own_stream or name.endswith(("-compile", "-out"))):
                # Without the graph's memory; a compiled peer would be recompiled.
                row.forward = self.clock.time(call.forward, call.reset).median
        except Unavailable as error:
            row.note = str(error)
        except torch.cuda.OutOfMemoryError:
            row.note = "out of memory"
        except Exception as error:  # no failure of a peer may end the run
            row.note = f"failed: {reason(error)}"
            if name in OURS:
                self.report.problems.append(f"{title}: {row.note}")
        finally:
            if call is not None:
                call.reset()
        if name in OURS and row.value_error is not None and not row.value_error < _WRONG:
            self.report.problems.append(f"{title}: value off by {row.value_error:.1e}")
        both_text = row.note
        if row.forward_backward is not None:
            both_text = f"{row.forward_backward * 1e3:.3f} ms"
        self.say(f"{title}: {both_text} (took {perf_counter() - start:.1f} s)")
        return row

    def reuse(self, case: Case) -> None:
        """The memory of a backward pass that overwrites the logits."""
        import fastloss.torch

        module, logits, labels = fastloss.torch.DiceCE(reuse_logits=True), case.logits, case.target
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        try:
            self.report.reuse_memory[case.spec.title] = self.clock.peak_memory(
                lambda: module(Output.apply(anchor, logits), labels).backward(), lambda: None
            )
        except Exception as error:
            self.report.problems.append(f"reuse_logits, {case.spec.title}: {reason(error)}")

    # ------------------------------------------------------------------ a training step

    def train(self) -> None:
        losses: tuple[str, ...] = train_step.LOSSES
        if self.options.peers == "none":
            losses = tuple(name for name in losses if name not in train_step.PEERS)
        for classes in train_step.CLASSES:
            what = f"training step, {classes} classes"
            try:
                if self.left() <= 0:
                    raise Unavailable("the time was up")
                steps = train_step.measure(self.clock, classes, losses, small=self.smoke)
            except Unavailable as error:
                self.report.missing.append(Missing("", what, str(error)))
                continue
            except Exception as error:
                self.report.problems.append(f"{what}: {reason(error)}")
                continue
            finally:
                self.clear()
            self.report.steps += steps
            for one in steps:
                if one.note and one.loss not in train_step.PEERS:
                    self.report.problems.append(f"{what}, {one.loss}: {one.note}")
                found = one.note or f"{(one.seconds or 0) * 1e3:.1f} ms"
                self.say(f"{one.title}, {train_step.TITLES[one.loss]}: {found}")

    # ------------------------------------------------------------------ small calls

    def host(self) -> None:
        """The host's time per call on 32³ voxels of two classes."""
        edge = 8 if self.smoke else 32
        case = device_case(Spec("phantom", (1, 2, edge, edge, edge), device=self.options.device))
        logits, labels = case.logits, case.target
        calls = 20 if self.smoke else 1000

        def measure(name: str, prepare: Callable[[], Callable[[], object]], calls: int) -> None:
            try:
                result = self.clock.host_time(prepare(), calls)
            except (Unavailable, ImportError) as error:
                self.report.missing.append(Missing("", f"host time of {name}", str(error)))
                return
            except Exception as error:
                self.report.problems.append(f"host time of {name}: {reason(error)}")
                return
            self.report.host[name] = result
            self.say(f"host, {name}: {result['host'] * 1e6:.1f} µs")

        def through(name: str) -> Callable[[], object]:
            call = self.call(name, case)

            def run() -> None:
                call.reset()
                call.forward_backward()

            return run

        def autograd(function: Callable[[Any], Any]) -> Callable[[], object]:
            leaf = logits.detach().clone().requires_grad_()

            def run() -> None:
                leaf.grad = None
                function(leaf).backward()

            return run

        def cross_entropy() -> Callable[[], object]:
            target = labels.long()
            return autograd(lambda leaf: torch.nn.functional.cross_entropy(leaf, target))

        def value() -> Callable[[], object]:
            return self.call("torch", case).forward

        def cupy_call(with_out: bool) -> Callable[[], object]:
            if self.smoke:
                raise Unavailable("CuPy's arrays are on a GPU")
            import cupy

            x, y = cupy.from_dlpack(logits.detach()).copy(), cupy.from_dlpack(labels).copy()
            out = cupy.empty_like(x) if with_out else None
            return lambda: LOSS.value_and_grad(x, y, out=out)

        measure(SMALL_CALL, lambda: through("torch"), calls)
        measure(BESIDE, cross_entropy, calls)
        measure("an autograd.Function that does nothing", lambda: autograd(Trivial.apply), calls)
        measure("PyTorch, value alone", value, calls)
        measure("PyTorch, value_and_grad(out=)", lambda: through("torch-out"), calls)
        measure("CuPy, value_and_grad", lambda: cupy_call(False), calls)
        measure("CuPy, value_and_grad(out=)", lambda: cupy_call(True), calls)
        if self.options.peers in ("all", "eager"):  # take half a minute, imports included
            for name in EAGER:
                measure(TITLES[name], lambda name=name: through(name), calls // 5)  # type: ignore[misc]

    def graph(self) -> None:
        """Capture forward and backward once, replay them on new data, and compare with eager."""
        if self.smoke:
            self.report.missing.append(Missing("", "CUDA graph", "needs a GPU"))
            return
        spec = spec_of("B2C4-128", self.options.device, 32)
        case = device_case(spec)
        x, labels = case.logits, case.target
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
            new = device_case(spec, seed=1)
            with torch.no_grad():
                leaf.copy_(new.logits)
            labels.copy_(new.target.flip(1))
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
            "input": spec.title,
            "same_bits_as_eager": same,
            "eager": eager,
            "replay": seconds,
            "replay_host": host,
        }
        if not same:
            self.report.problems.append("CUDA graph: a replay differs from eager")
        self.say(f"CUDA graph: same bits {same}, replay {seconds * 1e6:.1f} µs")

    def startup(self) -> None:
        """The first call of a process, with kernels to be compiled or cached."""
        with tempfile.TemporaryDirectory() as folder:
            # The driver has its own cache.
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
        made = self.report.machine
        self.say(f"{made.get('gpu', made['processor'])}; budget {self.options.budget:.0f} s")
        self.bandwidth()
        self.say(f"copy: {self.report.copy_bandwidth / 1e9:.0f} GB/s")
        edge = 8 if self.smoke else 128
        truth = check_formula(device_case(spec_of("B2C4-128", self.options.device, edge)))
        if not max(truth[k] for k in ("value_error", "gradient_error")) < 1e-6:
            self.report.problems.append(f"the float64 formula and the reference differ: {truth}")
        if self.options.peers != "none":
            self.report.notes.append(nnunet_source() + ".")
        for part in PARTS:
            if part in self.options.parts:
                getattr(self, part)()
        self.report.machine["seconds"] = perf_counter() - self.start
        if self.table:
            self.table.add(other_figures(self.report))
        print(render(self.report))
        for problem in self.report.problems:
            print(f"problem: {problem}", file=sys.stderr)
        return 1 if self.report.problems else 0

    def keep(self) -> None:
        """Add the new rows to the table of results, so that an aborted run keeps them."""
        if self.table:
            for row in self.report.rows[self.kept :]:
                self.table.add(self.report.figures(row))
        self.kept = len(self.report.rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="The library on a GPU, measured in one run.")
    parser.add_argument("--device", type=device_name, default="cuda",
                        help="cuda, cuda:1, …; cpu: a smoke run")  # fmt: skip
    parser.add_argument("--sizes", type=subset(tuple(SIZES)), default=tuple(SIZES),
                        metavar="LIST", help=", ".join(SIZES))  # fmt: skip
    parser.add_argument("--dtypes", type=subset(DTYPES), default=DTYPES,
                        metavar="LIST", help=", ".join(DTYPES))  # fmt: skip
    parser.add_argument("--peers", choices=("all", "plain", "eager", "none"), default="all",
                        help="plain: all of them, but on contiguous float32 alone")  # fmt: skip
    parser.add_argument("--parts", type=subset(PARTS), default=PARTS,
                        metavar="LIST", help=", ".join(PARTS))  # fmt: skip
    parser.add_argument("--budget", type=float, default=270,
                        help="seconds after which no other case is begun")  # fmt: skip
    parser.add_argument("--out", type=results_file, metavar="FILE.csv",
                        help="table to add rows to (default: benchmarks/results.csv)")  # fmt: skip
    parser.add_argument("--run", default="",
                        help="name of the run there (default: the time of day)")  # fmt: skip
    options = parser.parse_args()
    if not options.budget > 0:
        parser.error(f"argument --budget: expected more than 0, got {options.budget}")
    if options.device != "cpu":
        torch.cuda.set_device(options.device)
        if options.out is None:
            options.out = RESULTS
    elif options.out is not None and options.out.resolve() == RESULTS:
        parser.error("argument --out: a smoke run on a CPU does not go into benchmarks/results.csv")
    warnings.simplefilter("ignore")  # from the peers
    return Run(options).all()


if __name__ == "__main__":
    raise SystemExit(main())
