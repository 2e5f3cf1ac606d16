"""``python -m fastloss compare``: what is trained, judged and kept, and said of bad input."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import need, need_backend

import fastloss as fl
from fastloss.cli import main

torch = need("torch")
nibabel = need("nibabel")

SHAPE = (10, 12, 14)  # x, y, z
SIZES = (1.0, 2.0, 3.0)
CASES = ("one", "two", "three")
TINY = ("--patch", "8", "--width", "2", "--steps", "2", "--jobs", "1", "--seeds", "1")
TIMES = ("seconds", "loss_ms", "step_ms", "peak_bytes")


class Run:
    """A run of the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: Any) -> None:
        try:
            self.status: Any = main(["compare", *map(str, arguments)])
        except SystemExit as stop:
            self.status = stop.code
        self.out, self.err = capsys.readouterr()


def save(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([*SIZES, 1.0])), path)


def volume(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Two channels (x, y, z, 2), labels: an organ, three lesions, two planes ignored."""
    rng = np.random.default_rng(number)
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:8, 3 + number : 8 + number, 3:9] = 1
    labels[3, 4 + number, 4] = labels[5:7, 5 + number, 6:8] = labels[3, 6 + number, 7] = 2
    labels[:, :2] = 3
    image = (labels[..., None] == [1, 2]) + rng.normal(0, 0.2, (*SHAPE, 2))
    return image.astype(np.float32), labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three cases in nnU-Net's raw layout, whose dataset.json nnU-Net writes."""
    generate = need("nnunetv2.dataset_conversion.generate_dataset_json").generate_dataset_json
    root = tmp_path / "Dataset001_Tiny"
    for number, name in enumerate(CASES):
        image, labels = volume(number)
        for channel in range(2):
            path = root / "imagesTr" / f"{name}_{channel:04d}.nii.gz"
            save(path, image[..., channel])
        save(root / "labelsTr" / f"{name}.nii.gz", labels)
    labels = {"background": 0, "organ": 1, "lesion": 2, "ignore": 3}
    generate(str(root), {0: "T1", 1: "T2"}, labels, len(CASES), ".nii.gz")
    return root


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's with losses and a trainer."""
    (tmp_path / "own_losses.py").write_text(
        "import torch\n"
        "import fastloss as fl\n"
        "from fastloss.compare.training import train\n"
        "calls, tasks, stop = [], [], [10**9]\n"
        "def first(logits, labels):\n"
        "    calls.append(('first', logits.detach().clone(), labels.clone()))\n"
        "    return torch.nn.functional.cross_entropy(logits, labels.clamp(max=2))\n"
        "def second(logits, labels):\n"
        "    calls.append(('second', logits.detach().clone(), labels.clone()))\n"
        "    return 3 * logits.softmax(1)[:, 1].mean()\n"
        "def nan(logits, labels):\n"
        "    return logits.sum() * float('nan')\n"
        "def broken(logits, labels):\n"
        "    raise KeyError('it is broken')\n"
        "class Mine(fl.Loss):\n"
        "    def __init__(self):\n"
        "        super().__init__(fl.Dice(), fl.CrossEntropy())\n"
        "def trainer(task):\n"
        "    tasks.append(task)\n"
        "    if len(tasks) > stop[0]:\n"
        "        raise KeyboardInterrupt\n"
        "    return train(task)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_losses", None)
    return importlib.import_module("own_losses")


def without_times(path: Path) -> dict[str, Any]:
    """A study's JSON without what is measured by the clock."""
    found = json.loads(path.read_text(encoding="utf-8"))
    for kind in ("curves", "costs"):
        table = found[kind]
        keep = [i for i, name in enumerate(table["columns"]) if name not in TIMES]
        found[kind] = [[row[i] for i in keep] for row in table["rows"]]
    return dict(found)


def rows(path: Path, kind: str) -> list[dict[str, Any]]:
    table = json.loads(path.read_text(encoding="utf-8"))[kind]
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


# ---------------------------------------------------------------------- trainings


def test_from_a_folder_to_a_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every case is held out once, ignored voxels count for nothing; two runs have one result."""
    found = []
    for number, jobs in enumerate((1, 2)):
        out = tmp_path / f"out{number}"
        files = [tmp_path / f"found{number}.{ending}" for ending in ("json", "csv", "html")]
        outputs = [part for path in files for part in (f"--{path.suffix[1:]}", path)]
        with fl.use_backend(need_backend("cpu")):
            run = Run(capsys, "--data", folder, "--losses", "dice_ce,boundary=dice_ce_boundary",
                      *TINY, "--jobs", jobs, "--out", out, *outputs)  # fmt: skip
        assert run.status == 0, run.err
        found.append(without_times(files[0]))
    assert found[0] == found[1]

    assert "boundary" in run.out
    assert "6 trainings of 2 steps: 2 losses, 1 seeds, 3 folds of 3 cases" in run.err
    scores = rows(files[0], "scores")
    keys = [(s["loss"], s["case"], s["metric"], s["label"]) for s in scores]
    assert len(set(keys)) == len(keys) == 2 * 3 * 3 * 2
    assert {s["case"]: s["fold"] for s in scores}.keys() == set(CASES)
    size = next(s["size"] for s in scores if s["label"] == "organ" and s["case"] == "one")
    assert size == pytest.approx(np.prod(SIZES) * (volume(0)[1] == 1).sum())
    lesions = [x for x in rows(files[0], "lesions") if x["loss"] == "dice_ce"]
    assert {x["label"] for x in lesions} == {"lesion"}  # the organ is one component
    assert sorted(x["size"] for x in lesions if x["case"] == "one") == pytest.approx([6, 6, 24])
    assert [c["step"] for c in rows(files[0], "curves")[:2]] == [1, 2]
    costs = rows(files[0], "costs")
    assert [c["loss"] for c in costs] == ["dice_ce", "boundary"]
    assert all(c["step_ms"] > 0 and c["loss_ms"] > 0 for c in costs)
    assert files[1].read_text().count("\n") == len(scores) + 1
    assert "<html" in files[2].read_text()
    pictures = json.loads(files[0].read_text())["pictures"]
    assert len(pictures) == 4  # best and worst of each
    assert all("where the loss comes from" in each["caption"] for each in pictures)


def test_losses_say_where_they_come_from() -> None:
    """Each that is registered: a wrong voxel counts more than a right one."""
    for package in ("torch", "skimage"):
        need(package)
    from fastloss.compare.losses import LOSSES, TrainingLoss

    labels = np.zeros((8, 8, 8), np.int64)
    labels[1:7, 2:6, 2:6] = 1
    predicted = labels.copy()
    predicted[3, 3, 3] = 0
    p = 0.9 * np.stack([predicted == 0, predicted == 1]) + 0.05
    with fl.use_backend(need_backend("cpu")):
        for name in LOSSES:
            found = TrainingLoss(name, (1.0, 1.0, 1.0)).explain(p.astype(np.float32), labels)
            assert found is not None, name
            assert found.shape == labels.shape, name
            assert found[3, 3, 3] > found[3, 4, 4] - 1e-9, name


def test_a_comparison_goes_on_where_it_stopped(
    folder: Path, own: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, rest = tmp_path / "whole.json", tmp_path / "rest.json"
    common = ["--data", folder, "--losses", "ce,dice_ce", *TINY, "--trainer", "own_losses:trainer"]
    Run(capsys, *common, "--out", tmp_path / "whole", "--json", whole)
    assert len(own.tasks) == 6
    own.tasks.clear()
    own.stop[0] = 2
    run = Run(capsys, *common, "--out", tmp_path / "rest", "--json", rest)
    assert run.status == 130
    assert "interrupted; the same command goes on with what is in" in run.err
    own.tasks.clear()
    own.stop[0] = 99
    run = Run(capsys, *common, "--out", tmp_path / "rest", "--json", rest)
    assert run.status == 0
    assert len(own.tasks) == 4  # two were done
    assert without_times(rest) == without_times(whole)
    # A file that is half written is none.
    own.tasks.clear()
    done = sorted((tmp_path / "rest" / "runs").glob("*.json"))
    done[0].write_text(done[0].read_text()[:100])
    Run(capsys, *common, "--out", tmp_path / "rest", "--json", rest)
    assert len(own.tasks) == 1
    assert without_times(rest) == without_times(whole)
    # Other options would be another comparison.
    run = Run(capsys, *common, "--lr", 0.5, "--out", tmp_path / "rest")
    assert run.status == 2
    assert re.search(r"--out: .* other options: learning_rate is 0.02 there, and 0.5", run.err)


def test_the_same_start_and_patches_and_no_sight_of_held_out_cases(
    folder: Path, own: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "found.json"
    run = Run(capsys, "--data", folder, "--losses", "own_losses:first,own_losses:second",
              *TINY, "--steps", 3, "--tune-lr", "--seeds", 2, "--trainer", "own_losses:trainer",
              "--out", tmp_path / "out", "--json", written)  # fmt: skip
    assert run.status == 0, run.err
    # One step of each rate, three of each training, and the cost's with a random batch.
    calls = {name: [c for c in own.calls if c[0] == name] for name in ("first", "second")}
    trained = {name: each[9 : 9 + 18] for name, each in calls.items()}  # after 3 folds · 3 rates
    for (_, ours, labels), (_, _, same) in zip(*trained.values(), strict=True):
        assert torch.equal(labels, same)
        assert ours.shape == (2, 3, 8, 8, 8)
    starts = [[each[i][1] for i in range(0, 18, 3)] for each in trained.values()]
    for ours, theirs in zip(*starts, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.equal(starts[0][0], starts[0][3])  # another seed, another start
    held = {fold: set(CASES) - {case} for fold, case in
            {(s["fold"], s["case"]) for s in rows(written, "scores")}}  # fmt: skip
    for task in own.tasks:
        names = {case.name for case in task.training}
        assert names <= held[task.fold]  # of a search, a part
    rates = json.loads(written.read_text())["options"]["learning_rates"]
    assert set(rates) == {f"{loss}, fold {k}" for loss in ("first", "second") for k in range(3)}
    assert set(rates.values()) <= {0.02 * factor for factor in (1 / 3, 1, 3)}


def test_a_run_that_fails_is_reported_and_the_others_go_on(
    folder: Path, own: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "found.json"
    losses = "own_losses:Mine,own_losses:nan,own_losses:broken"
    run = Run(capsys, "--data", folder, "--losses", losses, *TINY, "--folds", 1,
              "--out", tmp_path / "out", "--json", written)  # fmt: skip
    assert run.status == 1, run.err
    failures = {f["loss"]: f["message"] for f in rows(written, "failures")}
    assert failures == {
        "nan": "the loss is nan in step 1 of 2",
        "broken": "KeyError: 'it is broken'",
    }
    for text in (run.out, run.err):
        assert "the loss is nan in step 1 of 2" in text
    assert {s["loss"] for s in rows(written, "scores")} == {"Mine"}


def test_every_registered_loss_has_a_gradient() -> None:
    """With another spacing, an ignored label and in each part of a training."""
    from fastloss.compare.losses import LOSSES, TrainingLoss

    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.integers(0, 4, (2, 2, 3, 4)).repeat(2, 1).repeat(2, 2).repeat(2, 3))
    need("skimage")
    with fl.use_backend(need_backend("cpu")):
        for name in LOSSES:
            loss = TrainingLoss(name, (6.0, 3.0, 3.0), ignore_index=3)
            for done in (0.0, 1.0):
                logits = torch.tensor(rng.normal(size=(2, 3, *labels.shape[1:]))).requires_grad_()
                value = loss.at(done)(logits, labels)
                (slope,) = torch.autograd.grad(value, logits)
                assert torch.isfinite(value), name
                assert slope.abs().sum() > 0, name
                assert not slope.movedim(1, -1)[labels == 3].any(), name
    # The spacing of a boundary is in units of the shortest edge, and its factor grows.
    first, last = (TrainingLoss("dice_ce_boundary", (6, 3, 3)).at(done) for done in (0, 1))
    term = fl.Boundary(include_background=False, spacing=(2, 1, 1))
    inside = labels.clamp(max=2)
    difference = last(logits.detach(), inside) - first(logits.detach(), inside)
    expected = 0.09 * fl.Loss(term)(logits.detach(), inside)
    np.testing.assert_allclose(difference, expected, rtol=1e-5)


def test_a_budget_is_a_number_of_steps() -> None:
    from fastloss.compare.data import BadData
    from fastloss.compare.phantom import Phantom
    from fastloss.compare.runner import Plan, steps_of
    from fastloss.compare.training import Settings

    settings = Settings(patch=(8, 8, 8), width=2)
    plan = Plan(Phantom(2, shape=(12, 12, 12)), {"ce": "ce"}, 2, 2, settings)
    assert steps_of(plan, 10, 1) > 2 * steps_of(plan, 1, 1) > 20
    words = (
        r"--minutes: in 1e-06 each of the 4 trainings would have 0 steps; .* takes (\d+) or more"
    )
    with pytest.raises(BadData, match=words) as caught:
        steps_of(plan, 1e-6, 1)  # less than judging takes
    found = re.search(words, str(caught.value))
    assert found
    assert steps_of(plan, 2 * int(found[1]), 1) >= 10


# ---------------------------------------------------------------------- data


def test_phantoms_are_patients_of_their_own() -> None:
    from fastloss.compare.phantom import LESION, Phantom

    source = Phantom(4)
    cases = [source.load(name) for name in source.names]
    assert len({case.spacing for case in cases}) > 1
    assert all(set(np.unique(case.labels)) == set(range(6)) for case in cases)
    again = Phantom(4).load("patient002")
    np.testing.assert_array_equal(again.image, cases[2].image)
    assert (again.labels != cases[1].labels).any()
    sizes = [np.bincount(fl.components((case.labels == LESION)[None]).numbers.ravel())[1:]
             for case in cases]  # fmt: skip
    assert min(map(len, sizes)) >= 2
    every = np.concatenate(sizes)
    assert every.max() > 20 * every.min()


def test_windows_cover_the_volume_and_their_average_is_the_prediction() -> None:
    """A network that looks at single voxels predicts the same in windows as at once."""
    from fastloss.compare.prediction import predict

    rng = np.random.default_rng(1)
    image = rng.normal(size=(1, 11, 20, 7)).astype(np.float32)

    def network(x: Any) -> Any:
        return torch.cat([x, -x, 1 - x.abs()], 1)

    found = predict(network, image, (8, 8, 8))
    exact = network(torch.tensor(image)[None])[0].argmax(0)
    np.testing.assert_array_equal(found, exact)


def test_pairs_by_a_pattern(folder: Path, tmp_path: Path, capsys: Any) -> None:
    for name in CASES:
        labels = nibabel.load(folder / "labelsTr" / f"{name}.nii.gz").get_fdata()
        save(tmp_path / name / "seg.nii", np.where(labels > 1, 7, labels).astype(np.int16))
        save(tmp_path / name / "mr.nii", labels.astype(np.float32))
    written = tmp_path / "found.json"
    run = Run(capsys, "--data", tmp_path / "*/mr.nii", "--labels", tmp_path / "*/seg.nii",
              "--losses", "ce", *TINY, "--folds", 1, "--out", tmp_path / "out",
              "--metrics", "dice", "--json", written)  # fmt: skip
    assert run.status == 0, run.err
    assert {s["label"] for s in rows(written, "scores")} == {"1", "7"}
    assert {s["case"] for s in rows(written, "scores")} <= set(CASES)


def test_files_that_do_not_fit_are_named_and_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, labels = volume(0)
    for name, wrong in {"shape": labels[1:], "number": labels + 4, "flat": labels[..., 0]}.items():
        save(folder / "labelsTr" / f"{name}.nii.gz", wrong)
        for channel in range(2):
            save(folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz", image[..., channel])
    save(folder / "labelsTr" / "half.nii.gz", labels)
    save(folder / "imagesTr" / "half_0000.nii.gz", image[..., 0])
    save(folder / "imagesTr" / "alone_0000.nii.gz", image[..., 0])
    (folder / "labelsTr" / "broken.nii.gz").write_bytes(b"no file of anything")
    for channel in range(2):
        save(folder / "imagesTr" / f"broken_{channel:04d}.nii.gz", image[..., channel])
    settings = json.loads((folder / "dataset.json").read_text())
    settings["labels"]["cyst"] = 9
    (folder / "dataset.json").write_text(json.dumps(settings))
    run = Run(capsys, "--data", folder, "--losses", "ce", *TINY, "--out", tmp_path / "out",
              "--metrics", "dice")  # fmt: skip
    assert run.status == 0, run.err
    for line in (
        r"shape: shape_0000.nii.gz has shape \(10, 12, 14\), the label map \(9, 12, 14\)",
        r"number: the labels hold 4, which is no class",
        r"flat: expected three axes, got shape \(10, 12\)",
        r"half: imagesTr has no half_0001",
        r"alone: labelsTr has none for this image",
        r"broken: .*cannot be read",
        r"cyst: no case has this label",
    ):
        assert re.search(rf"^{line}", run.err, re.M), (line, run.err)
    assert "3 folds of 3 cases" in run.err


def test_wrong_arguments_end_before_anything_is_trained(
    folder: Path, own: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "single"
    for part in ("imagesTr", "labelsTr"):
        for path in (folder / part).glob("one*"):
            save(one / part / path.name, nibabel.load(path).get_fdata().astype(np.float32))
    (one / "dataset.json").write_text((folder / "dataset.json").read_text())
    regions = tmp_path / "regions"
    for part in ("imagesTr", "labelsTr"):
        (regions / part).mkdir(parents=True)
    (regions / "dataset.json").write_text('{"labels": {"background": 0, "all": [1, 2]}}')
    for options, message in (
        (
            ["--losses", "dicee"],
            r"--losses: expected names among dice_ce, ce, .*, or module:object",
        ),
        (["--losses", "own_losses:no"], "--losses: own_losses:no is not there"),
        (["--losses", "ce,ce"], "--losses: 'ce' is there twice; NAME=ce gives it another name"),
        (["--losses", ","], "--losses: expected at least one"),
        (["--reference", "ce"], "--reference: expected one of dice_ce, tversky_ce"),
        (["--data", "nowhere"], "--data: expected phantom, brain, a folder"),
        (["--data", tmp_path], "--data: expected nnU-Net's raw layout"),
        (["--data", one], "--data: expected at least two cases, one to train on"),
        (["--data", regions], r"'all' is a region of the labels \[1, 2\]"),
        (["--data", folder, "--folds", 4], "--folds: expected at most 3"),
        (["--data", "a.nii", "--labels", "b*.nii"], "--labels: no file as"),
        (["--metrics", "dicee"], "metrics: expected names among"),
        (["--patch", "10"], "--patch: expected one number or three, multiples of 4"),
        (["--steps", 0], "--steps: expected at least 1, got 0"),
        (["--steps", 5, "--minutes", 5], "--minutes: expected either"),
        (["--device", "nonsense"], "--device: 'nonsense' cannot be used"),
        (["--trainer", "own_losses:no"], "--trainer: own_losses:no is not there"),
        (["--html", "no/such/x.html"], "--html: expected a file in a folder there is"),
        (["--svg", "no/such/x.svg"], "--svg: expected a file in a folder there is"),
        (["--collect", tmp_path], "--collect: expected --data DIR"),
    ):
        run = Run(capsys, *options, "--out", tmp_path / "out")
        assert run.status == 2, options
        assert re.search(message, " ".join(run.err.split())), (options, run.err)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- nnU-Net


@dataclass
class Plans:
    """What a trainer of nnU-Net knows when it builds its loss."""

    has_regions: bool = False
    ignore_label: int | None = None
    batch_dice: bool = True
    spacing: tuple[float, ...] = (3.0, 1.0, 1.0)


def test_exported_trainers_have_the_loss(
    own: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    base = need("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    losses = "dice_ce,dice_ce_boundary,cc_dice_ce,tversky_ce,own_losses:first"
    run = Run(capsys, "--losses", losses, "--export-nnunet", tmp_path / "trainers",
              "--seeds", 2, "--folds", 2)  # fmt: skip
    assert run.status == 0, run.err
    assert "nnUNetv2_train $DATASET $CONFIGURATION 1 -tr nnUNetTrainerCompare_ce" not in run.out
    assert run.out.count("nnUNetv2_train ") == 5 * 2 * 2
    monkeypatch.syspath_prepend(tmp_path / "trainers")
    exported = importlib.import_module("fastloss_compare")
    rng = np.random.default_rng(0)
    outputs = [torch.tensor(rng.normal(size=(2, 3, n, n, n)), requires_grad=True) for n in (8, 4)]
    targets = [torch.tensor(rng.integers(0, 3, (2, 1, n, n, n))).float() for n in (8, 4)]
    for loss in ("dice_ce", "dice_ce_boundary", "cc_dice_ce", "tversky_ce", "first"):
        name = f"nnUNetTrainerCompare_{loss}_seed1"
        kind = getattr(exported, name)
        assert issubclass(kind, base)
        trainer = object.__new__(kind)
        plans = Plans()
        vars(trainer).update(
            label_manager=plans, configuration_manager=plans, is_ddp=False,
            enable_deep_supervision=True, current_epoch=0, num_epochs=2,
            _do_i_compile=lambda: False, _get_deep_supervision_scales=lambda: [1, 1],
        )  # fmt: skip
        value = trainer._build_loss()(outputs, targets)
        (slope,) = torch.autograd.grad(value, outputs[:1], allow_unused=True)
        assert torch.isfinite(value), loss
        assert slope.abs().sum() > 0, loss
        assert trainer.compared_seed == 1
        if loss == "tversky_ce":  # nnU-Net's weights: the last output counts for nothing
            term = fl.Tversky(alpha=0.3, beta=0.7, batch=True, include_background=False)
            exact = (term + fl.CrossEntropy())(outputs[0], targets[0])
            torch.testing.assert_close(value, exact)


def test_collected_predictions_have_the_scores_of_their_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One loss in nnU-Net's results, of two folds; another by hand, with two seeds."""
    results = tmp_path / "nnUNetTrainerCompare_exact_seed0__nnUNetPlans__3d_fullres"
    for number, name in enumerate(CASES):
        labels = np.where((y := volume(number)[1]) == 3, 0, y)
        save(results / f"fold_{number % 2}" / "validation" / f"{name}.nii.gz", labels)
        for seed in range(2):
            moved = np.roll(labels, 1 + seed, 0)
            if (seed, name) != (1, "two"):
                save(tmp_path / "moved" / f"seed{seed}" / f"fold_{number % 2}" / f"{name}.nii.gz",
                     moved)  # fmt: skip
    save(tmp_path / "moved" / "seed1" / "stranger.nii.gz", moved)
    save(tmp_path / "moved" / "seed1" / "fold_1" / "two.nii.gz", moved + np.uint8(9))
    written, page, picture = (tmp_path / f"found.{end}" for end in ("json", "html", "svg"))
    run = Run(capsys, "--collect", results, tmp_path / "moved", "--data", folder, "--jobs", 1,
              "--json", written, "--html", page, "--svg", picture)  # fmt: skip
    assert run.status == 0, run.err
    assert re.search(r"stranger.nii.gz: no reference of this name", run.err)
    assert re.search(r"fold_1/two.nii.gz: it holds label 9, which is no class", run.err)
    scores = rows(written, "scores")
    exact = [s for s in scores if s["loss"] == "exact"]
    assert {(s["case"], s["seed"], s["fold"]) for s in exact} == {
        ("one", 0, 0), ("two", 0, 1), ("three", 0, 0)
    }  # fmt: skip
    assert all(s["value"] == (0 if s["metric"] == "hd95" else 1) for s in exact)
    moved_dice = {
        (s["seed"], s["case"]): s["value"]
        for s in scores
        if (s["loss"], s["metric"], s["label"]) == ("moved", "dice", "organ")
    }
    assert set(moved_dice) == {(s, c) for s in range(2) for c in CASES} - {(1, "two")}
    labels = volume(0)[1].astype(int)
    counted, mask = labels != 3, labels == 1
    ours = (np.roll(np.where(labels == 3, 0, labels), 1, 0) == 1) & counted
    assert moved_dice[0, "one"] == pytest.approx(
        2 * (ours & mask).sum() / (ours.sum() + mask.sum())
    )
    assert "<html" in page.read_text()
    assert picture.read_text().startswith("<svg")
    assert SimpleNamespace(**json.loads(written.read_text())).reference == "exact"
