"""Keras' Dice and Tversky losses."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import keras
from keras import ops

from fastloss.keras import _inputs, _reduce
from fastloss.loss import Loss
from fastloss.terms.region import Dice as DiceTerm
from fastloss.terms.region import GeneralizedDice, RegionTerm
from fastloss.terms.region import Tversky as TverskyTerm

registered = keras.saving.register_keras_serializable(package="fastloss")


class _Region:
    """A loss of overlap and sizes along the axes that it sums over."""

    axis: Any
    reduction: Any
    dtype: Any
    name: str

    def _term(self, **options: Any) -> RegionTerm:
        raise NotImplementedError(f"{type(self).__name__} must define _term")

    def _over_classes(self, **options: Any) -> RegionTerm | None:
        """The same of all classes of a sample together; None: there is no such term."""
        return None

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        mask = _reduce.mask_of(y_pred)
        with keras.name_scope(self.name):
            values = self.call(y_true, y_pred)
            found = _reduce.reduced(values, sample_weight, mask, self.reduction, self.dtype)
            return ops.cast(found, self.dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The values that are not reduced."""
        y_true, y_pred = _inputs.tensor(y_true), _inputs.predictions(y_pred, self.dtype)
        y_true, y_pred = _reduce.same_rank(y_true, y_pred)
        plan = _layout(self.axis, y_pred) if len(y_true.shape) == len(y_pred.shape) else None
        if plan is None:
            dtype = self.dtype
            return super().call(ops.cast(y_true, dtype), ops.cast(y_pred, dtype))  # type: ignore[misc]
        options = {
            "smooth_nr": 0.0,
            "smooth_dr": float(keras.config.epsilon()),
            "batch": plan.batch,
            "reduction": "none",
        }
        shape, axis, term = plan.shape, plan.axis, self._term(**options)
        activation, logits = _inputs.activated(y_pred)
        if activation == "softmax" and axis != 2:  # whose classes are no channels here
            joined = self._over_classes(**options)
            if joined is None or plan.apart is None:
                activation, logits = "none", y_pred
            else:
                shape, axis, term = plan.apart, 2, joined
        rank = len(y_pred.shape)
        if axis == 2 and rank > 2 and y_true.shape[-1] == y_pred.shape[-1]:
            # They are read as they are, and in a graph together with other losses of them.
            loss = Loss(term, activation=activation, channel_axis=rank - 1)
            values = loss(logits, y_true)
        else:
            loss = Loss(term, activation=activation, channel_axis=axis)
            values = loss(ops.reshape(logits, shape), ops.reshape(y_true, shape))
        return ops.reshape(values, plan.left)


class _Layout(NamedTuple):
    """How sums along axes are sums over voxels.

    Attributes:
        shape: to read the arrays in.
        axis: where the channels are in it.
        batch: whether samples are joined.
        left: the shape of the values.
        apart: where classes are summed over, the shape in which they are channels, the last.
    """

    shape: tuple[Any, ...]
    axis: int
    batch: bool
    left: tuple[int, ...]
    apart: tuple[Any, ...] | None = None


def _layout(axis: Any, y_pred: Any) -> _Layout | None:
    """How sums over these axes are sums over voxels; None: they are not."""
    rank = len(y_pred.shape)
    if rank == 0:
        return None
    if axis is None:
        axes = set(range(rank))
    else:
        given = axis if isinstance(axis, (tuple, list)) else (axis,)
        if not all(isinstance(a, int) and -rank <= a < rank for a in given):
            return None
        axes = {a % rank for a in given}
    left = [i for i in range(rank) if i not in axes]
    sizes = [y_pred.shape[i] for i in range(rank)]
    channels, first = sizes[-1], ops.shape(y_pred)[0]
    apart = None if channels in (None, 1) else (first, _rest(sizes, [0, rank - 1]), channels)
    if not left:
        return _Layout((1, 1, -1), 1, True, (), apart if rank > 1 else None)
    if left == [0]:
        rest = _rest(sizes, [0])
        return _Layout((first, 1, rest), 1, False, (-1,), apart if rank > 1 else None)
    if left == [rank - 1] and channels is not None:
        return _Layout((1, -1, channels), 2, True, (-1,))
    if left == [0, rank - 1] and channels is not None:
        return _Layout((first, _rest(sizes, left), channels), 2, False, (-1, channels))
    if left == [0, 1] and sizes[1] is not None:
        return _Layout((first, sizes[1], _rest(sizes, left)), 1, False, (-1, sizes[1]))
    if left == [1] and sizes[1] is not None:
        return _Layout((first, sizes[1], _rest(sizes, [0, 1])), 1, True, (-1,))
    return None


def _rest(sizes: list[int | None], without: list[int]) -> int:
    """The product of the other sizes; −1 where one is not known."""
    product = 1
    for i, n in enumerate(sizes):
        if i not in without:
            if n is None:
                return -1
            product *= n
    return product


@registered
class Dice(_Region, keras.losses.Dice):
    """`keras.losses.Dice`: 1 − 2 Σ y p / (Σ y + Σ p + ε), of probabilities, summed over ``axis``.

    Without an axis there is one Dice of all numbers, batch and classes included; ``axis=(1, 2, 3)``
    gives that of every sample and class of a volume (B, D, H, W, C).
    """

    def _term(self, **options: Any) -> RegionTerm:
        return _dice(tuple(options.items()))

    def _over_classes(self, **options: Any) -> RegionTerm:
        return _generalized(tuple(options.items()))


@registered
class Tversky(_Region, keras.losses.Tversky):
    """`keras.losses.Tversky`, of probabilities, summed over ``axis`` as in `Dice`.

    As in Keras, ``alpha`` weighs what is missed (Σ y (1−p)) and ``beta`` what is found too much
    (Σ p (1−y)), the other way round than its documentation and `fastloss.Tversky` have it.
    """

    def _term(self, **options: Any) -> RegionTerm:
        return _tversky(float(self.beta), float(self.alpha), tuple(options.items()))


@lru_cache(maxsize=64)
def _dice(options: tuple[tuple[str, Any], ...]) -> RegionTerm:
    return DiceTerm(**dict(options))


@lru_cache(maxsize=64)
def _generalized(options: tuple[tuple[str, Any], ...]) -> RegionTerm:
    return GeneralizedDice(weighting="uniform", **dict(options))


@lru_cache(maxsize=64)
def _tversky(alpha: float, beta: float, options: tuple[tuple[str, Any], ...]) -> RegionTerm:
    return TverskyTerm(alpha=alpha, beta=beta, **dict(options))
