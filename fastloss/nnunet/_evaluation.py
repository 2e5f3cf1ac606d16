"""nnU-Net's evaluation of a folder, with distances between surfaces."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastloss.evaluation.files import Case, read_label_map
from fastloss.evaluation.run import cores, evaluate_in_processes
from fastloss.metrics import overlap, surface
from fastloss.metrics.evaluate import check_tolerance
from fastloss.metrics.inputs import read_pair
from fastloss.options import check_choice

PROCESSES = "nnUNet_def_n_proc"
LabelOrRegion = int | tuple[int, ...]


def compute_metrics_on_folder(
    folder_ref: str,
    folder_pred: str,
    output_file: str | None,
    image_reader_writer: Any,
    file_ending: str,
    regions_or_labels: Sequence[LabelOrRegion],
    ignore_label: int | None = None,
    num_processes: int | None = None,
    chill: bool = True,
    *,
    definition: str = "deepmind",
    tolerance: Any = 1.0,
) -> dict[str, Any]:
    """nnU-Net's ``compute_metrics_on_folder``, with HD95, ASSD and NSD beside Dice and IoU.

    The result and the file have the form of nnU-Net's: ``metric_per_case``, ``mean`` and
    ``foreground_mean``, where every label or region has Dice, IoU, TP, FP, FN, TN, n_pred and
    n_ref, and here HD95, ASSD and NSD. Means over cases leave NaN out, which is the value where
    both masks are empty; where one is, HD95 and ASSD are infinite and NSD is 0.

    Args:
        folder_ref: the folder of references, by the same names.
        folder_pred: the folder of predictions. Each of its files is evaluated.
        output_file: a JSON file to write, or None.
        image_reader_writer: a reader of nnU-Net, such as ``SimpleITKIO()``; None: nibabel, or
            SimpleITK if that is missing.
        file_ending: of the files, such as ".nii.gz".
        regions_or_labels: labels, and tuples of labels that are united.
        ignore_label: where the reference has it, voxels count for nothing.
        num_processes: how many processes; None: ``nnUNet_def_n_proc`` or 8, as nnU-Net has it, but
            no more than cores.
        chill: False: every reference needs a prediction.
        definition: of surfaces and distances; see `fastloss.metrics.surface`.
        tolerance: of NSD, in mm: one number, or one for each label or region.

    Raises:
        ValueError: an ``output_file`` that is not JSON, no file, a missing prediction unless
            ``chill``, an unknown definition; a missing reference, arrays that do not fit, labels
            that are negative or no integers (which nnU-Net takes for background).
    """
    if output_file is not None and not str(output_file).endswith(".json"):
        raise ValueError(f"output_file: expected a name that ends in .json, got {output_file!r}")
    check_choice("definition", definition, surface.DEFINITIONS)
    regions = [each if isinstance(each, tuple) else int(each) for each in regions_or_labels]
    if not regions:
        raise ValueError("regions_or_labels: expected at least one, got none")
    check_tolerance(tolerance, list(map(str, regions)))
    references, predictions = Path(folder_ref), Path(folder_pred)
    names = _files(predictions, file_ending)
    if not names:
        raise ValueError(f"folder_pred: no file that ends in {file_ending!r} in {folder_pred!r}")
    if not chill:
        missing = sorted(set(_files(references, file_ending)) - set(names))
        if missing:
            raise ValueError(f"folder_pred: no prediction for {', '.join(missing)}")
    absent = [name for name in names if not (references / name).is_file()]
    if absent:
        raise ValueError(f"folder_ref: no reference for {', '.join(absent)}")
    if num_processes is None:
        num_processes = min(int(os.environ.get(PROCESSES, "8")), cores())
    work = partial(
        _one,
        reader=image_reader_writer,
        regions=regions,
        ignore_label=ignore_label,
        definition=definition,
        tolerance=tolerance,
    )
    # Joined as nnU-Net joins them: the paths stand in the result.
    cases = [
        Case(name, Path(os.path.join(folder_pred, name)), Path(os.path.join(folder_ref, name)))
        for name in names
    ]
    found = dict(evaluate_in_processes(work, cases, num_processes, _killed))
    results = [found[case] for case in cases]
    result = {"metric_per_case": results, **_means(results, regions)}
    if output_file is not None:
        _save(result, Path(output_file))
    return result


def _files(folder: Path, ending: str) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.is_file() and
                  each.name.endswith(ending))  # fmt: skip


def _killed(why: str) -> Any:
    raise RuntimeError(why)


def _one(
    case: Case,
    reader: Any,
    regions: list[LabelOrRegion],
    ignore_label: int | None,
    definition: str,
    tolerance: Any,
) -> dict[str, Any]:
    prediction, _ = _read(case.prediction, reader)
    reference, spacing = _read(case.reference, reader)
    try:
        pair = read_pair(
            prediction[None],
            reference[None],
            classes={str(each): each for each in regions},
            activation="labels",
            ignore_index=ignore_label,
            spacing=spacing,
        )
    except ValueError as error:
        raise ValueError(f"{case.prediction}, {case.reference}: {error}") from None
    tolerances = check_tolerance(tolerance, pair.classes)
    counts, distances = overlap.count(pair)[0], surface.measure(pair, definition)[0]
    metrics = {}
    for region, c, d, near in zip(regions, counts, distances, tolerances, strict=True):
        predicted, true = c.tp + c.fp, c.tp + c.fn
        measured = {
            "HD95": d.hausdorff(95),
            "ASSD": d.average_symmetric(),
            "NSD": d.surface_dice(near),
        }
        if not (predicted and true):
            both = not (predicted or true)
            measured = {
                "HD95": np.nan if both else np.inf,
                "ASSD": np.nan if both else np.inf,
                "NSD": np.nan if both else 0.0,
            }
        wrong = c.fp + c.fn
        metrics[region] = {
            "Dice": 2 * c.tp / (2 * c.tp + wrong) if c.tp + wrong else np.nan,
            "IoU": c.tp / (c.tp + wrong) if c.tp + wrong else np.nan,
            "FP": c.fp,
            "TP": c.tp,
            "FN": c.fn,
            "TN": c.tn,
            "n_pred": predicted,
            "n_ref": true,
            **measured,
        }
    return {
        "reference_file": str(case.reference),
        "prediction_file": str(case.prediction),
        "metrics": metrics,
    }


def _read(path: Path, reader: Any) -> tuple[np.ndarray, tuple[float, ...]]:
    """Voxels of two or three axes, and their spacing."""
    if reader is None:
        found = read_label_map(path)
        return found.voxels, found.spacing
    voxels, properties = reader.read_seg(str(path))
    spacing = tuple(float(each) for each in properties["spacing"])
    voxels = np.asarray(voxels)[0]
    if voxels.ndim == 3 and voxels.shape[0] == 1:
        # A picture, which nnU-Net gives a third axis: it is measured in its plane.
        return voxels[0], spacing[-2:]
    return voxels, spacing


def _means(results: list[dict[str, Any]], regions: list[LabelOrRegion]) -> dict[str, Any]:
    names = list(results[0]["metrics"][regions[0]])
    mean: dict[LabelOrRegion, dict[str, float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaN; inf − inf
        for region in regions:
            values = [each["metrics"][region] for each in results]
            mean[region] = {
                name: float(np.nanmean([value[name] for value in values])) for name in names
            }
        foreground = [each for region, each in mean.items() if region != 0]
        overall = {name: float(np.mean([each[name] for each in foreground])) for name in names}
    return {"mean": mean, "foreground_mean": overall}


def _save(result: dict[str, Any], path: Path) -> None:
    """As nnU-Net writes it: keys as text, sorted; NaN as Python's JSON has it."""
    text = {
        "foreground_mean": result["foreground_mean"],
        "mean": _text_keys(result["mean"]),
        "metric_per_case": [
            {**each, "metrics": _text_keys(each["metrics"])} for each in result["metric_per_case"]
        ],
    }
    path.write_text(json.dumps(text, sort_keys=True, indent=4), encoding="utf-8")


def _text_keys(by_region: dict[LabelOrRegion, Any]) -> dict[str, Any]:
    return {str(region): each for region, each in by_region.items()}
