"""Reductions, sample weights and masks, with the meaning that Keras gives them."""

from __future__ import annotations

from math import prod
from typing import Any

import keras
from keras import ops

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


def mask_of(y_pred: Any) -> Any:
    """The mask that a layer has left on what it returned; None: none."""
    return getattr(y_pred, "_keras_mask", None)


def same_rank(a: Any, b: Any, expand_rank_1: bool = True) -> tuple[Any, Any]:
    """Arrays whose ranks differ by a last axis of one, brought to the same rank."""
    ranks = len(a.shape), len(b.shape)
    if ranks[0] == ranks[1] + 1 and a.shape[-1] == 1:
        if ranks[1] == 1 and expand_rank_1:
            return a, ops.expand_dims(b, -1)
        return ops.squeeze(a, -1), b
    if ranks[1] == ranks[0] + 1 and b.shape[-1] == 1:
        if ranks[0] == 1 and expand_rank_1:
            return ops.expand_dims(a, -1), b
        return a, ops.squeeze(b, -1)
    return a, b


def count_of(shape: Any, dtype: str) -> Any:
    """How many numbers there are in an array of this shape."""
    if all(isinstance(n, int) for n in shape):
        return float(prod(shape))
    return ops.cast(ops.prod(ops.stack([ops.cast(n, "int32") for n in shape])), dtype)


def divided(total: Any, divisor: Any) -> Any:
    """The mean; 0 where nothing is counted."""
    if isinstance(divisor, float):
        return for_replicas(total / divisor if divisor else total * 0.0)
    return for_replicas(ops.divide_no_nan(total, ops.cast(divisor, total.dtype)))


def for_replicas(value: Any) -> Any:
    """The value over the number of replicas, whose values `tf.distribute` adds."""
    if keras.backend.backend() != "tensorflow":
        return value
    import tensorflow as tf

    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return value / replicas if replicas > 1 else value


def reduced(values: Any, sample_weight: Any, mask: Any, reduction: str | None, dtype: str) -> Any:
    """Losses, weighed and reduced."""
    values = ops.cast(values, dtype)
    weight = None if sample_weight is None else ops.convert_to_tensor(sample_weight, dtype=dtype)
    if mask is not None:
        masked = ops.cast(mask, dtype)
        if reduction in ("mean", "sum_over_batch_size"):
            # The mean is over what the mask leaves.
            total = count_of(ops.shape(mask), dtype)
            share = ops.divide_no_nan(ops.cast(total, dtype), ops.sum(masked))
            masked = masked * share
        if weight is not None:
            masked, weight = same_rank(masked, weight)
            weight = weight * masked
        else:
            weight = masked
    if weight is not None:
        values, weight = same_rank(values, weight)
        values = values * weight
    if reduction in (None, "none") or len(values.shape) == 0 or tuple(values.shape) == (0,):
        return values
    total = ops.sum(values)
    if reduction == "sum":
        return total
    if reduction == "mean_with_sample_weight" and weight is not None:
        return divided(total, ops.sum(weight))
    return divided(total, count_of(ops.shape(values), dtype))


def voxel_weight(sample_weight: Any, rank: int, shape: Any) -> tuple[Any, Any] | None:
    """Sample weights for the kernels, and their sum as Keras takes it; None: not in this shape.

    Args:
        rank, shape: of the losses that they weigh.
    """
    weight = ops.convert_to_tensor(sample_weight)
    if len(weight.shape) == rank + 1 and weight.shape[-1] == 1 and rank > 1:
        weight = ops.squeeze(weight, -1)
    own = len(weight.shape)
    lower = own == rank - 1 and shape[-1] == 1  # as which Keras would change the losses
    if own > rank or lower:
        return None
    return ops.broadcast_to(weight, shape), ops.sum(ops.cast(weight, "float32"))
