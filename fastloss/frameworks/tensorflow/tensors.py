"""TensorFlow's tensors: borrowed where they lie, and made of the library's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from fastloss.arrays import FLOATS, INTEGERS
from fastloss.borrowed import Borrowed
from fastloss.frameworks.base import Adapter
from fastloss.frameworks.capsules import view_of
from fastloss.frameworks.memory import new_array

_ALIGNED = 64
"""TensorFlow's operators read from addresses that are multiples of this many bytes."""


class EagerAdapter(Adapter):
    """Borrows tensors that hold numbers; they are immutable."""

    def serves(self, array: Any) -> bool:
        return bool(tf.is_tensor(array))

    def borrow(self, array: Any, name: str, *, write: bool = False) -> Borrowed:
        if write:
            raise ValueError(f"{name}: expected a writable array, got an immutable tf.Tensor")
        array = plain(array, name)
        if not isinstance(array, tf.__internal__.EagerTensor):
            raise TypeError(
                f"{name}: got a {type(array).__name__} without numbers, as in a tf.function; call "
                "the loss itself there"
            )
        if is_on_device(array):
            raise TypeError(
                f"{name}: expected a tensor in CPU memory, got one on {array.device}; call the "
                "loss itself, or move the tensor by tf.identity within tf.device('CPU')"
            )
        return view_of(tf.experimental.dlpack.to_dlpack(array), name, False)

    def empty_like(self, array: Any, borrowed: Borrowed) -> tuple[Any, Borrowed]:
        # The memory is the library's, which hands it out again, and TensorFlow frees it.
        new = _aligned(borrowed.array.shape, borrowed.array.dtype)
        return tensor_of(new, borrowed.dtype), Borrowed(new, borrowed.dtype)

    def result(self, value: Any) -> Any:
        return value if tf.is_tensor(value) else tf.convert_to_tensor(value)

    def upstream(self, gradient: Any) -> Any:
        if not tf.is_tensor(gradient):
            return gradient
        view, _, _ = self.borrow(tf.cast(gradient, tf.float64), "upstream")
        return float(view) if view.ndim == 0 else np.array(view)


def plain(array: Any, name: str) -> Any:
    """The tensor itself, of a variable its value.

    Raises:
        TypeError: it is sparse or ragged, or holds no numbers that a loss can read.
    """
    if isinstance(array, tf.Variable):
        array = array.value()
    elif not isinstance(array, tf.Tensor):
        array = tf.convert_to_tensor(array) if not tf.is_tensor(array) else array
        if not isinstance(array, tf.Tensor):
            raise TypeError(f"{name}: expected a dense tensor, got a {type(array).__name__}")
    if array.dtype.name not in FLOATS and array.dtype.name not in INTEGERS:
        raise TypeError(f"{name}: unsupported dtype {array.dtype.name}")
    return array


def is_on_device(array: Any) -> bool:
    """Whether a tensor that holds numbers lies elsewhere than in CPU memory."""
    return "CPU:" not in array.device


def aligned_like(array: np.ndarray) -> np.ndarray:
    """A new array of the same shape and dtype, which TensorFlow takes without a copy."""
    return _aligned(array.shape, array.dtype)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array in C order where TensorFlow can read it."""
    new = new_array(shape, dtype)
    if not new.size or new.ctypes.data % _ALIGNED == 0:
        return new
    memory = np.empty(new.nbytes + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    found: np.ndarray = memory[start : start + new.nbytes].view(dtype).reshape(shape)
    return found


def tensor_of(array: np.ndarray, dtype: str) -> Any:
    """A tensor that shares the memory of an aligned array; bfloat16 is stored as uint16."""
    if not array.size:
        return tf.zeros(array.shape, dtype)
    tensor = tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.bitcast(tensor, tf.bfloat16) if dtype == "bfloat16" else tensor


def _refuse(*_: Any) -> Any:
    raise RuntimeError(
        "logits: second derivatives are not computed; fastloss is differentiated once"
    )


@tf.custom_gradient
def once(gradient: Any, logits: Any) -> Any:
    """A gradient that is not differentiated again: RuntimeError says so."""
    return tf.identity(gradient), _refuse


TENSORS = EagerAdapter()
