"""Metrics of lesions, against loops over lesions as the definitions read, and other packages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import need, need_backend

import fastloss as fl

ndimage = need("scipy.ndimage")
evaluate = fl.metrics.evaluate
ALL = [name for name, metric in fl.metrics.METRICS.items() if metric.family == "lesion"]


def value(name, prediction, reference, **options):
    """Of one mask."""
    batch = [np.asarray(each, np.uint8)[None] for each in (prediction, reference)]
    return float(evaluate(*batch, metrics=name, classes=2, **options)[name][0, 0])


def label(mask, rank=3):
    return ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, min(rank, mask.ndim)))


def blobs(random, shape, count, most=3):
    """Balls of any size, which may touch."""
    mask = np.zeros(shape, bool)
    places = np.indices(shape)
    for _ in range(count):
        centre = [random.integers(0, n) for n in shape]
        away = sum((p - c) ** 2 for p, c in zip(places, centre, strict=True))
        mask |= away <= random.uniform(0, most) ** 2
    return mask


SEEDS = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def masks(random, axes, edge=(4, 16)):
    """A prediction and a reference that overlap here and there."""
    shape = random.integers(*edge, axes).tolist()
    reference = blobs(random, shape, random.choice([0, 1, 4, 12, 12]))
    shift = random.integers(-1, 2, axes).tolist()
    prediction = np.roll(reference, shift, range(axes)) & (blobs(random, shape, 9, 5) | reference)
    prediction |= blobs(random, shape, random.choice([0, 1, 5]), 2)
    return prediction & (random.random(shape) < random.choice([1, 0.9])), reference


def ratio(part, whole):
    return part / whole if whole else np.nan


# ------------------------------------------------------------------ panoptic quality, detection


def ious_of(prediction, reference):
    """Of every true and predicted lesion, by a loop over both."""
    (ours, m), (theirs, n) = label(prediction), label(reference)
    table = np.zeros((n, m))
    for i in range(n):
        for j in range(m):
            a, b = theirs == i + 1, ours == j + 1
            table[i, j] = (a & b).sum() / (a | b).sum()
    return table


@settings(max_examples=60)
@given(random=SEEDS, threshold=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]))
def test_panoptic_quality_and_detection_are_those_of_loops(random, threshold):
    need_backend("cpu")
    prediction, reference = masks(random, random.choice([2, 3]))
    table = ious_of(prediction, reference)
    n, m = table.shape
    pairs = {}
    while table.size and table.max() > threshold:  # the best one first
        i, j = np.unravel_index(table.argmax(), table.shape)
        pairs[i, j] = table[i, j]
        table[i], table[:, j] = 0, 0
    tp, total = len(pairs), sum(pairs.values())
    mean = (n + m) / 2
    shared = ious_of(prediction, reference) > 0
    right, found = shared.any(0).sum(), shared.any(1).sum()
    wanted = {
        "pq": ratio(total, mean),
        "sq": ratio(total, tp),
        "rq": ratio(tp, mean),
        "lesion_precision": ratio(right, m) if n else ratio(0, m),
        "lesion_recall": ratio(found, n) if m else ratio(0, n),
        "lesions_true": n,
        "lesions_predicted": m,
    }
    # Where one side is empty, shares are 0 by default.
    one = bool(n) != bool(m)
    wanted["lesion_precision"] = 0 if one else wanted["lesion_precision"]
    wanted["lesion_recall"] = 0 if one else wanted["lesion_recall"]
    p, r = right / max(m, 1), found / max(n, 1)
    wanted["lesion_f1"] = (2 * p * r / (p + r) if p + r else 0) if n or m else np.nan
    matched = {
        "lesion_precision": 0 if one else ratio(tp, m),
        "lesion_recall": 0 if one else ratio(tp, n),
        "lesion_f1": ratio(2 * tp, n + m),
    }
    with fl.use_backend(random.choice(["cpu", "reference"])):
        batch = [each[None].astype(np.uint8) for each in (prediction, reference)]
        options = {"classes": 2, "lesion_threshold": threshold}
        by_overlap = evaluate(*batch, metrics=tuple(wanted), **options)
        by_iou = evaluate(*batch, metrics=tuple(matched), lesion_match="iou", **options)
    for found, expected in ((by_overlap, wanted), (by_iou, matched)):
        for name, number in expected.items():
            np.testing.assert_allclose(found[name][0, 0], number, rtol=1e-12, err_msg=name)


def panoptic_cases():
    random = np.random.default_rng(3)
    for _ in range(3):
        reference = blobs(random, (24, 20, 22), 14, 4)
        prediction = np.roll(reference, 1, 0) | blobs(random, reference.shape, 3)
        found = {name: value(name, prediction, reference) for name in ("pq", "sq", "rq")}
        assert 0 < found["pq"] < 1
        yield found, [label(mask)[0].astype(np.uint16) for mask in (prediction, reference)]


def test_panoptic_quality_is_monais():
    monai, torch = need("monai.metrics.panoptic_quality"), need("torch")
    for found, instances in panoptic_cases():
        pair = [torch.from_numpy(each.astype(np.int64)) for each in instances]
        for name, number in found.items():
            theirs = float(monai.compute_panoptic_quality(*pair, metric_name=name))
            assert number == pytest.approx(theirs, rel=2e-6)  # its smoothing


def test_panoptic_quality_is_panopticas():
    need("plotly")  # without which it cannot be imported
    panoptica = need("panoptica")
    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.UNMATCHED_INSTANCE,
        instance_matcher=panoptica.NaiveThresholdMatching(
            matching_threshold=0.5,
            strict_threshold=True,  # by default an IoU of one half is a match
        ),
        verbose=False,
        log_times=False,
    )
    for found, instances in panoptic_cases():
        theirs = next(iter(evaluator.evaluate(*instances).values()))
        for name, number in found.items():
            assert number == pytest.approx(getattr(theirs, name), rel=1e-6)


def test_an_iou_at_the_threshold_is_no_match():
    reference, prediction = np.zeros((2, 1, 8), bool)
    reference[0, :2] = prediction[0, :1] = True  # an IoU of one half
    assert value("rq", prediction, reference) == 0  # panoptica says 1
    assert value("rq", prediction, reference, lesion_threshold=0.49) == 1


# ------------------------------------------------------------------ BraTS and autoPET


def hd95_of(prediction, reference, spacing):
    """Of whole volumes, by DeepMind's package."""
    vars(np)["Inf"] = np.inf  # which it reads, and NumPy 2 has not
    package = need("surface_distance")
    found = package.compute_surface_distances(reference, prediction, spacing)
    return package.compute_robust_hausdorff(found, 95)


def brats(prediction, reference, spacing, dilation, least):
    """Lesion by lesion over whole volumes, as the challenge's README describes it."""
    near = ndimage.generate_binary_structure(3, 2)

    def grown(mask):
        return ndimage.binary_dilation(mask, near, iterations=dilation) if dilation else mask

    ours, count = label(prediction)
    merged, lesions = label(grown(reference))
    dice, distance, hit = [], [], set()
    for lesion in range(1, lesions + 1):
        true = reference & (merged == lesion)
        touching = set(np.unique(ours[grown(true)])) - {0}
        hit |= touching
        if true.sum() * np.prod(spacing) <= least:
            continue
        predicted = np.isin(ours, list(touching))
        dice.append(2 * (predicted & true).sum() / (predicted.sum() + true.sum()))
        distance.append(hd95_of(predicted, true, spacing) if touching else 374)
    n, extra = len(dice), count - len(hit)
    if n + extra == 0:
        return 1, 0
    return sum(dice) / (n + extra), (sum(distance) + 374 * extra) / (n + extra)


@settings(max_examples=25)
@given(
    random=SEEDS,
    spacing=st.sampled_from([(1, 1, 1), (3, 1, 0.7)]),
    dilation=st.sampled_from([0, 1, 3]),
    least=st.sampled_from([0, 2, 50]),
)
def test_lesion_wise_scores_are_those_of_brats(random, spacing, dilation, least):
    need_backend("cpu")
    prediction, reference = masks(random, 3, (6, 24))
    with fl.use_backend("cpu"):
        found = [
            value(name, prediction, reference, spacing=spacing, lesion_dilation=dilation,
                  lesion_min_volume=least)
            for name in ("lesion_dice", "lesion_hd95")
        ]  # fmt: skip
    wanted = brats(prediction, reference, spacing, dilation, least)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_a_component_that_touches_two_lesions_is_no_other_lesions_fault(backend):
    reference = np.zeros((3, 3, 20), bool)
    reference[1, 1, [2, 3, 9, 17]] = True
    prediction = np.zeros_like(reference)
    prediction[1, 1, 2:10] = prediction[0, 0, 0] = prediction[1, 1, 13] = True

    def dice(least):
        options = {"lesion_dilation": 1, "lesion_min_volume": least, "spacing": 2}
        return value("lesion_dice", prediction, reference, **options)

    # Lesions of 2, 1 and 1 voxels, which are 16, 8 and 8 mm³; a component at 13 touches none.
    first, second = 2 * 2 / (2 + 8), 2 * 1 / (1 + 8)
    assert dice(7.9) == pytest.approx((first + second + 0) / (3 + 2))
    assert dice(8) == pytest.approx(first / (1 + 2))  # as large as that is not larger
    assert dice(16) == 0


def autopet(mask, other):
    numbers, count = label(mask, 2)
    alone = [numbers == k for k in range(1, count + 1) if not other[numbers == k].any()]
    return sum(int(each.sum()) for each in alone)


@settings(max_examples=30)
@given(random=SEEDS)
def test_false_volumes_are_those_of_autopet(random):
    prediction, reference = masks(random, random.choice([2, 3]))
    spacing = (2, 0.5, 3)[3 - prediction.ndim :]
    size = np.prod(spacing)
    found = [
        value(name, prediction, reference, spacing=spacing) for name in ("fp_volume", "fn_volume")
    ]
    wanted = autopet(prediction, reference) * size, autopet(reference, prediction) * size
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_connectivity_is_an_argument(backend):
    corner = np.zeros((1, 3, 3, 3), np.uint8)
    corner[0, 0, 0, 0] = corner[0, 1, 1, 1] = corner[0, 2, 2, 1] = 1
    for connectivity, count in [(None, 1), (26, 1), (18, 2), (6, 3)]:
        names = ("lesions_true", "lesion_recall")
        scores = evaluate(corner * 0, corner, metrics=names, classes=2, connectivity=connectivity)
        assert scores["lesions_true"][0, 0] == count
    # A false negative by edges alone, as published, and part of the found lesion by corners.
    prediction = corner.copy()
    prediction[0, 1:] = 0
    assert value("fn_volume", prediction[0], corner[0]) == 2
    assert value("fn_volume", prediction[0], corner[0], connectivity=26) == 0


# ------------------------------------------------------------------ classes, masks, empties


def test_classes_and_regions_have_lesions_of_their_own():
    reference = np.zeros((2, 6, 6, 6), np.uint8)
    reference[0, 0, 0, :4] = [1, 2, 2, 1]
    reference[1, 2, 2, 2] = 2
    classes = {"one": 1, "two": 2, "any": (1, 2)}
    scores = evaluate(reference, reference, metrics=("lesions_true", "pq"), classes=classes)
    assert scores["lesions_true"].tolist() == [[2, 1, 1], [0, 1, 1]]
    np.testing.assert_array_equal(scores["pq"], [[1, 1, 1], [np.nan, 1, 1]])


@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_voxels_that_do_not_count_are_of_no_lesion(kind):
    random = np.random.default_rng(5)
    shape = (1, 14, 14, 14)
    reference = blobs(random, shape[1:], 9)[None].astype(np.uint8)
    prediction = np.roll(reference, 1, 1) | blobs(random, shape[1:], 3)
    mask = random.random(shape) < 0.9
    options = {"metrics": ALL, "lesion_min_volume": 2}
    if kind == "labels":
        found = evaluate(prediction, reference, classes=2, mask=mask, **options)
    else:
        found = evaluate(
            prediction[:, None].astype(np.float32), reference[:, None], activation="none",
            mask=mask, **options,
        )  # fmt: skip
    wanted = evaluate(prediction * mask, reference * mask, classes=2, **options)
    ignored = evaluate(
        prediction, np.where(mask, reference, 9), classes=2, ignore_index=9, **options
    )
    for name in ALL:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
        np.testing.assert_array_equal(ignored[name], wanted[name], err_msg=name)
    assert 0 < wanted["pq"][0, 0] < 1


def test_empty_masks_give_what_is_documented(backend):
    nothing, some = np.zeros((2, 5, 5, 5), bool)
    some[1:3, 1:3, 1:3] = True
    found = {
        name: [
            value(name, *each, lesion_min_volume=0)
            for each in ((nothing, nothing), (some, nothing), (nothing, some))
        ]
        for name in ALL
    }
    nan = np.nan
    wanted = {
        "pq": [nan, 0, 0],
        "sq": [nan, nan, nan],
        "rq": [nan, 0, 0],
        "lesion_precision": [nan, 0, 0],
        "lesion_recall": [nan, 0, 0],
        "lesion_f1": [nan, 0, 0],
        "lesion_dice": [1, 0, 0],
        "lesion_hd95": [0, 374, 374],
        "fp_volume": [0, 8, 0],
        "fn_volume": [0, 0, 8],
        "lesions_true": [0, 0, 1],
        "lesions_predicted": [0, 1, 0],
    }
    assert found.keys() == wanted.keys()
    for name, numbers in wanted.items():
        np.testing.assert_array_equal(found[name], numbers, err_msg=name)
    assert value("pq", nothing, nothing, empty=(1, 0)) == 1
    with pytest.raises(ValueError, match="lesion_dice of class '1'"):
        value("lesion_dice", nothing, nothing, empty={"lesion_dice": ("error", None)})


def test_hundreds_of_lesions_and_those_of_one_voxel():
    reference = np.zeros((30, 30, 30), bool)
    reference[::3, ::3, ::3] = True
    prediction = reference.copy()
    prediction[::6] = False
    with fl.use_backend(need_backend("cpu")):
        assert value("lesions_true", prediction, reference) == 1000
        assert value("lesion_recall", prediction, reference) == 0.5
        assert value("pq", prediction, reference) == pytest.approx(2 / 3)
        options = {"lesion_dilation": 0, "lesion_min_volume": 0}
        assert value("lesion_dice", prediction, reference, **options) == 0.5
        assert value("lesion_hd95", prediction, reference, lesion_miss=10, **options) == 5


# ------------------------------------------------------------------ the table of lesions


def test_lesions_are_listed_with_size_and_place(backend):
    reference = np.zeros((2, 8, 9, 10), np.uint8)
    reference[1, 1:3, 2, 3:6] = 1
    reference[1, 6, 6, 6] = 1
    prediction = np.zeros_like(reference)
    prediction[1, 2, 2, 3:7] = 1
    found = fl.metrics.lesions(
        prediction, reference, classes=("background", "tumour"), spacing=(2, 1, 0.5)
    )
    iou = 3 / 7
    assert [tuple(each)[:8] for each in found] == [
        (1, "tumour", "reference", 1, 6, 6.0, True, 1),
        (1, "tumour", "reference", 2, 1, 1.0, False, 0),
        (1, "tumour", "prediction", 1, 4, 4.0, True, 1),
    ]
    assert [each.iou for each in found] == [iou, 0, iou]
    assert [each.dice for each in found] == pytest.approx([0.6, 0, 0.6])
    assert [each.centroid for each in found] == [(3, 2, 2), (12, 6, 3), (4, 2, 2.25)]
    strict = fl.metrics.lesions(prediction, reference, lesion_match="iou")
    assert [each.matched for each in strict] == [False] * 3
    assert fl.metrics.lesions(prediction[..., 0], reference[..., 0], classes=2) == []


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"connectivity": 8}, ValueError, "connectivity: expected 6 or 18 or 26 .* got 8"),
        ({"connectivity": 26.0}, TypeError, "connectivity: expected an integer"),
        ({"lesion_match": "dice"}, ValueError, "lesion_match: expected one of 'overlap', 'iou'"),
        ({"lesion_threshold": 1.5}, ValueError, "lesion_threshold: .* got 1.5"),
        ({"lesion_dilation": -1}, ValueError, "lesion_dilation: expected a number of at least 0"),
        ({"lesion_dilation": 1.0}, TypeError, "lesion_dilation: expected an integer"),
        ({"lesion_min_volume": "x"}, TypeError, "lesion_min_volume: expected a number"),
        ({"lesion_miss": -1}, ValueError, "lesion_miss: .* got -1"),
    ],
)
def test_bad_options_are_named(options, error, message):
    masks = np.zeros((2, 1, 4, 4, 4), np.uint8)
    with pytest.raises(error, match=message):
        evaluate(*masks, classes=2, metrics="pq", **options)


def test_a_line_has_no_surface():
    line = np.zeros((1, 8), np.uint8)
    line[0, 2:4] = 1
    assert evaluate(line, line, classes=2, metrics="pq")["pq"][0, 0] == 1
    with pytest.raises(ValueError, match="lesion_hd95: expected two or three spatial axes"):
        evaluate(line, line, classes=2, metrics="lesion_hd95")
