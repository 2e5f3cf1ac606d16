"""``python -m fastloss evaluate``: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastloss.evaluation.files import Case, Matched, check_reader, match
from fastloss.evaluation.progress import Progress
from fastloss.evaluation.results import Results
from fastloss.evaluation.run import NothingEvaluated, Settings, cores, evaluate_files
from fastloss.metrics.evaluate import DEFAULT, METRICS, PATTERNS
from fastloss.metrics.metric import find_metrics
from fastloss.metrics.surface import DEFINITIONS
from fastloss.version import __version__

MOST_JOBS = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "exit status: 0: all cases were evaluated; 1: some or all were not; 2: wrong arguments.\n"
        f"metrics: {', '.join(METRICS)}, hd95 (any percentile), f2 (any beta)."
    )
    add = parser.add_argument
    add("predictions", metavar="PREDICTIONS", help="a NIfTI label map, or a folder of them")
    add("references", metavar="REFERENCES", help="the same of the references, by the same names")
    add(
        "--classes",
        metavar="CLASSES",
        help="their number (with the background), their names (comma-separated, label 0 first), or "
        "a dataset.json with labels; by default every label of any file is one",
    )
    add(
        "--regions",
        nargs="+",
        default=[],
        metavar="NAME=LABELS",
        help="labels that are united, as WT=1,2,3 TC=1,3; alone, or beside --classes",
    )
    add(
        "--metrics",
        default=",".join(DEFAULT),
        metavar="LIST",
        help="comma-separated (default: %(default)s)",
    )
    add(
        "--definition",
        choices=DEFINITIONS,
        default="deepmind",
        help="of surfaces and distances, see fastloss.metrics.surface (default: %(default)s)",
    )
    add(
        "--tolerance",
        nargs="+",
        default=["1"],
        metavar="MM",
        help="of nsd: a number, or NAME=MM for each class (default: 1)",
    )
    add("--include-background", action="store_true", help="evaluate label 0 as well")
    add(
        "--ignore-index",
        type=int,
        default=None,
        metavar="LABEL",
        help="voxels of this label in the reference count for nothing",
    )
    add(
        "--ignore-affine",
        action="store_true",
        help="compare by index files whose headers place them elsewhere; shape and spacing must "
        "still agree",
    )
    add(
        "--jobs",
        type=int,
        default=None,
        metavar="N",
        help=f"processes, which share the cores (default: one for each core, at most {MOST_JOBS})",
    )
    add("--csv", type=Path, metavar="FILE", help="write a row for each case and class")
    add("--json", type=Path, metavar="FILE", help="write settings, statistics and all values")
    add("--html", type=Path, metavar="FILE", help="write a page with box plots and the worst cases")
    add(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="images of the cases (NAME.nii.gz or NAME_0000.nii.gz), shown in the page",
    )
    add(
        "--worst",
        type=int,
        default=5,
        metavar="N",
        help="how many of the worst cases the page shows (default: %(default)s)",
    )


def run(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    arguments: Sequence[str],
) -> int:
    """The exit status. Wrong arguments exit by ``parser.error``."""
    try:
        check_reader()
        _check_outputs(options)
        settings = settings_of(options)
        matched = match(options.predictions, options.references)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    jobs = min(cores(), MOST_JOBS) if options.jobs is None else options.jobs
    progress = Progress(max(len(matched.cases), 1))
    for name, problem in matched.problems:
        progress.say(f"{name}: {problem}")

    def done(case: Case, problem: str) -> None:
        progress.step(f"{case.name}: {problem}" if problem else "")

    try:
        found = evaluate_files(matched.cases, settings, jobs=jobs, progress=done)
    except NothingEvaluated as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    results = _with_context(found, matched, settings, options, arguments)
    print(_header(results))
    print(f"\n{results.text()}")
    if results.problems:
        print(f"\nnot evaluated: {len(results.problems)}")
        for name, problem in results.problems:
            print(f"  {name}: {problem}")
    _write(parser, options, results, settings)
    return 1 if results.problems else 0


def settings_of(options: argparse.Namespace) -> Settings:
    """ValueError, naming the option: one that is out of range or cannot be read."""
    classes, count, ignored = None, None, options.ignore_index
    if options.classes is not None:
        classes, count, theirs = _classes(options.classes, options.include_background)
        ignored = theirs if ignored is None else ignored
    regions = dict(map(_region, options.regions))
    if regions:
        twice = [name for name in regions if name in (classes or {})]
        if twice:
            raise ValueError(f"--regions: the class {twice[0]!r} has this name already")
        classes = {**(classes or {}), **regions}
        if options.classes is None and options.include_background:
            classes = {"0": (0,), **classes}
    metrics = tuple(part.strip() for part in options.metrics.split(",") if part.strip())
    for name, low in (("jobs", 1), ("worst", 0)):
        value = getattr(options, name)
        if value is not None and value < low:
            raise ValueError(f"--{name}: expected at least {low}, got {value}")
    return Settings(
        metrics=metrics,
        classes=classes,
        count=count,
        include_background=options.include_background,
        ignore_index=ignored,
        definition=options.definition,
        tolerance=_tolerance(options.tolerance),
        compare_affine=not options.ignore_affine,
    )


_Classes = tuple[dict[str, tuple[int, ...]], "int | None", "int | None"]


def _classes(text: str, include_background: bool) -> _Classes:
    """Labels by name, how many labels there are if that is known, and the ignored one."""
    first = 0 if include_background else 1
    if text.lower().endswith(".json"):
        return _dataset(Path(text), first)
    if text.strip().isdecimal():
        count = int(text)
        if count < 2:
            raise ValueError(f"--classes: expected at least 2 with the background, got {text!r}")
        return {str(label): (label,) for label in range(first, count)}, count, None
    names = [name.strip() for name in text.split(",")]
    # Names that are numbers would be those of other labels.
    named = len(names) > 1 and not any(name.isdecimal() or not name for name in names)
    if not named or len(set(names)) < len(names):
        raise ValueError(
            "--classes: expected a number, names as background,liver,spleen that differ, or a "
            f"dataset.json, got {text!r}"
        )
    return {name: (i,) for i, name in enumerate(names) if i >= first}, len(names), None


def _dataset(path: Path, first: int) -> _Classes:
    """Those of a dataset.json of nnU-Net, or of the Medical Segmentation Decathlon."""
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        pairs = list(labels.items())
        if all(isinstance(value, str) for value in labels.values()):  # label: name
            pairs = [(name, int(label)) for label, name in pairs]
        read = {
            str(name): tuple(map(int, value if isinstance(value, list) else [value]))
            for name, value in pairs
        }
    except OSError as error:
        raise ValueError(f"--classes: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--classes: {str(path)!r} has no labels that can be read") from None
    ignored = read.pop("ignore", None)
    found = {name: each for name, each in read.items() if first == 0 or each != (0,)}
    if not found:
        raise ValueError(f"--classes: {str(path)!r} has no label but the background's")
    count = 1 + max(label for each in read.values() for label in each)
    return found, count, None if ignored is None else ignored[0]


def _region(text: str) -> tuple[str, tuple[int, ...]]:
    name, sign, labels = text.partition("=")
    try:
        found = tuple(int(label) for label in labels.split(","))
    except ValueError:
        found = ()
    if not (name and sign and found) or min(found) < 0:
        raise ValueError(f"--regions: expected NAME=LABELS, as WT=1,2,3, got {text!r}")
    return name, found


def _tolerance(texts: Sequence[str]) -> float | Mapping[str, float]:
    try:
        if len(texts) == 1 and "=" not in texts[0]:
            return float(texts[0])
        pairs = [text.rpartition("=") for text in texts]
        if all(name for name, _, _ in pairs):
            return {name: float(number) for name, _, number in pairs}
    except ValueError:
        pass
    raise ValueError(
        f"--tolerance: expected a number, or NAME=MM for each class, got {' '.join(texts)!r}"
    )


def _check_outputs(options: argparse.Namespace) -> None:
    """Better said now than after minutes of measuring."""
    for name in ("csv", "json", "html"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise ValueError(f"--{name}: expected a file in a folder there is, got {str(path)!r}")
    if options.images is not None and not options.images.is_dir():
        raise ValueError(f"--images: no such folder: {str(options.images)!r}")


def _with_context(
    found: Results,
    matched: Matched,
    settings: Settings,
    options: argparse.Namespace,
    arguments: Sequence[str],
) -> Results:
    """With the problems of files without a partner, and what was measured."""
    about = {
        "fastloss": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m fastloss " + shlex.join(arguments),
        "predictions": str(options.predictions),
        "references": str(options.references),
        "metrics": list(settings.metrics),
        "definition": settings.definition,
        "tolerance": settings.tolerance,
        "ignore_index": settings.ignore_index,
    }
    problems = tuple(sorted((*matched.problems, *found.problems)))
    return Results(found.scores, found.cases, found.labels, found.spacings, problems, about)


def _header(results: Results) -> str:
    about, n = results.about, len(results.cases)
    found = find_metrics(list(results.scores), METRICS, PATTERNS)
    measured = ""
    if any(metric.family == "surface" for metric in found.values()):
        measured = f", surfaces as {about['definition']!r}, tolerance {about['tolerance']} mm"
    return (
        f"{n} {'case' if n == 1 else 'cases'}{measured}\n"
        "mean and std are of the finite values; the median counts infinite ones too"
    )


def _write(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    results: Results,
    settings: Settings,
) -> None:
    def write(name: str, text: Any) -> None:
        path = getattr(options, name)
        if path is None:
            return
        try:
            path.write_text(text(), encoding="utf-8")
        except OSError as error:
            parser.error(f"argument --{name}: {error}")

    def page() -> str:
        from fastloss.evaluation.html import page

        return page(results, images=options.images, worst=options.worst)

    write("csv", results.scores.to_csv)
    write("json", lambda: json.dumps(results.to_dict(), indent=1, ensure_ascii=False) + "\n")
    write("html", page)
