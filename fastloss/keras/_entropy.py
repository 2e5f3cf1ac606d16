"""Keras' cross-entropies and focal losses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import keras
from keras import ops

from fastloss.keras import _inputs, _reduce
from fastloss.keras._terms import Entropy
from fastloss.loss import Loss

registered = keras.saving.register_keras_serializable(package="fastloss")


@dataclass
class _Plan:
    """How a loss is computed by the kernels.

    Attributes:
        y_true, y_pred: as the kernels read them, the channels along ``axis``.
        options: of the `Entropy`, by name, None left out.
        ignore: the label whose voxels do not count.
        mean: whether the values are means over the channels, of both outcomes.
    """

    y_true: Any
    y_pred: Any
    activation: str
    axis: int
    options: dict[str, Any]
    ignore: int | None = None
    mean: bool = False

    def compute(self, reduction: str, weight: Any = None) -> Any:
        options = tuple((k, _frozen(v)) for k, v in self.options.items())
        loss = _loss(self.activation, self.axis, self.ignore, reduction, options)
        return loss(self.y_pred, self.y_true, weight)

    def values(self) -> Any:
        """The loss of every voxel."""
        found = self.compute("voxel")
        if not self.mean:
            return found
        if self.activation == "sigmoid":  # whose map has every channel
            return ops.mean(found, axis=self.axis)
        return found / self.y_pred.shape[self.axis]

    @property
    def shape(self) -> list[Any]:
        """That of the values."""
        shape = list(ops.shape(self.y_pred))
        del shape[self.axis]
        return shape


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=256)
def _loss(
    activation: str,
    axis: int,
    ignore: int | None,
    reduction: str,
    options: tuple[tuple[str, Any], ...],
) -> Loss:
    term = Entropy(reduction=reduction, **dict(options))
    return Loss(term, activation=activation, channel_axis=axis, ignore_index=ignore)


class _Voxelwise:
    """A loss with a value for every voxel, which the kernels reduce where they can."""

    reduction: Any
    dtype: Any
    name: str

    def _plan(self, y_true: Any, y_pred: Any) -> _Plan | None:
        """How these are computed; None: by Keras."""
        raise NotImplementedError(f"{type(self).__name__} must define _plan")

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        mask = _reduce.mask_of(y_pred)
        plan = self._plan(_inputs.tensor(y_true), _inputs.predictions(y_pred, self.dtype))
        if plan is None:
            return super().__call__(y_true, y_pred, sample_weight)  # type: ignore[misc]
        with keras.name_scope(self.name):
            found = None
            if mask is None and self.reduction not in (None, "none"):
                found = self._fused(plan, sample_weight)
            if found is None:
                if plan.ignore is not None:
                    valid = self._valid(plan)
                    mask = valid if mask is None else ops.logical_and(mask, valid)
                found = _reduce.reduced(
                    plan.values(), sample_weight, mask, self.reduction, self.dtype
                )
            return ops.cast(found, self.dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The values that are not reduced."""
        plan = self._plan(_inputs.tensor(y_true), _inputs.predictions(y_pred, self.dtype))
        if plan is None:
            return super().call(y_true, y_pred)  # type: ignore[misc]
        return plan.values()

    def _fused(self, plan: _Plan, sample_weight: Any) -> Any:
        """The reduced value in two passes; None: the weights do not fit."""
        weight = weights = None
        if sample_weight is not None:
            shape = plan.shape
            both = _reduce.voxel_weight(sample_weight, len(shape), shape)
            if both is None:
                return None
            weight, weights = both
        elif plan.mean and self.reduction != "sum":
            # The mean over all numbers, whatever their axes.
            y_true, y_pred = (ops.reshape(a, (1, 1, -1)) for a in (plan.y_true, plan.y_pred))
            total = _Plan(y_true, y_pred, plan.activation, 1, plan.options).compute("sum")
            return _reduce.divided(total, _reduce.count_of(ops.shape(plan.y_pred), "float32"))
        total = plan.compute("sum", weight)
        if plan.mean:
            total = total / plan.y_pred.shape[plan.axis]
        if self.reduction == "sum":
            return total
        if self.reduction == "mean_with_sample_weight" and weights is not None:
            if plan.ignore is not None:
                return None
            return _reduce.divided(total, weights)
        if plan.ignore is not None:
            return _reduce.divided(total, ops.sum(ops.cast(self._valid(plan), "float32")))
        return _reduce.divided(total, _reduce.count_of(plan.shape, "float32"))

    def _valid(self, plan: _Plan) -> Any:
        """Where the label counts, in the shape of the values."""
        assert plan.ignore is not None
        labels = plan.y_true
        if len(labels.shape) == len(plan.y_pred.shape):
            labels = ops.squeeze(labels, plan.axis)
        return ops.not_equal(labels, ops.cast(plan.ignore, labels.dtype))


def _axis(axis: Any, y_pred: Any) -> int | None:
    """The axis of the channels, counted from the first; None: not one that the kernels take."""
    rank = len(y_pred.shape)
    if isinstance(axis, bool) or not isinstance(axis, int) or not -rank <= axis < rank:
        return None
    axis %= rank
    return axis if axis and y_pred.shape[axis] is not None else None


def _categorical(
    loss: Any, y_true: Any, y_pred: Any, name: str, search: bool = True, **options: Any
) -> _Plan | None:
    """Of a dense target and a softmax."""
    y_true, y_pred = _reduce.same_rank(y_true, y_pred)
    axis = _axis(loss.axis, y_pred)
    alike = len(y_true.shape) == len(y_pred.shape) and all(
        a == b or a is None or b is None for a, b in zip(y_true.shape, y_pred.shape, strict=True)
    )
    if axis is None or not alike or y_pred.shape[-1] in (1, None) or y_pred.shape[axis] == 1:
        return None
    smoothing = loss.label_smoothing
    options["hard"] = 1.0 - smoothing if smoothing else 1.0
    # Keras counts the classes along the last axis, whatever the axis is.
    options["smooth"] = smoothing / y_pred.shape[-1] if smoothing else 0.0
    found = _inputs.logits_of(y_pred, "softmax", loss.from_logits, name) if search else None
    if found is not None or loss.from_logits:
        return _Plan(y_true, y_pred if found is None else found, "softmax", axis, options)
    return _Plan(y_true, _inputs.normalized(y_pred, axis), "none", axis, options)


@registered
class CategoricalCrossentropy(_Voxelwise, keras.losses.CategoricalCrossentropy):
    """`keras.losses.CategoricalCrossentropy`: −Σ_c y_c log p_c of every voxel.

    y_true is one-hot or soft, of y_pred's shape.
    """

    def _plan(self, y_true: Any, y_pred: Any) -> _Plan | None:
        return _categorical(self, y_true, y_pred, "CategoricalCrossentropy")


@registered
class CategoricalFocalCrossentropy(_Voxelwise, keras.losses.CategoricalFocalCrossentropy):
    """`keras.losses.CategoricalFocalCrossentropy`: −Σ_c α y_c (1−p_c)^γ log p_c of every voxel.

    y_true is one-hot or soft, of y_pred's shape; α is one number or one for each class.
    """

    def _plan(self, y_true: Any, y_pred: Any) -> _Plan | None:
        alpha = self.alpha
        options = {
            "gamma": float(self.gamma),
            "weight": tuple(map(float, alpha)) if hasattr(alpha, "__len__") else float(alpha),
        }
        name = "CategoricalFocalCrossentropy"
        return _categorical(self, y_true, y_pred, name, search=False, **options)


@registered
class SparseCategoricalCrossentropy(_Voxelwise, keras.losses.SparseCategoricalCrossentropy):
    """`keras.losses.SparseCategoricalCrossentropy`: −log p_y of every voxel.

    y_true holds labels, without the channel axis or with one of 1; those of ``ignore_class`` count
    for nothing.
    """

    def __init__(
        self,
        from_logits: bool = False,
        ignore_class: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        axis: int = -1,
        name: str = "sparse_categorical_crossentropy",
        dtype: Any = None,
    ) -> None:
        super().__init__(
            from_logits=from_logits,
            ignore_class=ignore_class,
            reduction=reduction,
            axis=axis,
            name=name,
            dtype=dtype,
        )
        self.axis = axis

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}

    def _plan(self, y_true: Any, y_pred: Any) -> _Plan | None:
        axis = _axis(self.axis, y_pred)
        if axis is None or y_pred.shape[axis] == 1:
            return None
        ranks = len(y_true.shape), len(y_pred.shape)
        if ranks[0] == ranks[1]:
            if y_true.shape[axis] != 1:
                return None
        elif ranks[0] != ranks[1] - 1:
            return None
        name, ignore = "SparseCategoricalCrossentropy", self.ignore_class
        found = _inputs.logits_of(y_pred, "softmax", self.from_logits, name)
        if found is not None or self.from_logits:
            y_pred = y_pred if found is None else found
            return _Plan(y_true, y_pred, "softmax", axis, {}, ignore)
        if keras.backend.backend() == "tensorflow":  # which divides after it has clipped
            logarithms = ops.log(_inputs.clipped(y_pred))
            return _Plan(y_true, logarithms, "softmax", axis, {}, ignore)
        return _Plan(y_true, _inputs.normalized(y_pred, axis), "none", axis, {}, ignore)


def _binary(loss: Any, y_true: Any, y_pred: Any, name: str, **options: Any) -> _Plan | None:
    """Of both outcomes of every channel."""
    axis = _axis(loss.axis, y_pred)
    alike = len(y_true.shape) == len(y_pred.shape) and all(
        a == b or a is None or b is None for a, b in zip(y_true.shape, y_pred.shape, strict=True)
    )
    if axis is None or not alike:
        return None
    options["both"] = True
    found = _inputs.logits_of(y_pred, "sigmoid", loss.from_logits, name)
    if found is not None or loss.from_logits:
        y_pred = y_pred if found is None else found
        return _Plan(y_true, y_pred, "sigmoid", axis, options, mean=True)
    return _Plan(y_true, _inputs.clipped(y_pred), "none", axis, options, mean=True)


@registered
class BinaryCrossentropy(_Voxelwise, keras.losses.BinaryCrossentropy):
    """`keras.losses.BinaryCrossentropy`: −y log p − (1−y) log(1−p), the mean over the channels.

    y_true is of y_pred's shape, hard or soft.
    """

    def _plan(self, y_true: Any, y_pred: Any) -> _Plan | None:
        y_true, y_pred = _reduce.same_rank(y_true, y_pred)
        smoothing = self.label_smoothing
        options = {"hard": 1.0 - smoothing, "smooth": smoothing / 2} if smoothing else {}
        return _binary(self, y_true, y_pred, "BinaryCrossentropy", **options)


@registered
class BinaryFocalCrossentropy(_Voxelwise, keras.losses.BinaryFocalCrossentropy):
    """`keras.losses.BinaryFocalCrossentropy`, the mean over the channels.

    y_true is of y_pred's shape. The kernels take targets of integers or bool; floating ones may be
    soft, of which the loss is no sum of products, and are left to Keras.
    """

    def _plan(self, y_true: Any, y_pred: Any) -> _Plan | None:
        if self.label_smoothing or not _inputs.is_hard(y_true):
            return None
        y_true, y_pred = _reduce.same_rank(y_true, y_pred)
        options: dict[str, Any] = {"gamma": float(self.gamma)}
        if self.apply_class_balancing:
            options["weight"] = float(self.alpha)
            options["rest_weight"] = 1.0 - float(self.alpha)
        return _binary(self, y_true, y_pred, "BinaryFocalCrossentropy", **options)
