"""What Keras hands to a loss, as the kernels take it."""

from __future__ import annotations

import warnings
from typing import Any

import keras
from keras import ops


def tensor(array: Any, dtype: str | None = None) -> Any:
    """Anybody's array as one of the backend; one of the backend as it is."""
    return (
        array
        if keras.ops.is_tensor(array) and dtype is None
        else (ops.convert_to_tensor(array, dtype=dtype))
    )


def predictions(y_pred: Any, dtype: str) -> Any:
    """Floating numbers, no narrower than a loss of float64 asks."""
    found = tensor(y_pred)
    kind = keras.backend.standardize_dtype(found.dtype)
    if dtype == "float64" and kind != "float64":
        return ops.cast(found, "float64")
    return found if "float" in kind else ops.cast(found, dtype)


def logits_of(y_pred: Any, activation: str, from_logits: bool, name: str) -> Any:
    """The logits of a softmax or sigmoid that made the predictions, where Keras looks for them.

    None: not known, or on a backend where Keras takes none.
    """
    if keras.backend.backend() != "tensorflow":
        return None
    found = getattr(y_pred, "_keras_logits", None)
    operation = getattr(y_pred, "op", None)  # of a tensor in a graph
    if found is None and operation is not None and operation.type == activation.title():
        (found,) = operation.inputs
    if found is not None and from_logits:
        warnings.warn(
            f"{name} received from_logits=True, but the predictions were made by a {activation}, "
            "and are no logits; those of the activation are taken",
            stacklevel=4,
        )
    return found


def activated(y_pred: Any) -> tuple[str, Any]:
    """The activation that made the predictions, and what it was given; "none": not known.

    It is known in graphs of TensorFlow alone, of a softmax along the last axis or a sigmoid.
    """
    if keras.backend.backend() == "tensorflow":
        operation = getattr(y_pred, "op", None)
        if operation is not None and operation.type in ("Softmax", "Sigmoid"):
            return operation.type.lower(), operation.inputs[0]
    return "none", y_pred


def clipped(probabilities: Any) -> Any:
    """In [ε, 1 − ε], in float32 at least, as Keras takes logarithms of them."""
    epsilon = keras.config.epsilon()
    return ops.clip(_wide(probabilities), epsilon, 1.0 - epsilon)


def normalized(probabilities: Any, axis: int) -> Any:
    """Over their sum along the axis, then `clipped`."""
    wide = _wide(probabilities)
    return clipped(wide / ops.sum(wide, axis=axis, keepdims=True))


def _wide(array: Any) -> Any:
    kind = keras.backend.standardize_dtype(array.dtype)
    return ops.cast(array, "float32") if kind in ("float16", "bfloat16") else array


def is_hard(y_true: Any) -> bool:
    """Whether the dtype alone tells that the numbers are 0 and 1 (else the kernels raise)."""
    return "float" not in keras.backend.standardize_dtype(y_true.dtype)
