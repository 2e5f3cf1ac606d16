"""The examples run to the end, and their results match their page."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT, made_once, need

SCRIPT = ROOT / "examples" / "train_brain.py"
STEPS = 2


COARSE = """
from dataclasses import replace
import brain.volume as volume
def coarse(load=volume.load_brain):
    whole, every = load(), (slice(None, None, 3),) * 3
    slab = slice(whole.held_out.start // 3, whole.held_out.stop // 3)
    image, labels = whole.image[every].copy(), whole.labels[every].copy()
    return replace(whole, image=image, labels=labels, held_out=slab)
volume.load_brain = coarse
"""
"""The brain at a third of its resolution, a 27th of the work."""


def train_brain(
    *arguments: str,
    absent: tuple[str, ...] = (),
    before: str = "",
    script: Path = SCRIPT,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run the script with some packages made unimportable, after some code, with these variables
    of the environment."""
    program = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name: None if name in {absent!r} else find(name)\n"
        f"sys.path.insert(0, {str(script.parent)!r})\n{before}"
        f"sys.argv = [{str(script)!r}, *{arguments!r}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program]
    if not absent and not before:
        command = [sys.executable, script, *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        # On shared cores, threads that wait for each other take many times as long.
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder and text of a few steps with each loss."""
    for package in ("torch", "monai", "nilearn", "nibabel", "matplotlib"):
        need(package)
    # In float64 rounding is negligible: any difference between the losses shows.
    options = ["--loss-impl", "both", "--dtype", "float64"]
    return _trained(tmp_path_factory, "example", *options)


@pytest.fixture(scope="module")
def run_boundary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same with the boundary loss, with fastloss alone."""
    for package in ("torch", "nilearn", "nibabel", "matplotlib"):
        need(package)
    return _trained(tmp_path_factory, "boundary", "--loss", "dice_ce_boundary")


def _trained(factory: pytest.TempPathFactory, name: str, *arguments: str) -> tuple[Path, str]:
    """The output folder and text of a few steps, made once for all workers."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / name / "not" / "there yet"

    def printed() -> str:
        options = [*arguments, "--steps", str(STEPS), "--patch", "16", "--out", str(out)]
        result = train_brain(*options, before=COARSE)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return out, made_once(shared, name, printed)


@pytest.fixture
def brain_modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a module of the example."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return lambda name: importlib.import_module(f"brain.{name}")


def test_same_curve(run: tuple[Path, str]) -> None:
    out, _ = run
    with (out / "curve.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = {
        name: [float(row["loss"]) for row in rows if row["implementation"] == name]
        for name in ("fastloss", "monai")
    }
    assert len(losses["fastloss"]) == STEPS
    assert len(set(losses["fastloss"])) == STEPS  # it learns, or at least moves
    # The first depends on the value alone, the second also on the gradient.
    np.testing.assert_allclose(losses["fastloss"], losses["monai"], rtol=1e-11)
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    expected = max(abs(a - b) / b for a, b in zip(losses["fastloss"], losses["monai"], strict=True))
    assert summary["difference"]["loss"] == pytest.approx(expected)


def test_progress_and_table(run: tuple[Path, str]) -> None:
    out, printed = run
    for name in ("fastloss", "monai"):
        for step in range(1, STEPS + 1):
            assert f"{name}  step {step}/{STEPS}  loss " in printed
    for row in ("step, median", "loss alone, forward + backward", "peak memory of a step"):
        assert f"\n{row} " in printed
    assert "The losses differ by at most" in printed
    assert str(out) in printed


def test_memory_of_the_loss(run: tuple[Path, str]) -> None:
    """It is less than MONAI's, and at least the gradient's: 4 patches of 3 classes in float64."""
    out, _ = run
    measured = json.loads((out / "summary.json").read_text("utf-8"))["implementations"]
    peaks = {name: one["loss_peak_bytes"] for name, one in measured.items()}
    if sys.platform != "linux" and None in peaks.values():
        pytest.skip("this system does not tell the peak of a process")
    assert 0.9 * 4 * 3 * 16**3 * 8 <= peaks["fastloss"] < peaks["monai"]


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("run", "curve.png"),
        ("run", "overlay.png"),
        ("run_boundary", "curve.png"),
        ("run_boundary", "distances.png"),
    ],
)
def test_pictures_show_something(request: pytest.FixtureRequest, fixture: str, name: str) -> None:
    out, _ = request.getfixturevalue(fixture)
    image = need("matplotlib.image").imread(out / name)[..., :3]
    assert min(image.shape[:2]) > 300
    assert len(np.unique(image[..., 0])) > 50
    coloured = np.ptp(image, axis=2) > 0.3
    assert coloured.mean() > 0.0005  # the curves are thin lines


def test_boundary_run(run: tuple[Path, str], run_boundary: tuple[Path, str]) -> None:
    out, printed = run_boundary
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert summary["loss"] == "dice_ce_boundary"
    for tissue, distance in summary["implementations"]["fastloss"]["held_out_hd95_mm"].items():
        line = next(x for x in printed.splitlines() if x.startswith(f"held-out HD95, {tissue} "))
        assert line.endswith(" none found" if distance is None else f" {distance:.2f} mm")
    assert "\nthese metrics, an evaluation " in printed
    assert "distances.png" in printed
    assert "distances.png" not in run[1]
    assert not (run[0] / "distances.png").exists()


@pytest.mark.parametrize("loss_name", ["dice_ce", "dice_ce_boundary"])
def test_both_implementations_are_one_loss(brain_modules: Any, loss_name: str) -> None:
    torch = need("torch")
    need("monai")
    make_loss = brain_modules("training").make_loss
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(2, 3, 8, 8, 8)), requires_grad=True)
    y = torch.tensor(rng.integers(0, 3, (2, 1, 8, 8, 8), dtype=np.uint8))
    found = []
    for implementation in ("fastloss", "monai"):
        value = make_loss(implementation, loss_name)(x, y, 0.3)
        found.append((value.detach(), *torch.autograd.grad(value, x)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-9)


def test_held_out_metrics(brain_modules: Any) -> None:
    """Of labels, by tissue in the order of the classes, and as DeepMind defines them."""
    need("torch")
    training = brain_modules("training")
    truth = np.zeros((12, 12, 12), np.uint8)
    truth[2:6, 2:6, 2:6] = 1
    truth[8:10, 8:10, 8:10] = 2
    predicted = np.where(truth == 1, truth, 0)
    scores = training.evaluate(predicted, truth)
    assert scores.classes == ("grey matter", "white matter")
    assert [float(scores[name][0, 0]) for name in ("dice", "hd95", "nsd")] == [1, 0, 1]
    assert [float(scores[name][0, 1]) for name in ("dice", "hd95", "nsd")] == [0, np.inf, 0]
    scores = training.evaluate(np.roll(truth, 2, 0), truth)
    assert scores["hd95"][0, 0] == 2  # mm
    assert scores.about["definition"] == "deepmind"


@pytest.mark.slow
def test_training_in_jax(tmp_path: Path) -> None:
    """A few steps write all that the page names; an absent package is named at once."""
    for package in ("jax", "optax", "nilearn", "nibabel", "matplotlib"):
        need(package)
    script = SCRIPT.with_name("train_jax.py")
    options = ["--steps", str(STEPS), "--patch", "16", "--out", str(tmp_path)]
    # Two steps are over sooner than XLA has optimised them.
    flags = "--xla_backend_optimization_level=0"
    result = train_brain(*options, script=script, before=COARSE, XLA_FLAGS=flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"step {STEPS}/{STEPS}  loss " in result.stdout
    with (tmp_path / "curve.csv").open(newline="", encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(set(losses)) == STEPS
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert all(0 <= dice <= 1 for dice in summary["held_out_dice"].values())
    for name in ("curve.png", "overlay.png"):
        image = need("matplotlib.image").imread(tmp_path / name)[..., :3]
        assert (np.ptp(image, axis=2) > 0.3).mean() > 0.0005
    result = train_brain(absent=("optax",), script=script)
    assert result.returncode == 2
    assert "package optax is not there: pip install" in result.stderr


@pytest.mark.slow
def test_training_in_keras(tmp_path: Path) -> None:
    """Two epochs of a few steps write all that the page names; bad options are named."""
    for package in ("keras", "tensorflow", "nilearn", "nibabel", "matplotlib"):
        need(package)
    script = SCRIPT.with_name("train_keras.py")
    options = ["--epochs", "2", "--steps", str(STEPS), "--patch", "16", "--out", str(tmp_path)]
    backend = "import os; os.environ['KERAS_BACKEND'] = 'tensorflow'\n"
    result = train_brain(*options, script=script, before=COARSE + backend)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{STEPS}/{STEPS}" in result.stdout  # Keras' own bar
    assert f"are in {tmp_path}" in result.stdout
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert summary["backend"] == "tensorflow"
    assert summary["step_seconds"] > 0
    assert all(0 <= dice <= 1 for dice in summary["held_out_dice"].values())
    for name in ("curve.png", "overlay.png"):
        image = need("matplotlib.image").imread(tmp_path / name)[..., :3]
        assert (np.ptp(image, axis=2) > 0.3).mean() > 0.0005
    result = train_brain("--patch", "18", script=script)
    assert result.returncode == 2
    assert "--patch: expected a multiple of 4" in result.stderr


def test_absent_package_is_named_before_work_begins() -> None:
    result = train_brain("--loss-impl", "monai", absent=("monai",))
    assert result.returncode == 2
    assert "package monai is not there: pip install monai" in result.stderr
    result = train_brain(absent=("matplotlib",))
    assert result.returncode == 2
    assert "package matplotlib is not there: pip install '.[examples]'" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("option", "value"), [("--steps", "0"), ("--patch", "18"), ("--seed", "-1")]
)
def test_bad_option(option: str, value: str) -> None:
    result = train_brain(option, value)
    assert result.returncode == 2
    assert f"{option}: expected" in result.stderr
    assert f"got {value}" in result.stderr


@pytest.fixture(scope="module")
def organs() -> Any:
    """The example of organs as a module."""
    for package in ("torch", "nibabel", "matplotlib"):
        need(package)
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module("organs")
    finally:
        sys.path.remove(str(SCRIPT.parent))


BODY = """
import numpy as np
import volumes
def body():
    z, y, x = np.indices((112, 24, 24))
    labels = np.zeros(z.shape, np.uint8)
    for index, (where, size) in enumerate([((8, 8), 5), ((14, 15), 4), ((5, 18), 3)], start=1):
        labels[(y - where[0]) ** 2 + (x - where[1]) ** 2 < size**2] = index
    labels[60:, :4, :4] = 4  # in none but the upper half
    image = np.array([-900.0, 40, 90, 140, 40], np.float32)[labels]
    classes = ("background", "liver", "spleen", "aorta", "rib")
    return volumes.Scan(image, labels, classes, (3.0, 3.0, 3.0))
volumes.load_organs = body
import fastloss.compare.cost as cost
cost.SECONDS = 0.01
"""
"""A CT that is made: columns, and a class in none but its upper half. Costs are of no interest."""


@pytest.mark.slow
def test_organs(tmp_path: Path) -> None:
    """A few steps with two losses print and write what the page names; bad options are named."""
    for package in ("torch", "nibabel", "matplotlib"):
        need(package)
    script = SCRIPT.with_name("organs.py")
    options = ["--steps", "3", "--width", "2", "--organs", "3", "--out", str(tmp_path)]
    result = train_brain(*options, script=script, before=BODY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Trained on: 73 % of the slices. Held out: slices 30 to 35, 58 to 63" in result.stdout
    with (tmp_path / "organs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["loss"], row["organ"]) for row in rows] == [
        (loss, organ)
        for loss in ("dice_ce", "dice_ce_boundary")
        for organ in ("liver", "spleen", "aorta")  # the largest
    ]
    assert all(0 <= float(row["dice"]) <= 1 and 0 <= float(row["nsd"]) <= 1 for row in rows)
    for row in rows:
        assert re.search(rf"^{row['organ']} .* {float(row['dice']):.3f} ", result.stdout, re.M)
    costs = result.stdout.partition("loss alone")[2]
    assert ("MONAI's dice_ce" in costs) == bool(importlib.util.find_spec("monai"))
    for name in ("slices.png", "dice.png"):
        image = need("matplotlib.image").imread(tmp_path / name)[..., :3]
        assert (np.ptp(image, axis=2) > 0.3).mean() > 0.0005
    result = train_brain("--organs", "0", script=script)
    assert result.returncode == 2
    assert "--organs: expected at least 1, got 0" in result.stderr


def test_nothing_of_the_held_out_organs_is_trained_on(organs: Any) -> None:
    """Slabs, their neighbours and what is trained on share no slice, and nothing thin is left."""
    parts = organs.trained_on(112)
    trained = {z for each in parts for z in range(112)[each]}
    for slab in organs.HELD_OUT:
        near = range(slab.start - organs.GAP, slab.stop + organs.GAP)
        assert not trained & set(near)
    assert min(each.stop - each.start for each in parts) >= organs.DEPTH
    scan = organs.Scan(
        np.zeros((112, 8, 8), np.float32),
        np.arange(112, dtype=np.uint8)[:, None, None] // 28 + np.zeros((1, 8, 8), np.uint8),
        ("background", "first", "second", "third"),
        (3.0, 3.0, 3.0),
    )
    assert organs.common(scan) == [1, 2, 3]
    # A prediction is compared with the slabs alone: right there is right.
    predicted = np.zeros_like(scan.labels)
    for slab in organs.HELD_OUT:
        predicted[slab] = scan.labels[slab]
    scores = organs.judge(predicted, scan, organs.METRICS)
    assert scores["dice"][0].tolist() == scores["nsd"][0].tolist() == [1, 1, 1]
    found = organs.largest(scan, 2)
    assert len(found.classes) == 3
    assert (found.labels > 0).sum() == 2 * 28 * 64


def test_network_of_organs_keeps_places(organs: Any) -> None:
    """Cubes of 2³ voxels are channels of what is within, and its logits are put back there."""
    torch = need("torch")
    net = organs.Halved(2, 1, 2)
    image = torch.randn(2, 2, 4, 6, 8)
    del net.inner, net.place
    net.inner, net.place = (lambda cubes: cubes[:, :8]), (lambda places: 10 * places)
    assert torch.equal(net(image)[:, 0], image[:, 0] + 10 * image[:, 1])
    assert organs.Halved(3, 5, 2)(torch.randn(1, 3, 8, 16, 24)).shape == (1, 5, 8, 16, 24)


def test_the_loss_of_monai_is_the_same(organs: Any) -> None:
    need("monai")
    torch = need("torch")
    from fastloss.compare.losses import TrainingLoss

    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(2, 5, 8, 8, 8)), requires_grad=True)
    labels = torch.tensor(rng.integers(0, 5, (2, 8, 8, 8)))
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        losses = [TrainingLoss(spec) for spec in ("dice_ce", "monai_losses:dice_ce")]
    finally:
        sys.path.remove(str(SCRIPT.parent))
    values = [each.at(1.0)(logits, labels) for each in losses]
    gradients = [torch.autograd.grad(value, logits)[0] for value in values]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-9)
