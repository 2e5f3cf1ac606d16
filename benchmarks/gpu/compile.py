"""Compiles the benchmark's kernels and peers in several processes, before anything is timed.

    python benchmarks/gpu/compile.py [--device cuda] [--processes 8] [--dtypes LIST]
        [--peers LIST] [--limit SECONDS] [SIZE ...]

The library's kernels go into CuPy's cache (CUPY_CACHE_DIR), the compiled peers into Inductor's
(TORCHINDUCTOR_CACHE_DIR). A kernel is compiled for the classes, dtypes and layout of a call, not
for its number of voxels: tiny volumes suffice. Peers are compiled for the measured shape, in one
process per peer, which is terminated at the limit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import torch
from cases import DTYPES, MAIN, SIZES, all_specs, is_plain, tiny

from fastloss.bench.arguments import device_name, subset
from fastloss.bench.errors import reason
from fastloss.bench.implementations import make_call
from fastloss.bench.inputs import Spec, device_case

PEERS = ("nnunet-compile", "monai-compile")
SMALL = (1, 2, 32, 32, 32)
"""The shape of the small calls."""


def compile_all(spec: Spec, names: tuple[str, ...]) -> float:
    """Run each implementation once; return the seconds that it took."""
    start = perf_counter()
    case = device_case(spec)
    for name in names:
        call = make_call(name, case, "dice_ce", 1)
        call.forward_backward()
        call.reset()
    if case.logits.is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - start


def own_kernels(specs: Iterable[Spec], processes: int) -> list[str]:
    """Compile the library's kernels for these inputs; return the errors."""
    # Kernels of many classes take longest.
    todo = sorted({tiny(spec) for spec in specs}, key=lambda spec: -spec.shape[1])
    problems = []
    context = get_context("spawn")  # CUDA cannot be used in a fork
    with ProcessPoolExecutor(min(processes, len(todo)), context) as pool:
        jobs = {pool.submit(compile_all, spec, ("torch", "torch-out")): spec for spec in todo}
        for job in as_completed(jobs):
            error = job.exception()
            if error is not None:
                problems.append(f"{jobs[job].title}: {reason(error)}")
    return problems


def start_peer(name: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A process that compiles a peer for every size, without child processes."""
    command = [sys.executable, str(Path(__file__).resolve()), "--device", options.device]
    return subprocess.Popen(
        [*command, "--only", name, *options.sizes],
        env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
    )


def peer(name: str, options: argparse.Namespace) -> None:
    specs = all_specs(options.sizes, DTYPES[:1], options.device)
    for spec in filter(is_plain, specs):
        took = compile_all(tiny(spec) if options.device == "cpu" else spec, (name,))
        print(f"{name}, {spec.title}: {took:.1f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile what the benchmark runs.")
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("--device", type=device_name, default="cuda")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--dtypes", type=subset(DTYPES), default=DTYPES, metavar="LIST")
    parser.add_argument("--peers", type=subset(PEERS, everything=True), default=(),
                        metavar="LIST", help=", ".join(PEERS))  # fmt: skip
    parser.add_argument("--limit", type=float, default=60,
                        help="seconds after which peers are ended")  # fmt: skip
    parser.add_argument("--only", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for size in options.sizes:
        if size not in SIZES:
            parser.error(f"argument SIZE: expected some of {', '.join(SIZES)}, got {size!r}")
    # The order of the benchmark.
    options.sizes = sorted(options.sizes or SIZES, key=lambda size: size != MAIN)
    if options.device != "cpu":
        torch.cuda.set_device(options.device)
    if options.only:
        peer(options.only, options)
        return 0
    start = perf_counter()
    peers = {name: start_peer(name, options) for name in options.peers}
    try:
        specs = all_specs(options.sizes, options.dtypes, options.device)
        small = Spec("phantom", SMALL, device=options.device)
        problems = own_kernels([*specs, small], options.processes)
        print(f"kernels of {len(specs)} inputs: {perf_counter() - start:.1f} s", flush=True)
        for name, process in peers.items():
            try:
                process.wait(max(0.0, options.limit - (perf_counter() - start)))
            except subprocess.TimeoutExpired:
                print(f"{name}: ended after {perf_counter() - start:.1f} s")
    finally:
        for process in peers.values():
            process.kill()
            process.wait()
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
