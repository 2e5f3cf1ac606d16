"""Bad input raises the right error, naming the argument, before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import example, need, one_hot

import fastloss as fl

LOSS = fl.Dice() + fl.CrossEntropy()
X, Y = example(2, 3, (4, 5), dtype=np.float32)
W = np.ones(Y.shape, np.float32)
G = one_hot(Y, 3, np.float32)


def rejects(error: type[Exception], name: str, *args: Any, loss: Any = LOSS, **kw: Any) -> str:
    """Check that every way of calling raises this error, naming the argument; the message."""
    message = ""
    for call in (loss.value_and_grad, loss.gradient) + (() if kw else (loss, loss.statistics)):
        with pytest.raises(error, match=rf"^{name}: ") as caught:
            call(*args, **kw)
        message = str(caught.value)
    return message


# ------------------------------------------------------------------ kinds of array


@pytest.mark.parametrize("wrong", [None, 3.0, "x", X.tolist(), [X], object()])
def test_what_is_no_array(wrong: Any) -> None:
    rejects(TypeError, "logits", wrong, Y)
    rejects(TypeError, "target", X, wrong)
    if wrong is not None:
        rejects(TypeError, "voxel_weight", X, Y, wrong)
        rejects(TypeError, "out", X, Y, out=wrong)


def test_masked_arrays() -> None:
    message = rejects(TypeError, "logits", np.ma.array(X), Y)
    assert "voxel_weight" in message  # the remedy
    rejects(TypeError, "target", X, np.ma.array(Y))
    rejects(TypeError, "voxel_weight", X, Y, np.ma.array(W))
    rejects(TypeError, "out", X, Y, out=np.ma.array(X))


def test_foreign_byte_order() -> None:
    foreign = X.astype(X.dtype.newbyteorder())
    assert "byte order" in rejects(TypeError, "logits", foreign, Y)
    rejects(TypeError, "target", X, Y.astype(Y.dtype.newbyteorder()))
    rejects(TypeError, "voxel_weight", X, Y, W.astype(W.dtype.newbyteorder()))
    rejects(TypeError, "out", X, Y, out=foreign)


@pytest.mark.parametrize(
    "dtype", ["int32", "uint8", "bool", "complex64", "object", "U3", "longdouble"]
)
def test_dtype_of_logits(dtype: str) -> None:
    assert np.dtype(dtype).name in rejects(TypeError, "logits", X.astype(dtype), Y)


@pytest.mark.parametrize("dtype", ["complex64", "object", "U3", "M8[s]"])
def test_dtype_of_target_and_voxel_weight(dtype: str) -> None:
    zeros = np.zeros(Y.shape, dtype)
    assert np.dtype(dtype).name in rejects(TypeError, "target", X, zeros)
    rejects(TypeError, "voxel_weight", X, Y, zeros)


def test_torch_tensors_that_would_lose_their_graph() -> None:
    torch = need("torch")
    target = torch.tensor(G, requires_grad=True)
    assert "detach" in rejects(TypeError, "target", X, target)
    for logits in (X, torch.tensor(X), torch.tensor(X, requires_grad=True)):
        weight = torch.ones(Y.shape, requires_grad=True)
        assert "detach" in rejects(TypeError, "voxel_weight", logits, Y, weight)


def test_torch_tensors_without_memory() -> None:
    torch = need("torch")
    with pytest.raises(TypeError, match=r"^logits: .* meta"):
        LOSS.value_and_grad(torch.empty(X.shape, device="meta"), Y)
    rejects(TypeError, "target", X, torch.empty(Y.shape, device="meta"))
    rejects(TypeError, "logits", torch.tensor(X).to_sparse(), Y)


def test_torch_complex() -> None:
    torch = need("torch")
    rejects(TypeError, "logits", torch.tensor(X).to(torch.complex64), Y)


# ------------------------------------------------------------------ shapes


@pytest.mark.parametrize("shape", [(), (3,)])
def test_rank_of_logits(shape: tuple[int, ...]) -> None:
    assert str(shape) in rejects(ValueError, "logits", np.zeros(shape, np.float32), Y)


def test_logits_without_channels() -> None:
    rejects(ValueError, "logits", np.zeros((2, 0, 4), np.float32), np.zeros((2, 4), int))


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (2,),
        (2, 4),
        (2, 5, 4),
        (1, 4, 5),
        (3, 4, 5),
        (2, 4, 5, 1),
        (2, 2, 4, 5),
        (2, 4, 4, 5),
        (2, 1, 4, 6),
        (1, 2, 4, 5),
        (2, 4, 5, 3),
        (2, 1, 1, 4, 5),
    ],
)
def test_shape_of_target(shape: tuple[int, ...]) -> None:
    message = rejects(ValueError, "target", X, np.zeros(shape, np.uint8))
    assert str(shape) in message
    assert str(Y.shape) in message


@pytest.mark.parametrize(
    "shape", [(), (2, 4), (2, 5, 4), (3, 4, 5), (1, 5, 4), (4, 5), (1, 3, 4, 5), (2, 4, 5, 1)]
)
def test_shape_of_voxel_weight(shape: tuple[int, ...]) -> None:
    message = rejects(ValueError, "voxel_weight", X, Y, np.ones(shape))
    assert str(shape) in message
    assert str(Y.shape) in message


@pytest.mark.parametrize("axis", [4, 7, -4, -9])
def test_channel_axis_that_is_not_there(axis: int) -> None:
    rejects(ValueError, "channel_axis", X, Y, loss=fl.Loss(LOSS, channel_axis=axis))


# ------------------------------------------------------------------ numbers in the arrays

BAD_LABELS = {
    "uint8": [3, 255],
    "int8": [-1, 3],
    "uint16": [3, 65535],
    "int16": [-1, 300],
    "uint32": [3, 2**32 - 1],
    "int32": [-1, 2**31 - 1],
    "uint64": [3, 2**32, 2**32 + 1],
    "int64": [-1, 2**32, 2**32 + 1, -(2**32)],
    "float32": [0.5, -1.0, 3.0, 2.0**32],
    "float64": [0.5, 2.5, -0.25, 3.0, 2.0**32],
    "float16": [0.5, -1.0, 3.0],
}


@pytest.mark.parametrize("dtype", BAD_LABELS)
def test_labels_out_of_range(backend: str, dtype: str) -> None:
    for label in BAD_LABELS[dtype]:
        y = Y.astype(dtype)
        y[0, 1, 2] = label
        message = rejects(ValueError, "target", X, y)
        shown = int(label) if label == int(label) else label
        assert f"the first is {shown}" in message
        assert "but 1 label is not" in message
        y[1, 3] = label
        message = rejects(ValueError, "target", X, y[:, None])
        assert "but 6 labels are not" in message
        assert "[0, 3)" in message


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "float32", "float64"])
def test_the_first_bad_label_is_the_first_in_the_array(backend: str, dtype: str) -> None:
    x, y = example(2, 3, (70, 80), dtype=np.float32)
    y = y.astype(dtype)
    y[0, 60, 70], y[0, 69, 1], y[1, 0, 0] = 7, 8, 9
    message = rejects(ValueError, "target", x, y)
    assert "3 labels" in message
    assert message.endswith("first is 7")


def test_nan_and_infinite_labels(backend: str) -> None:
    for label in (np.nan, np.inf, -np.inf):
        y = Y.astype(np.float32)
        y[1, 2, 3] = label
        assert "1 label" in rejects(ValueError, "target", X, y)


def test_labels_do_not_wrap_around_to_the_ignored_one(backend: str) -> None:
    for dtype, label, ignore in (
        ("uint8", 255, -1),
        ("int8", -1, 255),
        ("uint16", 65535, -1),
        ("int64", 2**32 - 1, -1),
        ("int64", 2**32 + 255, 255),
        ("uint64", 2**64 - 1, -1),
        ("int32", -1, 2**32 - 1),
    ):
        y = Y.astype(dtype)
        y[0, 0, 0] = label
        message = rejects(ValueError, "target", X, y, loss=fl.Loss(LOSS, ignore_index=ignore))
        assert str(ignore) in message


def test_labels_are_checked_where_the_weight_is_zero(backend: str) -> None:
    y, w = Y.copy(), W.copy()
    y[0, 0, 0], w[0, 0, 0] = 7, 0
    rejects(ValueError, "target", X, y, w)


def test_labels_are_checked_in_other_strides(backend: str) -> None:
    y = np.asfortranarray(Y)
    y[0, 3, 4] = 9
    rejects(ValueError, "target", X, y)
    rejects(ValueError, "target", X, np.broadcast_to(y[:1], y.shape))


# Numbers other than 0 and 1, including some that truncation would turn into these.
BAD_NUMBERS = {
    "bool": [2, 255],  # from arbitrary bytes
    "uint8": [2, 255],
    "int8": [-1, 2],
    "uint16": [256, 65535],
    "int16": [-1, 257],
    "uint32": [2**16, 2**32 - 1],
    "int32": [-1, 2**24 + 1],
    "uint64": [2**32 + 1, 2**63],
    "int64": [-255, 2**32, 2**32 + 1],
}
# A mask or a dense target for every path: the activation, the classes, the loss.
DENSE: list[tuple[str, int, fl.Loss]] = [
    ("sigmoid", 1, LOSS),
    ("none", 1, LOSS),
    ("sigmoid", 3, LOSS + fl.Focal()),
    ("softmax", 2, LOSS),
    ("softmax", 3, LOSS),
    ("softmax", 5, fl.Dice(squared=True) + fl.Focal()),
    ("softmax", 40, LOSS),
]


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: f"{kind[0]}, {kind[1]}")
def test_integers_of_masks_and_dense_targets(backend: str, kind: tuple[str, int, fl.Loss]) -> None:
    """Integers must be 0 or 1, wherever they are; floating-point numbers may be anything."""
    for dtype in BAD_NUMBERS:
        activation, classes, loss = kind
        loss = fl.Loss(loss, activation=activation)
        x, y = example(2, classes, (9, 10), dtype=np.float32, activation=activation)
        stored = "uint8" if dtype == "bool" else dtype
        g = (y[:, None] + np.arange(classes)[:, None, None] % 2 == 1).astype(stored)
        w = np.ones(y.shape, np.float32)
        w[1, 8, 9] = 0  # labels are checked there too
        good = loss.value_and_grad(x, g.view(dtype), w)
        for got, exact in zip(good, loss.value_and_grad(x, g.astype(np.float32), w), strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-9)
        for number in BAD_NUMBERS[dtype]:
            bad = g.copy()
            bad[1, -1, 8, 9] = number  # the last class and voxel
            first = bad[:, 0] if classes == 1 else bad
            for target, weight in ((first, None), (bad, w), (np.asfortranarray(bad), w)):
                message = rejects(ValueError, "target", x, target.view(dtype), weight, loss=loss)
                assert message.endswith(f"but 1 number is not; the first is {number}")
            bad[1, 0, 0, 2:4] = number
            message = rejects(ValueError, "target", x, bad.view(dtype), loss=loss)
            assert "0 or 1 in a " in message
            assert message.endswith(f"but 3 numbers are not; the first is {number}")
            if dtype != "bool":
                assert np.isfinite(loss(x, bad.astype(np.float32) / np.abs(bad).max()))


def test_the_first_bad_number_is_of_the_first_voxel(backend: str) -> None:
    loss = fl.Loss(LOSS, activation="sigmoid")
    x, _ = example(2, 3, (70, 80), dtype=np.float32)
    g = np.zeros(x.shape, np.int16)
    g[0, 0, 69, 1], g[0, 2, 60, 70], g[1, 0, 0, 0] = 7, 8, 9
    message = rejects(ValueError, "target", x, g, loss=loss)
    assert message.endswith("but 3 numbers are not; the first is 8")


def test_a_mask_of_0_and_255(backend: str) -> None:
    """It is refused, unless 255 is the ignore_index: then those voxels are ignored."""
    x = np.array([[[8, -8, 8, -8, 3]]], np.float32)
    mask = np.array([[1, 0, 1, 0, 255]], np.uint8)
    loss = fl.Loss(LOSS, activation="sigmoid")
    rejects(ValueError, "target", x, mask * 255, loss=loss)
    assert rejects(ValueError, "target", x, mask, loss=loss).endswith("the first is 255")
    ignoring = fl.Loss(loss, ignore_index=255)
    value, gradient = ignoring.value_and_grad(x, mask)
    expected, slope = loss.value_and_grad(x[..., :4], mask[..., :4])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :4], slope, rtol=1e-5)
    assert not gradient[..., 4].any()
    mask[0, 1] = 7
    message = rejects(ValueError, "target", x, mask, loss=ignoring)
    assert "expected 0 or 1 or ignore_index=255 in a mask" in message
    assert message.endswith("but 1 number is not; the first is 7")


def test_ignored_numbers_of_dense_targets(backend: str) -> None:
    x, _ = example(1, 3, (4, 5), dtype=np.float32)
    for dtype, ignored in (("uint8", 255), ("int8", -1), ("int64", 2**32), ("uint64", 7)):
        g = np.zeros(x.shape, dtype)
        g[:, 1], g[0, 0, 2, 3] = 1, ignored  # one channel is enough
        loss = fl.Loss(LOSS, activation="sigmoid", ignore_index=ignored)
        assert not loss.gradient(x, g)[..., 2, 3].any()
        g[0, 2, 3, 3] = 2
        assert f"ignore_index={ignored}" in rejects(ValueError, "target", x, g, loss=loss)
    # A number that the dtype cannot hold is not truncated to one that it can.
    for dtype, number, other in (("uint8", 255, -1), ("int8", -1, 255), ("int64", 7, 7 + 2**32)):
        g = np.zeros(x.shape, dtype)
        g[0, 2, 3, 3] = number
        loss = fl.Loss(LOSS, activation="sigmoid", ignore_index=other)
        rejects(ValueError, "target", x, g, loss=loss)
    # Where ignore_index is a class, it is no number.
    loss = fl.Loss(LOSS, activation="sigmoid", ignore_index=2)
    g = np.zeros(x.shape, np.uint8)
    g[0, 0, 3, 3] = 2
    assert "ignore" not in rejects(ValueError, "target", x, g, loss=loss)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("dense", [False, True])
def test_voxel_weights_out_of_range(backend: str, dtype: str, dense: bool) -> None:
    for weight in (-1.0, -1e-6, np.nan, np.inf, -np.inf):
        w = W.astype(dtype)
        w[1, 2, 3] = weight
        target = G if dense else Y
        message = rejects(ValueError, "voxel_weight", X, target, w)
        assert "1 number is not" in message
        w[1, 3] = weight
        message = rejects(ValueError, "voxel_weight", X, target, w)
        assert "6 numbers are not" in message
        assert f"first is {weight:g}" in message or dtype == "float16"


def test_negative_integer_weights(backend: str) -> None:
    w = W.astype(np.int16)
    w[1, 2, 3] = -2
    assert rejects(ValueError, "voxel_weight", X, Y, w).endswith("first is -2")


def test_weights_are_checked_where_the_label_is_ignored(backend: str) -> None:
    w = np.where(Y == 1, -1.0, 1.0)
    rejects(ValueError, "voxel_weight", X, Y, w, loss=fl.Loss(LOSS, ignore_index=1))


def test_nothing_is_written_when_the_input_is_bad(backend: str) -> None:
    x, y = example(2, 3, (40, 50), dtype=np.float32)
    bad, w = y.copy(), np.ones(y.shape)
    bad[1, 39, 49], w[1, 39, 49] = 3, -1
    out, before = np.full_like(x, 7), x.copy()
    for target, weight in ((bad, None), (y, w)):
        for call in (LOSS.value_and_grad, LOSS.gradient):
            with pytest.raises(ValueError, match=r"1 (label|number)"):
                call(x, target, weight, out=out)
            with pytest.raises(ValueError, match=r"1 (label|number)"):
                call(x, target, weight, out=x)
    assert (out == 7).all()
    np.testing.assert_array_equal(x, before)
    # The next call is not affected.
    assert np.isfinite(LOSS(x, y))


# ------------------------------------------------------------------ out and upstream


def test_out_that_cannot_take_the_gradient() -> None:
    fixed = np.empty_like(X)
    fixed.flags.writeable = False
    assert "writable" in rejects(ValueError, "out", X, Y, out=fixed)
    assert "shape" in rejects(ValueError, "out", X, Y, out=np.empty((2, 3, 5, 4), np.float32))
    assert "float64" in rejects(TypeError, "out", X, Y, out=X.astype(np.float64))
    rejects(TypeError, "out", X, Y, out=X.astype(np.int32))
    shared = np.lib.stride_tricks.as_strided(np.empty(1, np.float32), X.shape, (0,) * 4)
    rejects(ValueError, "out", X, Y, out=shared)


def test_out_of_overlapping_rows() -> None:
    """Overlapping elements are refused even without a stride of 0."""
    x, y = example(1, 2, (4, 4), dtype=np.float32)
    rows = np.lib.stride_tricks.as_strided(np.zeros(64, np.float32), x.shape, (64, 32, 4, 4))
    rejects(ValueError, "out", x, y, out=rows)


def test_out_that_overlaps_an_input() -> None:
    memory = np.zeros(2 * X.size, np.float32)
    x = memory[: X.size].reshape(X.shape)
    x[...] = X
    shifted = memory[4 : X.size + 4].reshape(X.shape)
    assert "overlaps the logits" in rejects(ValueError, "out", x, Y, out=shifted)
    reordered = x.reshape(X.shape)[..., ::-1]
    rejects(ValueError, "out", x, Y, out=reordered)
    square = np.zeros((2, 3, 4, 4), np.float32)
    rejects(ValueError, "out", square, Y[..., :4], out=square.swapaxes(2, 3))
    g = G.copy()
    assert "overlaps the target" in rejects(ValueError, "out", X, g, out=g)
    labels = memory.view(np.int64)[: Y.size].reshape(Y.shape)
    rejects(ValueError, "out", X, labels, out=x)
    weight = memory[: Y.size].reshape(Y.shape)
    assert "overlaps the voxel_weight" in rejects(ValueError, "out", X, Y, weight, out=x)
    # Interleaved without a common element: no overlap.
    both = np.zeros((*X.shape, 2), np.float32)
    both[..., 0] = X
    np.testing.assert_array_equal(
        LOSS.gradient(both[..., 0], Y, out=both[..., 1]), LOSS.gradient(X, Y)
    )


def test_shape_of_upstream() -> None:
    rejects(ValueError, "upstream", X, Y, upstream=np.ones(2))
    none = fl.Dice(reduction="none")
    for wrong in (1.0, np.ones(3), np.ones((3, 2)), np.ones((2, 3, 1))):
        rejects(ValueError, "upstream", X, Y, loss=none, upstream=wrong)


# ------------------------------------------------------------------ options

REGIONS = (fl.Dice, fl.Jaccard, fl.Tversky, fl.GeneralizedDice)
VOXELWISE = (fl.CrossEntropy, fl.Focal)
BAD_OPTIONS: list[tuple[Any, str, Any, type[Exception]]] = [
    *[(t, "reduction", v, ValueError) for t in REGIONS + VOXELWISE for v in ("avg", "", None, 1)],
    *[(t, "smooth_nr", v, ValueError) for t in REGIONS for v in (-1, np.nan, np.inf)],
    *[(t, "smooth_dr", v, ValueError) for t in REGIONS for v in (-1e-9, np.nan)],
    *[(t, "smooth_dr", v, TypeError) for t in REGIONS for v in ("small", None, [1, 2])],
    *[
        (t, "weight", v, ValueError)
        for t in (*REGIONS, fl.CrossEntropy)
        for v in (-1, [1, -1], [1, np.nan], [np.inf, 1], [[1, 2]])
    ],
    *[(t, "weight", v, TypeError) for t in (*REGIONS, fl.CrossEntropy) for v in ("a", ["a"], {})],
    *[(fl.CrossEntropy, "label_smoothing", v, ValueError) for v in (-0.1, 1.1, np.nan)],
    (fl.CrossEntropy, "label_smoothing", "much", TypeError),
    *[(fl.Focal, "gamma", v, ValueError) for v in (-1, np.nan, np.inf)],
    (fl.Focal, "gamma", None, TypeError),
    *[(fl.Focal, "alpha", v, ValueError) for v in (-0.1, [0.5, -0.1], np.nan)],
    *[(fl.Tversky, n, v, ValueError) for n in ("alpha", "beta") for v in (-1, np.nan, np.inf)],
    *[(fl.Tversky, "gamma", v, ValueError) for v in (0, -1, np.nan)],
    *[(fl.GeneralizedDice, "weighting", v, ValueError) for v in ("cubic", None)],
    *[
        (t, name, v, TypeError)
        for t in REGIONS
        for name in ("batch", "include_background")
        for v in ("no", None, 2, 0.5)
    ],
]


@pytest.mark.parametrize("kind", REGIONS + VOXELWISE)
def test_option_out_of_range(kind: Any) -> None:
    for term, name, value, error in BAD_OPTIONS:
        if term is kind:
            with pytest.raises(error, match=rf"^{name}: "):
                term(**{name: value})


@pytest.mark.parametrize("term", REGIONS + VOXELWISE)
def test_unknown_option(term: Any) -> None:
    with pytest.raises(TypeError, match="smoothing_factor"):
        term(smoothing_factor=1)
    with pytest.raises(TypeError):
        term(2.0)  # options are keyword-only
    with pytest.raises(TypeError, match="axis"):
        fl.Loss(term(), axis=1)


def test_unknown_option_of_a_function() -> None:
    with pytest.raises(TypeError, match="smoothing_factor"):
        fl.dice_ce_loss(X, Y, smoothing_factor=1)
    with pytest.raises(TypeError, match="label_smoothing"):
        fl.dice_focal_loss(X, Y, label_smoothing=0.1)


@pytest.mark.parametrize("value", ["relu", "", "Softmax", 1])
def test_activation(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^activation: .*'softmax'"):
        fl.Loss(fl.Dice(), activation=value)


@pytest.mark.parametrize("name", ["ignore_index", "channel_axis"])
@pytest.mark.parametrize("value", [1.0, "1", True, (1,)])
def test_integer_options(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}: "):
        fl.Loss(fl.Dice(), **{name: value})


def test_channel_axis_of_the_batch() -> None:
    with pytest.raises(ValueError, match=r"^channel_axis: "):
        fl.Loss(fl.Dice(), channel_axis=0)


@pytest.mark.parametrize("terms", [(), (None,), ("dice",), (fl.Dice,), ([fl.Dice()],)])
def test_terms(terms: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^terms: "):
        fl.Loss(*terms)


def test_options_that_do_not_fit_the_class_count() -> None:
    for term in (fl.CrossEntropy(weight=[1, 2]), fl.Dice(weight=[1, 2, 3, 4])):
        assert "3" in rejects(ValueError, "weight", X, Y, loss=term)
    foreground = fl.Dice(weight=[1, 2, 3], include_background=False)
    assert "2" in rejects(ValueError, "weight", X, Y, loss=foreground)
    rejects(ValueError, "alpha", X, Y, loss=fl.Focal(alpha=[1, 2]))
    one = np.zeros((2, 1, 4), np.float32)
    rejects(
        ValueError,
        "include_background",
        one,
        np.zeros((2, 4), int),
        loss=fl.Dice(include_background=False),
    )


def test_alpha_above_one_with_sigmoid() -> None:
    rejects(ValueError, "alpha", X, G, loss=fl.Loss(fl.Focal(alpha=2), activation="sigmoid"))


def test_reductions_whose_shapes_do_not_fit() -> None:
    loss = fl.Dice(reduction="none") + fl.Dice(reduction="none", include_background=False)
    with pytest.raises(ValueError, match=r"reduction|shape"):
        loss(X, Y)


@pytest.mark.parametrize("factor", ["1", None, np.ones(3), {}, float("nan"), True])
def test_a_factor_that_is_no_number(factor: Any) -> None:
    x, y = example(1, 3, (8,))
    fl.dice_ce_loss(x, y)  # is remembered with factors of 1.0, which are equal to True
    for name in ("dice_factor", "ce_factor"):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected a"):
            fl.dice_ce_loss(x, y, **{name: factor})
    with pytest.raises((TypeError, ValueError), match=r"^focal_factor: expected a"):
        fl.dice_focal_loss(x, y, focal_factor=factor)


def test_options_of_functions_that_are_no_numbers() -> None:
    x, y = example(1, 3, (8,))
    with pytest.raises(TypeError, match=r"^weight: expected a number, or one per class, got \{\}"):
        fl.dice_loss(x, y, weight={})


@pytest.mark.parametrize("key", ["overlaps", "focal:x", fl.Sum("target", "log")])
def test_a_sum_that_is_not_there_is_named_beside_those_that_are(key: Any) -> None:
    statistics = fl.Dice().statistics(*example(1, 3, (8,)))
    with pytest.raises(KeyError, match=r"expected one of the sums reference, overlap, predicted"):
        statistics[key]
