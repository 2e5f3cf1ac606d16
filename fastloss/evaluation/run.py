"""Evaluates pairs of files, one case at a time in each process."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastloss.evaluation.files import Case, LabelMap, Mismatch, check_same_grid, read_label_map
from fastloss.evaluation.results import Results
from fastloss.metrics import Scores, evaluate
from fastloss.metrics.evaluate import DEFAULT
from fastloss.threads import set_num_threads

Item = TypeVar("Item", bound=Hashable)
MOST_LABEL = 65534
KILLED = "a process ended without a result, perhaps for lack of memory: try fewer jobs"


@dataclass(frozen=True)
class Settings:
    """The options of an evaluation; `fastloss.metrics.evaluate` documents them."""

    metrics: tuple[str, ...] = DEFAULT
    classes: Mapping[str, tuple[int, ...]] | None = None
    """The labels that each class unites; None: every label of any file is a class."""
    count: int | None = None
    """Labels from this one on are an error; None: none is."""
    include_background: bool = False
    """Whether label 0 is a class, if ``classes`` is None."""
    ignore_index: int | None = None
    definition: str = "deepmind"
    tolerance: Any = 1.0
    compare_affine: bool = True
    """Whether files must agree in orientation and place, not in shape and spacing alone."""


class Outcome(NamedTuple):
    """One case: scores, or what was wrong."""

    scores: Scores | None
    spacing: tuple[float, ...]
    problem: str


def evaluate_files(
    cases: Sequence[Case],
    settings: Settings,
    *,
    jobs: int = 1,
    progress: Callable[[Case, str], None] | None = None,
) -> Results:
    """The scores of all cases. A case that fails is recorded, and the others go on.

    Args:
        cases: as `match` finds them.
        settings: what is measured.
        jobs: how many processes; they share the processor's cores. With 1 this process computes.
        progress: called after each case with what was wrong with it, or "".

    Raises:
        ValueError: a metric, definition or tolerance that `fastloss.metrics.evaluate` refuses.
        NothingEvaluated: no case could be evaluated, or no file holds a label but the background's.
    """
    blank = _blank_scores(settings)
    found: dict[Case, Outcome] = {}
    work = partial(evaluate_case, settings=settings)
    for case, outcome in evaluate_in_processes(work, cases, jobs, _killed):
        found[case] = outcome
        if progress is not None:
            progress(case, outcome.problem)
    good = [case for case in cases if found[case].scores is not None]
    problems = tuple((case.name, found[case].problem) for case in cases if found[case].problem)
    if not good:
        raise NothingEvaluated(problems)
    scores = [(case.name, found[case].scores) for case in good]
    labels = settings.classes
    if labels is None:
        present = {int(name) for _, each in scores if each is not None for name in each.classes}
        if not present:
            raise NothingEvaluated(problems, "no file holds a label but the background's")
        labels = {str(label): (label,) for label in sorted(present)}
    values = {
        name: np.array([[_of(each, name, c, blank) for c in labels] for _, each in scores])
        for name in blank
    }
    table = Scores(
        values,
        samples=[case.name for case in good],
        classes=list(labels),
        about={"definition": settings.definition, "tolerance": settings.tolerance},
    )
    spacings = tuple(found[case].spacing for case in good)
    return Results(table, tuple(good), labels, spacings, problems)


class NothingEvaluated(ValueError):
    """There is no score of any case."""

    def __init__(
        self, problems: Sequence[tuple[str, str]], message: str = "no case could be evaluated"
    ) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


def _of(scores: Scores | None, metric: str, label: str, blank: Mapping[str, float]) -> float:
    """That of a class, which is empty in both files if a case was evaluated without it."""
    assert scores is not None
    if label not in scores.classes:
        return blank[metric]
    return float(scores[metric][0, scores.classes.index(label)])


def _blank_scores(settings: Settings) -> dict[str, float]:
    """By metric, what it is of a class that is in neither file.

    Raises:
        ValueError, TypeError: settings that no case could be evaluated with.
    """
    if settings.classes is None and isinstance(settings.tolerance, Mapping):
        raise ValueError("tolerance: one for each class needs the classes to be named")
    nothing, one = np.zeros((1, 2, 2, 2), np.uint8), {"1": (1,)}
    _evaluate(nothing, nothing, settings, settings.classes or one, 1.0)
    # A class of label 0 is not empty there.
    plain = Settings(metrics=settings.metrics, definition=settings.definition)
    scores = _evaluate(nothing, nothing, plain, one, 1.0)
    return {name: float(scores[name][0, 0]) for name in scores}


def _evaluate(
    prediction: np.ndarray,
    reference: np.ndarray,
    settings: Settings,
    classes: Mapping[str, tuple[int, ...]],
    spacing: Any,
) -> Scores:
    return evaluate(
        prediction,
        reference,
        metrics=settings.metrics,
        classes=classes,
        ignore_index=settings.ignore_index,
        spacing=spacing,
        definition=settings.definition,
        tolerance=settings.tolerance,
    )


def evaluate_case(case: Case, settings: Settings) -> Outcome:
    """One case, from its files."""
    try:
        prediction, reference = read_label_map(case.prediction), read_label_map(case.reference)
        check_same_grid(prediction, reference, affine=settings.compare_affine)
        classes = _classes(prediction, reference, settings)
        if classes:
            voxels = prediction.voxels[None], reference.voxels[None]
            scores = _evaluate(*voxels, settings, classes, reference.spacing)
        else:
            nothing = dict.fromkeys(settings.metrics, np.empty((1, 0)))
            scores = Scores(nothing, samples=[case.name], classes=[])
        return Outcome(scores, reference.spacing, "")
    except Mismatch as error:
        return Outcome(None, (), str(error))
    except Exception as error:  # whatever it is, the other cases go on
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return Outcome(None, (), kind + (reason or "no more is known"))


def _killed(why: str) -> Outcome:
    return Outcome(None, (), why)


def _classes(
    prediction: LabelMap, reference: LabelMap, settings: Settings
) -> Mapping[str, tuple[int, ...]]:
    """Those of the settings, or the labels that a case holds.

    Raises:
        Mismatch: a label that is too large.
    """
    if settings.classes is not None and settings.count is None:
        return settings.classes
    ignored = {settings.ignore_index}
    ours, theirs = labels_in(prediction.voxels), labels_in(reference.voxels) - ignored
    if settings.count is not None:
        for role, labels in (("prediction", ours), ("reference", theirs)):
            if labels and max(labels) >= settings.count:
                raise Mismatch(
                    f"the {role} holds label {max(labels)}, expected labels in "
                    f"[0, {settings.count})"
                )
    if settings.classes is not None:
        return settings.classes
    if not settings.include_background:
        ignored |= {0}
    return {str(label): (label,) for label in sorted((ours | theirs) - ignored)}


def labels_in(voxels: np.ndarray) -> set[int]:
    """The labels that occur. Mismatch: one above 65534."""
    largest = int(voxels.max())
    if largest > MOST_LABEL:
        raise Mismatch(f"expected labels up to {MOST_LABEL}, got {largest}")
    found = np.zeros(largest + 1, np.int64)
    for part in voxels:  # a slice at a time, as bincount makes a copy of eight bytes a voxel
        found += np.bincount(part.ravel(), minlength=largest + 1)
    return {int(label) for label in np.flatnonzero(found)}


def evaluate_in_processes(
    work: Callable[[Item], Any],
    cases: Sequence[Item],
    jobs: int,
    failed: Callable[[str], Any],
) -> Iterator[tuple[Item, Any]]:
    """Each case with its result, as it is done.

    Args:
        work: with more than one job it is pickled.
        cases: what it is called with.
        jobs: how many fresh processes, which share the cores; with 1, or a single case, this
            process works.
        failed: the result of a case whose process is killed, given why.
    """
    jobs = min(jobs, len(cases))
    if jobs <= 1:
        yield from ((case, work(case)) for case in cases)
        return
    threads = max(1, cores() // jobs)
    waiting = deque(cases)
    while waiting:
        running: dict[Future[Any], Item] = {}
        try:
            with _pool(jobs, threads) as pool:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        running[pool.submit(work, waiting[0])] = waiting[0]
                        waiting.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield running.pop(future), result
        except BrokenProcessPool:
            # One of these cases killed its process: run each again in a process of its own.
            for case in running.values():
                try:
                    with _pool(1, threads) as pool:
                        result = pool.submit(work, case).result()
                except BrokenProcessPool:
                    result = failed(KILLED)
                yield case, result


def _pool(jobs: int, threads: int) -> ProcessPoolExecutor:
    # Spawned, not forked: threads of OpenMP do not survive a fork.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(threads,))


def _start(threads: int) -> None:
    warnings.simplefilter("ignore")  # this process says nothing that the first one does not
    set_num_threads(threads)


def cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
