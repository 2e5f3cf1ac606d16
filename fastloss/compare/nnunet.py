"""Losses compared by nnU-Net: trainers to run there, and its predictions in the same report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastloss.compare.data import BadData, Files, Source
from fastloss.compare.judging import Measures, Run, judge
from fastloss.compare.losses import BOUNDARY_FACTORS
from fastloss.compare.pictures import picture
from fastloss.compare.records import LesionScore, Picture, Score, Study
from fastloss.evaluation.files import (
    ENDINGS,
    Mismatch,
    check_same_grid,
    read_label_map,
    stem,
)
from fastloss.evaluation.run import evaluate_in_processes, labels_in

TRAINERS = "fastloss_compare.py"
COMMANDS = "commands.sh"
PREFIX = "nnUNetTrainerCompare_"
_MIXINS = {
    "dice_ce": ("FusedLoss", ""),
    "dice_ce_boundary": (
        "BoundaryLoss",
        f"    first_boundary_factor, last_boundary_factor = {BOUNDARY_FACTORS}\n",
    ),
    "skeleton_recall": ("SkeletonRecallLoss", ""),
    "cc_dice_ce": ("CCDiceCELoss", ""),
    "blob_dice_ce": ("BlobLoss", ""),
}
"""Losses that `fastloss.nnunet.trainer` has: what they read is made in the data loader."""


# ---------------------------------------------------------------------- export


def export(folder: Path, losses: Mapping[str, str], *, seeds: int = 1, folds: int = 5) -> str:
    """Write the trainers and the commands to run; what there is to do, for people.

    Args:
        folder: it is made if it is not there.
        losses: what each is, by its name.
        seeds: trainers of each loss, which differ in the weights that a network starts from.
        folds: of nnU-Net's cross-validation.

    Raises:
        OSError: a folder that cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        trainer_name(loss, seed): (spec, seed)
        for loss, spec in losses.items()
        for seed in range(seeds)
    }
    classes = [_class(name, spec, seed) for name, (spec, seed) in names.items()]
    mixins = sorted({_MIXINS[spec][0] for spec in losses.values() if spec in _MIXINS})
    imports = ["from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer", ""]
    imports += ["from fastloss.compare.nnunet_trainer import ComparedLoss, Seeded"]
    if mixins:
        imports += [f"from fastloss.nnunet.trainer import {', '.join(mixins)}"]
    header = '"""Trainers that differ in their loss alone: name one with -tr."""\n\n'
    text = header + "\n".join(imports) + "\n\n\n" + "\n\n\n".join(classes) + "\n"
    (folder / TRAINERS).write_text(text, encoding="utf-8")
    commands = _commands(folder, list(names), folds)
    (folder / COMMANDS).write_text(commands, encoding="utf-8")
    return (
        f"{len(names)} trainers are in {folder / TRAINERS}. To train, set DATASET at the top of\n"
        f"{folder / COMMANDS}, and run its lines:\n\n{commands}"
    )


def trainer_name(loss: str, seed: int) -> str:
    """Of the class."""
    return f"{PREFIX}{re.sub(r'[^0-9A-Za-z_]', '_', loss)}_seed{seed}"


def _class(name: str, spec: str, seed: int) -> str:
    mixin, more = _MIXINS.get(spec, ("ComparedLoss", f"    compared_loss = {spec!r}\n"))
    return (
        f"class {name}(Seeded, {mixin}, nnUNetTrainer):\n"
        f"    compared_seed = {seed}\n{more}".rstrip()
    )


def _commands(folder: Path, names: Sequence[str], folds: int) -> str:
    lines = [
        "# The number or name of your data set, and one of nnU-Net's configurations.",
        "DATASET=1",
        "CONFIGURATION=3d_fullres",
        f"export nnUNet_extTrainer={folder.resolve()}",
        "nnUNetv2_plan_and_preprocess -d $DATASET -c $CONFIGURATION --verify_dataset_integrity",
    ]
    lines += [
        f"nnUNetv2_train $DATASET $CONFIGURATION {fold} -tr {name}"
        for fold in range(folds)
        for name in names
    ]
    lines += [
        "# Each training predicts the cases of its fold; these are read into one report.",
        'NAME=$(basename "$(ls -d "$nnUNet_raw"/Dataset$(printf %03d $DATASET)_*)")',
        'python -m fastloss compare --data "$nnUNet_raw/$NAME" --html compare.html '
        f'--collect "$nnUNet_results/$NAME/{PREFIX}"*',
    ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- collect


class Found(NamedTuple):
    """A predicted file."""

    run: Run
    case: str
    path: Path


class Judged(NamedTuple):
    scores: list[Score]
    lesions: list[LesionScore]
    problem: str


def collect(
    folders: Sequence[Path],
    source: Source,
    measures: Measures,
    *,
    reference: str | None = None,
    jobs: int = 1,
    progress: Callable[[int, str], None] = lambda total, line: None,
) -> tuple[Study, list[tuple[str, str]]]:
    """The scores of predictions that others made.

    Args:
        folders: one for each loss, or for each loss and seed: ``LOSS``, ``LOSS_seed1``, or one of
            nnU-Net's results, ``nnUNetTrainerCompare_LOSS_seed0__nnUNetPlans__3d_fullres``. Within,
            NIfTI files by the names of the cases, at any depth; folders called ``seed1`` and
            ``fold_1`` on the way say which seed and fold they are of, which else is 0.
        source: the references.
        reference: the loss to compare with; by default that of the first folder.
        progress: as in `fastloss.compare.runner.compare`.

    Returns:
        The study, and what was wrong with files: a line by the name of each.

    Raises:
        BadData: a folder without a prediction, or no prediction that fits.
    """
    if not isinstance(source, Files):
        raise BadData("--collect: expected references in files")
    found: list[Found] = []
    problems = list(source.problems)
    for folder in folders:
        inside = _predictions(folder)
        if not inside:
            raise BadData(f"--collect: no NIfTI file in {str(folder)!r}")
        for each in inside:
            if each.case in source.names:
                found.append(each)
            else:
                problems.append((str(each.path), "no reference of this name"))
    found, twice = _once(found)
    problems += twice
    losses = list(dict.fromkeys(each.run.loss for each in found))
    if not losses:
        raise BadData("--collect: no prediction has the name of a case of --data")
    if reference is not None and reference not in losses:
        raise BadData(f"--reference: expected one of {', '.join(losses)}, got {reference!r}")
    options = {"collected": [str(folder) for folder in folders], "data": source.describe()}
    study = Study("collected predictions", reference or losses[0], losses, options)
    progress(len(found), "")
    work = partial(_judge, source=source, measures=measures)
    results: dict[Found, Judged] = {}
    for each, judged in evaluate_in_processes(work, found, jobs, _killed):
        results[each] = judged
        if judged.problem:
            problems.append((str(each.path), judged.problem))
        progress(0, f"{each.path}: {judged.problem}" if judged.problem else "")
    for each in found:
        study.scores += results[each].scores
        study.lesions += results[each].lesions
    if not study.scores:
        raise BadData(f"--collect: no prediction fits its reference ({problems[-1][1]})")
    for run in dict.fromkeys(each.run for each in found):
        have = {each.case for each in found if each.run == run}
        wanted = {
            each.case for each in found if (each.run.seed, each.run.fold) == (run.seed, run.fold)
        }
        problems += [(str(run), f"no prediction of {name}") for name in sorted(wanted - have)]
    study.pictures += _pictures(study, results, source)
    return study, problems


def _predictions(folder: Path) -> list[Found]:
    if not folder.is_dir():
        raise BadData(f"--collect: no such folder: {str(folder)!r}")
    loss, seed = _named(folder.resolve().name)
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.name.lower().endswith(ENDINGS) or path.name.startswith("."):
            continue
        parts = "/".join(path.relative_to(folder).parts[:-1])
        own = _number("seed", parts)
        run = Run(loss, seed if own is None else own, _number("fold", parts) or 0)
        found.append(Found(run, stem(path), path))
    return found


def _named(name: str) -> tuple[str, int]:
    """The loss and the seed of a folder."""
    name = name.partition("__")[0].removeprefix(PREFIX)
    loss, seed, number = name.rpartition("_seed")
    if seed and number.isdecimal() and loss:
        return loss, int(number)
    return name, 0


def _number(word: str, text: str) -> int | None:
    match = re.search(rf"(?:^|[/_]){word}[-_]?(\d+)(?:$|[/_])", text)
    return None if match is None else int(match[1])


def _once(found: Sequence[Found]) -> tuple[list[Found], list[tuple[str, str]]]:
    """One prediction of each run and case; of several, the first."""
    kept: dict[tuple[Run, str], Found] = {}
    problems = []
    for each in found:
        first = kept.setdefault((each.run, each.case), each)
        if first is not each:
            problems.append((str(each.path), f"left out: {first.path} is of the same run and case"))
    return list(kept.values()), problems


def _judge(found: Found, source: Files, measures: Measures) -> Judged:
    try:
        case = source.load_labels(found.case)
        prediction = _read(found, source)
        scores, lesions = judge(found.run, prediction, case, source.classes, measures)
        return Judged(scores, lesions, "")
    except Exception as error:  # whatever it is, the other files are read
        return Judged([], [], " ".join(str(error).split()) or type(error).__name__)


def _read(found: Found, source: Files) -> np.ndarray:
    """The prediction, as indices into the classes."""
    prediction = read_label_map(found.path)
    check_same_grid(prediction, read_label_map(source.references[found.case]), affine=False)
    known = {number for each in source.labels for number in each}
    strange = labels_in(prediction.voxels) - known
    if strange:
        raise Mismatch(f"it holds label {min(strange)}, which is no class")
    return source.indices(prediction.voxels)


def _killed(why: str) -> Judged:
    return Judged([], [], why)


def _pictures(study: Study, results: Mapping[Found, Judged], source: Files) -> list[Picture]:
    """The best and the worst case of each loss by its mean Dice, where it was measured."""
    pictures = []
    for loss in study.losses:
        means = {
            each: float(np.nanmean(values))
            for each, judged in results.items()
            if each.run.loss == loss
            and not np.isnan(values := [s.value for s in judged.scores if s.metric == "dice"]).all()
        }
        if not means:
            continue
        ends = {"worst": min(means, key=lambda e: means[e])}
        if len(means) > 1:
            ends["best"] = max(means, key=lambda e: means[e])
        for words, each in ends.items():
            case = source.load(each.case)
            pictures.append(picture(loss, words, case, _read(each, source)))
    return pictures
