"""The segmentation losses of optax with its signatures and values, in two passes.

``from fastloss.optax import dice_loss`` takes the place of ``from optax.losses import dice_loss``;
optax itself is not needed. Arrays are channels last, (batch, *spatial, C), and are read where they
lie. Other than in optax

- predictions need not be JAX arrays, and a target of several classes may be a label map of
  integers, (batch, *spatial), for which no one-hot array is made;
- probabilities (``apply_softmax=False``) are taken as they are, inside `jax.jit` as well: optax
  looks whether they sum to 1, which works outside it alone, and never for one channel;
- float16 and bfloat16 predictions are summed in float32, and the value is float32;
- gradients flow to the predictions and ``class_weights`` alone, once; ``smooth``, ``alpha`` and
  ``beta`` are numbers.

Source: DeepMind's optax 0.2.8, `optax/losses/_segmentation.py`.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastloss.loss import Loss, Term
from fastloss.options import REDUCTIONS, check_choice, check_number
from fastloss.terms import RegionTerm, Tversky

__all__ = ["binary_dice_loss", "dice_loss", "multiclass_generalized_dice_loss"]


def dice_loss(
    predictions: Any,
    targets: Any,
    *,
    class_weights: Any = None,
    smooth: Any = 1.0,
    alpha: Any = 0.5,
    beta: Any = 0.5,
    apply_softmax: bool = True,
    reduction: str = "mean",
    ignore_background: bool = False,
    axis: Any = None,
) -> jax.Array:
    """1 − (O + smooth) / (O + α (P − O) + β (G − O) + smooth) of every sample and class.

    O = Σ p g, P = Σ p and G = Σ g over the spatial axes. As `optax.losses.dice_loss`.

    Args:
        predictions: logits (batch, *spatial, C); of one class also (batch, *spatial).
        targets: one-hot, multi-label or soft, of the same shape; or a label map of integers in
            [0, C), (batch, *spatial); with C = 1 a mask of that shape.
        class_weights: (C,), by which the value of each class is multiplied.
        smooth: at least 0.
        alpha: of false positives, at least 0.
        beta: of false negatives, at least 0.
        apply_softmax: the predictions are logits, of softmax or with C = 1 of a sigmoid; else they
            are probabilities.
        reduction: over the classes: "mean", "sum" or "none".
        ignore_background: leave out class 0, where there are several.
        axis: the axes that are summed, in place of the spatial ones; not that of the classes.

    Returns:
        (batch,), with reduction "none" (batch, C) or (batch, C−1); with ``axis`` the axes that are
        not summed in place of the batch.

    Raises:
        TypeError, ValueError: arrays that do not fit each other, an option out of its range.

    Source: Salehi et al. 2017, "Tversky loss function for image segmentation".
    """
    check_choice("reduction", reduction, REDUCTIONS)
    term = _tversky(_number("smooth", smooth), _number("alpha", alpha), _number("beta", beta))
    value = _each(term, predictions, targets, apply_softmax, axis)
    classes = value.shape[-1]
    if class_weights is not None:
        if np.shape(class_weights) != (classes,):
            raise ValueError(
                f"class_weights: expected shape {(classes,)}, got {np.shape(class_weights)}"
            )
        value = value * class_weights
    if ignore_background and classes > 1:
        value = value[..., 1:]
    if reduction == "none":
        return value
    return value.mean(axis=-1) if reduction == "mean" else value.sum(axis=-1)


def multiclass_generalized_dice_loss(
    predictions: Any,
    targets: Any,
    *,
    smooth: Any = 1.0,
    apply_softmax: bool = True,
    ignore_background: bool = False,
) -> jax.Array:
    """The mean of `dice_loss` over samples and classes, weighed by 1 / (size of the class)².

    The size is that in the whole batch; the weights are scaled so that their mean is 1. As
    `optax.losses.multiclass_generalized_dice_loss`, with arguments as in `dice_loss`.

    Source: Sudre et al. 2017, "Generalised Dice overlap as a deep learning loss function".
    """
    term = _weighed(_number("smooth", smooth))
    value = _each(term, predictions, targets, apply_softmax, None)
    return (value[..., 1:] if ignore_background and value.shape[-1] > 1 else value).mean()


def binary_dice_loss(
    predictions: Any, targets: Any, *, smooth: Any = 1.0, apply_sigmoid: bool = True
) -> jax.Array:
    """`dice_loss` of a mask: predictions and targets are (batch, *spatial) or (batch, *spatial, 1).

    As `optax.losses.binary_dice_loss`; the value is (batch,).
    """
    if np.ndim(predictions) == np.ndim(targets) and np.shape(predictions)[-1:] != (1,):
        predictions, targets = _array(predictions)[..., None], _array(targets)[..., None]
    return dice_loss(predictions, targets, smooth=smooth, apply_softmax=apply_sigmoid)


class SizeWeightedTversky(RegionTerm):
    """w_c (1 − (O + s) / (½ (P + G) + s)), w ∝ 1/(G_c² + 1e-7) over the batch, of mean 1."""

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weight = 1.0 / (reference.sum(axis=0, keepdims=True) ** 2 + 1e-7)
        weight = weight / weight.sum(axis=1, keepdims=True) * weight.shape[1]
        inverse = 1.0 / (0.5 * (predicted + reference) + self.smooth_dr)
        index = (overlap + self.smooth_nr) * inverse
        return weight * (1.0 - index), -weight * inverse, weight * 0.5 * index * inverse


@lru_cache(maxsize=64)
def _tversky(smooth: float, alpha: float, beta: float) -> Term:
    options: dict[str, Any] = {"smooth_nr": smooth, "smooth_dr": smooth, "reduction": "none"}
    return Tversky(alpha=alpha, beta=beta, **options)


@lru_cache(maxsize=64)
def _weighed(smooth: float) -> Term:
    return SizeWeightedTversky(smooth_nr=smooth, smooth_dr=smooth, reduction="none")


@lru_cache(maxsize=256)
def _loss(term: Term, activation: str) -> Loss:
    return Loss(term, activation=activation, channel_axis=-1)


def _each(term: Term, predictions: Any, targets: Any, is_logits: bool, axis: Any) -> jax.Array:
    """The value of every sample and class: what is not summed, then C."""
    x, y = _array(predictions), _array(targets)
    if x.ndim == y.ndim - 1:
        x = x[..., None]
    if not x.ndim or x.shape[-1] == 0:
        raise ValueError(f"predictions: expected an axis of classes, got shape {x.shape}")
    is_map = y.ndim == x.ndim - 1 and x.shape[-1] > 1
    if is_map and not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"targets: expected integers in a label map, got {y.dtype}")
    if y.ndim == x.ndim - 1 and not is_map:
        y = y[..., None]
    if y.shape != (x.shape[:-1] if is_map else x.shape):
        raise ValueError(
            f"targets: for predictions {x.shape} expected {x.shape}, or a label map "
            f"{x.shape[:-1]} of integers, got shape {y.shape}"
        )
    kept, order = _kept(x.ndim, axis)
    shape = tuple(x.shape[i] for i in kept)
    if order != tuple(range(x.ndim - 1)):
        x, y = x.transpose(*order, x.ndim - 1), y.transpose(*order, *range(x.ndim - 1, y.ndim))
    voxels = (prod(shape), prod(x.shape[len(kept) : -1]))
    x, y = x.reshape(*voxels, -1), y.reshape(voxels if is_map else (*voxels, -1))
    activation = "none" if not is_logits else "sigmoid" if x.shape[-1] == 1 else "softmax"
    value: jax.Array = _loss(term, activation)(x, y)
    return value.reshape(*shape, x.shape[-1])


def _kept(ndim: int, axis: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that are not summed, and all but the last with those first."""
    if axis is None:
        return tuple(range(min(1, ndim - 1))), tuple(range(ndim - 1))
    summed = {int(i) for i in np.ravel(axis)}
    if not all(-ndim <= i < ndim and i % ndim != ndim - 1 for i in summed):
        raise ValueError(
            f"axis: expected axes of predictions of {ndim} axes other than the last, got {axis}"
        )
    summed = {i % ndim for i in summed}
    kept = tuple(i for i in range(ndim - 1) if i not in summed)
    return kept, (*kept, *sorted(summed))


def _array(array: Any) -> jax.Array:
    return array if isinstance(array, jax.Array) else jnp.asarray(array)


def _number(name: str, number: Any) -> float:
    if isinstance(number, jax.core.Tracer):
        raise TypeError(f"{name}: expected a number, got a tracer of JAX: it may not be traced")
    return check_number(name, float(number) if np.ndim(number) == 0 else number)
