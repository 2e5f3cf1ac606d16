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
