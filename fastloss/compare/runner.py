"""All trainings of a comparison, in processes; what is done is kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil, isnan, nan
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np

import fastloss
from fastloss.compare.data import BadData, Source, Volume
from fastloss.compare.judging import Measures, Run, judge, mean_dice, of_lesions
from fastloss.compare.losses import TrainingLoss, imported
from fastloss.compare.pictures import picture
from fastloss.compare.records import CurvePoint, Failure, Picture, Study
from fastloss.compare.store import Store, key_of
from fastloss.compare.training import Predict, Settings, Task, Trained, train
from fastloss.evaluation.run import evaluate_in_processes

RATES = (1 / 3, 1.0, 3.0)
"""The learning rates that a search tries, as multiples of that of the settings."""
SEARCH = 0.35
"""The share of the steps that a training of the search has."""
WATCHED = 2
"""How many held-out cases the curve is of."""
LEAST = 10
"""Steps of a training that --minutes allows, at least."""
MEASURED = 4
"""Steps of each loss by which a budget of time is made a number of steps."""


@dataclass(frozen=True)
class Plan:
    """All that decides the numbers of a comparison."""

    source: Source
    losses: Mapping[str, str]
    """What each is, by its name."""
    seeds: int = 3
    folds: int = 3
    settings: Settings = field(default_factory=Settings)
    measures: Measures = field(default_factory=Measures)
    tune: bool = False
    trainer: str | None = None
    threads: int = 1
    """Of each process. Another number rounds otherwise, and on a busy machine two wait for each
    other."""

    @property
    def runs(self) -> list[Run]:
        """All trainings, those of a seed and fold together."""
        return [
            Run(loss, seed, fold)
            for seed in range(self.seeds)
            for fold in range(self.folds)
            for loss in self.losses
        ]

    def split(self, fold: int) -> tuple[list[str], list[str]]:
        """Names of the cases to train on, and of those held out: each is in one fold.

        Of a single fold a quarter of the cases is held out.
        """
        names = list(self.source.names)
        order = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
        held = order[fold :: self.folds] if self.folds > 1 else order[: ceil(len(order) / 4)]
        return [name for name in names if name not in held], [n for n in names if n in held]

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "fastloss": fastloss.__version__,
            "data": self.source.describe(),
            "losses": dict(self.losses),
            "seeds": self.seeds,
            "folds": self.folds,
            **asdict(self.settings),
            **asdict(self.measures),
            "tune_lr": self.tune,
            "trainer": self.trainer,
            "threads": self.threads,
        }


def check(plan: Plan) -> None:
    """BadData: too few cases, or none to train on that has some class of the held-out ones."""
    cases = len(plan.source.names)
    if cases < 2:
        raise BadData(
            f"--data: expected at least two cases, one to train on and one held out, got {cases}"
        )
    if plan.folds > cases:
        raise BadData(f"--folds: expected at most {cases}, one for each case, got {plan.folds}")
    if plan.tune and any(len(plan.split(fold)[0]) < 2 for fold in range(plan.folds)):
        raise BadData("--tune-lr: expected at least two cases to train on in every fold")


def compare(
    plan: Plan,
    store: Store,
    *,
    name: str,
    reference: str,
    jobs: int = 1,
    progress: Callable[[int, str], None] = lambda total, line: None,
) -> Study:
    """Train with every loss, seed and fold that is not in the store, and judge.

    Args:
        plan: what is compared.
        store: where results are kept.
        name, reference: as `Study` has them.
        jobs: how many processes train at once; with 1 this one does.
        progress: called once with the number of trainings, then after each with what was wrong
            with it, or "".

    Returns:
        A study of all runs. A run that failed is one of its failures, and is tried again when the
        comparison is started again.
    """
    missing = [run for run in plan.runs if store.load("runs", key_of(run)) is None]
    searches = [
        Run(loss, 0, fold) for fold in range(plan.folds) for loss in plan.losses if plan.tune
    ]
    searches = [each for each in searches if store.load("rates", key_of(each)) is None]
    costs = [Run(loss, 0, 0) for loss in plan.losses if store.load("costs", loss) is None]
    progress(len(missing) + len(searches) + len(costs), "")
    found = Study(name, reference, list(plan.losses), plan.describe())
    failures: dict[Run, str] = {}
    with _settled(plan):
        for kind, items, work in (
            ("the learning rate of", searches, _search),
            ("", missing, _run),
        ):
            working = partial(work, plan=plan, folder=store.folder)
            for item, problem in evaluate_in_processes(working, items, jobs, _killed):
                if problem and work is _run:
                    failures[item] = problem
                progress(0, f"{kind} {item}: {problem}".strip() if problem else "")
        # One after the other, so that they do not disturb each other.
        for item in costs:
            problem = _cost(item, plan, store.folder)
            progress(0, f"cost of {item.loss}: {problem}" if problem else "")
        _collect(plan, store, found, failures)
    found.check()
    return found


def _collect(plan: Plan, store: Store, found: Study, failures: Mapping[Run, str]) -> None:
    for run in plan.runs:
        done = store.load("runs", key_of(run))
        if done is None:
            message = failures.get(run, "it was not run")
            found.failures.append(Failure(run.loss, run.seed, run.fold, message))
            continue
        found.scores += done.scores
        found.lesions += done.lesions
        found.curves += done.curves
    found.lesions = of_lesions(found.lesions)
    for loss in plan.losses:
        cost = store.load("costs", loss)
        found.costs += [] if cost is None else cost.costs
    rates = {}
    for fold in range(plan.folds if plan.tune else 0):
        for loss in plan.losses:
            each = store.load("rates", key_of(Run(loss, 0, fold)))
            if each is not None:
                rates[f"{loss}, fold {fold}"] = each.options["learning_rate"]
    if rates:
        found.options["learning_rates"] = rates
    found.pictures += _pictures(plan, store, found)


def _killed(why: str) -> str:
    return why


# ---------------------------------------------------------------------- one training


def _run(run: Run, plan: Plan, folder: Any) -> str:
    """Train, judge and keep; what went wrong, or ""."""
    store = Store(folder)
    with _settled(plan):
        try:
            study, predictions, maps = _trained(run, plan, _rate(run, plan, store))
        except Exception as error:  # whatever it is, the other runs go on
            return _reason(error)
        if run.seed == 0:
            store.save_predictions(run, predictions, maps)
        store.save("runs", key_of(run), study)
    return ""


_Arrays: TypeAlias = dict[str, np.ndarray]


def _trained(run: Run, plan: Plan, rate: float) -> tuple[Study, _Arrays, _Arrays]:
    """What was measured; the predictions of held-out cases, and where their losses come from."""
    training, held = plan.split(run.fold)
    source, classes = plan.source, plan.source.classes
    watched = [_volume(source, name) for name in held[:WATCHED]]

    def validate(predict: Predict) -> float:
        values = [mean_dice(predict(case.image), case, classes) for case in watched]
        known = [value for value in values if not isnan(value)]
        return sum(known) / len(known) if known else nan

    task = task_of(run, plan, training, rate, validate)
    trained = _trainer(plan)(task)
    if not isinstance(trained, Trained):
        trained = Trained(trained)
    study = Study("run", run.loss, [run.loss])
    predictions, maps = {}, {}
    for name in held:
        case = _volume(source, name)
        predictions[name] = np.asarray(trained.predict(case.image))
        scores, lesions = judge(run, predictions[name], case, classes, plan.measures)
        study.scores += scores
        study.lesions += lesions
        if run.seed == 0 and trained.probabilities is not None:
            found = task.loss.explain(trained.probabilities(case.image), case.labels)
            if found is not None:
                maps[name] = found.astype(np.float32)
    study.curves = [CurvePoint(run.loss, run.seed, run.fold, *each) for each in trained.curve]
    return study, predictions, maps


def task_of(
    run: Run,
    plan: Plan,
    training: Sequence[str],
    rate: float,
    validate: Callable[[Predict], float] = lambda predict: nan,
) -> Task:
    """The task of one run, which its trainer is called with."""
    cases = [_volume(plan.source, name) for name in training]
    spacing = tuple(float(x) for x in np.median([case.spacing for case in cases], axis=0))
    classes = len(plan.source.classes)
    ignored = any(int(case.labels.max()) == classes for case in cases)
    loss = TrainingLoss(plan.losses[run.loss], spacing, classes if ignored else None)
    return Task(
        loss,
        run.seed,
        run.fold,
        cases,
        classes,
        plan.source.channels,
        rate,
        plan.settings,
        validate,
    )


def _trainer(plan: Plan) -> Callable[[Task], Any]:
    if plan.trainer is None:
        return train
    module, _, attribute = plan.trainer.partition(":")
    found: Callable[[Task], Any] = imported(module, attribute, "--trainer")
    return found


_volumes: dict[tuple[str, str], Volume] = {}


def _volume(source: Source, name: str) -> Volume:
    """A case, which is kept in memory from its first use."""
    key = json.dumps(source.describe(), sort_keys=True), name
    if key not in _volumes:
        _volumes[key] = source.load(name)
    return _volumes[key]


# ---------------------------------------------------------------------- learning rates


def _rate(run: Run, plan: Plan, store: Store) -> float:
    found = store.load("rates", key_of(replace(run, seed=0))) if plan.tune else None
    return plan.settings.learning_rate if found is None else found.options["learning_rate"]


def _search(run: Run, plan: Plan, folder: Any) -> str:
    """Find the learning rate of a loss in a fold, on its training cases alone."""
    with _settled(plan):
        training, _ = plan.split(run.fold)
        aside = training[: max(1, len(training) // 4)]
        rest = [name for name in training if name not in aside]
        classes = plan.source.classes
        steps = max(1, round(SEARCH * plan.settings.steps))
        short = replace(plan, settings=replace(plan.settings, steps=steps, points=1))
        tried = {}
        problem = ""
        for factor in RATES:
            rate = factor * plan.settings.learning_rate
            try:
                trained = _trainer(plan)(task_of(run, short, rest, rate))
                predict = trained.predict if isinstance(trained, Trained) else trained
                values = [
                    mean_dice(predict(case.image), case, classes)
                    for case in (_volume(plan.source, name) for name in aside)
                ]
                tried[rate] = float(np.nan_to_num(values).mean())
            except Exception as error:
                problem = _reason(error)
        if not tried:
            return problem
        best = max(tried, key=lambda rate: tried[rate])
        study = Study("rate", run.loss, [run.loss], {"learning_rate": best, "tried": tried})
        Store(folder).save("rates", key_of(run), study)
    return ""


# ---------------------------------------------------------------------- cost, pictures, budget


def _cost(run: Run, plan: Plan, folder: Any) -> str:
    from fastloss.compare.cost import measure

    with _settled(plan):
        try:
            training, _ = plan.split(0)
            task = task_of(run, plan, training[:2], plan.settings.learning_rate)
            study = Study("cost", run.loss, [run.loss], costs=[measure(run.loss, task)])
        except Exception as error:
            return _reason(error)
        Store(folder).save("costs", run.loss, study)
    return ""


def _pictures(plan: Plan, store: Store, study: Study) -> list[Picture]:
    """The best and the worst held-out case of each loss by the first metric, of the first seed."""
    found = []
    metric = "dice" if "dice" in plan.measures.metrics else plan.measures.metrics[0]
    down = not metric.startswith(("hd", "assd", "hausdorff", "fp", "fn"))
    for loss in plan.losses:
        values: dict[tuple[int, str], list[float]] = {}
        for score in study.scores:
            if (score.loss, score.seed, score.metric) == (loss, 0, metric):
                values.setdefault((score.fold, score.case), []).append(score.value)
        means = {
            key: float(np.mean([v for v in each if not isnan(v)] or [nan]))
            for key, each in values.items()
        }
        order = sorted((k for k in means if not isnan(means[k])), key=lambda k: means[k])
        if not order:
            continue
        ends = {"worst": order[0 if down else -1], "best": order[-1 if down else 0]}
        for words, (fold, name) in list(ends.items())[: min(2, len(order))]:
            kept = store.load_predictions(Run(loss, 0, fold)).get(name)
            if kept is not None:
                found.append(picture(loss, words, _volume(plan.source, name), *kept))
    return found


def steps_of(plan: Plan, minutes: float, jobs: int) -> int:
    """How many steps each training may have, so that all end in this time.

    The same number for each loss: the time of a step of each, and of a prediction, is measured
    here, once.

    Raises:
        BadData: a time in which no training has `LEAST` steps.
    """
    few = replace(plan, settings=replace(plan.settings, steps=MEASURED, points=1))
    training, held = plan.split(0)
    total = 0.0
    with _settled(plan):
        predict: Predict | None = None
        for loss in plan.losses:
            task = task_of(Run(loss, 0, 0), few, training[:2], plan.settings.learning_rate)
            train(replace(task, settings=replace(task.settings, steps=1)))
            begin = perf_counter()
            with suppress(ArithmeticError):  # a loss that gives NaN ends at once
                predict = train(task).predict
            total += (perf_counter() - begin) / MEASURED
        begin = perf_counter()
        if predict is not None:
            predict(_volume(plan.source, held[0]).image)
        prediction = perf_counter() - begin
    runs = plan.seeds * plan.folds
    judged = len(held) + plan.settings.points * min(WATCHED, len(held))
    # A tenth for starting processes and costs.
    each_minute = 0.9 * 60 * jobs
    judging = runs * len(plan.losses) * judged * 1.5 * prediction
    searches = plan.folds * len(RATES) * SEARCH if plan.tune else 0.0
    step = total * (runs + searches)
    steps = int((each_minute * minutes - judging) / step)
    if steps < LEAST:
        needed = (LEAST * step + judging) / each_minute
        raise BadData(
            f"--minutes: in {minutes:g} each of the {len(plan.runs)} trainings would have "
            f"{max(steps, 0)} steps; expected enough for {LEAST}: it takes {ceil(needed)} or more"
        )
    return steps


@contextmanager
def _settled(plan: Plan) -> Iterator[None]:
    """Settings of PyTorch by which the same command has the same numbers; as before afterwards."""
    import torch

    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    ours = fastloss.get_num_threads()
    torch.set_num_threads(plan.threads)
    if ours > plan.threads:
        fastloss.set_num_threads(plan.threads)
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torch")
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        if ours > plan.threads:
            fastloss.set_num_threads(ours)


def _reason(error: BaseException) -> str:
    words = " ".join(str(error).split())
    kind = "" if isinstance(error, (ValueError, ArithmeticError)) else f"{type(error).__name__}: "
    return (kind + (words or type(error).__name__))[:300]
