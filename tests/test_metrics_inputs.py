"""Whose arrays `fastloss.metrics.evaluate` takes, in which shapes, and what it refuses."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest
from support import need

from fastloss.metrics import confusion_matrix, evaluate

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 3, (2, 4, 5, 6))
PREDICTION = np.where(RANDOM.random(LABELS.shape) < 0.3, 2 - LABELS, LABELS)
SCORES = RANDOM.normal(size=(2, 3, 4, 5, 6)).astype(np.float32)


def dice(*arrays, **options):
    return evaluate(*arrays, metrics="dice", **options)["dice"]


# ------------------------------------------------------------------ kinds of arrays


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16",
     "float32", "float64", "bfloat16"],
)  # fmt: skip
def test_label_maps_of_any_number_type(dtype):
    kind = need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    wanted = dice(PREDICTION, LABELS)
    assert np.array_equal(dice(PREDICTION.astype(kind), LABELS.astype(kind)), wanted)


def test_label_maps_of_bool():
    wanted = dice((PREDICTION > 0).astype(int), (LABELS > 0).astype(int))
    assert np.array_equal(dice(PREDICTION > 0, LABELS > 0), wanted)


def test_arrays_are_read_wherever_they_lie_and_not_changed():
    wanted = dice(SCORES, LABELS, ignore_index=2)
    scores, labels = np.asfortranarray(SCORES), np.repeat(LABELS, 2, axis=3)[..., ::2]
    for each in (scores, labels):
        each.flags.writeable = False
    before = scores.copy(), labels.copy()
    assert np.array_equal(dice(scores, labels, ignore_index=2), wanted)
    assert np.array_equal(scores, before[0])
    assert np.array_equal(labels, before[1])


def test_tensors_of_pytorch():
    torch = need("torch")
    scores, labels = torch.from_numpy(SCORES), torch.from_numpy(LABELS)
    wanted = dice(SCORES, LABELS)
    assert np.array_equal(dice(scores.requires_grad_(), labels), wanted)
    last = scores.detach().contiguous(memory_format=torch.channels_last_3d)
    assert np.array_equal(dice(last, labels), wanted)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = scores.detach().to(dtype)
        wanted = dice(rounded.double(), labels)
        assert np.array_equal(dice(rounded, labels), wanted)
        masks = dice(rounded, labels, activation="sigmoid")
        assert np.array_equal(masks, dice(rounded.double(), labels, activation="sigmoid"))


def test_arrays_of_jax():
    jnp = need("jax.numpy")
    scores, labels = jnp.asarray(SCORES), jnp.asarray(LABELS)
    assert np.array_equal(dice(scores, labels), dice(SCORES, LABELS))
    rounded = scores.astype(jnp.bfloat16)
    wanted = dice(np.asarray(rounded.astype(jnp.float32)), LABELS)
    assert np.array_equal(dice(rounded, labels), wanted)


# ------------------------------------------------------------------ shapes and defaults


def test_a_channel_axis_of_one_is_left_out():
    wanted = dice(PREDICTION, LABELS)
    for predicted in (PREDICTION, PREDICTION[:, None]):
        for labels in (LABELS, LABELS[:, None]):
            mask = np.ones_like(labels, bool)
            assert np.array_equal(dice(predicted, labels, mask=mask), wanted)
            scored = dice(SCORES, labels, mask=mask)
            assert np.array_equal(scored, dice(SCORES, LABELS))
    flat = dice(PREDICTION.reshape(2, -1), LABELS.reshape(2, -1))
    assert np.array_equal(flat, wanted)


def test_an_axis_of_one_with_a_spacing_is_one_of_space():
    scores = evaluate(PREDICTION[:, :1, 0], LABELS[:, :1, 0], metrics="dice", spacing=(2, 3))
    assert scores.about["spacing"] == [2, 3]
    scores = evaluate(PREDICTION[:, :1, 0], LABELS[:, :1, 0], metrics="dice", spacing=2)
    assert scores.about["spacing"] == [2]


def test_classes_are_named_after_their_labels():
    assert evaluate(PREDICTION, LABELS).classes == ("1", "2")
    assert evaluate(PREDICTION, LABELS, classes=5).classes == ("1", "2", "3", "4")
    assert evaluate(PREDICTION, LABELS, include_background=True).classes == ("0", "1", "2")
    names = ("background", "liver", "tumour")
    assert evaluate(PREDICTION, LABELS, classes=names).classes == names[1:]
    assert evaluate(SCORES, LABELS, include_background=True, classes=names).classes == names
    assert evaluate(SCORES, LABELS).classes == ("1", "2")


def test_masks_that_may_overlap_have_no_background():
    masks = SCORES > 1
    for activation in ("sigmoid", "none"):
        options = {"metrics": "dice", "activation": activation}
        assert evaluate(SCORES, masks, **options).classes == ("0", "1", "2")
        assert evaluate(SCORES, masks, include_background=False, **options).classes == ("1", "2")
        names = ("whole", "core", "enhancing")
        assert evaluate(SCORES, masks, classes=names, **options).classes == names
        assert evaluate(SCORES[:, :1], LABELS > 0, **options).classes == ("0",)


def test_volumes_without_foreground_have_class_1():
    empty = np.zeros((1, 2, 3, 4), np.uint8)
    scores = evaluate(empty, empty, metrics="dice")
    assert scores.classes == ("1",)
    assert isnan(scores["dice"].item())
    ignored = np.full_like(empty, 255)
    assert np.isnan(dice(empty + 1, ignored, ignore_index=255)).all()


@pytest.mark.parametrize("shape", [(0, 4, 5), (0, 4, 5, 6), (2, 0, 5)])
def test_batches_and_volumes_of_nothing(shape):
    empty = np.zeros(shape, np.uint8)
    scores = evaluate(empty, empty, metrics=("dice", "iou"), classes=3)
    assert scores["dice"].shape == (shape[0], 2)
    assert np.isnan(scores["dice"]).all()
    assert isnan(scores.mean()["dice"])
    for activation in ("softmax", "sigmoid"):
        logits = np.zeros((shape[0], 3, *shape[1:]), np.float32)
        assert np.isnan(dice(logits, empty, activation=activation)).all()
    assert not confusion_matrix(empty, empty, classes=3).any()


@pytest.mark.parametrize("labels", [254, 255, 256, 1500])
def test_ignored_and_masked_voxels_with_many_labels(labels):
    """Among them as many as a byte can hold, and more than are counted in a matrix."""
    reference = np.arange(labels).repeat(4)[None]
    prediction = reference.copy()
    prediction[0, ::4] = labels - 1
    reference[0, 1::4] = 60_000
    mask = np.ones(reference.shape, bool)
    mask[0, 2::4] = False
    found = dice(prediction, reference, classes=labels, ignore_index=60_000, mask=mask)
    # Of four voxels two count, one of which is wrong, save of the last class.
    wanted = np.full((1, labels - 1), 2 / 3)
    wanted[0, -1] = 2 * 2 / (2 * 2 + labels - 1)
    np.testing.assert_allclose(found, wanted, 1e-12)


def test_a_voxel_that_is_ignored_may_hold_anything():
    scores, masks = SCORES.copy(), (SCORES > 0.3).astype(np.int16)
    outside = np.s_[:, :, 2:]
    scores[outside], masks[outside] = nan, 255
    for activation in ("sigmoid", "softmax"):
        options = {"activation": activation, "include_background": True}
        wanted = dice(SCORES[:, :, :2], masks[:, :, :2], **options)
        assert np.array_equal(dice(scores, masks, ignore_index=255, **options), wanted)
        labels = LABELS.copy()
        labels[:, 2:] = -1
        wanted = dice(SCORES[:, :, :2], LABELS[:, :2], **options)
        assert np.array_equal(dice(scores, labels, ignore_index=-1, **options), wanted)


# ------------------------------------------------------------------ bad input


BAD = {
    "no numbers": (TypeError, "prediction: expected integers", (PREDICTION + 0j, LABELS), {}),
    "a list": (TypeError, "reference: expected", (PREDICTION, LABELS.tolist()), {}),
    "another batch": (ValueError, "reference: expected shape", (SCORES, LABELS[:1]), {}),
    "another shape": (ValueError, "reference: expected shape", (SCORES, LABELS[..., 1:]), {}),
    "other labels": (
        ValueError, "reference: expected shape .* that of the prediction",
        (PREDICTION, LABELS[:, 1:]), {"activation": "labels"},
    ),
    "no space": (ValueError, "prediction: expected a label map", (np.zeros(3), np.zeros(3)), {}),
    "scores without space": (
        ValueError, "prediction: expected .batch, classes", (np.zeros((3, 2)), np.zeros(3)), {},
    ),
    "too many axes": (
        ValueError, "prediction: expected a label map .* activation=", (SCORES, SCORES > 0), {},
    ),
    "one channel": (
        ValueError, "prediction: expected at least 2 channels .*'sigmoid'",
        (SCORES[:, :1], LABELS), {"activation": "softmax"},
    ),
    "whole scores": (
        TypeError, "prediction: expected floating scores, got int64", (LABELS, LABELS[:, 0]), {},
    ),
    "fractions": (
        ValueError, "prediction: expected whole numbers, but 240 labels are not; scores need",
        (PREDICTION + 0.5, LABELS), {},
    ),
    "NaN": (ValueError, "reference: expected", (PREDICTION, np.full(LABELS.shape, nan)), {}),
    "a label beyond": (
        ValueError, r"reference: expected labels in \[0, 3\), but 1 label is not; the first is 7",
        (SCORES, np.where(np.arange(240).reshape(LABELS.shape) == 9, 7, LABELS)), {},
    ),
    "a mask's label beyond": (
        ValueError, r"reference: expected labels in \[0, 2\)", (SCORES[:, :1], LABELS),
        {"activation": "sigmoid"},
    ),
    "a negative label": (ValueError, "prediction: expected labels", (-PREDICTION, LABELS), {}),
    "an ignored prediction": (
        ValueError, "prediction: expected labels", (PREDICTION - 1, LABELS), {"ignore_index": -1},
    ),
    "a huge label": (
        ValueError, "reference: expected labels up to 65534, got 70000",
        (PREDICTION, LABELS + 70_000 - LABELS.max()), {},
    ),
    "mask": (ValueError, "mask: expected shape", (SCORES, LABELS), {"mask": LABELS[..., 1:] > 0}),
    "activation": (
        ValueError, "activation: expected one", (SCORES, LABELS), {"activation": "relu"},
    ),
    "ignore_index": (TypeError, "ignore_index: expected", (SCORES, LABELS), {"ignore_index": "a"}),
    "too many classes": (ValueError, "classes: expected 3", (SCORES, LABELS), {"classes": 4}),
    "too few names": (
        ValueError, "classes: expected 3, .* got 2", (SCORES, LABELS),
        {"classes": ("a", "b"), "activation": "sigmoid"},
    ),
    "a region beyond": (
        ValueError, r"classes\['a'\]: expected labels in \[0, 3\)", (SCORES, LABELS),
        {"classes": {"a": (1, 3)}},
    ),
    "an empty region": (
        ValueError, r"classes\['a'\]: expected at least one", (SCORES, LABELS),
        {"classes": {"a": ()}},
    ),
    "a region of names": (
        TypeError, r"classes\['a'\]: expected a label", (SCORES, LABELS), {"classes": {"a": "b"}},
    ),
    "no classes": (ValueError, "classes: expected at least one", (SCORES, LABELS), {"classes": {}}),
    "a class twice": (
        ValueError, "classes: expected names that differ", (SCORES, LABELS),
        {"classes": ("a", "b", "b")},
    ),
    "classes of a kind": (TypeError, "classes: expected", (SCORES, LABELS), {"classes": "liver"}),
    "numbers as names": (TypeError, "classes: expected", (SCORES, LABELS), {"classes": [0, 1, 2]}),
    "0 classes": (ValueError, "classes: expected a number", (SCORES, LABELS), {"classes": 0}),
    "samples": (ValueError, "samples: expected 2 names", (SCORES, LABELS), {"samples": ["a"]}),
    "metrics": (ValueError, "metrics: .* got 'dize'", (SCORES, LABELS), {"metrics": "dize"}),
    "no metrics": (ValueError, "metrics: expected at least", (SCORES, LABELS), {"metrics": ()}),
    "a metric's kind": (TypeError, "metrics: expected names", (SCORES, LABELS), {"metrics": [1]}),
    "spacing": (ValueError, "spacing", (SCORES, LABELS), {"spacing": (1, 1)}),
    "tolerance": (ValueError, "tolerance: ", (SCORES, LABELS), {"tolerance": -1}),
    "tolerances": (ValueError, "tolerance: .* 2, one", (SCORES, LABELS), {"tolerance": [1, 2, 3]}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    kind, message, arrays, options = BAD[case]
    with pytest.raises(kind, match=f"^{message}"):
        evaluate(*arrays, **({"metrics": "dice"} | options))
