"""The command line: what is installed, how fast it is, metrics of files, losses compared."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

import fastloss
from fastloss.backends import BACKENDS, current_backend, load_backend


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastloss", description="Fused losses and metrics for 3D segmentation."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="version, backends, instruction set and threads")
    bench = commands.add_parser(
        "bench",
        help="time, accuracy and memory on a real volume, against other implementations",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate = commands.add_parser(
        "evaluate",
        help="metrics of predicted label maps in NIfTI files",
        description="Metrics of predicted label maps, two NIfTI files or two folders of them.",
    )
    compare = commands.add_parser(
        "compare",
        help="train with several losses, and say which is better, or that the data cannot tell",
        description="Train the same network with several losses, and say which is better.",
    )
    if arguments is None:
        arguments = sys.argv[1:]
    # The choices of a command live in modules that nothing else should load.
    if "bench" in arguments[:1]:
        _add_bench_options(bench)
    if "evaluate" in arguments[:1]:
        from fastloss.evaluation import command

        command.add_options(evaluate)
    if "compare" in arguments[:1]:
        from fastloss.compare import command as comparison

        comparison.add_options(compare)
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    if options.command == "evaluate":
        return command.run(evaluate, options, arguments)
    if options.command == "compare":
        return comparison.run(compare, options)
    return _bench(bench, options)


def info() -> str:
    """Version, backends and why the others are missing, instruction set and threads."""
    from fastloss.bench.implementations import backend_remedy
    from fastloss.bench.machine import cores, instruction_sets, processor

    chosen, available = instruction_sets()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which backend is missing is said below
        try:
            default, threads = current_backend().name, str(fastloss.get_num_threads())
        except (ImportError, ValueError) as error:
            default, threads = f"none, by FASTLOSS_BACKEND: {error}", "-"
    lines = [
        f"fastloss         {fastloss.__version__}",
        f"Python           {platform.python_version()}, NumPy {np.__version__}",
        f"processor        {processor()}, {cores()} cores",
        f"threads          {threads}",
    ]
    if chosen:
        others = f" (has {', '.join(available)})" if available else ""
        lines.append(f"instruction set  {chosen}{others}")
    lines.append(f"default backend  {default}")
    lines.append("backends")
    kinds = {"cpu": "C++", "numba": "Numba", "reference": "NumPy, float64"}
    for name in BACKENDS:
        try:
            load_backend(name)
            state = f"available: {kinds[name]}"
        except ImportError as error:
            state = f"missing: {backend_remedy(name, error)}"
        lines.append(f"  {name:<14} {state}")
    try:
        from fastloss.backends.cuda.backend import describe_devices

        state = f"available: {describe_devices()}"
    except ImportError as error:
        state = f"missing: {error}"
    lines.append(f"  {'cuda':<14} {state}")
    return "\n".join(lines)


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    from fastloss.bench.arguments import subset
    from fastloss.bench.implementations import FRAMEWORKS, PEERS
    from fastloss.bench.inputs import DTYPES
    from fastloss.bench.losses import LOSSES
    from fastloss.bench.volumes import default_volume

    add = parser.add_argument
    add(
        "--volume",
        default=default_volume(),
        metavar="VOLUME",
        help="'brain' (tissues of the MNI152 template, from the nilearn package), 'phantom' (a "
        "procedural torso) or the path of a NIfTI label map",
    )
    add(
        "--classes",
        type=_at_least(2),
        default=None,
        metavar="N",
        help="number of classes; as many as the volume has, or 4 for the phantom, if not given",
    )
    add(
        "--size",
        type=_size,
        default="128",
        metavar="SIZE",
        help="voxels, as 128 or 128x128x96; the volume is cut around its middle, and mirrored "
        "where it is smaller",
    )
    add("--batch", type=_at_least(1), default=1, metavar="N", help="samples")
    add("--dtype", choices=DTYPES, default="float32", help="of the logits")
    add(
        "--losses",
        type=subset(LOSSES),
        default="dice_ce",
        metavar="LIST",
        help=f"comma-separated, of {', '.join(LOSSES)}",
    )
    add(
        "--backends",
        type=subset(BACKENDS),
        default=argparse.SUPPRESS,
        metavar="LIST",
        help=f"comma-separated, of {', '.join(BACKENDS)} (default: all, but without numba, which "
        "compiles for half a minute, where there are the C++ kernels)",
    )
    add(
        "--frameworks",
        type=subset(FRAMEWORKS, everything=True),
        default="all",
        metavar="LIST",
        help="fastloss through the automatic differentiation of a framework: comma-separated, of "
        f"{', '.join(FRAMEWORKS)}; 'all' or 'none'",
    )
    add(
        "--peers",
        type=subset(PEERS, everything=True),
        default="all",
        metavar="LIST",
        help=f"comma-separated, of {', '.join(PEERS)}; 'all' or 'none'",
    )
    add(
        "--repeats",
        type=_at_least(1),
        default=7,
        metavar="N",
        help="samples of each time; the reference is timed once",
    )
    add("--json", type=Path, default=None, metavar="FILE", help="write all results here as well")


def _bench(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from fastloss.bench.errors import BadArgument
    from fastloss.bench.run import Options, render, run

    if options.json is not None and not options.json.resolve().parent.is_dir():
        # Better said now than after minutes of measuring.
        parser.error(f"argument --json: no such folder: {str(options.json.parent)!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says which backends are missing
            current_backend()
    except (ImportError, ValueError) as error:
        parser.error(f"environment variable FASTLOSS_BACKEND: {error}")
    start = perf_counter()

    def progress(message: str) -> None:
        print(f"[{perf_counter() - start:5.1f} s] {message}", file=sys.stderr, flush=True)

    try:
        report = run(
            Options(
                volume=options.volume,
                size=options.size,
                classes=options.classes,
                batch=options.batch,
                dtype=options.dtype,
                losses=options.losses,
                backends=getattr(options, "backends", None),
                frameworks=options.frameworks,
                peers=options.peers,
                repeats=options.repeats,
            ),
            progress,
        )
    except BadArgument as error:
        parser.error(str(error))
    print(render(report))
    if options.json is not None:
        try:
            text = json.dumps(report.as_json(), indent=2, ensure_ascii=False)
            options.json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            parser.error(f"argument --json: {error}")
    return 0 if report.rows else 1


def _at_least(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {low}, got {text!r}")
        return value

    return convert


def _size(text: str) -> tuple[int, int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) in (1, 3) and all(p.isdecimal() and int(p) > 0 for p in parts):
        edges = [int(p) for p in parts] * (3 if len(parts) == 1 else 1)
        return edges[0], edges[1], edges[2]
    raise argparse.ArgumentTypeError(f"expected voxels as 128 or as 128x128x96, got {text!r}")
