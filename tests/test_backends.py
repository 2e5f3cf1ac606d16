"""Every backend against the reference in float64, over arrays of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from support import assert_agree, example, need, norm, one_hot, packed, reference

import fastloss as fl

MOST_LOGITS = 150_000
SPATIAL = (
    (), (1,), (2,), (7,), (255,), (256,), (257,), (511,), (513,), (1000,), (5000,), (20000,),
    (1, 1), (3, 5), (16, 16), (51, 5), (32, 33), (100, 57),
    (2, 3, 4), (8, 8, 8), (3, 17, 5), (1, 256, 1), (16, 17, 18), (21, 22, 23),
    (2, 3, 4, 5), (5, 1, 9, 8), (4, 8, 8, 9),
)  # fmt: skip
CLASSES = (1, 2, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 31, 32, 33, 40)
LABEL_TYPES = (
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float32",
    "float64",
    "float16",
)
LAYOUTS = (
    "contiguous",
    "channels last",
    "fortran",
    "cropped",
    "reversed",
    "stepped",
    "transposed",
    "wide",
    "packed",
)


def relayout(array: np.ndarray, layout: str) -> np.ndarray:
    """The same numbers in other strides."""
    if layout == "contiguous" or array.ndim < 2:
        return np.ascontiguousarray(array)
    if layout == "channels last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "cropped":
        padded = np.pad(array, [(1, 2)] * array.ndim)
        return padded[tuple(slice(1, 1 + n) for n in array.shape)]
    if layout == "reversed":
        back = (slice(None, None, -1),) * array.ndim
        return np.ascontiguousarray(array[back])[back]
    if layout == "stepped":
        last = array.ndim - 1
        return np.repeat(np.repeat(array, 2, axis=last), 3, axis=0)[::3, ..., ::2]
    if layout == "transposed":
        axes = (0, 1, *reversed(range(2, array.ndim)))
        return np.ascontiguousarray(array.transpose(axes)).transpose(axes)
    if layout == "packed":
        return packed(array)
    assert layout == "wide", layout
    # The voxels of a row are far apart, as in one channel of an interleaved volume.
    return np.repeat(array[..., None], 5, axis=-1)[..., 2]


@dataclass
class Case:
    loss: fl.Loss
    logits: np.ndarray
    target: np.ndarray
    weight: np.ndarray | None
    upstream: float

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis's summary of a failing example, without all its numbers."""
        arrays = {"logits": self.logits, "target": self.target, "weight": self.weight}
        shown = [f"{k}={a.dtype}{a.shape}" for k, a in arrays.items() if a is not None]
        printer.text(f"Case({self.loss!r}, {', '.join(shown)}, upstream={self.upstream})")


def drawn_labels(
    draw: st.DrawFn, rng: np.random.Generator, classes: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Labels that change from voxel to voxel, or in runs, as organs do."""
    stretch = draw(st.sampled_from([1, 1, 30, 700]))
    size = int(np.prod(shape))
    labels = np.repeat(rng.integers(0, classes, size // stretch + 1), stretch)
    return labels[:size].reshape(shape)


@st.composite
def term(draw: st.DrawFn, classes: int, activation: str) -> fl.Term:
    def class_weight(count: int) -> Any:
        kind = draw(st.sampled_from(["none", "number", "array"]))
        if kind == "none":
            return None
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        return 0.7 if kind == "number" else rng.uniform(0, 1, count)

    name = draw(
        st.sampled_from(["CrossEntropy", "Focal", "Dice", "Jaccard", "Tversky", "GeneralizedDice"])
    )
    reduction = draw(st.sampled_from(["mean", "sum"]))
    if name == "CrossEntropy":
        return fl.CrossEntropy(
            weight=class_weight(classes),
            reduction=reduction,
            label_smoothing=draw(st.sampled_from([0.0, 0.1, 0.5])),
        )
    if name == "Focal":
        gamma = draw(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.25]))
        return fl.Focal(gamma=gamma, alpha=class_weight(classes), reduction=reduction)
    background = classes == 1 or draw(st.booleans())
    options: dict[str, Any] = {
        "include_background": background,
        "batch": draw(st.booleans()),
        "squared": draw(st.booleans()),
        "weight": class_weight(classes - (not background)),
        "reduction": reduction,
    }
    if name == "Tversky":
        options |= {
            "alpha": draw(st.sampled_from([0.3, 0.5])),
            "beta": draw(st.sampled_from([0.5, 0.7])),
            # With p² and soft targets 1 − TI crosses 0, where below γ = 1 its power has no slope.
            "gamma": draw(st.sampled_from([1.0, 1.5] if options["squared"] else [1.0, 0.75, 1.5])),
        }
    if name == "GeneralizedDice":
        options["weighting"] = draw(st.sampled_from(["square", "simple", "uniform"]))
    return getattr(fl, name)(**options)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[str, ...]) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    activation = draw(st.sampled_from(["softmax", "softmax", "sigmoid", "none"]))
    spatial = draw(st.sampled_from(SPATIAL))
    voxels = int(np.prod(spatial))
    classes = draw(st.sampled_from(CLASSES))
    if draw(st.integers(0, 15)) == 0:
        classes = draw(st.sampled_from([300, 1000]))
    while classes * voxels > MOST_LOGITS:
        classes = max(1, classes // 2)
    batch = draw(st.sampled_from([1, 1, 2, 3]))
    batch = batch if batch * classes * voxels <= MOST_LOGITS else 1
    shape = (batch, classes, *spatial)

    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    if activation == "none":
        x = rng.uniform(0.01, 0.99, shape).astype(dtype)
    else:
        x = (draw(st.sampled_from([0.1, 1.0, 4.0])) * rng.normal(size=shape)).astype(dtype)

    ignore_index = draw(st.sampled_from([None, None, 0, classes - 1, 100, -1]))
    if ignore_index is not None and (classes == 1 or ignore_index == 100 >= classes):
        ignore_index = -1 if classes == 1 else 100
    labels = drawn_labels(draw, rng, classes, (batch, *spatial))
    kind = draw(st.sampled_from(["labels", "labels", "labels", "one-hot", "multi-label", "soft"]))
    single = classes == 1 and activation != "softmax"
    # Softmax over one channel has one class: its target is a label map of zeros.
    if (kind == "labels" or classes == 1) and not single:
        if ignore_index is not None:
            labels = np.where(rng.uniform(size=labels.shape) < 0.2, ignore_index, labels)
        low, high = labels.min(initial=0), labels.max(initial=0)
        possible = [
            t
            for t in LABEL_TYPES
            if np.dtype(t).kind == "f" or (np.iinfo(t).min <= low and high <= np.iinfo(t).max)
        ]
        if low >= 0 and high < 2:
            possible.append("bool")
        target = labels.astype(draw(st.sampled_from(possible)))
        if draw(st.booleans()):
            target = target[:, None]
    else:
        if kind == "soft":
            dense = rng.uniform(size=shape)
            dense /= dense.sum(axis=1, keepdims=True) if classes > 1 else 1
            type_ = draw(st.sampled_from(["float16", "float32", "float64"]))
        else:
            dense = one_hot(labels, classes) if kind == "one-hot" else rng.uniform(size=shape) < 0.3
            types = ["uint8", "bool", "int32", "float16", "float32", "float64", "int64"]
            type_ = draw(st.sampled_from(types))
        target = dense.astype(type_)
        if (
            ignore_index is not None
            and not 0 <= ignore_index < classes
            and ignore_index in (np.array([ignore_index]).astype(type_).astype(int))
            and type_ != "bool"
        ):
            ignored = rng.uniform(size=(batch, *spatial)) < 0.2
            target = np.where(ignored[:, None], np.array(ignore_index, type_), target)
        if classes == 1 and single and draw(st.booleans()):
            target = target[:, 0]

    weight = None
    weight_kind = draw(st.sampled_from(["none", "none", "float", "integer", "mask"]))
    if weight_kind != "none":
        if weight_kind == "float":
            type_ = draw(st.sampled_from(["float32", "float64", "float16"]))
            weight = rng.uniform(0, 2, (batch, *spatial)).astype(type_)
        elif weight_kind == "integer":
            type_ = draw(st.sampled_from(["uint8", "int16", "int64"]))
            weight = rng.integers(0, 4, (batch, *spatial)).astype(type_)
        else:
            weight = rng.uniform(size=(batch, *spatial)) < 0.6
        if draw(st.booleans()):
            weight = weight[:, None]

    parts = draw(st.lists(term(classes, activation), min_size=1, max_size=3))
    factors = draw(st.lists(st.sampled_from([1.0, 0.25, 2.0]), min_size=3, max_size=3))
    loss = sum(f * t for f, t in zip(factors, parts, strict=False))
    loss = fl.Loss(loss, activation=activation, ignore_index=ignore_index)
    event(f"{activation}, {kind}, {dtype}")
    return Case(loss, x, target, weight, draw(st.sampled_from([1.0, 1.0, 3.5])))


def check(case: Case, layouts: tuple[str, str, str], channels_last: bool, reuse: bool) -> None:
    loss, x, y, w = case.loss, case.logits, case.target, case.weight
    ndim = x.ndim
    expected = reference(loss, x, y, w, upstream=case.upstream)
    # The size of the gradient without cancellation: at nearly equal probabilities.
    flat = np.clip(x, 0.4, 0.6) if loss.activation == "none" else 0.1 * x.astype(np.float64)
    scale = norm(reference(loss, flat, y, w, upstream=case.upstream)[1])
    # Even there the sums may cancel, most of all with few voxels.
    scale = max(scale, 0.3 * case.upstream / (x.shape[0] * np.sqrt(max(x[0].size, 1))))
    value_scale = 0.5
    if x.shape[1] == 1 and loss.activation == "softmax":  # everything cancels
        scale, value_scale = case.upstream * np.sqrt(x.size), 0.5 + 0.1 * x.size

    if channels_last:
        loss = fl.Loss(loss, channel_axis=-1)
        x, y, w = (
            np.ascontiguousarray(np.moveaxis(a, 1, -1)) if a is not None and a.ndim == ndim else a
            for a in (x, y, w)
        )
    x, y = relayout(x, layouts[0]), relayout(y, layouts[1])
    w = None if w is None else relayout(w, layouts[2])
    before = [None if a is None else a.copy() for a in (x, y, w)]
    out = np.full_like(x, np.nan) if reuse else None
    value, gradient = loss.value_and_grad(x, y, w, upstream=case.upstream, out=out)

    for array, copy in zip((x, y, w), before, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert gradient.shape == x.shape
    assert gradient.dtype == x.dtype
    assert out is None or gradient is out
    assert value.dtype == (np.float64 if x.dtype == np.float64 else np.float32)
    assert value == loss(x, y, w)
    if channels_last:
        gradient = np.moveaxis(gradient, -1, 1)
    assert_agree(value, gradient, expected, scale, value_scale)


layouts = st.tuples(*[st.sampled_from(LAYOUTS)] * 3)


@settings(max_examples=settings().max_examples * 3 // 2)
@given(cases(("float32",)), layouts, st.booleans(), st.booleans())
def test_float32(
    backend: str, case: Case, layouts: tuple[str, str, str], channels_last: bool, reuse: bool
) -> None:
    check(case, layouts, channels_last, reuse)


@settings(max_examples=settings().max_examples // 2)
@given(cases(("float64",)), layouts, st.booleans())
def test_float64(
    backend: str, case: Case, layouts: tuple[str, str, str], channels_last: bool
) -> None:
    check(case, layouts, channels_last, False)


@settings(max_examples=settings().max_examples // 2)
@given(cases(("float16",)), layouts, st.booleans())
def test_float16(
    backend: str, case: Case, layouts: tuple[str, str, str], channels_last: bool
) -> None:
    check(case, layouts, channels_last, False)


@settings(max_examples=settings().max_examples // 2)
@given(data=st.data(), layouts=layouts, channels_last=st.booleans())
def test_bfloat16(
    backend: str, data: st.DataObject, layouts: tuple[str, str, str], channels_last: bool
) -> None:
    need("ml_dtypes")
    check(data.draw(cases(("bfloat16",))), layouts, channels_last, False)


@given(st.data())
def test_what_training_mostly_is(backend: str, data: st.DataObject) -> None:
    """The fastest paths: softmax, Dice and cross-entropy, few classes, whole vectors of voxels."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    classes = draw(st.sampled_from([2, 2, 2, 3, 4, 14, 40]))
    shape = (2, classes, draw(st.sampled_from([8, 32, 512, 520, 1100, 3000])))
    dtype = draw(st.sampled_from(["float32", "float32", "float16", "float64"]))
    x = (draw(st.sampled_from([1.0, 30.0])) * rng.normal(size=shape)).astype(dtype)
    labels = drawn_labels(draw, rng, classes, (2, shape[2]))
    ignore_index = draw(st.sampled_from([None, 1, 255]))
    if ignore_index is not None:
        labels[rng.uniform(size=labels.shape) < 0.2] = ignore_index
    target = labels.astype(np.uint8)
    if ignore_index != 255 and draw(st.booleans()):
        target = one_hot(labels, classes, np.float32)
        if draw(st.booleans()):
            target = (0.9 * target + rng.uniform(0, 0.1, shape)).astype(dtype)
    weight: Any = None
    weight_kind = draw(st.sampled_from(["mask", "number", "none"]))
    if weight_kind == "number":
        weight = rng.uniform(0, 2, labels.shape)
    elif weight_kind == "mask":  # and masked logits may be anything
        weight = rng.uniform(size=labels.shape) < 0.8
        x = np.where(weight[:, None], x, np.array(np.nan, dtype))
    dice = fl.Dice(include_background=draw(st.booleans()), batch=draw(st.booleans()))
    entropy = fl.CrossEntropy(weight=rng.uniform(0, 1, classes) if draw(st.booleans()) else None)
    loss = fl.Loss(
        draw(st.sampled_from([dice, entropy, dice + entropy])), ignore_index=ignore_index
    )
    layouts = [draw(st.sampled_from(["contiguous", "channels last"])) for _ in range(2)]
    case = Case(loss, x, target, weight, 1.0)
    check(case, (*layouts, "contiguous"), draw(st.booleans()), draw(st.booleans()))


def test_every_type_of_label(backend: str) -> None:
    for type_ in (*LABEL_TYPES, "bool"):
        loss = fl.Dice() + fl.CrossEntropy()
        x, y = example(2, 2, (300,), dtype=np.float32)
        assert_agree(*loss.value_and_grad(x, y.astype(type_)), reference(loss, x, y))


def test_every_type_of_dense_target(backend: str) -> None:
    for type_ in (*LABEL_TYPES, "bool"):
        loss = fl.Loss(fl.Dice(squared=True), fl.CrossEntropy(), activation="sigmoid")
        x, y = example(2, 3, (300,), dtype=np.float32)
        g = one_hot(y, 3)
        assert_agree(*loss.value_and_grad(x, g.astype(type_)), reference(loss, x, g))


def test_every_type_of_voxel_weight(backend: str) -> None:
    for type_ in (*LABEL_TYPES, "bool"):
        loss = fl.Dice() + fl.CrossEntropy()
        x, y = example(2, 3, (300,), dtype=np.float32)
        w = np.random.default_rng(0).integers(0, 2, (2, 300))
        assert_agree(*loss.value_and_grad(x, y, w.astype(type_)), reference(loss, x, y, w))


def test_bfloat16_target_and_weight(backend: str) -> None:
    bfloat16 = need("ml_dtypes").bfloat16
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (300,), dtype=np.float32)
    g = np.random.default_rng(0).uniform(size=x.shape).astype(bfloat16)
    w = np.random.default_rng(1).uniform(size=y.shape).astype(bfloat16)
    expected = reference(loss, x, g.astype(np.float64), w.astype(np.float64))
    assert_agree(*loss.value_and_grad(x, g, w), expected)
    assert_agree(*loss.value_and_grad(x, y.astype(bfloat16)), reference(loss, x, y))


@pytest.mark.parametrize("classes", [1, 2, 3, 8, 16, 33, 300])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_edges_of_tiles(fast_backend: str, classes: int, activation: str) -> None:
    for voxels in (255, 256, 257, 1025):
        terms = fl.Dice(), fl.Dice(squared=True), fl.CrossEntropy(label_smoothing=0.1), fl.Focal()
        loss = fl.Loss(*terms, activation=activation)
        x, y = example(2, classes, (voxels,), dtype=np.float32, activation=activation)
        if classes == 1 and activation != "softmax":
            y = (np.arange(2 * voxels).reshape(2, voxels) % 3 == 0).astype(int)
        expected = reference(loss, x, y)
        scale = norm(reference(loss, x * 0.1 if activation != "none" else x, y)[1])
        scale = max(scale, 1 / np.sqrt(voxels))  # with one class everything cancels
        assert_agree(*loss.value_and_grad(x, y), expected, scale)


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_broadcast_target_and_weight(backend: str, axis: int) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(3, 4, (20, 30), dtype=np.float32)
    w = np.random.default_rng(1).uniform(size=y.shape)
    one = (slice(None),) * (axis - (axis > 0)) + (slice(1),)
    y, w = np.broadcast_to(y[one], y.shape), np.broadcast_to(w[one], w.shape)
    assert 0 in y.strides
    expected = reference(loss, x, y.copy(), w.copy())
    assert_agree(*loss.value_and_grad(x, y, w), expected)
    g = one_hot(y, 4)
    assert_agree(
        *loss.value_and_grad(x, np.broadcast_to(g[:1], g.shape)),
        reference(loss, x, np.repeat(g[:1], 3, axis=0)),
    )


def test_broadcast_logits(backend: str) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(1, 4, (20, 30), dtype=np.float32)
    x, y = np.broadcast_to(x, (3, 4, 20, 30)), np.repeat(y, 3, axis=0)
    value, gradient = loss.value_and_grad(x, y)
    assert gradient.flags.writeable
    assert len(np.unique(gradient[:, 0, 0, 0])) == 1
    assert_agree(value, gradient, reference(loss, x, y))


@pytest.mark.parametrize("axis", [1, 2, 3, 4, -1, -2, -3, -4])
def test_channel_axis(backend: str, axis: int) -> None:
    for kind in ("labels", "labels with channel", "dense"):
        plain = fl.Dice() + fl.CrossEntropy()
        x, y = example(2, 3, (4, 5, 6), dtype=np.float32)
        expected = reference(plain, x, y)
        target = {
            "labels": y,
            "labels with channel": np.expand_dims(y, axis),
            "dense": np.moveaxis(one_hot(y, 3), 1, axis),
        }[kind]
        loss = fl.Loss(plain, channel_axis=axis)
        value, gradient = loss.value_and_grad(np.moveaxis(x, 1, axis), target)
        assert_agree(value, np.moveaxis(gradient, axis, 1), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("dense", [False, True], ids=["labels", "dense"])
def test_memory_that_is_not_aligned(backend: str, dtype: str, dense: bool) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (5, 60), dtype=dtype)
    w = np.random.default_rng(0).uniform(0, 2, y.shape).astype(np.float32)
    regions = (w > 1).astype(np.int32)
    target = one_hot(y, 3, np.float32) if dense else y.astype(np.int32)
    given = packed(target)
    assert not given.flags.aligned
    expected = reference(loss, x, target, w)
    assert_agree(*loss.value_and_grad(packed(x), given, packed(w)), expected)
    expected = reference(loss, x, target, w, regions=regions)
    found = loss.value_and_grad(packed(x), given, packed(w), regions=packed(regions))
    assert_agree(*found, expected)
    # Memory between the numbers of `out` must not change; it may hold the logits.
    right = loss.gradient(x, target)
    records = np.full(x.shape, 7, [("skipped", "u1"), ("numbers", dtype)])
    loss.gradient(x, given, out=records["numbers"])
    np.testing.assert_array_equal(records["numbers"], right)
    assert (records["skipped"] == 7).all()
    over = packed(x)
    loss.gradient(over, target, out=over)
    np.testing.assert_array_equal(over, right)


def test_batches_of_one_voxel_classify_images(backend: str) -> None:
    loss = fl.CrossEntropy()
    x, y = example(300, 5, (), dtype=np.float32)
    assert x.shape == (300, 5)
    assert y.shape == (300,)
    assert_agree(*loss.value_and_grad(x, y), reference(loss, x, y))


@settings(max_examples=20)
@given(st.integers(0, 2**20), st.sampled_from([30.0, 80.0, 200.0]))
def test_widely_spread_logits(backend: str, seed: int, spread: float) -> None:
    loss = fl.Dice() + fl.CrossEntropy() + fl.Focal()
    rng = np.random.default_rng(seed)
    x = (spread * rng.normal(size=(1, 4, 700))).astype(np.float32)
    y = rng.integers(0, 4, (1, 700))
    assert_agree(*loss.value_and_grad(x, y), reference(loss, x, y))
    loss = fl.Loss(loss, activation="sigmoid")
    assert_agree(*loss.value_and_grad(x, y), reference(loss, x, y))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_two_classes(backend: str, dtype: str, weighted: bool) -> None:
    """Labels that change at random, and tiles of one label, with a weight per class."""
    x, y = example(2, 2, (20_001,), dtype=dtype)
    y[0, 1000:], y[1] = 1, np.arange(20_001) > 9000
    w = np.random.default_rng(0).uniform(0, 2, y.shape) * (y != y[:, ::-1]) if weighted else None
    weight = [1.0, 0.3]
    fast = fl.Dice(weight=weight[::-1]) + fl.CrossEntropy(weight=weight)
    for loss in (fast, fast + fl.Dice(squared=True, weight=weight)):
        assert_agree(*loss.value_and_grad(x, y.astype(np.uint8), w), reference(loss, x, y, w))
