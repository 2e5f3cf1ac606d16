"""nnU-Net's trainers with boundary loss and skeleton recall, on nnU-Net's own classes."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support import need, need_backend, need_gloo

import fastloss as fl

torch = need("torch")
ndimage = need("scipy.ndimage")
ours = need("fastloss.nnunet")

BOUNDARY = "nnUNetTrainerFastlossBoundary"
SKELETON = "nnUNetTrainerFastlossSkeletonRecall"
LESIONS = {
    "nnUNetTrainerFastlossCCDiceCE": (1.0, fl.CCDiceCE, "voronoi"),
    "nnUNetTrainerFastlossBlob": (0.5, fl.BlobDiceCE, "components+background"),
}
"""The factor, the term, and how its regions are made."""
TRAINER = "fastloss.nnunet.trainer"
OPTIONS = {"batch_dice": True, "do_bg": False, "smooth": 1e-5, "ddp": False}
SPACING = (2.0, 1.0, 1.0)

RNG = np.random.default_rng(3)
LOGITS = torch.tensor(RNG.normal(size=(2, 3, 6, 7, 8)))
LABELS = torch.tensor(
    ndimage.zoom(RNG.integers(0, 3, (2, 1, 3, 4, 4)), (1, 1, 2, 7 / 4, 2), order=0)
)
WITH_IGNORED = torch.where(torch.tensor(RNG.random(LABELS.shape) < 0.2), 3, LABELS)
REGIONS = torch.cat([LABELS > 0, LABELS == 2, LABELS == 1], 1)
WITH_CHANNEL = torch.cat([REGIONS & (WITH_IGNORED != 3), WITH_IGNORED == 3], 1)
"""As nnU-Net makes it of a label map: ignored voxels are of no region."""


# --------------------------------------------------------------------------- definitions


def signed(mask: np.ndarray, spacing: Any = None) -> np.ndarray:
    """Kervadec's distance map of one mask."""
    if not mask.any() or mask.all():
        return np.zeros(mask.shape)
    inside = ndimage.distance_transform_edt(mask, sampling=spacing) - 1
    outside = ndimage.distance_transform_edt(~mask, sampling=spacing)
    return np.where(mask, -inside, outside)


def tube(mask: np.ndarray) -> np.ndarray:
    """The skeleton of one mask, dilated twice, within the mask."""
    if not mask.any():
        return mask
    skeleton = need("skimage.morphology").skeletonize(mask) > 0
    return ndimage.binary_dilation(skeleton, iterations=2) & mask


def masks_of(y: Any, classes: int, regions: bool) -> tuple[np.ndarray, np.ndarray]:
    """The masks of the classes, and where voxels count, (B, C, *spatial) and (B, 1, *spatial)."""
    y = y.numpy()
    if not regions:
        axis = np.arange(classes).reshape(-1, *[1] * (y.ndim - 2))
        return y == axis, y < classes
    masks, counts = y[:, :classes] > 0, np.ones_like(y[:, :1], bool)
    return masks, counts if y.shape[1] == classes else y[:, classes:] == 0


def boundary(x: Any, y: Any, *, regions: bool = False, spacing: Any = None) -> Any:
    """The mean of p φ over what counts, the background excepted."""
    masks, counts = masks_of(y, x.shape[1], regions)
    if regions:
        masks = masks & counts
    phi = torch.tensor(np.stack([[signed(m, spacing) for m in one] for one in masks]))
    p = x.sigmoid() if regions else x.softmax(1)
    axes, m = tuple(range(2, x.ndim)), torch.tensor(counts)
    each = (p * phi * m).sum(axes) / m.sum(axes)
    return each[:, 0 if regions else 1 :].mean()


def recall(x: Any, y: Any, *, regions: bool = False, tubes: Any = None) -> Any:
    """The negative recall of the tubes of the batch, the background excepted."""
    masks, counts = masks_of(y, x.shape[1], regions)
    if tubes is None:
        tubes = tubes_of(masks & counts, regions)
    s = torch.tensor(tubes & counts)
    p = x.sigmoid() if regions else x.softmax(1)
    axes = (0, *range(2, x.ndim))
    each = ((p * s).sum(axes) + 1e-5) / (s.sum(axes) + 1e-5)
    return -each[0 if regions else 1 :].mean()


def tubes_of(masks: np.ndarray, regions: bool) -> np.ndarray:
    if regions:
        return np.stack([[tube(m) for m in one] for one in masks])
    return np.stack([tube(one[1:].any(0))[None] & one for one in masks])


def compound(kind: str) -> tuple[Any, Any, bool]:
    """A loss of the drop-ins, its target, and whether that has regions."""
    return {
        "labels": lambda: (ours.DC_and_CE_loss(OPTIONS, {}), LABELS, False),
        "ignored": lambda: (ours.DC_and_CE_loss(OPTIONS, {}, ignore_label=3), WITH_IGNORED, False),
        "top-k": lambda: (ours.DC_and_topk_loss(OPTIONS, {"k": 30}), LABELS, False),
        "regions": lambda: (ours.DC_and_BCE_loss({}, OPTIONS), REGIONS, True),
        "regions, ignored": lambda: (
            ours.DC_and_BCE_loss({}, OPTIONS, use_ignore_label=True),
            WITH_CHANNEL,
            True,
        ),
    }[kind]()


KINDS = ["labels", "ignored", "top-k", "regions", "regions, ignored"]


def with_term(name: str, loss: Any, *args: Any, **options: Any) -> Any:
    if name == "boundary":
        return ours.WithBoundary(loss, *args, **options)
    return ours.WithSkeletonRecall(loss, *args, batch_dice=True, ddp=False, **options)


def loaded(transform: Any, targets: list[Any]) -> list[Any]:
    """What the loader makes of targets, (B, C, *spatial) each: the list that the loss takes."""
    samples = [
        transform(image=None, segmentation=[t[b] for t in targets])["segmentation"]
        for b in range(len(targets[0]))
    ]
    return [torch.stack(parts) for parts in zip(*samples, strict=True)]


def gradient(function: Any, x: Any) -> tuple[Any, Any]:
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    (slope,) = torch.autograd.grad(value, leaf)
    return value.detach(), slope


def assert_same(got: Any, exact: Any, by: float) -> None:
    np.testing.assert_allclose(got[0], exact[0], rtol=by)
    np.testing.assert_allclose(got[1], exact[1], rtol=by, atol=by * float(exact[1].abs().max()))


# --------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("where", ["made", "loaded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["boundary", "skeleton"])
def test_value_and_gradient(name: str, kind: str, where: str) -> None:
    """The sum is that of the definitions, in one pass each way, on ignored voxels that hold NaN."""
    loss, y, regions = compound(kind)
    options = {"spacing": SPACING} if name == "boundary" else {}
    term = (boundary if name == "boundary" else recall, options)

    def exact(x: Any) -> Any:
        return loss(x, y) + 0.3 * term[0](x, y, regions=regions, **term[1])

    both = with_term(name, loss, 0.3, **options)
    target = y if where == "made" else loaded(both.append_fields(3), [y])
    backend = fl.backends.load_backend("reference")
    with mock.patch.object(backend, "apply", wraps=backend.apply) as apply:
        got = gradient(lambda x: both(x, target), LOGITS)
    assert apply.call_count == 1
    assert_same(got, gradient(exact, LOGITS), 1e-6)
    if "ignored" in kind:
        lost = y[:, -1:] == (1 if regions else 3)
        value, slope = gradient(lambda x: both(x, target), LOGITS.masked_fill(lost, torch.nan))
        np.testing.assert_allclose(value, got[0], rtol=1e-9)
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("where", ["made", "loaded"])
@pytest.mark.parametrize("name", ["boundary", "skeleton"])
def test_deep_supervision(name: str, where: str) -> None:
    """The boundary is that of full resolution alone; each resolution has the tube's voxels."""
    outputs = [LOGITS, LOGITS[..., ::2, ::2, ::2], LOGITS[..., ::3, ::3, ::3]]
    targets = [LABELS, *(torch.empty(0) for _ in range(2))]
    for i in (1, 2):
        size = outputs[i].shape[2:]
        near = torch.nn.functional.interpolate(LABELS.float(), size, mode="nearest-exact")
        targets[i] = near.to(LABELS.dtype)
    loss, weights = compound("labels")[0], (0.6, 0.4, 0.0)
    both = with_term(name, ours.DeepSupervisionWrapper(loss, weights), 0.3)
    given = targets if where == "made" else loaded(both.append_fields(3), targets)
    assert len(given) == 3 + (where == "loaded") * (1 if name == "boundary" else 3)
    exact = sum(w * loss(x, y) for w, x, y in zip(weights, outputs, targets, strict=True))
    if name == "boundary":
        exact = exact + 0.3 * boundary(LOGITS, LABELS)
    else:
        tubes: list[Any] = [None, None]
        if where == "loaded":  # that of full resolution, at the nearest voxels
            whole = torch.tensor(tubes_of(masks_of(LABELS, 3, False)[0], False)).float()
            size = outputs[1].shape[2:]
            tubes[1] = (
                torch.nn.functional.interpolate(whole, size, mode="nearest-exact").numpy() > 0
            )
        for w, x, y, s in zip(weights, outputs, targets, tubes, strict=False):
            exact = exact + 0.3 * w * recall(x, y, tubes=s)
    np.testing.assert_allclose(both(outputs, given), exact, rtol=1e-6)
    # Weights 0 for the first output and for the term leave out what they say.
    both.weight_factors = (0.0, 1.0, 0.0)
    first = 0.3 * boundary(LOGITS, LABELS) if name == "boundary" else 0.0
    both_value = both(outputs, given)
    both.weight = 0.0
    alone = both(outputs, given)
    np.testing.assert_allclose(alone, loss(outputs[1], targets[1]), rtol=1e-9)
    if name == "boundary":
        np.testing.assert_allclose(both_value, alone + first, rtol=1e-6)


def test_parts_that_are_not_fused() -> None:
    """A hook, or a part of weight 0, does not change the sum."""
    for change in ("hook", "weight_ce", "weight_dice"):
        loss = compound("labels")[0]
        both = ours.WithBoundary(loss, 0.3)
        if change == "hook":
            loss.register_forward_hook(lambda *_: torch.tensor(7.0))
        else:
            setattr(loss, change, 0.0)
        exact = loss(LOGITS, LABELS) + 0.3 * boundary(LOGITS, LABELS)
        np.testing.assert_allclose(both(LOGITS, LABELS), exact, rtol=1e-6)


def test_a_schedule_compiles_nothing_anew() -> None:
    torch.compiler.reset()
    loss = compound("labels")[0]
    both = ours.WithBoundary(ours.DeepSupervisionWrapper(loss, (0.7, 0.3)), 0.01)
    outputs = [LOGITS, LOGITS[..., ::2]]
    target = loaded(both.append_fields(3), [LABELS, LABELS[..., ::2]])
    made = []

    def count(graph: Any, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    compiled = torch.compile(both, fullgraph=True, backend=count)
    for weight in (0.01, 0.02, 0.5, 1.0):
        both.weight = weight
        np.testing.assert_allclose(compiled(outputs, target), both(outputs, target), rtol=1e-9)
    torch.compiler.reset()
    assert len(made) == 1


def test_half() -> None:
    """Half logits, and distances of float16, change the last digits."""
    both = ours.WithBoundary(compound("labels")[0], 1.0)
    target = loaded(both.append_fields(3, dtype="float16"), [LABELS])
    assert target[-1].dtype == torch.float16
    with fl.use_backend(need_backend("cpu")):
        value = both(LOGITS.to(torch.bfloat16), target)
    np.testing.assert_allclose(value, both(LOGITS.to(torch.bfloat16).double(), target), rtol=1e-5)
    np.testing.assert_allclose(both(LOGITS, target), both(LOGITS, LABELS), rtol=1e-3)


def test_copies() -> None:
    for name in ("boundary", "skeleton"):
        both = with_term(name, compound("labels")[0], 0.3)
        again = pickle.loads(pickle.dumps(both))
        assert torch.equal(again(LOGITS, LABELS), both(LOGITS, LABELS))


def test_bad_input() -> None:
    loss = compound("labels")[0]
    for wrong in (ours.SoftDiceLoss(), torch.nn.CrossEntropyLoss()):
        with pytest.raises(TypeError, match=r"loss: expected one of DC_and_CE_loss.* got "):
            ours.WithBoundary(wrong)
    with pytest.raises(ValueError, match="spacing"):
        ours.WithBoundary(loss, spacing=-1)
    with pytest.raises(ValueError, match="dilations"):
        ours.WithSkeletonRecall(loss, dilations=-1)(LOGITS, LABELS)
    both = ours.WithBoundary(loss, weight_factors=(1.0, 0.5))
    with pytest.raises(ValueError, match="net_output: expected 2"):
        both([LOGITS], [LABELS])
    with pytest.raises(ValueError, match=r"target: expected 2.* and 1 fields or none, got 5"):
        both([LOGITS, LOGITS], [LABELS] * 5)
    with pytest.raises(ValueError, match="dtype"):
        both.append_fields(3, dtype="float64")
    with pytest.raises(ValueError, match="classes"):
        both.append_fields(0)(image=None, segmentation=LABELS[0])


# --------------------------------------------------------------------------- the transform


def test_tube_of_a_bar() -> None:
    """Of a bar of 7² voxels the tube is its middle line and what is within two steps of it."""
    labels = torch.zeros(1, 30, 15, 15, dtype=torch.int16)
    labels[0, 2:28, 4:11, 4:11] = 1
    labels[0, 15:28, 4:11, 4:11] = 2  # the line runs through both
    coarse = labels[:, 1::2, 1::2, 1::2]  # the voxels that nnU-Net takes
    transform = ours.WithSkeletonRecall(compound("labels")[0]).append_fields(3)
    image = torch.zeros(1)
    made = pickle.loads(pickle.dumps(transform))(image=image, segmentation=[labels, coarse])
    assert made["image"] is image
    targets, fields = made["segmentation"][:2], made["segmentation"][2:]
    assert torch.equal(targets[0], labels)
    assert torch.equal(targets[1], coarse)
    assert [tuple(field.shape) for field in fields] == [(30, 15, 15), (15, 7, 7)]
    away = np.abs(np.arange(15) - 7)
    section = (away[:, None] + away) <= 2  # 13 voxels
    for z in range(8, 22):
        np.testing.assert_array_equal(fields[0][z].numpy() != 255, section)
        assert set(np.unique(fields[0][z])) == {1 if z < 15 else 2, 255}
    for field, target in zip(fields, targets, strict=True):
        there = field != 255
        assert torch.equal(field[there].int(), target[0][there].int())


def test_distances_of_a_cube() -> None:
    """They respect the spacing, and are nothing else where nothing else is there."""
    labels = torch.zeros(1, 9, 9, 9, dtype=torch.int16)
    labels[0, 3:6, 3:6, 3:6] = 1
    transform = ours.WithBoundary(compound("labels")[0], spacing=SPACING).append_fields(3)
    target, field = transform(image=None, segmentation=labels)["segmentation"]
    assert torch.equal(target, labels)
    assert field.shape == (3, 9, 9, 9)
    assert field[1, 4, 4, 4] == -1  # two voxels of length 1 to the outside, minus 1
    assert field[1, 4, 4, 5] == 0
    assert field[1, 1, 4, 4] == 4  # two voxels of length 2
    assert field[0, 4, 4, 4] == 2
    assert not field[2].any()


# --------------------------------------------------------------------------- the trainers


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a preprocessed data set of two cases, as nnU-Net finds it."""
    need("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    dataset = need("nnunetv2.training.dataloading.nnunet_dataset").nnUNetDatasetNumpy
    folder = tmp_path_factory.mktemp("nnunet")
    data = folder / "nnUNet_preprocessed" / "Dataset001_Tubes"
    (data / "tubes").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        labels = np.zeros((1, 20, 20, 20), np.int8)
        labels[:, 3:18, 8:12, 8:12] = 1
        labels[:, 8:12, 3:18, 4:7] = 2
        image = (labels + 0.3 * rng.normal(size=labels.shape)).astype(np.float32)
        places = {c: np.argwhere(labels == c) for c in (1, 2)}
        dataset.save_case(image, labels, {"class_locations": places}, str(data / "tubes" / name))
    split = [{"train": ["a", "b"], "val": ["a", "b"]}]
    (data / "splits_final.json").write_text(json.dumps(split))
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(variable, str(folder / variable))
        patch.setenv("nnUNet_n_proc_DA", "0")
        yield folder


def trainer(name: str, *, regions: bool = False, planar: bool = False, deep: bool = True) -> Any:
    """A trainer of a tiny network on that data set, ready to train."""
    axes = 2 if planar else 3
    convolution, normalisation = f"conv.Conv{axes}d", f"instancenorm.InstanceNorm{axes}d"
    network = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 4,
            "features_per_stage": [4] * 4,
            "conv_op": f"torch.nn.modules.{convolution}",
            "kernel_sizes": [[3] * axes] * 4,
            "strides": [[1] * axes, *[[2] * axes] * 3],
            "n_conv_per_stage": [1] * 4,
            "n_conv_per_stage_decoder": [1] * 3,
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.{normalisation}",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "tubes",
        "batch_size": 2,
        "patch_size": [16] * axes,
        "spacing": [3.0, 1.5, 1.5][-axes:],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": True,
        "architecture": network,
    }
    plans = {
        "continue_training": False,
        "dataset_name": "Dataset001_Tubes",
        "plans_name": "plans",
        "configurations": {"tiny": configuration},
    }
    labels: dict[str, Any] = {"background": 0, "a": 1, "b": 2}
    dataset: dict[str, Any] = {"channel_names": {"0": "T1"}, "labels": labels}
    dataset["file_ending"] = ".nii.gz"
    if regions:
        labels |= {"a": [1, 2]}
        dataset["regions_class_order"] = [1, 2]
    kind = getattr(importlib.import_module(TRAINER), name)
    made = kind(plans, "tiny", 0, dataset, torch.device("cpu"))
    made.enable_deep_supervision = deep
    made.num_epochs = 5
    made.initialize()
    made.dataloader_train, made.dataloader_val = made.get_dataloaders()
    return made


CASES = [
    (BOUNDARY, {}),
    (BOUNDARY, {"regions": True}),
    (BOUNDARY, {"deep": False}),
    (BOUNDARY, {"planar": True}),
    (SKELETON, {}),
    (SKELETON, {"regions": True, "deep": False}),
    (SKELETON, {"planar": True}),
    ("nnUNetTrainerFastlossCCDiceCE", {}),
    ("nnUNetTrainerFastlossBlob", {"deep": False}),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "how"), CASES)
@pytest.mark.usefixtures("nnunet")
def test_training_steps(name: str, how: dict[str, bool]) -> None:
    """nnU-Net's steps run on its loader's batches, and their loss is that of the definitions."""
    made = trainer(name, **how)
    regions = how.get("regions", False)
    made.current_epoch = 2
    made.on_train_epoch_start()
    before = [p.detach().clone() for p in made.network.parameters()]
    for which in ("train", "val", "train"):
        batch = next(getattr(made, f"dataloader_{which}"))
        with torch.no_grad():
            made.network.train(which == "train")
            outputs = made.network(batch["data"])
        exact = formula(made, outputs, batch["target"], regions)
        if which == "train":
            result = made.train_step(batch)
        else:
            with torch.no_grad():
                made.on_validation_epoch_start()
                result = made.validation_step(batch)
            assert len(result["tp_hard"]) == 2
        np.testing.assert_allclose(result["loss"], exact, rtol=1e-3, atol=1e-4)
    after = made.network.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def formula(made: Any, outputs: Any, target: list[Any], regions: bool) -> float:
    """The loss of nnU-Net's default trainer, and the term of this one."""
    deep = made.enable_deep_supervision
    outputs = outputs if deep else [outputs]
    count = len(outputs)
    base = importlib.import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    default = base._build_loss(made)
    assert type(default).__module__.startswith("nnunetv2.")
    targets = [t.clone() for t in target[:count]]
    value = float(default(outputs, targets) if deep else default(outputs[0], targets[0]))
    weights = (2 / 3, 1 / 3, 0.0) if deep else (1.0,)  # the coarsest counts for nothing
    assert made.loss.weight_factors == (pytest.approx(weights) if deep else None)
    if "Boundary" in type(made).__name__:
        spacing = (2.0, 1.0, 1.0)[-(outputs[0].ndim - 2) :]
        first = boundary(outputs[0].double(), targets[0], regions=regions, spacing=spacing)
        return value + made.boundary_factor * float(first)
    if type(made).__name__ in LESIONS:
        factor, kind, mode = LESIONS[type(made).__name__]
        given = fl.PerRegion(fl.Dice(), fl.CrossEntropy(), regions=mode, without=kind().without)
        exact = given.fields(targets[0][:, 0], classes=3, spacing=(2.0, 1.0, 1.0))["regions"]
        torch.testing.assert_close(target[count], exact, check_dtype=False)
        for weight, x, y, r in zip(weights, outputs, targets, target[count:], strict=True):
            value += weight * factor * float(given(x.double(), y, regions=r))
        return value
    classes, first = outputs[0].shape[1], not regions
    axis = np.arange(classes).reshape(-1, *[1] * (outputs[0].ndim - 2))
    fields = [field.numpy() for field in target[count:]]
    tubes = [field if regions else field[:, None] == axis for field in fields]
    exact = tubes_of(masks_of(targets[0], classes, regions)[0], regions)
    np.testing.assert_array_equal(tubes[0][:, first:], exact[:, first:])
    for weight, x, y, s in zip(weights, outputs, targets, tubes, strict=True):
        value += weight * float(recall(x.double(), y, regions=regions, tubes=s))
    return value


@pytest.mark.usefixtures("nnunet")
def test_schedule() -> None:
    made = trainer(BOUNDARY)
    assert made.loss.weight == 0.01
    loss, seen = made.loss, []
    for epoch in range(5):
        made.current_epoch = epoch
        made.on_train_epoch_start()
        seen.append(made.loss.weight)
    assert made.loss is loss
    np.testing.assert_allclose(seen, [0.01, 0.2575, 0.505, 0.7525, 1.0])
    made.first_boundary_factor, made.last_boundary_factor = 0.5, 0.1
    assert made.boundary_factor == pytest.approx(0.1)
    made.num_epochs, made.current_epoch = 1, 0
    assert made.boundary_factor == 0.5


@pytest.mark.usefixtures("nnunet")
def test_fields_of_the_training_step() -> None:
    """Without the loader's fields the step makes them, to the same value."""
    made = trainer(BOUNDARY)
    batch = next(made.dataloader_train)
    count = len(made._get_deep_supervision_scales())
    assert len(batch["target"]) == count + 1
    assert batch["target"][-1].dtype == torch.float16
    with torch.no_grad():
        outputs = made.network(batch["data"])
        with_field, without = (made.loss(outputs, batch["target"][:n]) for n in (count + 1, count))
    np.testing.assert_allclose(with_field, without, rtol=1e-4)
    made.fields_in_loader = False
    assert len(next(made.get_dataloaders()[0])["target"]) == count


@pytest.mark.usefixtures("nnunet")
def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's processes make the fields, here by the C++ kernels after their parent did."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    with fl.use_backend(need_backend("cpu")):
        ours.WithBoundary(compound("labels")[0])(LOGITS, LABELS)
        made = trainer(BOUNDARY)
        try:
            target = next(made.dataloader_train)["target"]
        finally:
            for loader in (made.dataloader_train, made.dataloader_val):
                loader._finish()
    exact = fl.Boundary(spacing=SPACING).fields(target[0], classes=3, spatial_axes=3)["boundary"]
    assert torch.equal(target[-1], exact.half())


def test_nnunet_finds_the_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # its kernels need another build of PyTorch
        asks = "dynamic_network_architectures.architectures.primus"  # for other trainers' networks
        monkeypatch.setitem(sys.modules, asks, mock.MagicMock())
    objects = need("nnunetv2.utilities.find_objects")
    (tmp_path / "fused.py").write_text(f"from {TRAINER} import *\n")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    for name in (BOUNDARY, SKELETON):
        found = objects.recursive_find_trainer_class_by_name(name)
        assert found is getattr(importlib.import_module(TRAINER), name)


# --------------------------------------------------------------------------- two ranks


def work(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    loss = ours.DC_and_CE_loss(OPTIONS | {"ddp": True}, {}, weight_ce=0.5)
    both = ours.WithSkeletonRecall(loss, 0.3, batch_dice=True)
    with fl.use_backend("reference"):
        own = gradient(lambda x: both(x, LABELS[rank : rank + 1]), LOGITS[rank : rank + 1])
    torch.save(own, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # a rank that exits early can crash the other
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """The averaged gradient is that of the whole batch, whose Dice and recall each rank has."""
    need_gloo()
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    values, slopes = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    loss = ours.DC_and_CE_loss(OPTIONS, {}, weight_ce=0.5)
    both = ours.WithSkeletonRecall(loss, 0.3, batch_dice=True, ddp=False)
    value, exact = gradient(lambda x: both(x, LABELS), LOGITS)
    np.testing.assert_allclose((values[0] + values[1]) / 2, value, rtol=1e-9)
    np.testing.assert_allclose(torch.cat(slopes) / 2, exact, rtol=1e-9, atol=1e-12)
