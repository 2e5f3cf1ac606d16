"""`fastloss.nnunet.compute_metrics_on_folder`: nnU-Net's results and file, and distances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import need

import fastloss as fl

LABELS = [1, 2, (1, 2), (2, 3)]
KEYS = ("Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref")


@pytest.fixture(scope="module")
def ours() -> Any:
    need("torch")
    need("nibabel")
    return need("fastloss.nnunet").compute_metrics_on_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """References and predictions; the last case has an empty class, and one reference is unused."""
    nibabel = need("nibabel")
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("nnunet")
    made = folder / "references", folder / "predictions"
    for i in range(4):
        reference = rng.integers(0, 2, (3, 2, 2)).repeat(3, 0).repeat(3, 1).repeat(2, 2)
        reference = (reference * rng.integers(1, 4, reference.shape)).astype(np.uint8)
        prediction = np.where(rng.random(reference.shape) < 0.2, 1, reference).astype(np.uint8)
        if i == 2:
            reference[reference == 2] = 0
            prediction[prediction == 2] = 0
        reference[0] = 4  # ignored
        for role, voxels in zip(made, (reference, prediction), strict=True):
            role.mkdir(exist_ok=True)
            if i < 3 or role.name == "references":
                image = nibabel.Nifti1Image(voxels, np.diag([1, 2, 3, 1]))
                nibabel.save(image, role / f"case_{i}.nii.gz")
    return made


def test_results_and_file_are_those_of_nnunet(
    ours: Any, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    theirs = need("nnunetv2.evaluation.evaluate_predictions")
    reader = need("nnunetv2.imageio.nibabel_reader_writer").NibabelIO()
    places = [str(folder) for folder in folders]
    files = [str(tmp_path / name) for name in ("theirs.json", "ours.json")]
    expected = theirs.compute_metrics_on_folder(
        *places, files[0], reader, ".nii.gz", LABELS, 4, num_processes=1
    )
    found = ours(*places, files[1], reader, ".nii.gz", LABELS, 4, num_processes=1)
    assert list(found) == list(expected)
    for case, other in zip(found["metric_per_case"], expected["metric_per_case"], strict=True):
        assert case["reference_file"] == other["reference_file"]
        assert case["prediction_file"] == other["prediction_file"]
        _assert_agree(case["metrics"], other["metrics"])
    _assert_agree(found["mean"], expected["mean"])
    _assert_agree({0: found["foreground_mean"]}, {0: expected["foreground_mean"]})
    # nnU-Net reads our file as its own.
    read = theirs.load_summary_json(files[1])
    _assert_agree(read["mean"], theirs.load_summary_json(files[0])["mean"])
    assert list(json.loads(Path(files[1]).read_text())) == list(
        json.loads(Path(files[0]).read_text())
    )


def _assert_agree(found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    assert list(found) == list(expected)
    for region, values in expected.items():
        assert set(values) == set(KEYS)
        for name, value in values.items():
            np.testing.assert_allclose(found[region][name], value, rtol=1e-12)


def test_distances_are_those_of_the_metrics(ours: Any, folders: tuple[Path, Path]) -> None:
    """In the spacing of the files, by the definition asked for, without a reader of nnU-Net."""
    nibabel = need("nibabel")
    places = [str(folder) for folder in folders]
    found = ours(
        *places, None, None, ".nii.gz", LABELS, 4, num_processes=1, definition="monai", tolerance=2
    )
    volumes = [np.asarray(nibabel.load(folder / "case_0.nii.gz").dataobj) for folder in folders]
    scores = fl.metrics.evaluate(
        volumes[1][None],
        volumes[0][None],
        metrics=("hd95", "assd", "nsd"),
        classes={str(label): label for label in LABELS},
        ignore_index=4,
        spacing=(1, 2, 3),
        definition="monai",
        tolerance=2,
    )
    for k, label in enumerate(LABELS):
        case = found["metric_per_case"][0]["metrics"][label]
        for key, name in (("HD95", "hd95"), ("ASSD", "assd"), ("NSD", "nsd")):
            assert case[key] == pytest.approx(scores[name][0, k], rel=1e-6)
    empty = found["metric_per_case"][2]["metrics"][2]
    assert all(np.isnan(empty[key]) for key in ("HD95", "ASSD", "NSD", "Dice", "IoU"))


def test_bad_input(ours: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    references, predictions = (str(folder) for folder in folders)
    with pytest.raises(ValueError, match=r"output_file: .*\.json"):
        ours(references, predictions, "out.txt", None, ".nii.gz", [1])
    with pytest.raises(ValueError, match=r"folder_pred: no prediction for case_3\.nii\.gz"):
        ours(references, predictions, None, None, ".nii.gz", [1], chill=False)
    with pytest.raises(ValueError, match=r"folder_ref: no reference for case_3\.nii\.gz"):
        ours(predictions, references, None, None, ".nii.gz", [1])
    with pytest.raises(ValueError, match="folder_pred: no file"):
        ours(references, str(tmp_path), None, None, ".nii.gz", [1])
    with pytest.raises(ValueError, match="definition: expected"):
        ours(references, predictions, None, None, ".nii.gz", [1], definition="mine")
