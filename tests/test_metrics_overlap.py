"""Metrics of overlap, against independent formulas, scikit-learn and MONAI."""

from __future__ import annotations

import pickle
from math import isnan, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import NATIVE, need, need_backend, need_gloo, run_python

import fastloss as fl
from fastloss.metrics import ConfusionAccumulator, confusion_matrix, evaluate

OVERLAP = tuple(name for name, metric in fl.metrics.METRICS.items() if metric.family == "overlap")


def ratio(part, whole):
    return part / whole if whole else nan


def by_definition(name, p, r):
    """A metric of two masks, of whatever shape, both with a voxel in them."""
    both, either = (p & r).sum(), (p | r).sum()
    recall, specificity = ratio(both, r.sum()), ratio((~p & ~r).sum(), (~r).sum())
    if name == "mcc":
        constant = p.all() or r.all()
        return nan if constant else np.corrcoef(p.ravel(), r.ravel())[0, 1]
    if name == "f2":
        precision = ratio(both, p.sum())
        return ratio(5 * precision * recall, 4 * precision + recall) if both else 0.0
    return {
        "dice": ratio(2 * both, p.sum() + r.sum()),
        "iou": ratio(both, either),
        "precision": ratio(both, p.sum()),
        "recall": recall,
        "specificity": specificity,
        "balanced_accuracy": (recall + specificity) / 2,
        "volume_difference": ratio(float(p.sum()) - r.sum(), r.sum()),
        "volume_similarity": 1 - ratio(abs(float(p.sum()) - r.sum()), p.sum() + r.sum()),
    }[name]


def agree(scores, masks, counted=None):
    """Masks: for each class, those of prediction and reference, (B, *spatial)."""
    for k, (label, (predicted, true)) in enumerate(masks.items()):
        assert scores.classes[k] == label
        for b in range(len(predicted)):
            where = np.ones_like(true[b], bool) if counted is None else counted[b]
            p, r = predicted[b][where], true[b][where]
            if not (p.any() and r.any()):
                continue  # see the tests of empty masks
            for name in scores:
                wanted = by_definition(name, p, r)
                np.testing.assert_allclose(scores[name][b, k], wanted, 1e-12, 1e-12, err_msg=name)
    assert scores.classes == tuple(masks)


@st.composite
def label_maps(draw, most=9):
    """Prediction and reference, and how many labels there are."""
    labels = draw(st.integers(2, most))
    shape = draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    reference = random.integers(0, labels, shape)
    other = random.random(shape) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    return np.where(other, random.integers(0, labels, shape), reference), reference, labels


@settings(max_examples=60)
@given(maps=label_maps(), data=st.data())
def test_each_metric_of_label_maps_is_its_formula(maps, data):
    prediction, reference, labels = maps
    background = data.draw(st.booleans())
    ignored = data.draw(st.none() | st.integers(0, labels - 1) | st.just(255))
    masked = data.draw(st.booleans())
    counted = np.ones(reference.shape, bool)
    mask = None
    if ignored is not None:
        reference = np.where(
            np.arange(reference.size).reshape(reference.shape) % 3, reference, ignored
        )
        counted &= reference != ignored
    if masked:
        mask = np.arange(reference.size).reshape(reference.shape) % 4 > 0
        counted &= mask
    scores = evaluate(
        prediction,
        reference,
        metrics=(*OVERLAP, "f2"),
        classes=labels,
        include_background=background,
        ignore_index=ignored,
        mask=mask,
    )
    wanted = {str(c): (prediction == c, reference == c) for c in range(not background, labels)}
    agree(scores, wanted, counted)


@settings(max_examples=30)
@given(maps=label_maps())
def test_a_region_is_the_union_of_its_labels(maps):
    prediction, reference, _ = maps
    regions = {"whole": (1, 2, 4), "core": (1, 4), "enhancing": 4, "far": [700, 2]}
    scores = evaluate(prediction, reference, metrics=(*OVERLAP, "f2"), classes=regions)
    masks = {
        name: (np.isin(prediction, labels), np.isin(reference, labels))
        for name, labels in regions.items()
    }
    agree(scores, masks)


@settings(max_examples=30)
@given(data=st.data())
def test_masks_that_overlap_are_measured_one_by_one(data):
    channels = data.draw(st.integers(1, 4))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    logits = random.normal(size=(2, channels, 3, 4))
    dense = data.draw(st.booleans())
    masks = random.random(logits.shape) < 0.5
    labels = random.integers(0, max(channels, 2), (2, 3, 4))
    if not dense:
        numbers = np.arange(channels)[:, None, None] if channels > 1 else 1
        masks = labels[:, None] == numbers
    regions = {"first": 0, "all": range(channels)} if data.draw(st.booleans()) else None
    activation = data.draw(st.sampled_from(["sigmoid", "none"]))
    scores = evaluate(
        logits if activation == "sigmoid" else 1 / (1 + np.exp(-logits)),
        masks if dense else labels,
        metrics=OVERLAP,
        classes=regions,
        activation=activation,
    )
    wanted = {
        name: ((logits > 0)[:, which].any(1), masks[:, which].any(1))
        for name, which in (
            {"first": [0], "all": list(range(channels))}
            if regions
            else {str(c): [c] for c in range(channels)}
        ).items()
    }
    agree(scores, wanted)


# ------------------------------------------------------------------ the likeliest class


@st.composite
def scores_of(draw):
    """Scores (B, C, *spatial) with equal numbers, infinities and NaN, in any layout; and as
    numbers that NumPy compares."""
    classes = draw(st.sampled_from([2, 3, 4, 5, 8, 9, 33]))
    voxels = draw(st.sampled_from([(1,), (15,), (16, 16), (3, 5, 7), (2, 600), (513,)]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = random.integers(-3, 4, (2, classes, *voxels)).astype(np.float32)
    x += draw(st.sampled_from([0, 1])) * random.normal(size=x.shape).astype(np.float32)
    special = draw(st.sampled_from([0.0, 0.3]))
    x = np.where(
        random.random(x.shape) < special, random.choice([nan, -nan, np.inf, -np.inf], x.shape), x
    )
    dtype = draw(st.sampled_from(["float32", "float16", "float64", "bfloat16"]))
    x = x.astype(need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    layout = draw(st.sampled_from(["first", "last", "every second", "backwards", "reversed axes"]))
    if layout == "last":
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    elif layout == "every second":
        x = np.repeat(x, 2, axis=-1)[..., ::2]
    elif layout == "backwards":
        x = np.ascontiguousarray(x[:, ::-1, ..., ::-1])[:, ::-1, ..., ::-1]
    elif layout == "reversed axes":
        x = np.asfortranarray(x)
    return x, x.astype(np.float64)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@settings(max_examples=80)
@given(given_scores=scores_of())
def test_the_likeliest_class_is_numpys_argmax(backend, given_scores):
    need_backend(backend)
    scores, numbers = given_scores
    likeliest = numbers.argmax(axis=1)
    with fl.use_backend(backend):
        matrix = confusion_matrix(scores, likeliest)
    counts = np.bincount(likeliest.ravel(), minlength=scores.shape[1])
    assert np.array_equal(matrix, np.diag(counts))


def test_a_dense_reference_is_its_likeliest_class():
    random = np.random.default_rng(0)
    scores = random.normal(size=(2, 4, 5, 6)).astype(np.float32)
    soft = random.random(scores.shape)
    options = {"activation": "softmax"}
    wanted = confusion_matrix(scores, soft.argmax(1))
    assert np.array_equal(confusion_matrix(scores, soft, **options), wanted)
    one_hot = soft == soft.max(1, keepdims=True)
    for reference in (one_hot, one_hot.astype(np.uint8), one_hot.astype(np.float16)):
        assert np.array_equal(confusion_matrix(scores, reference, **options), wanted)
    # Voxels are ignored by their class, or by a number in any channel.
    matrix = confusion_matrix(scores, one_hot, ignore_index=2, **options)
    assert np.array_equal(matrix, np.where(np.arange(4)[:, None] == 2, 0, wanted))
    numbers = one_hot.astype(np.uint8)
    numbers[:, 1, 3:] = 255
    part = confusion_matrix(scores[:, :, :3], one_hot[:, :, :3], **options)
    assert np.array_equal(confusion_matrix(scores, numbers, ignore_index=255, **options), part)


# ------------------------------------------------------------------ joint histograms


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("labels", [2, 5, 193, 255, 256, 1030])
def test_every_pair_of_labels_is_counted(backend, labels):
    need_backend(backend)
    random = np.random.default_rng(labels)
    # Long stretches, short ones, and none.
    reference = np.repeat(random.integers(0, labels, (2, 3, 4, 1)), 401, axis=3)
    prediction = np.where(random.random(reference.shape) < 0.01, labels - 1, reference)
    prediction[1, 1] = random.integers(0, labels, prediction[1, 1].shape)
    reference[0, 0, 0, ::3] = 0
    wanted = np.zeros((2, labels, labels), np.int64)
    np.add.at(
        wanted, (np.arange(2)[:, None], reference.reshape(2, -1), prediction.reshape(2, -1)), 1
    )
    with fl.use_backend(backend):
        found = confusion_matrix(prediction, reference, classes=labels)
        assert np.array_equal(found, wanted.sum(0))
        scores = evaluate(prediction, reference, metrics="iou", classes=labels, mask=reference >= 0)
    for b in range(2):
        both, p, r = np.diagonal(wanted[b]), wanted[b].sum(0), wanted[b].sum(1)
        either = np.where(p + r, p + r - both, 1)
        iou = np.where(p + r, both / either, nan)
        np.testing.assert_array_equal(scores["iou"][b], iou[1:])


def test_the_same_counts_for_any_number_of_threads():
    need_backend("cpu")
    random = np.random.default_rng(0)
    scores = random.normal(size=(2, 5, 50_003)).astype(np.float32)
    reference = random.integers(0, 5, (2, 50_003))
    with fl.use_backend("cpu"):
        before = fl.get_num_threads()
        try:
            found = []
            for threads in (1, 2, 7):
                fl.set_num_threads(threads)
                found.append(confusion_matrix(scores, reference))
        finally:
            fl.set_num_threads(before)
    wanted = need("sklearn.metrics").confusion_matrix(reference.ravel(), scores.argmax(1).ravel())
    assert all(np.array_equal(each, wanted) for each in found)


# ------------------------------------------------------------------ other libraries


def test_values_are_those_of_scikit_learn():
    metrics = need("sklearn.metrics")
    random = np.random.default_rng(3)
    reference = random.integers(0, 4, (1, 9, 8, 7))
    prediction = np.where(random.random(reference.shape) < 0.6, reference, reference[:, ::-1])
    scores = evaluate(prediction, reference, metrics=(*OVERLAP, "f2", "f0.5"))
    for k in range(3):
        masks = (reference == k + 1).ravel(), (prediction == k + 1).ravel()
        wanted = {
            "dice": metrics.f1_score(*masks),
            "iou": metrics.jaccard_score(*masks),
            "precision": metrics.precision_score(*masks),
            "recall": metrics.recall_score(*masks),
            "specificity": metrics.recall_score(*masks, pos_label=False),
            "balanced_accuracy": metrics.balanced_accuracy_score(*masks),
            "mcc": metrics.matthews_corrcoef(*masks),
            "f2": metrics.fbeta_score(*masks, beta=2),
            "f0.5": metrics.fbeta_score(*masks, beta=0.5),
        }
        for name, value in wanted.items():
            assert scores[name][0, k] == pytest.approx(value, rel=1e-12)


def test_values_are_those_of_monai():
    metrics, torch = need("monai.metrics"), need("torch")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 6, 7, 8, generator=generator)
    reference = torch.randint(0, 5, (3, 1, 6, 7, 8), generator=generator)
    reference[1][reference[1] == 4] = 0  # an empty class, predicted in places
    one_hot = [
        torch.nn.functional.one_hot(each[:, 0], 5).movedim(-1, 1)
        for each in (logits.argmax(1, keepdim=True), reference)
    ]
    scores = evaluate(
        logits.requires_grad_(),
        reference,
        metrics=("dice", "iou", "recall", "precision", "specificity", "balanced_accuracy"),
        include_background=True,
        empty=(nan, nan),  # MONAI's, for an empty reference
    )
    wanted = {"dice": metrics.compute_dice(*one_hot), "iou": metrics.compute_iou(*one_hot)}
    matrix = metrics.get_confusion_matrix(*one_hot)
    names = {"recall": "sensitivity", "precision": "precision", "specificity": "specificity",
             "balanced_accuracy": "balanced accuracy"}  # fmt: skip
    for name, theirs in names.items():
        wanted[name] = metrics.compute_confusion_matrix_metric(theirs, matrix)
    for name, values in wanted.items():
        filled = ~np.isnan(scores[name])
        assert filled.sum() == 14
        np.testing.assert_allclose(scores[name][filled], values.numpy()[filled], 1e-6)


# ------------------------------------------------------------------ accumulators


def parts(labels=4, batch=3):
    random = np.random.default_rng(5)
    reference = random.integers(0, labels, (batch, 4, 5, 6))
    scores = random.normal(size=(batch, labels, 4, 5, 6)).astype(np.float32)
    return scores, reference


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_parts_of_volumes_add_to_the_whole(activation):
    scores, reference = parts()
    masks = np.random.default_rng(0).random(scores.shape) < 0.5
    target = masks if activation == "sigmoid" else reference
    whole = ConfusionAccumulator(activation=activation).update(scores, target)
    cut = ConfusionAccumulator(activation=activation)
    for b in range(3):
        for y in (slice(0, 2), slice(2, 5)):
            cut.update(scores[b : b + 1, ..., y, :], target[b : b + 1, ..., y, :])
    assert np.array_equal(cut.matrix, whole.matrix)
    several = [
        ConfusionAccumulator(activation=activation).update(scores[b : b + 1], target[b : b + 1])
        for b in range(3)
    ]
    before = several[0].matrix
    assert np.array_equal(sum(several).matrix, whole.matrix)
    assert np.array_equal(several[0].matrix, before)
    copied = pickle.loads(pickle.dumps(whole))
    assert np.array_equal((copied + several[0]).matrix, whole.matrix + before)
    # A score is that of the one volume that all of them make.
    names = ("dice", "mcc", "f2")
    joined = evaluate(
        np.concatenate(list(scores), axis=1)[None],
        np.concatenate(list(target), axis=1 if activation == "sigmoid" else 0)[None],
        metrics=names,
        activation=activation,
    )
    found = whole.scores(names)
    assert found.samples == ("all",)
    assert found.classes == joined.classes
    for name in names:
        np.testing.assert_allclose(found[name], joined[name], 1e-12)


def test_masks_that_overlap_have_a_table_of_four_each():
    metrics = need("sklearn.metrics")
    scores, _ = parts()
    masks = np.random.default_rng(0).random(scores.shape) < 0.5
    columns = [np.moveaxis(each, 1, -1).reshape(-1, 4) for each in (masks, scores > 0)]
    found = confusion_matrix(scores, masks, activation="sigmoid")
    assert np.array_equal(found, metrics.multilabel_confusion_matrix(*columns))


def test_a_matrix_grows_with_the_labels():
    total = ConfusionAccumulator(classes={"low": (1, 2), "high": 5})
    total.update(np.array([[1, 2, 0]]), np.array([[1, 1, 1]]))
    total.update(np.array([[5, 5, 9]]), np.array([[5, 0, 0]]))
    total.update(np.array([[1, 0, 0]]), np.array([[1, 0, 0]]))
    wanted = need("sklearn.metrics").confusion_matrix(
        [1, 1, 1, 5, 0, 0, 1, 0, 0], [1, 2, 0, 5, 5, 9, 1, 0, 0], labels=range(10)
    )
    assert np.array_equal(total.matrix, wanted)
    counts = total.counts()
    assert counts["low"] == (3, 0, 1, 5)
    assert counts["high"] == (1, 1, 0, 7)
    assert total.scores("dice")["dice"].tolist() == [[6 / 7, 2 / 3]]
    total.reset()
    assert total.matrix.shape == (0, 0)


def test_an_accumulator_of_nothing():
    known = ConfusionAccumulator(classes=("background", "liver"))
    assert known.scores("dice").classes == ("liver",)
    assert isnan(known.scores("dice")["dice"].item())
    with pytest.raises(ValueError, match="update, or classes="):
        ConfusionAccumulator().scores()
    assert np.array_equal((known + known).matrix, np.zeros((0, 0)))


def test_accumulators_that_do_not_add():
    scores, reference = parts()
    labels = ConfusionAccumulator(activation="softmax").update(scores, reference)
    with pytest.raises(ValueError, match="same options"):
        labels + ConfusionAccumulator(activation="none")
    with pytest.raises(TypeError, match="unsupported operand"):
        labels + 1
    mixed = ConfusionAccumulator(activation="sigmoid").update(scores, reference)
    with pytest.raises(ValueError, match="4 classes, as before, got 3"):
        mixed.update(scores[:, :3], reference % 3)
    with pytest.raises(ValueError, match="labels below 4096"):
        confusion_matrix(np.array([[5000]]), np.array([[0]]))
    with pytest.raises(ValueError, match=r"metrics: .*'hd95'"):
        labels.scores("hd95")


RANKS = """
import sys, numpy as np, torch.distributed as dist, torch.multiprocessing as mp
from fastloss.metrics import ConfusionAccumulator

def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = ConfusionAccumulator()
    if rank == 0:
        mine.update(np.array([[0, 1, 1, 2]]), np.array([[0, 1, 2, 2]]))
    for _ in range(2):
        total = mine.all_reduce()
    assert total.matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]], total.matrix
    if rank == 1:
        mine.update(np.array([[3, 1]]), np.array([[3, 0]]))
    total = mine.all_reduce(dist.group.WORLD)
    assert total.matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    dist.destroy_process_group()

mp.start_processes(run, (sys.argv[1] if len(sys.argv) > 1 else FOLDER,), 2, start_method="fork")
"""


def test_the_sum_over_processes(tmp_path):
    need_gloo()
    run_python(RANKS.replace("FOLDER", repr(str(tmp_path))))
    with pytest.raises(RuntimeError, match=r"process_group: torch.distributed is not initialised"):
        ConfusionAccumulator().all_reduce()
    with pytest.raises(TypeError, match="process_group: expected"):
        ConfusionAccumulator().all_reduce(5)
    assert ConfusionAccumulator().all_reduce(None).matrix.shape == (0, 0)
