"""Where a loss comes from: `Loss.explain` against voxels that are replaced one by one."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
import pytest
from support import BACKENDS, example, need, need_backend

import fastloss as fl
from fastloss.explanation import Explanation

SPATIAL = (3, 4)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def probabilities(logits: np.ndarray, activation: str) -> np.ndarray:
    if activation == "softmax":
        return softmax(logits)
    return 1 / (1 + np.exp(-logits)) if activation == "sigmoid" else logits


def right(target: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The p of voxels that are predicted right."""
    if target.ndim == p.ndim:
        return target.astype(np.float64)
    known = np.arange(p.shape[1]) == target[..., None]  # all 0 of an ignored label
    return np.moveaxis(known, -1, 1).astype(np.float64)


def by_replacement(
    loss: fl.Loss,
    logits: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    step: float = 1.0,
    fields: dict[str, np.ndarray] | None = None,
    regions: np.ndarray | None = None,
) -> np.ndarray:
    """By how much the loss falls, one voxel (of a sigmoid, one channel of it) being right.

    A ``step`` of the voxel's weight is moved to a voxel beside it that is right; the fall is
    divided by the step.
    """
    batch, classes, *spatial = logits.shape
    p = probabilities(logits, loss.activation).reshape(batch, classes, -1)
    sigmoid, dense = loss.activation == "sigmoid", target.ndim == logits.ndim
    g = target.reshape(batch, *[classes] * dense, -1)
    m = np.ones((batch, p.shape[2])) if weight is None else weight.reshape(batch, -1).astype(float)
    wanted = right(g, p)
    # Of probabilities; those of a sigmoid as logits, for what a sigmoid alone has.
    plain = loss.with_terms(loss.terms)
    plain._options = {**loss._options, "activation": loss.activation if sigmoid else "none"}
    read = logit if sigmoid else np.asarray

    def value(sample: int, voxel: int, p_there: np.ndarray, share: float) -> float:
        """With one voxel more in every sample, which has a share of that voxel's weight."""

        def more(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array, array[..., voxel : voxel + 1]], -1)

        q, weights = more(p), more(m)
        weights[:, -1] = 0.0
        q[sample, :, -1], weights[sample, -1] = p_there, share * m[sample, voxel]
        weights[sample, voxel] *= 1 - share
        own = {n: more(f.reshape(*f.shape[: f.ndim - len(spatial)], -1))
               for n, f in (fields or {}).items()}  # fmt: skip
        of = None if regions is None else more(regions.reshape(batch, -1))
        return float(plain(read(q), more(g), weights, fields=own or None, regions=of))

    found = np.zeros((batch, *[classes] * sigmoid, p.shape[2]))
    for place in np.ndindex(*found.shape):
        b, *channel, v = place
        there = p[b, :, v].copy()
        at = channel[0] if sigmoid else slice(None)
        there[at] = wanted[b, at, v]
        found[place] = (value(b, v, there, 0.0) - value(b, v, there, step)) / step
    return found.reshape(*found.shape[:-1], *spatial)


def logit(p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.clip(np.log(p) - np.log1p(-p), -1e4, 1e4)


def arrays_of(activation: str, dense: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = example(2, 3, SPATIAL, seed=seed, activation=activation)
    if not dense:
        return logits, labels
    soft = np.random.default_rng(seed).dirichlet(np.ones(3), (2, *SPATIAL))
    return logits, np.moveaxis(soft, -1, 1).copy()


FIELD = np.abs(np.random.default_rng(3).normal(size=(2, 3, *SPATIAL)))
REGION_TERMS: dict[str, tuple[fl.Term, dict[str, Any]]] = {
    "Dice": (fl.Dice(), {}),
    "options": (
        fl.Dice(include_background=False, weight=[0.5, 2.0], squared=True, reduction="sum"),
        {},
    ),
    "Tversky": (fl.Tversky(alpha=0.3, beta=0.7, gamma=0.75), {}),
    "Jaccard": (fl.Jaccard(batch=True), {}),
    "coupled": (fl.GeneralizedDice(weight=[1.0, 2.0, 3.0]), {}),
    "MCC": (fl.MCC(), {}),
    "Boundary": (fl.Boundary(), {"fields": {"boundary": FIELD - 0.5}}),
    "surface": (fl.GeneralizedSurface(), {"fields": {"distance": FIELD}}),
    "DoU": (fl.BoundaryDoU(batch=True), {"fields": {"boundary_voxels": FIELD > 0.5}}),
    "recall": (fl.SkeletonRecall(), {"fields": {"skeleton": FIELD > 0.5}}),
    "Hausdorff": (fl.HausdorffDT(log=True), {"fields": {"hausdorff(2.0)": FIELD}}),
}


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_gains_are_those_of_voxels_replaced_one_by_one(activation: str) -> None:
    """Exactly, and to first order those of a small step; of labels, masks and soft targets."""
    weight = np.random.default_rng(1).random((2, *SPATIAL)) + 0.1
    weight[0, 0, 0] = 0.0
    for name, (term, more) in REGION_TERMS.items():
        for dense in (False, True):
            if activation == "sigmoid" and not dense:
                continue
            logits, target = arrays_of(activation, dense)
            if activation == "sigmoid" and name != "DoU":
                target = (target > 0.3).astype(np.uint8)
            if dense and name in ("Hausdorff", "surface"):
                target = (target > 0.3).astype(np.float32)
            for arrays in ((), (weight,)):
                for loss in (fl.Loss(term, activation=activation),):
                    where = f"{name}, dense={dense}, weighted={bool(arrays)}"
                    exact = loss.explain(logits, target, *arrays, exact=True, **more)
                    wanted = by_replacement(loss, logits, target, *arrays, **more)
                    np.testing.assert_allclose(exact.map, wanted, 1e-6, 1e-9, err_msg=where)
                    first = loss.explain(logits, target, *arrays, **more)
                    slopes = by_replacement(loss, logits, target, *arrays, step=1e-6, **more)
                    np.testing.assert_allclose(first.map, slopes, 1e-4, 1e-7, err_msg=where)
                    assert first.kinds == {type(term).__name__: "gain"}


def test_parts_and_maps_of_terms_over_voxels_add_up_to_the_value() -> None:
    """Shares are the losses of single voxels over what the mean divides by."""
    logits, labels = example(2, 3, SPATIAL, seed=5)
    labels[0, 0] = 255
    weight = np.random.default_rng(1).random((2, *SPATIAL)) + 0.1
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (fl.CrossEntropy, {"weight": [1.0, 0.5, 2.0]}),
        (fl.CrossEntropy, {"label_smoothing": 0.2}),
        (fl.Focal, {"gamma": 1.5, "alpha": [1.0, 2.0, 3.0]}),
        (fl.Brier, {}),
        (fl.MeanAbsoluteError, {"weight": 2.0}),
        (fl.GeneralizedCrossEntropy, {}),
    ]
    for activation in ("softmax", "sigmoid"):
        target = labels
        if activation == "sigmoid":
            target = (np.random.default_rng(2).random(logits.shape) > 0.5).astype(np.uint8)
        for kind, options in kinds:
            if activation == "sigmoid" and kind is fl.Focal:
                options = {"gamma": 1.5, "alpha": 0.3}
            how: dict[str, Any] = {"activation": activation, "ignore_index": 255}
            # Beside a region term, and alone, where the pass over the sums writes the map.
            for loss in (fl.Loss(0.5 * kind(**options), **how),
                         fl.Loss(fl.Dice(), 0.5 * kind(**options), **how)):  # fmt: skip
                found = loss.explain(logits, target, weight)
                name, where = kind.__name__, f"{kind.__name__}, {activation}"
                alone = float(fl.Loss(kind(**options), **how)(logits, target, weight))
                np.testing.assert_allclose(found.terms[name], 0.5 * alone, 1e-9, err_msg=where)
                np.testing.assert_allclose(found.maps[name].sum(), 0.5 * alone, 1e-9)
                assert found.parts[name].shape == (2, 3)
                assert found.kinds[name] == "share"
                each = fl.Loss(kind(**options, reduction="voxel"), **how)(logits, target, weight)
                np.testing.assert_allclose(
                    found.maps[name] * each.sum(), each * 0.5 * alone, 1e-9, 1e-12, err_msg=where
                )
                if activation == "softmax":
                    assert not found.map[0, 0].any()
                np.testing.assert_allclose(sum(found.terms.values()), found.value, 1e-9)
                np.testing.assert_allclose(found.value, float(loss(logits, target, weight)), 1e-12)
    # The class is the label, for a loss that reads p of the label alone.
    found = fl.Loss(fl.CrossEntropy(), ignore_index=255).explain(logits, labels)
    for b, c in np.ndindex(2, 3):
        own = found.map[b][labels[b] == c].sum()
        np.testing.assert_allclose(found.parts["CrossEntropy"][b, c], own, 1e-9)


def test_parts_of_region_terms() -> None:
    """By their formula; where a term has one value for classes or samples, one part."""
    logits, labels = example(2, 3, SPATIAL, seed=6)
    p, g = softmax(logits), right(labels, logits)
    axes = (2, 3)
    dice = 1 - (2 * (p * g).sum(axes) + 1e-5) / ((p + g).sum(axes) + 1e-5)
    joined = 1 - (2 * (p * g).sum((0, *axes)) + 1e-5) / ((p + g).sum((0, *axes)) + 1e-5)
    weight = np.array([1.0, 3.0])
    loss = (
        fl.Dice()
        + 2 * fl.Dice(batch=True)
        + fl.Dice(include_background=False, weight=weight, reduction="sum")
        + fl.GeneralizedDice()
        + fl.TopKCrossEntropy(k=30, weight=[1.0, 2.0, 3.0])
    )
    found = loss.explain(logits, labels)
    np.testing.assert_allclose(found.parts["Dice"], dice / 6, 1e-9)
    np.testing.assert_allclose(found.parts["Dice 2"], 2 * joined[None] / 3, 1e-9)
    wanted = np.concatenate([np.zeros((2, 1)), dice[:, 1:] * weight], 1)
    np.testing.assert_allclose(found.parts["Dice 3"], wanted, 1e-9)
    assert found.parts["GeneralizedDice"].shape == (2, 1)
    np.testing.assert_allclose(sum(found.terms.values()), float(loss(logits, labels)), 1e-9)
    # Of the voxels that top-k chooses, by their labels.
    chosen = found.maps["TopKCrossEntropy"]
    assert found.kinds["TopKCrossEntropy"] == "share"
    assert np.count_nonzero(chosen) == int(0.3 * chosen.size)
    for b, c in np.ndindex(2, 3):
        own = chosen[b][labels[b] == c].sum()
        np.testing.assert_allclose(found.parts["TopKCrossEntropy"][b, c], own, 1e-9)
    np.testing.assert_allclose(found.map, sum(found.maps.values()), 1e-12)
    # The table has a row for each kind of part, and its columns add up to the terms.
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    places = [(row["sample"], row["class"]) for row in rows]
    assert places == [("0", "0"), ("0", "1"), ("0", "2"), ("0", "all"),
                      ("1", "0"), ("1", "1"), ("1", "2"), ("1", "all"),
                      ("all", "0"), ("all", "1"), ("all", "2")]  # fmt: skip
    for name, value in found.terms.items():
        column = np.array([float(row[name]) for row in rows])
        np.testing.assert_allclose(np.nansum(column), value, 1e-9)
    np.testing.assert_allclose(sum(float(row["total"]) for row in rows), found.value, 1e-9)
    assert need("pandas").DataFrame.equals(
        found.to_pandas().reset_index(), need("pandas").DataFrame(found.rows())
    )
    lines = repr(found).splitlines()
    assert lines[0] == f"Loss {found.value:.5g}"
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2", "all", "sum"]
    assert lines[-1].split()[-1] == f"{found.value:.5g}"


LESIONS = np.array([[[1, 0, 0, 2], [0, 0, 0, 2], [1, 1, 0, 0]], [[0] * 4] * 3])
"""Three lesions, and a sample without any."""


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_parts_of_the_unified_focal_loss(activation: str) -> None:
    """With a sigmoid its parts are those of the symmetric form, as its value is."""
    logits, labels = example(2, 3, SPATIAL, seed=3)
    loss = fl.UnifiedFocal(activation=activation)
    found = loss.explain(logits, labels)
    np.testing.assert_allclose(sum(found.terms.values()), loss(logits, labels), 1e-9)
    exact = loss.explain(logits, labels, exact=True).maps["UnbalancedTversky"]
    tversky = fl.Loss(loss.terms[1][0] * loss.terms[1][1], activation=activation)
    np.testing.assert_allclose(exact, by_replacement(tversky, logits, labels), 1e-6, 1e-9)


def lesion_losses() -> dict[str, fl.Loss]:
    terms = fl.Dice(smooth_nr=0.1) + 0.5 * fl.CrossEntropy()
    return {
        "voronoi": fl.Loss(fl.PerRegion(terms, weight="inverse_volume")),
        "skip": fl.Loss(fl.CCDiceCE(without="skip")),
        "beside": fl.Dice() + 2 * fl.PerRegion(terms, regions="components+background"),
        "coupled": fl.Loss(fl.PerRegion(fl.GeneralizedDice(smooth_nr=1.0))),
    }


def test_parts_and_gains_in_lesions() -> None:
    logits, _ = example(2, 3, SPATIAL, seed=7)
    for name, loss in lesion_losses().items():
        made = loss.fields(LESIONS, classes=3)["regions"]
        found = loss.explain(logits, LESIONS)
        term = next(n for n in found.terms if n != "Dice")
        np.testing.assert_allclose(
            sum(found.terms.values()), float(loss(logits, LESIONS)), 1e-9, err_msg=name
        )
        regions = found.regions[term]
        assert set(found.regions) == {term}
        np.testing.assert_allclose(regions.sum(axis=1), found.parts[term], 1e-12)
        # Lesions 1, 2 and 3 are of the classes 1, 2 and 1.
        counted = np.argwhere(regions[0]) - [1 if name == "beside" else 0, 0]
        np.testing.assert_array_equal(counted, [[0, 1], [1, 2], [2, 1]], err_msg=name)
        assert regions[1].any() == (name != "skip")
        parts = [row["part"] for row in found.region_rows()]
        assert parts == sorted(parts, reverse=True)
        # Terms over voxels are linear: their gain is their share, as there is no loss at p = 1.
        for exact, step, near in ((True, 1.0, 1e-6), (False, 1e-7, 1e-4)):
            gains = loss.explain(logits, LESIONS, regions=made, exact=exact).map
            wanted = by_replacement(loss, logits, LESIONS, regions=made, step=step)
            np.testing.assert_allclose(gains, wanted, near, 1e-6, err_msg=f"{name} {exact}")


def test_regions_of_the_callers() -> None:
    """Every term is one of regions then; a voxel of none has no gain."""
    logits, labels = example(2, 3, SPATIAL, seed=8)
    regions = np.zeros((2, *SPATIAL), np.int16)
    regions[:, 1] = 1
    regions[0, 2, 2:] = -1
    loss = fl.Dice() + fl.Dice(batch=True, weight=[1.0, 2.0, 0.5]) + fl.CrossEntropy()
    for exact, step in ((True, 1.0), (False, 1e-7)):
        found = loss.explain(logits, labels, regions=regions, exact=exact)
        wanted = by_replacement(loss, logits, labels, regions=regions, step=step)
        np.testing.assert_allclose(found.map, wanted, 1e-4, 1e-7)
        assert not found.map[0, 2, 2:].any()
    assert {name: table.shape for name, table in found.regions.items()} == {
        "Dice": (2, 2, 3), "Dice 2": (1, 2, 3), "CrossEntropy": (2, 2, 3)}  # fmt: skip
    assert found.parts["Dice 2"].shape == (1, 3)
    np.testing.assert_allclose(sum(found.terms.values()), found.value, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree(backend: str) -> None:
    need_backend(backend)
    logits, labels = example(2, 3, SPATIAL, seed=9, dtype=np.float32)
    dense = (np.random.default_rng(2).random(logits.shape) > 0.5).astype(np.uint8)
    regions = lesion_losses()["voronoi"].fields(LESIONS, classes=3)["regions"]
    cases: list[tuple[fl.Loss, np.ndarray, dict[str, Any]]] = [
        (fl.Dice() + fl.CrossEntropy(), labels, {}),
        (fl.Dice() + fl.TopKCrossEntropy(k=40), labels, {}),
        (fl.Dice() + fl.CrossEntropy(), labels, {"exact": True}),
        (lesion_losses()["beside"], LESIONS, {"regions": regions + 1}),
        (fl.Loss(fl.Boundary(), fl.Focal(), activation="sigmoid"), dense, {}),
        (fl.Dice() + fl.LovaszSoftmax() + 2 * fl.CrossEntropy(), labels, {}),
    ]

    def maps() -> list[Explanation]:
        return [loss.explain(logits, target, **options) for loss, target, options in cases]

    with fl.use_backend("reference"):
        wanted = maps()
    with fl.use_backend(backend):
        found = maps()
    for one, other in zip(found, wanted, strict=True):
        assert one.map.dtype == np.float32
        np.testing.assert_allclose(one.map, other.map, 2e-5, 1e-7)
        for name in one.parts:
            np.testing.assert_allclose(one.parts[name], other.parts[name], 1e-5, 1e-7)


def test_arrays_of_frameworks() -> None:
    """Maps are the caller's, in the axes of the logits; inputs stay as they are."""
    torch = need("torch")
    logits, labels = example(2, 3, SPATIAL, seed=10, dtype=np.float32)
    dense = np.moveaxis(np.eye(3, dtype=np.float32)[labels], -1, 1)
    loss = fl.Dice() + fl.CrossEntropy()
    wanted = loss.explain(logits, labels)
    x, y = torch.from_numpy(logits.copy()).requires_grad_(), torch.from_numpy(labels.copy())
    found = loss.explain(x, y)
    assert isinstance(found.map, torch.Tensor)
    assert not found.map.requires_grad
    np.testing.assert_array_equal(found.map.numpy(), wanted.map)
    np.testing.assert_array_equal(found.numbers("Dice"), wanted.maps["Dice"])
    np.testing.assert_array_equal(x.detach().numpy(), logits)
    half = loss.explain(x.detach().bfloat16(), y)
    assert half.map.dtype == torch.float32
    np.testing.assert_allclose(half.map.numpy(), wanted.map, 0.1, 1e-3)
    # Channels last, of a sigmoid.
    last = fl.Loss(loss, activation="sigmoid", channel_axis=-1)
    by_channel = last.explain(np.moveaxis(logits, 1, -1), np.moveaxis(dense, 1, -1))
    assert by_channel.map.shape == (2, *SPATIAL, 3)
    first = fl.Loss(loss, activation="sigmoid").explain(logits, dense)
    np.testing.assert_array_equal(np.moveaxis(by_channel.map, -1, 1), first.map)
    worst, same = by_channel.worst(3), first.worst(3)
    assert [set(worst)] == [set(same)]
    jax = need("jax")
    np.testing.assert_allclose(
        loss.explain(jax.numpy.asarray(logits), jax.numpy.asarray(labels)).map, wanted.map, 1e-6
    )
    # One number per sample, where there are no spatial axes.
    flat = loss.explain(logits[:, :, 0, 0], labels[:, 0, 0], exact=True)
    assert flat.map.shape == (2,)


def test_worst_voxels() -> None:
    logits, labels = example(2, 3, SPATIAL, seed=11)
    found = (fl.Dice() + fl.CrossEntropy()).explain(logits, labels)
    for term in (None, "Dice", "CrossEntropy"):
        numbers = found.numbers(term)
        worst = found.worst(5, term)
        assert [v.value for v in worst] == sorted(numbers.reshape(-1).tolist(), reverse=True)[:5]
        assert all(numbers[(v.sample, *v.position)] == v.value for v in worst)
        assert all(v.channel is None for v in worst)
    assert len(found.worst(10**6)) == labels.size
    assert found.worst(0) == []
    equal = fl.CrossEntropy().explain(np.zeros((1, 2, 4)), np.zeros((1, 4), int))
    assert [v.position for v in equal.worst(2)] == [(0,), (1,)]
    logits[1, :, 2, 3] = np.nan
    nothing = (fl.Dice() + fl.CrossEntropy()).explain(logits, labels)
    assert np.isnan(nothing.value)
    first, second = nothing.worst(2, "CrossEntropy")
    assert (first.sample, first.position) == (1, (2, 3))
    assert np.isnan(first.value)
    assert np.isfinite(second.value)


def test_spacing_is_that_of_the_fields_that_are_made() -> None:
    logits, labels = example(1, 2, (4, 5), seed=12)
    for term in (fl.Boundary(), fl.CCDiceCE()):
        loss = fl.Dice() + term
        spaced = loss.explain(logits, labels, spacing=(3.0, 1.0))
        fields = loss.fields(labels, classes=2, spacing=(3.0, 1.0))
        np.testing.assert_allclose(spaced.map, loss.explain(logits, labels, fields=fields).map)
        with pytest.raises(ValueError, match="spacing: expected 2 numbers"):
            loss.explain(logits, labels, spacing=(1, 1, 1))
    with pytest.raises(ValueError, match="spacing"):
        loss.explain(logits, labels, spacing=-1)


def test_terms_of_ones_own() -> None:
    class Squared(fl.Term):
        """Of no kind that the library knows: (Σ p g)²."""

        requires = frozenset({"region"})

        def combine(self, statistics: fl.Statistics) -> Any:
            total = statistics["overlap"].sum()
            return total**2, lambda upstream: {"overlap": upstream * 2 * total}

    class Halved(fl.Dice):
        def combine(self, statistics: fl.Statistics) -> Any:
            value, pullback = super().combine(statistics)
            return value / 2, lambda upstream: pullback(upstream / 2)

    logits, labels = example(2, 3, SPATIAL, seed=13)
    for term in (Squared(), Halved()):
        found = fl.Loss(term).explain(logits, labels)
        name = type(term).__name__
        assert found.parts[name].shape == (1, 1)
        np.testing.assert_allclose(found.terms[name], float(fl.Loss(term)(logits, labels)), 1e-12)
        wanted = by_replacement(fl.Loss(term), logits, labels, step=1e-6)
        np.testing.assert_allclose(found.map, wanted, 1e-3, 1e-6)
        with pytest.raises(ValueError, match=f"exact: {name} defines no `fall`"):
            fl.Loss(term).explain(logits, labels, exact=True)


def test_bad_input() -> None:
    logits, labels = example(2, 3, SPATIAL)
    for term, shape in ((fl.Dice(reduction="none"), (2, 3)),
                        (fl.CrossEntropy(reduction="voxel"), (2, *SPATIAL))):  # fmt: skip
        with pytest.raises(ValueError, match="reduction: expected a loss of one value") as error:
            term.explain(logits, labels)
        assert str(shape) in str(error.value)
    with pytest.raises(ValueError, match="target: expected labels"):
        fl.Dice().explain(logits, labels + 5)

    class Counted(fl.Term):
        requires = frozenset({"errors"})

    with pytest.raises(ValueError, match=r"terms: Counted reads a histogram"):
        fl.Loss(fl.Dice(), Counted()).explain(logits, labels)
    with pytest.raises(TypeError, match="fields: expected a mapping"):
        fl.Dice().explain(logits, labels, fields=1)
    found = fl.Dice().explain(logits, labels)
    with pytest.raises(ValueError, match="term: expected one of 'Dice', got 'Dise'"):
        found.worst(1, "Dise")
    with pytest.raises(TypeError, match=r"n: expected an integer, got 1\.5"):
        found.worst(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n: expected at least 0, got -1"):
        found.worst(-1)
    nothing = fl.Dice().explain(logits[:0], labels[:0])
    assert nothing.map.shape == (0, *SPATIAL)
    assert nothing.worst(3) == []
