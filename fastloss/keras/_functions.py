"""Plain functions of (y_true, y_pred), where Keras' losses are classes."""

from __future__ import annotations

from typing import Any

from keras import ops

from fastloss.keras import _inputs
from fastloss.keras._entropy import CategoricalCrossentropy
from fastloss.loss import Loss
from fastloss.terms.region import Dice

_values = CategoricalCrossentropy()
_dice = Loss(Dice(squared=True, smooth_nr=0.0, smooth_dr=0.0), activation="none")


def cross_entropy_loss(y_true: Any, y_pred: Any) -> Any:
    """Cross-entropy of every voxel, −Σ_c y_c log p_c, as `keras.losses.categorical_crossentropy`.

    Args:
        y_true: (B, *spatial, C), one-hot or soft.
        y_pred: probabilities (B, *spatial, C); they are divided by their sum and clipped to
            [1e-7, 1 − 1e-7].

    Returns:
        (B, *spatial), of the backend.
    """
    return _values.call(y_true, y_pred)


def dice_loss(y_true: Any, y_pred: Any) -> Any:
    """1 − 2 Σ y p / (Σ y² + Σ p²), over all numbers: batch, voxels and classes.

    Args:
        y_true: one-hot or soft, any shape.
        y_pred: probabilities of the same shape.

    Returns:
        A scalar of the backend; 0 where all numbers are 0.

    Source: Milletari et al. 2016, "V-Net".
    """
    y_true, y_pred = _inputs.tensor(y_true), _inputs.predictions(y_pred, "float32")
    if tuple(y_true.shape) != tuple(y_pred.shape):
        raise ValueError(
            f"y_true: expected the shape of y_pred {tuple(y_pred.shape)}, got {tuple(y_true.shape)}"
        )
    return _dice(ops.reshape(y_pred, (1, 1, -1)), ops.reshape(y_true, (1, 1, -1)))
