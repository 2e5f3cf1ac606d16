"""``python -m fastloss explain``: what is read, printed and written."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import need

import fastloss as fl
from fastloss.cli import main

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
SHAPE = (5, 6, 7)  # z, y, x


class Run:
    """A run of the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: Any) -> None:
        try:
            self.status: Any = main(["explain", *map(str, arguments)])
        except SystemExit as stop:
            self.status = stop.code
        self.out, self.err = capsys.readouterr()
        self.rows = [line.split() for line in self.out.splitlines()]


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, Path]:
    """A box that is predicted but for a corner of 2 voxels, and one voxel too much."""
    nibabel = need("nibabel")
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:4, 1:4, 1:4] = 1
    predicted = labels.copy()
    predicted[3, 3, 2:4] = 0
    predicted[4, 4, 4] = 1  # which touches the corner
    sure = np.where(predicted == 1, 2.0, -2.0)
    sure[3, 3, 3] = -5
    np.save(tmp_path / "logits.npy", np.stack([-sure, sure]).astype(np.float32))
    nibabel.save(nibabel.Nifti1Image(labels.T, AFFINE), tmp_path / "labels.nii.gz")
    np.save(tmp_path / "labels.npy", labels)
    return tmp_path / "logits.npy", tmp_path / "labels.nii.gz"


def test_parts_and_regions(
    case: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nibabel = need("nibabel")
    run = Run(capsys, *case, "--loss", "Dice+0.5*CrossEntropy", "--out", tmp_path / "out")
    assert run.status == 0, run.err
    logits, labels = np.load(case[0])[None], np.load(tmp_path / "labels.npy")[None]
    loss = fl.Dice() + 0.5 * fl.CrossEntropy()
    wanted = loss.explain(logits, labels)
    assert repr(wanted) in run.out
    # Two voxels missed, of 6 mm³ each, and one too much, in the axes of the file.
    missed, extra = wanted.map[0, 3, 3, 2:4].sum(), wanted.map[0, 4, 4, 4]
    share = 100 / wanted.map.sum()
    assert run.rows[-2] == ["1", "0", "2", "12", "(3,", "3,", "3)", f"{missed:.4g}",
                            f"{missed * share:.3g}", "%"]  # fmt: skip
    assert run.rows[-1] == ["0", "1", "1", "6", "(4,", "4,", "4)", f"{extra:.4g}",
                            f"{extra * share:.3g}", "%"]  # fmt: skip
    folder = tmp_path / "out"
    image = nibabel.load(folder / "map.nii.gz")
    np.testing.assert_array_equal(image.affine, AFFINE)
    np.testing.assert_allclose(image.get_fdata().T, wanted.map[0], 1e-6)
    dice = nibabel.load(folder / "map_Dice.nii.gz").get_fdata().T
    np.testing.assert_allclose(dice, wanted.maps["Dice"][0], 1e-6)
    assert (folder / "parts.csv").read_text() == wanted.to_csv()
    with (folder / "regions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["x"], row["y"], row["z"]) for row in rows] == [("3", "3", "3"), ("4", "4", "4")]
    assert float(rows[0]["cost"]) == pytest.approx(missed)
    # Exact gains, without a header, of the same arrays in a batch of one.
    exact = Run(capsys, case[0], tmp_path / "labels.npy", "--exact", "--worst", 1,
                "--out", tmp_path / "exact")  # fmt: skip
    assert len(exact.rows) == len(run.rows) - 1
    found = np.load(tmp_path / "exact" / "map_Dice.npy")
    np.testing.assert_allclose(found, fl.Dice().explain(logits, labels, exact=True).map, 1e-6)


def test_what_is_read(
    case: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Probabilities, masks that overlap, samples, ignored labels, losses of one's own."""
    logits, labels = np.load(case[0]), np.load(tmp_path / "labels.npy")
    p = np.exp(logits) / np.exp(logits).sum(axis=0)
    np.savez(tmp_path / "p.npz", probabilities=p, other=np.zeros(3))
    run = Run(capsys, tmp_path / "p.npz", case[1], "--activation", "none", "--loss", "dice")
    assert run.status == 0, run.err
    plain = float(fl.Dice()(logits[None], labels[None]))
    assert f"Loss {plain:.4f}" in run.out
    # Of channels that overlap, each has its regions.
    masks = np.stack([labels, labels])
    np.save(tmp_path / "masks.npy", masks)
    run = Run(capsys, case[0], tmp_path / "masks.npy", "--activation", "sigmoid", "--loss", "dice",
              "--worst", 99)  # fmt: skip
    assert run.status == 0, run.err
    sigmoid = fl.Loss(fl.Dice(), activation="sigmoid")
    assert repr(sigmoid.explain(logits[None], masks[None])) in run.out
    assert {tuple(row[:2]) for row in run.rows if "%" in row} >= {("1", "missed"), ("1", "too")}
    # Two samples, of which the second is all right but for what is ignored.
    away = np.where(logits.argmax(axis=0) == labels, labels, 255)
    np.save(tmp_path / "two.npy", np.stack([labels, away]))
    np.save(tmp_path / "twice.npy", np.stack([logits, logits]))
    run = Run(capsys, tmp_path / "twice.npy", tmp_path / "two.npy", "--ignore-index", 255)
    assert run.status == 0, run.err
    assert [row[0] for row in run.rows if "%" in row] == ["0", "0"]
    run = Run(capsys, case[0], tmp_path / "labels.npy", "--loss", "ce", "--ignore-index", 1)
    assert run.status == 0, run.err
    assert len([row for row in run.rows if "%" in row]) == 1
    (tmp_path / "ones_own.py").write_text(
        "import fastloss as fl\ndef made():\n    return 2 * fl.Dice(include_background=False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = Run(capsys, *case, "--loss", "ones_own:made")
    twice = 2 * float(fl.Dice(include_background=False)(logits[None], labels[None]))
    assert f"Loss {twice:.4f}" in run.out
    # A spacing for the distances that a loss measures.
    run = Run(capsys, *case, "--loss", "boundary", "--spacing", 3, 2, 1)
    boundary = float(fl.Boundary(spacing=(3, 2, 1))(logits[None], labels[None]))
    assert f"Loss {boundary:.4f}" in run.out
    sure = np.where(np.arange(2)[:, None, None, None] == labels, 9.0, -9.0)
    np.save(tmp_path / "right.npy", sure)
    assert "no voxel is wrong" in Run(capsys, tmp_path / "right.npy", case[1]).out


def test_wrong_arguments(
    case: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = np.load(case[0])
    np.save(tmp_path / "turned.npy", logits.transpose(0, 3, 2, 1))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "many.npz", a=logits, b=logits)
    (tmp_path / "no.nii.gz").write_bytes(b"nothing")
    np.save(tmp_path / "bad.npy", np.full(SHAPE, 7))
    np.save(tmp_path / "masks.npy", (logits > 0).astype(np.uint8))
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((*case, "--loss", "dise"), r"loss: expected a sum of names among .*got 'dise'"),
        ((*case, "--loss", "a*dice"), "loss: expected a sum of names"),
        ((*case, "--loss", "fastloss:nothing"), "loss: 'fastloss:nothing': .*no attribute"),
        ((*case, "--loss", "fastloss:__version__"), "loss: expected a loss, or a function.*str"),
        ((tmp_path / "turned.npy", case[1]), "TARGET: for logits of shape .* reversed"),
        ((tmp_path / "objects.npy", case[1]), "LOGITS: .*cannot be read"),
        ((tmp_path / "many.npz", case[1]), "LOGITS: .*expected one array, .*got a, b"),
        ((tmp_path / "nowhere.npy", case[1]), "LOGITS: .*cannot be read"),
        ((case[0], tmp_path / "no.nii.gz"), r"no\.nii\.gz: cannot be read"),
        ((case[0], tmp_path / "bad.npy"), "target: expected labels in .*the first is 7"),
        ((*case, "--image", tmp_path / "turned.npy"), "--image: expected shape"),
        ((*case, "--worst", "-1"), "--worst: expected at least 0, got -1"),
        ((*case, "--html", tmp_path / "no" / "x.html"), "--html: expected a file"),
        ((*case, "--out", tmp_path / "no" / "out"), "--out: expected a folder"),
        ((*case, "--loss", "boundary", "--spacing", 1, 2), "spacing: expected 3 numbers"),
        (
            (case[0], tmp_path / "masks.npy", "--loss", "blobloss", "--activation", "sigmoid"),
            "regions: of 2 channels",
        ),
    ]
    for arguments, message in wrong:
        run = Run(capsys, *arguments)
        assert run.status == 2, message
        assert re.search(message, " ".join(run.err.split())), run.err
        assert not run.out


def test_page(case: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stands alone, and a browser shows it without an error."""
    np.save(tmp_path / "image.npy", np.arange(210.0).reshape(SHAPE))
    written = tmp_path / "page.html"
    run = Run(capsys, *case, "--html", written, "--image", tmp_path / "image.npy",
              "--loss", "dice+ccdicece")  # fmt: skip
    assert run.status == 0, run.err
    text = written.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "<script" not in text
    assert text.count("data:image/png;base64,") == 2 * 3
    for fact in ("Lesions that cost most", "CCDiceCE<small>gain", "axial", "(3, 3, 3)"):
        assert fact in text
    # Arrays without a header have no patient; of one slice there is one picture.
    flat = [tmp_path / "flat.npy", tmp_path / "slice.npy"]
    np.save(flat[0], np.load(case[0])[:, 3])
    np.save(flat[1], np.load(tmp_path / "labels.npy")[3])
    assert Run(capsys, *flat, "--html", tmp_path / "flat.html").status == 0
    flat_text = (tmp_path / "flat.html").read_text(encoding="utf-8")
    assert flat_text.count("data:image/png;base64,") == 1
    assert "patient" not in flat_text
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("chromium: not installed")
    shot = tmp_path / "page.png"
    result = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         "--window-size=1000,2600", f"--user-data-dir={tmp_path / 'profile'}",
         f"--screenshot={shot}", written.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in result.stderr
    pixels = np.rint(255 * need("matplotlib.image").imread(shot)[..., :3])
    for colour in ((0, 200, 255), (255, 140, 0), (255, 60, 190)):
        assert (np.abs(pixels - colour).max(axis=2) <= 2).sum() > 100
