"""The class indices of which operations of a graph made a target: one-hot, or of another dtype."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

_BITS = {"int8": 7, "uint8": 8, "int16": 15, "uint16": 16, "int32": 31, "uint32": 32, "int64": 63}
"""How large numbers of an integer dtype may be."""
_FLOATS = ("float32", "float64")
"""They hold class indices exactly, and larger numbers as numbers that are no classes either."""
_SAME = ("Identity", "StopGradient")
_OF_ONE = ("ExpandDims", "Squeeze")
"""Operations that add and remove axes of one."""


def itself(tensor: Any) -> Any:
    """The tensor of which this one is another name."""
    while tensor.op.type in _SAME:
        tensor = tensor.op.inputs[0]
    return tensor


def of_one_hot(target: Any, axis: int) -> Any:
    """The indices of which `tf.one_hot` made a dense target along this axis; None: it did not."""
    while target.op.type in ("Cast", *_SAME):
        target = target.op.inputs[0]
    if target.op.type != "OneHot":
        return None
    indices, _, on, off = target.op.inputs
    own = target.op.get_attr("axis")
    same_axis = target.shape.rank is not None and (own - axis) % target.shape.rank == 0
    numbers = tf.get_static_value(on), tf.get_static_value(off)
    return indices if same_axis and numbers == (1, 0) else None


def source(labels: Any) -> Any:
    """The tensor with the same class indices, in the same places, of which these were cast.

    Where it is no class, the number differs perhaps, but is none in either. Without axes of one
    the shapes are the same.
    """
    chain = [labels]
    while labels.op.type in ("Cast", *_SAME, *_OF_ONE):
        labels = labels.op.inputs[0]
        chain.append(labels)
    for i in range(len(chain) - 1, 0, -1):
        if _keeps(chain[i].dtype.name, [tensor.dtype.name for tensor in chain[:i]]):
            return chain[i]
    return chain[0]


def _keeps(dtype: str, others: list[str]) -> bool:
    """Whether class indices of a dtype stay the same when they are cast to the others."""
    if all(other == dtype for other in others):
        return True
    bits = _BITS.get(dtype, 64)
    signed = dtype.startswith("int")
    return bits < 64 and all(
        other in _FLOATS
        or (_BITS.get(other, 0) >= bits and (other.startswith("int") or not signed))
        for other in others
    )


def fits(labels: Any, logits: Any, axis: int) -> bool:
    """Whether it is seen that a label map has the shape of the logits, but for the channels."""
    if labels.shape.rank is None or not labels.shape.is_fully_defined():
        return False
    voxels = [n for i, n in enumerate(logits.shape) if i != axis]
    own = list(labels.shape)
    if len(own) == len(voxels) + 1 and own[axis] == 1:
        del own[axis]
    return own == voxels
