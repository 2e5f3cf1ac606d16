"""``python -m fastloss evaluate``: which files are compared, what is printed and written."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import need

import fastloss as fl
from fastloss.cli import main
from fastloss.evaluation import files
from fastloss.evaluation.files import Case
from fastloss.evaluation.overlay import overlay
from fastloss.evaluation.plots import box_of, ticks_of
from fastloss.evaluation.png import png
from fastloss.evaluation.run import evaluate_in_processes

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
SHAPE = (7, 6, 5)  # x, y, z
METRICS = ("--metrics", "dice,hd95,nsd", "--definition", "monai")


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel = need("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def body(label: int, *, shift: int = 0, size: int = 3) -> np.ndarray:
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[1 + shift : 1 + shift + size, 1 : 1 + size, 1 : 1 + size] = label
    return voxels


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two cases: one shifted by a voxel along x, of 1 mm; one where label 2 is missed."""
    references, predictions = tmp_path / "references", tmp_path / "predictions"
    save(references / "shifted.nii.gz", body(1))
    save(predictions / "shifted.nii.gz", body(1, shift=1))
    both = body(1)
    both[6, 5, 4] = 2
    save(references / "missed.nii", both)
    save(predictions / "missed.nii.gz", body(1))
    return predictions, references


class Run:
    """A run of the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: Any) -> None:
        try:
            self.status: Any = main(["evaluate", *map(str, arguments)])
        except SystemExit as stop:
            self.status = stop.code
        self.out, self.err = capsys.readouterr()

    def row(self, metric: str, label: str) -> list[str]:
        """Cells of a line of the printed table."""
        block = next(b for b in self.out.split("\n\n") if b.startswith(f"{metric} "))
        return next(x for x in block.splitlines() if x.startswith(f"{label} ")).split()[1:]


def test_table_and_values(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: 18 of 27 voxels are shared, and the shift is 1 mm."""
    written = {name: tmp_path / f"results.{name}" for name in ("csv", "json")}
    options = [part for name, path in written.items() for part in (f"--{name}", path)]
    run = Run(capsys, *folders, *METRICS, "--jobs", 1, *options)
    assert run.status == 0, run.err
    # mean, std, median, n, infinite, NaN
    assert run.row("dice", "1") == ["0.8333", "0.2357", "0.8333", "2", "0", "0"]
    assert run.row("hd95", "1") == ["0.5000", "0.7071", "0.5000", "2", "0", "0"]
    assert run.row("hd95", "2") == ["–", "–", "inf", "0", "1", "1"]
    assert run.row("nsd", "2") == ["0.0000", "–", "0.0000", "1", "0", "1"]
    assert run.row("dice", "mean of classes")[-3:] == ["3", "0", "1"]
    with written["csv"].open(newline="") as file:
        rows = {(row["sample"], row["class"]): row for row in csv.DictReader(file)}
    assert float(rows["shifted", "1"]["dice"]) == pytest.approx(2 / 3)
    assert float(rows["missed", "2"]["hd95"]) == float("inf")
    assert np.isnan(float(rows["shifted", "2"]["dice"]))
    # Strict JSON: no NaN, no Infinity but as text.
    report = json.loads(written["json"].read_text(), parse_constant=pytest.fail)
    cases = {case["name"]: case for case in report["cases"]}
    assert cases["shifted"]["spacing"] == [3, 2, 1]
    assert cases["shifted"]["metrics"]["2"]["dice"] is None
    assert cases["missed"]["metrics"]["2"]["hd95"] == "Infinity"
    assert report["summary"]["dice"]["1"]["mean"] == pytest.approx(5 / 6)
    assert report["definition"] == "monai"
    assert report["problems"] == []


def test_values_are_those_of_the_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two files, in every family, with the spacing in the order of the axes."""
    rng = np.random.default_rng(0)
    volumes = [rng.integers(0, 3, (4, 3, 2)).repeat(3, 0).repeat(2, 1).repeat(2, 2).astype(np.int16)
               for _ in range(2)]  # fmt: skip
    paths = [save(tmp_path / f"{i}.nii.gz", volume) for i, volume in enumerate(volumes)]
    written = tmp_path / "found.json"
    run = Run(capsys, *paths, "--tolerance", 2.5, "--metrics", "iou,hd90,assd,nsd", "--json",
              written, "--include-background")  # fmt: skip
    assert run.status == 0, run.err
    expected = fl.metrics.evaluate(
        *(volume[None] for volume in volumes),
        metrics=("iou", "hd90", "assd", "nsd"),
        spacing=(1, 2, 3),
        tolerance=2.5,
        include_background=True,
    )
    (case,) = json.loads(written.read_text())["cases"]
    assert list(case["metrics"]) == ["0", "1", "2"]
    for k, values in enumerate(case["metrics"].values()):
        for name, value in values.items():
            assert value == pytest.approx(expected[name][0, k], rel=1e-6)


def test_what_is_wrong_with_a_file_is_a_line_and_the_rest_goes_on(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions, references = folders
    wrong: dict[str, tuple[Any, Any, str]] = {
        # prediction, reference, the line
        "absent": (None, body(1), "no prediction"),
        "extra": (body(1), None, "no reference"),
        "shape": (body(1)[1:], body(1), r"prediction has shape \(6, 6, 5\), the reference \(7, 6"),
        "fraction": (body(1) * np.float32(0.5), body(1), "expected labels, but it holds 0.5"),
        "negative": (body(1).astype(np.int16) * -1, body(1), "at least 0, but it holds -1"),
    }
    affines = {
        "spacing": (np.diag([1, 2, 4, 1]), "spacing 1×2×4 mm, the reference 1×2×3 mm"),
        "flipped": (np.diag([-1, 2, 3, 1]), "axes LAS, the reference RAS"),
        "moved": (AFFINE + np.eye(4, k=3) * 5, "up to 5 mm from the reference"),
    }
    for name, (prediction, reference, _) in wrong.items():
        if prediction is not None:
            save(predictions / f"{name}.nii.gz", prediction)
        if reference is not None:
            save(references / f"{name}.nii.gz", reference)
    for name, (affine, _) in affines.items():
        save(predictions / f"{name}.nii.gz", body(1), affine)
        save(references / f"{name}.nii.gz", body(1))
    save(references / "broken.nii.gz", body(1))
    (predictions / "broken.nii.gz").write_bytes(b"no file of anything")
    lines = {name: line for name, (*_, line) in wrong.items()}
    lines |= {name: line for name, (_, line) in affines.items()} | {"broken": "cannot be read"}
    written = tmp_path / "found.json"
    run = Run(capsys, predictions, references, "--metrics", "dice", "--jobs", 1, "--json", written)
    assert run.status == 1
    for text in (run.out, run.err):
        for name, line in lines.items():
            assert re.search(rf"^ *{name}: .*{line}", text, re.M), (name, text)
    report = json.loads(written.read_text())
    assert [case["name"] for case in report["cases"]] == ["missed", "shifted"]
    assert {each["name"] for each in report["problems"]} == set(lines)
    # By index, whatever the headers say of the place; spacing still counts.
    run = Run(capsys, predictions, references, "--metrics", "dice", "--jobs", 1, "--ignore-affine")
    assert "moved" not in run.err
    assert "flipped" not in run.err
    assert "spacing: the prediction has spacing" in run.err


def test_two_jobs_find_the_same(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for jobs in (1, 2):
        written = tmp_path / f"{jobs}.json"
        run = Run(capsys, *folders, *METRICS, "--jobs", jobs, "--json", written)
        assert run.status == 0, run.err
        assert "2/2" in run.err
        results.append(json.loads(written.read_text()))
    assert results[0]["cases"] == results[1]["cases"]


def test_a_process_that_is_killed_costs_its_case_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killing.py").write_text(
        "import os\ndef work(case):\n    os._exit(9) if case.name == 'kill' else None\n"
        "    return case.name\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("killing").work
    cases = [Case(name, Path(), Path()) for name in ("a", "kill", "b", "c")]
    found = evaluate_in_processes(work, cases, 2, lambda why: why)
    results = {case.name: result for case, result in found}
    assert "for lack of memory: try fewer jobs" in results.pop("kill")
    assert results == {"a": "a", "b": "b", "c": "c"}


DATASET = {"background": 0, "liver": 1, "either": [1, 2], "ignore": 3}


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ([], "1 2"),
        (["--classes", "3"], "1 2"),
        (["--classes", "background,liver,spot"], "liver spot"),
        (["--classes", "a,b,c", "--include-background"], "a b c"),
        (["--regions", "either=1,2"], "either"),
        (["--classes", "3", "--regions", "either=1,2", "far=7"], "1 2 either far"),
        (["--classes", "dataset.json"], "liver either"),
        (["--classes", "decathlon.json"], "liver spot"),
    ],
)
def test_classes(
    options: list[str],
    classes: str,
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decathlon = {"0": "background", "1": "liver", "2": "spot"}
    for name, labels in (("dataset", DATASET), ("decathlon", decathlon)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"labels": labels}))
    options = [str(tmp_path / each) if each.endswith(".json") else each for each in options]
    written = tmp_path / "found.json"
    run = Run(capsys, *folders, "--metrics", "dice", "--jobs", 1, "--json", written, *options)
    assert run.status == 0, run.err
    report = json.loads(written.read_text())
    assert " ".join(report["classes"]) == classes
    missed = next(case for case in report["cases"] if case["name"] == "missed")["metrics"]
    if "either" in classes:
        assert missed["either"]["dice"] == pytest.approx(2 * 27 / (27 + 28))


def test_ignored_label_counts_for_nothing(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "found.json"
    Run(capsys, *folders, "--metrics", "dice", "--jobs", 1, "--ignore-index", 2, "--classes", 2,
        "--json", written)  # fmt: skip
    report = json.loads(written.read_text())
    assert report["summary"]["dice"]["1"]["n"] == 2
    # Without it, label 2 is none of the two classes.
    run = Run(capsys, *folders, "--metrics", "dice", "--jobs", 1, "--classes", 2)
    assert run.status == 1
    assert "missed: the reference holds label 2, expected labels in [0, 2)" in run.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "6,7"], "--classes: expected a number, names as"),
        (["--classes", "1"], "--classes: expected at least 2"),
        (["--classes", "none.json"], "--classes: .*none.json"),
        (["--regions", "WT"], "--regions: expected NAME=LABELS, as WT=1,2,3, got 'WT'"),
        (["--classes", "2", "--regions", "1=1"], "the class '1' has this name already"),
        (["--metrics", "dicee"], "metrics: expected names among .* got 'dicee'"),
        (["--tolerance", "a"], "--tolerance: expected a number"),
        (["--tolerance", "-1"], "tolerance: expected numbers of at least 0"),
        (["--tolerance", "1=2"], "tolerance: one for each class needs the classes"),
        (["--tolerance", "1=2", "--classes", "3"], r"tolerance: .* \['2'\] have none"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--csv", "no/such/folder/x.csv"], "--csv: expected a file in a folder there is"),
        (["--images", "no/such"], "--images: no such folder"),
    ],
)
def test_wrong_arguments_end_before_anything_is_read(
    options: list[str],
    message: str,
    folders: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(capsys, *folders, *options)
    assert run.status == 2
    assert re.search(message, " ".join(run.err.split())), run.err
    assert not run.out


def test_paths_that_fit_nothing(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions, references = folders
    (tmp_path / "empty").mkdir()
    for pair, message in [
        ((tmp_path / "nowhere", references), "PREDICTIONS: no such file or folder"),
        ((predictions, references / "shifted.nii.gz"), "expected two files or two folders"),
        ((predictions, tmp_path / "empty"), "REFERENCES: no NIfTI file in"),
    ]:
        run = Run(capsys, *pair)
        assert run.status == 2
        assert message in run.err
    # Nothing could be evaluated.
    save(tmp_path / "other.nii.gz", body(1)[1:])
    run = Run(capsys, tmp_path / "other.nii.gz", references / "shifted.nii.gz")
    assert run.status == 1
    assert "no case could be evaluated" in run.err
    # Files without a label agree in nothing.
    empty = save(tmp_path / "nothing.nii.gz", body(0))
    run = Run(capsys, empty, empty)
    assert run.status == 1
    assert "no file holds a label but the background's" in run.err


def test_without_nibabel_simpleitk_reads_the_same(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("SimpleITK")
    oblique = np.array([[0, -2, 0, 5], [1, 0, 0.0, -7], [0, 0, 3, 9], [0, 0, 0, 1.0]])
    path = save(folders[0] / "oblique.nii.gz", np.arange(210).reshape(SHAPE).astype(np.int16),
                oblique)  # fmt: skip
    by_nibabel = files.read_label_map(path)
    find_spec = files.find_spec
    monkeypatch.setattr(files, "find_spec", lambda n: None if n == "nibabel" else find_spec(n))
    by_simpleitk = files.read_label_map(path)
    np.testing.assert_array_equal(by_nibabel.voxels, by_simpleitk.voxels)
    np.testing.assert_allclose(by_nibabel.affine, by_simpleitk.affine, atol=1e-5)
    np.testing.assert_allclose(by_nibabel.spacing, by_simpleitk.spacing, rtol=1e-6)
    monkeypatch.setattr(files, "find_spec", lambda n: None)
    with pytest.raises(ImportError, match=r"fastloss\[evaluate\]"):
        files.read_label_map(path)


def test_a_single_slice_is_measured_in_its_plane(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its faces, up and down, are no surface."""
    square = np.zeros((8, 8, 1), np.uint8)
    square[1:5, 1:5] = 1
    paths = [save(tmp_path / "a.nii", np.roll(square, 2, 1)), save(tmp_path / "b.nii", square)]
    written = tmp_path / "found.json"
    Run(capsys, *paths, "--metrics", "hausdorff", "--json", written)
    (case,) = json.loads(written.read_text())["cases"]
    assert case["spacing"] == [2, 1]
    assert case["metrics"]["1"]["hausdorff"] == pytest.approx(4)


# ---------------------------------------------------------------------- the page


def test_png_is_read_by_others() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    found = png(pixels)
    assert struct.unpack(">II", found[16:24]) == (7, 5)
    start = found.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", found[start - 8 : start - 4])
    rows = np.frombuffer(zlib.decompress(found[start : start + length]), np.uint8).reshape(5, 22)
    np.testing.assert_array_equal(rows[:, 1:].reshape(5, 7, 3), pixels)
    image = need("matplotlib.image")
    np.testing.assert_allclose(image.imread(io.BytesIO(found))[..., :3], pixels / 255, atol=1e-6)
    with pytest.raises(ValueError, match="pixels: expected"):
        png(pixels[..., 0])


def test_overlay_shows_the_voxel_that_is_farthest_wrong(tmp_path: Path) -> None:
    """In slices through it, as a radiologist sees them: whatever the order of the file's axes."""
    reference, prediction = body(1), body(1)
    prediction[6, 5, 4] = 1  # right, anterior, superior
    case = Case("case", save(tmp_path / "p.nii", prediction), save(tmp_path / "r.nii", reference))
    axial, coronal, sagittal = overlay(case, (1,)).pictures
    assert [each.view for each in (axial, coronal, sagittal)] == ["axial", "coronal", "sagittal"]
    orange = [np.argwhere((each.pixels == (255, 140, 0)).all(axis=2)) for each in (axial, coronal)]
    for found, picture in zip(orange, (axial, coronal), strict=True):
        # The patient's right, and the front or the top: top left.
        h, w, _ = picture.pixels.shape
        assert len(found)
        assert found[:, 0].max() < h / 2
        assert found[:, 1].max() < w / 2
    # By 3 voxels of 1 mm, 2 of 2 mm and one of 3 mm.
    assert overlay(case, (1,)).caption == f"too much by up to {34**0.5:.3g} mm"
    # The same anatomy in a file with other axes gives the same pictures.
    swapped = np.array([[0, 0, -1, 6], [0, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1.0]])
    paths = [save(tmp_path / f"{name}2.nii", volume.transpose(2, 1, 0)[..., ::-1].copy(), swapped)
             for name, volume in (("p", prediction), ("r", reference))]  # fmt: skip
    again = overlay(Case("again", *paths), (1,)).pictures
    for one, other in zip((axial, coronal, sagittal), again, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)


def test_box_plots_by_hand() -> None:
    values = np.array([1.0, 2, 3, 4, 100, np.nan, np.inf])
    box = box_of(values)
    assert box is not None
    assert box[:5] == (1, 2, 3, 4, 4)
    assert box.points == (0, 1, 2, 3, 4)
    assert box_of(np.array([np.nan, np.inf])) is None
    assert ticks_of(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    ticks = ticks_of(-3.0, 47.9)
    assert ticks[0] <= -3
    assert ticks[-1] >= 47.9


@pytest.fixture
def page(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A page with an image for one of the cases, and names that must be escaped."""
    save(tmp_path / "images" / "shifted_0000.nii.gz", np.arange(210.0).reshape(SHAPE))
    save(folders[0] / "a<b>.nii.gz", body(1))
    written = tmp_path / "page.html"
    run = Run(capsys, *folders, *METRICS, "--jobs", 1, "--html", written, "--images",
              tmp_path / "images", "--regions", "<both>=1,2", "spot=2")  # fmt: skip
    assert run.status == 1
    return written


def test_page_stands_alone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "<script" not in text
    assert "url(" not in text
    assert "<both>" not in text
    assert "<b>a&lt;b&gt;</b>: no reference" in text
    assert text.count("<svg") == 3
    assert text.count("data:image/png;base64,") == 2 * 3
    for fact in ("monai", "1 mm", "3 × 2 × 1 mm", fl.__version__, "--regions", "1 inf",
                 "no image: there is none", "prefers-color-scheme"):  # fmt: skip
        assert fact in text


def test_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    """Headless Chromium renders it without an error in the console."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("chromium: not installed")
    result = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "CONSOLE" not in result.stderr
    assert "Evaluation: 2 cases, 2 classes" in result.stdout
    assert "Worst cases" in result.stdout
    shot = tmp_path / "page.png"
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,2600",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    pixels = np.rint(255 * need("matplotlib.image").imread(shot)[..., :3])
    for colour in ((0, 200, 255), (255, 140, 0), (11, 114, 133)):  # contours, boxes
        assert (np.abs(pixels - colour).max(axis=2) <= 2).sum() > 100
