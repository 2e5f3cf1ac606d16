"""``python -m fastloss compare``: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastloss.compare.data import BadData, Source, open_folder, open_pairs
from fastloss.compare.judging import Measures
from fastloss.compare.losses import LOSSES, REMEDY, imported, read_losses
from fastloss.compare.records import Study
from fastloss.evaluation.progress import Progress
from fastloss.evaluation.run import cores

MOST_JOBS = 8
DEFAULT = "dice_ce,tversky_ce,dice_ce_boundary,cc_dice_ce"
QUICK = {"seeds": 1, "folds": 2, "cases": 6, "steps": 200}
FULL = {"seeds": 3, "folds": 3, "cases": 12, "steps": 240}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "All losses train the same network from the same start on the same patches, for each seed\n"
        "and fold, and are judged on whole volumes that were held out. The folder of --out keeps\n"
        "every training that is done: after an interruption the same command goes on.\n"
        "The same command has the same numbers on the same machine, whatever --jobs is.\n\n"
        "exit status: 0: all is done; 1: some trainings failed, the others are reported; 2: wrong\n"
        f"arguments; 130: interrupted.\nlosses: {', '.join(LOSSES)};\n{REMEDY}."
    )
    add = parser.add_argument
    add(
        "--losses",
        default=DEFAULT,
        metavar="LIST",
        help="comma-separated names, module:object, or NAME=either (default: %(default)s)",
    )
    add("--reference", metavar="NAME", help="what all are compared with (default: the first loss)")
    add(
        "--data",
        default="phantom",
        metavar="DATA",
        help="phantom: generated patients; brain: the MNI template, bent; a folder in nnU-Net's "
        "raw layout; or with --labels a path of images with a star for the name of the case, "
        "comma-separated for several channels (default: %(default)s)",
    )
    add("--labels", metavar="PATTERN", help="the path of label maps, with a star")
    add("--classes", default="", metavar="LIST", help="with --labels: names, the background first")
    add("--cases", type=int, metavar="N", help=f"of phantom and brain (default: {FULL['cases']})")
    add("--metrics", default="dice,hd95,nsd", metavar="LIST", help="(default: %(default)s)")
    add("--tolerance", type=float, default=2.0, metavar="MM", help="of nsd (default: %(default)s)")
    add("--seeds", type=int, metavar="N", help=f"(default: {FULL['seeds']})")
    add("--folds", type=int, metavar="K", help="of a cross-validation; 1: a quarter of the cases "
        f"is held out (default: {FULL['folds']}, or as many as there are cases)")  # fmt: skip
    add("--steps", type=int, metavar="N", help=f"of a training (default: {FULL['steps']})")
    add(
        "--minutes",
        type=float,
        metavar="M",
        help="instead of --steps: the time for all trainings; each has as many steps as the others",
    )
    add("--patch", default="32", metavar="SIZE", help="one number or three, multiples of 4 "
        "(default: %(default)s)")  # fmt: skip
    add("--batch", type=int, default=2, metavar="N", help="patches in a step (default: 2)")
    add("--width", type=int, default=8, metavar="N", help="channels of the network (default: 8)")
    add("--lr", type=float, default=2e-2, metavar="RATE", help="of AdamW (default: %(default)s)")
    add("--tune-lr", action="store_true", help="search a learning rate for each loss and fold, on "
        "training cases alone")  # fmt: skip
    add("--trainer", metavar="MODULE:FUNCTION", help="one of your own in place of the U-Net's: "
        "see fastloss.compare.training.Task")  # fmt: skip
    add("--quick", action="store_true", help="minutes instead of a quarter of an hour: "
        + ", ".join(f"--{name} {value}" for name, value in QUICK.items()))  # fmt: skip
    add("--jobs", type=int, metavar="N", help="processes, which share the cores (default: one for "
        f"each core, at most {MOST_JOBS})")  # fmt: skip
    add(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="of each process; another number rounds otherwise (default: %(default)s)",
    )
    add("--device", default="cpu", help="of PyTorch: cpu or cuda (default: %(default)s)")
    add("--out", type=Path, default=Path("compare"), metavar="DIR", help="(default: %(default)s)")
    add("--html", type=Path, metavar="FILE", help="write a page that stands alone")
    add("--svg", type=Path, metavar="FILE", help="write a picture: learning curves, and intervals "
        "of the first metric")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all that was measured")
    add("--csv", type=Path, metavar="FILE", help="write a row for each score")
    add("--export-nnunet", type=Path, metavar="DIR", help="write an nnU-Net trainer for each loss, "
        "and the commands to run, and train nothing")  # fmt: skip
    add("--collect", nargs="+", type=Path, metavar="DIR", help="train nothing: read predictions of "
        "folders named by loss, with folders seedN and fold_K inside, or nnU-Net's results; the "
        "reference is --data")  # fmt: skip


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """The exit status. Wrong arguments exit by ``parser.error``."""
    try:
        return _run(options)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; the same command goes on with what is in {options.out}",
            file=sys.stderr,
        )
        return 130


def _run(options: argparse.Namespace) -> int:
    _check_outputs(options)
    if options.collect is not None:
        return _collect(options)
    losses = read_losses(options.losses)
    reference = next(iter(losses)) if options.reference is None else options.reference
    if reference not in losses:
        raise ValueError(f"--reference: expected one of {', '.join(losses)}, got {reference!r}")
    if options.export_nnunet is not None:
        return _export(options, losses)
    _check_torch(options.device)
    from fastloss.compare.runner import Plan, check, compare, steps_of
    from fastloss.compare.store import Store

    chosen = QUICK if options.quick else FULL
    source = _source(options, chosen["cases"])
    folds = options.folds
    if folds is None:
        folds = max(1, min(chosen["folds"], len(source.names)))
    seeds, jobs = _number(options, "seeds", chosen["seeds"]), _jobs(options)
    if folds < 1:
        raise ValueError(f"--folds: expected at least 1, got {folds}")
    plan = Plan(
        source,
        losses,
        seeds=seeds,
        folds=folds,
        settings=_settings(options, chosen["steps"]),
        measures=_measures(options),
        tune=options.tune_lr,
        trainer=options.trainer,
        threads=_number(options, "threads", 1),
    )
    check(plan)
    for name, problem in source.problems:
        print(f"{name}: {problem}", file=sys.stderr)
    store = Store(options.out)
    budget: dict[str, Any] = {}
    if options.minutes is not None:
        budget = {"minutes": options.minutes}
        kept = store.options()
        if kept is not None and kept.get("minutes") == options.minutes:
            steps = int(kept["steps"])  # another measurement would give another number
        else:
            print("measuring how long a step takes", file=sys.stderr)
            steps = steps_of(plan, options.minutes, jobs)
        plan = replace(plan, settings=replace(plan.settings, steps=steps))
    store.claim({**plan.describe(), **budget})
    counted = len(plan.runs)
    print(
        f"{counted} trainings of {plan.settings.steps} steps: {len(losses)} losses, {seeds} seeds, "
        f"{folds} folds of {len(source.names)} cases; {min(jobs, counted)} at a time",
        file=sys.stderr,
    )
    study = compare(
        plan,
        store,
        name=f"{len(losses)} losses on {source.describe()['kind']}",
        reference=reference,
        jobs=jobs,
        progress=_Steps(),
    )
    study.options |= budget
    study.options["problems"] = [list(each) for each in source.problems]
    return _report(options, study)


class _Steps:
    """Calls of `compare` to a bar: the first says how many there will be."""

    def __init__(self) -> None:
        self.bar: Progress | None = None

    def __call__(self, total: int, line: str) -> None:
        if self.bar is None:
            self.bar = Progress(max(total, 1))
        else:
            self.bar.step(line)


def _source(options: argparse.Namespace, cases: int) -> Source:
    name = options.data
    count = _number(options, "cases", cases)
    if options.labels is not None:
        names = [each.strip() for each in options.classes.split(",") if each.strip()]
        return open_pairs(options.data.split(","), options.labels, names)
    if name == "phantom":
        from fastloss.compare.phantom import Phantom

        return Phantom(count)
    if name == "brain":
        from fastloss.compare.brain import Brain, check_packages

        check_packages()
        return Brain(count)
    folder = Path(name)
    if not folder.is_dir():
        raise BadData(
            "--data: expected phantom, brain, a folder in nnU-Net's raw layout, or with --labels "
            f"a path with a star, got {name!r}"
        )
    return open_folder(folder)


def _settings(options: argparse.Namespace, steps: int) -> Any:
    from fastloss.compare.network import DIVISOR
    from fastloss.compare.training import Settings

    if options.minutes is not None and options.steps is not None:
        raise ValueError("--minutes: expected either --minutes or --steps, got both")
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"--minutes: expected more than 0, got {options.minutes}")
    try:
        sizes = [int(part) for part in options.patch.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 3) or any(n < 8 or n % DIVISOR for n in sizes):
        raise ValueError(
            f"--patch: expected one number or three, multiples of {DIVISOR} from 8 on, got "
            f"{options.patch!r}"
        )
    if not options.lr > 0:
        raise ValueError(f"--lr: expected more than 0, got {options.lr}")
    if options.trainer is not None:
        module, _, attribute = options.trainer.partition(":")
        imported(module, attribute, "--trainer")
    d, h, w = sizes if len(sizes) == 3 else sizes * 3
    return Settings(
        steps=_number(options, "steps", steps),
        batch=_number(options, "batch", 2),
        patch=(d, h, w),
        width=_number(options, "width", 8),
        learning_rate=options.lr,
        device=options.device,
    )


def _measures(options: argparse.Namespace) -> Measures:
    names = tuple(part.strip() for part in options.metrics.split(",") if part.strip())
    measures = Measures(metrics=names, tolerance=options.tolerance)
    measures.check()
    return measures


def _number(options: argparse.Namespace, name: str, default: int) -> int:
    value = getattr(options, name)
    if value is None:
        return default
    if value < 1:
        raise ValueError(f"--{name}: expected at least 1, got {value}")
    return int(value)


def _jobs(options: argparse.Namespace) -> int:
    return _number(options, "jobs", 1 if options.device != "cpu" else min(cores(), MOST_JOBS))


def _check_torch(device: str) -> None:
    if not find_spec("torch"):
        raise ImportError("compare trains with PyTorch, which is not there: pip install torch")
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device: {device!r} cannot be used: {reason}") from None


def _check_outputs(options: argparse.Namespace) -> None:
    """Better said now than after minutes of training."""
    for name in ("html", "svg", "json", "csv"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise ValueError(f"--{name}: expected a file in a folder there is, got {str(path)!r}")


def _export(options: argparse.Namespace, losses: dict[str, str]) -> int:
    from fastloss.compare.nnunet import export

    seeds, folds = _number(options, "seeds", 1), _number(options, "folds", 5)
    print(export(options.export_nnunet, losses, seeds=seeds, folds=folds))
    return 0


def _collect(options: argparse.Namespace) -> int:
    from fastloss.compare.nnunet import collect

    source = _source(options, 0) if options.data not in ("phantom", "brain") else None
    if source is None:
        raise BadData("--collect: expected --data DIR, where the reference labels are")
    bar = _Steps()
    study, problems = collect(
        options.collect,
        source,
        _measures(options),
        reference=options.reference,
        jobs=_jobs(options),
        progress=bar,
    )
    for name, problem in problems:
        print(f"{name}: {problem}", file=sys.stderr)
    return _report(options, study)


def _report(options: argparse.Namespace, study: Study) -> int:
    from fastloss.compare.report_table import table

    print(table(study))
    if study.failures:
        print(f"\nfailed: {len(study.failures)}")
        for each in study.failures:
            print(f"  {each.loss}, seed {each.seed}, fold {each.fold}: {each.message}")
    writers: dict[str, Callable[[], str]] = {
        "json": study.to_json,
        "csv": study.to_csv,
        "html": lambda: _page(study),
        "svg": lambda: _picture(study),
    }
    for name, text in writers.items():
        path = getattr(options, name)
        if path is not None:
            path.write_text(text(), encoding="utf-8")
    return 1 if study.failures else 0


def _page(study: Study) -> str:
    from fastloss.compare.report_page import page

    text: str = page(study)
    return text


def _picture(study: Study) -> str:
    from fastloss.compare.report_svg import svg

    text: str = svg(study)
    return text
