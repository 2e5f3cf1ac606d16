"""Distances between surfaces: against the tools that define them, and bodies that are known."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from math import inf, isnan, pi

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import need, need_backend

import fastloss as fl
from fastloss.metrics import evaluate, surface_distances

ndimage = need("scipy.ndimage")


def blobs(random, shape):
    """A mask of blobs or noise, neither empty nor full but where there is one voxel."""
    noise = ndimage.gaussian_filter(random.normal(size=shape), random.uniform(0, 2))
    mask = noise > np.quantile(noise, random.uniform(0.2, 0.97))
    mask.flat[random.integers(mask.size)] = True
    return mask


@st.composite
def pairs(draw, axes=(2, 3), most=18):
    """Two masks of one shape, not empty; a spacing and a tolerance."""
    n = draw(st.sampled_from(axes))
    shape = draw(st.tuples(*[st.integers(1, most)] * n))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spacing = draw(st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 1.3, 3.0])] * n))
    tolerance = draw(st.sampled_from([0.0, 0.7, 1.0, 1.4, 2.3, 3.0]))
    return blobs(random, shape), blobs(random, shape), spacing, tolerance


def measured(prediction, reference, **options):
    options = {"classes": 2, **options}
    arrays = (mask[None].astype(np.uint8) for mask in (prediction, reference))
    return surface_distances(*arrays, **options)[0][0]


@pytest.fixture
def deepmind(monkeypatch):
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)  # which NumPy 2 removed
    return need("surface_distance")


@pytest.mark.parametrize("name", ["cpu", "reference"])
@settings(max_examples=40)
@given(case=pairs())
def test_deepmind(deepmind, name, case):
    prediction, reference, spacing, tolerance = case
    true = deepmind.compute_surface_distances(reference, prediction, spacing)
    with fl.use_backend(need_backend(name)):
        found = measured(prediction, reference, spacing=spacing)
    for percentile in (50, 95, 100):
        assert found.hausdorff(percentile) == pytest.approx(
            deepmind.compute_robust_hausdorff(true, percentile), rel=1e-6
        )
    from_reference, from_prediction = deepmind.compute_average_surface_distance(true)
    assert found.average() == pytest.approx((from_prediction, from_reference), rel=1e-6)
    shares = deepmind.compute_surface_overlap_at_tolerance(true, tolerance)
    assert found.overlap(tolerance) == pytest.approx(shares[::-1], rel=1e-6)
    dice = deepmind.compute_surface_dice_at_tolerance(true, tolerance)
    assert found.surface_dice(tolerance) == pytest.approx(dice, rel=1e-6)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@settings(max_examples=25)
@given(case=pairs())
def test_medpy(name, case):
    medpy = need("medpy.metric.binary")
    prediction, reference, spacing, _ = case
    with fl.use_backend(need_backend(name)):
        found = measured(prediction, reference, spacing=spacing, definition="medpy")
    masks = prediction, reference, spacing
    assert found.hausdorff() == pytest.approx(medpy.hd(*masks), rel=1e-9)
    assert found.hausdorff(95) == pytest.approx(medpy.hd95(*masks), rel=1e-9)
    assert found.average()[0] == pytest.approx(medpy.asd(*masks), rel=1e-9)
    assert found.average_symmetric() == pytest.approx(medpy.assd(*masks), rel=1e-9)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@settings(max_examples=25)
@given(case=pairs())
def test_monai(name, case):
    monai, torch = need("monai.metrics"), need("torch")
    prediction, reference, spacing, tolerance = case
    with fl.use_backend(need_backend(name)):
        found = measured(prediction, reference, spacing=spacing, definition="monai")
    masks = [torch.tensor(mask)[None, None] for mask in (prediction, reference)]
    options = {"include_background": True, "spacing": list(spacing)}
    # MONAI rounds distances to float32.
    for percentile in (50, 95, 100):
        true = monai.compute_hausdorff_distance(*masks, percentile=percentile, **options)
        assert found.hausdorff(percentile) == pytest.approx(true.item(), rel=1e-5, abs=1e-6)
    true = monai.compute_average_surface_distance(*masks, **options)
    assert found.average()[0] == pytest.approx(true.item(), rel=1e-6)
    true = monai.compute_average_surface_distance(*masks, symmetric=True, **options)
    assert found.average_symmetric() == pytest.approx(true.item(), rel=1e-6)
    true = monai.compute_surface_dice(*masks, [tolerance], **options)
    assert found.surface_dice(tolerance) == pytest.approx(true.item(), rel=1e-6)


@settings(max_examples=60)
@given(case=pairs(axes=(1, 2, 3)), data=st.data())
def test_every_backend_finds_the_same_elements(case, data):
    """With several classes, regions, masks, and spacings unlike each other."""
    prediction, reference, spacing, _ = case
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    ours = (prediction * random.integers(1, 5, prediction.shape))[None]
    theirs = np.where(reference & ~prediction, 2, ours[0] * reference)[None].astype(np.int16)
    options = {
        "classes": {"one": 1, "region": (1, 3), "two": 2},
        "definition": data.draw(st.sampled_from(["monai", "deepmind"][: len(spacing)])),
        "spacing": tuple(size * data.draw(st.sampled_from([1, 20])) for size in spacing),
        "mask": data.draw(st.sampled_from([None, random.random(ours.shape) < 0.7])),
        "ignore_index": data.draw(st.sampled_from([None, 4])),
    }
    found = {}
    for name in ("cpu", "reference"):
        with fl.use_backend(need_backend(name)):
            found[name] = surface_distances(ours, theirs, **options)[0]
    for each, true in zip(found["cpu"], found["reference"], strict=True):
        for here, there in zip(each[:2], true[:2], strict=True):
            np.testing.assert_allclose(here.distances, there.distances, rtol=1e-6)
            if there.areas is not None:
                assert here.areas.sum() == pytest.approx(there.areas.sum(), rel=1e-6)


def ball(radius, center, shape, spacing):
    grid = np.meshgrid(*[np.arange(n) * s for n, s in zip(shape, spacing, strict=True)],
                       indexing="ij")  # fmt: skip
    return sum((g - c) ** 2 for g, c in zip(grid, center, strict=True)) <= radius**2


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (1.5, 0.5, 0.75)])
def test_concentric_spheres_by_default(fast_backend, spacing):
    shape, center = [int(33 / s) for s in spacing], (16.2, 16.1, 15.9)
    small, large = (ball(radius, center, shape, spacing) for radius in (9.0, 12.0))
    found = measured(small, large, spacing=spacing)
    half = np.linalg.norm(spacing) / 2  # of a voxel's diagonal: how far a point may be off
    assert found.hausdorff(50) == pytest.approx(3, abs=half)
    assert found.average_symmetric() == pytest.approx(3, abs=half)
    assert found.hausdorff() < 3 + half
    assert found.surface_dice(3 - 2 * half) < 0.05
    assert found.surface_dice(3 + half) == 1
    # Marching cubes on voxels that are inside or outside finds a rougher sphere.
    area = found.to_prediction.areas.sum()
    assert 4 * pi * 12**2 < area < 1.2 * 4 * pi * 12**2


@pytest.mark.parametrize("definition", ["deepmind", "monai", "medpy"])
def test_a_box_that_is_shifted(fast_backend, definition):
    """By two voxels of 3 mm: the far faces are 6 mm apart, half of the sides in between."""
    reference = np.zeros((1, 20, 9, 9), np.uint8)
    reference[:, 4:12, 2:7, 2:7] = 1
    prediction = np.roll(reference, 2, axis=1)
    options = {"spacing": (3, 1, 1), "definition": definition}
    found = surface_distances(prediction, reference, **options)[0][0]
    assert found.hausdorff() == 6
    assert 0 < found.average_symmetric() < 2
    assert found.surface_dice(6) == 1
    assert found.average() == pytest.approx((found.average()[1],) * 2)
    scores = evaluate(
        prediction,
        reference,
        metrics=("hausdorff", "hd95", "assd", "nsd"),
        tolerance=2.9,
        **options,
    )
    assert scores["hausdorff"][0, 0] == 6
    assert scores["assd"][0, 0] == pytest.approx(found.average_symmetric())
    assert scores["nsd"][0, 0] == pytest.approx(found.surface_dice(2.9))


def test_planes_have_their_area():
    """What a slab between two slices shows of its surface is its two faces and its rim."""
    reference = np.zeros((1, 6, 10, 12), np.uint8)
    reference[:, 2:4] = 1
    found = surface_distances(reference, reference, spacing=(5, 2, 0.5))[0][0]
    inner = 9 * 11 * 2 * (2 * 0.5)  # of both faces, points between four voxels
    assert inner < found.to_reference.areas.sum()
    assert found.hausdorff() == 0
    assert found.surface_dice(0) == 1


def test_empty_masks(backend):
    empty, full = np.zeros((1, 5, 6), np.uint8), np.ones((1, 5, 6), np.uint8)
    metrics = ("hausdorff", "hd95", "assd", "asd", "nsd", "surface_precision", "surface_recall")
    both = evaluate(empty, empty, classes=2, metrics=metrics)
    assert all(isnan(both[name][0, 0]) for name in metrics)
    for arrays in ((empty, full), (full, empty)):
        one = evaluate(*arrays, classes=2, metrics=metrics)
        assert [one[name][0, 0] for name in metrics] == [inf] * 4 + [0.0] * 3
    chosen = evaluate(full, empty, classes=2, metrics=metrics, empty={"hd95": (0, 374)})
    assert chosen["hd95"][0, 0] == 374
    found = surface_distances(empty, full, classes=2)[0][0]
    assert (found.hausdorff(), found.average_symmetric()) == (inf, inf)
    found = surface_distances(empty, empty, classes=2)[0][0]
    assert isnan(found.hausdorff())
    assert isnan(found.average_symmetric())
    assert len(surface_distances(empty[:0], full[:0], classes=2)) == 0


def test_what_does_not_count_has_no_surface(fast_backend):
    """A prediction that is wrong only where nothing counts has no distance."""
    reference = np.zeros((1, 16, 16, 16), np.uint8)
    reference[:, 4:12, 4:12, 4:8] = 1
    prediction = reference.copy()
    prediction[:, :, :, 10:] = 1
    mask = np.ones_like(reference)
    mask[:, :, :, 9:] = 0
    for definition in ("deepmind", "monai", "medpy"):
        assert measured_masked(prediction, reference, mask, definition).hausdorff() == 0
        assert surface_distances(prediction, reference, definition=definition)[0][0].hausdorff() > 5
    marked = np.where(mask, reference, 255).astype(np.uint8)
    found = surface_distances(prediction, marked, classes=2, ignore_index=255)[0][0]
    assert found.hausdorff() == 0


def measured_masked(prediction, reference, mask, definition):
    return surface_distances(prediction, reference, mask=mask, definition=definition)[0][0]


THREADS = """
import hashlib, sys, numpy as np, fastloss as fl
fl.set_num_threads(int(sys.argv[1]))
random = np.random.default_rng(0)
labels = [np.kron(random.integers(0, 4, (1, 5, 6, 7)), np.ones((1, 4, 4, 4), int)) for _ in "ab"]
found = fl.metrics.surface_distances(*labels, spacing=(3, 1, 0.7))
data = b"".join(x.tobytes() for each in found[0] for part in each[:2] for x in part)
print(hashlib.sha256(data).hexdigest())
"""


def test_the_same_bits_for_any_number_of_threads():
    need_backend("cpu")
    environment = {**os.environ, "FASTLOSS_BACKEND": "cpu"}
    found = {
        subprocess.run(
            [sys.executable, "-c", THREADS, threads],
            capture_output=True, text=True, check=True, env=environment,
        ).stdout
        for threads in ("1", "2", "5")
    }  # fmt: skip
    assert len(found) == 1


def test_results_can_be_pickled(fast_backend):
    labels = np.ones((1, 3, 3), np.uint8)
    found = surface_distances(labels, labels, classes=2)
    assert pickle.loads(pickle.dumps(found))[0][0].hausdorff() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"definition": "exact"}, r"definition: expected one of 'deepmind', .* got 'exact'"),
        ({"spacing": (1, 1, 1)}, "spacing: expected 2 numbers"),
        ({"spacing": 0}, "spacing: expected finite numbers above 0"),
        ({"mask": np.ones((1, 3))}, r"mask: expected shape \(1, 4, 4\), got \(1, 3\)"),
    ],
)
def test_bad_input(options, message):
    labels = np.ones((1, 4, 4), np.uint8)
    with pytest.raises(ValueError, match=message):
        surface_distances(labels, labels, **options)


def test_bad_tolerances():
    labels = np.ones((1, 4, 4), np.uint8)
    for tolerance, error in ((-1, ValueError), ((1, 2), ValueError), ("far", TypeError)):
        with pytest.raises(error, match="tolerance: expected"):
            evaluate(labels, labels, classes=2, metrics="nsd", tolerance=tolerance)
    with pytest.raises(ValueError, match=r"tolerance: expected one for each class, but \['b'\]"):
        evaluate(labels, labels, classes={"a": 1, "b": 2}, tolerance={"a": 1})
    with pytest.raises(ValueError, match="'deepmind' needs two or three spatial axes"):
        surface_distances(labels[0], labels[0])
