"""What a graph knows of a call before it runs: ranks, kinds, and static shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastloss.arrays import Arrays, arrange
from fastloss.borrowed import Borrowed, Extras
from fastloss.protocol import FusedLoss

_UNKNOWN = 1009
"""Stands for the first dimension that is not known, 1010 for the second, and so on."""


@dataclass(frozen=True)
class Shapes:
    """The shapes of one call in a graph.

    Attributes:
        logits: the shape of the logits, None where it is not known.
        arrays: stand-ins of the arrays that hold no numbers, as kernels would be given them.
        value: the static shape of the value.
    """

    loss: FusedLoss
    logits: tuple[int | None, ...]
    arrays: Arrays
    value: tuple[int | None, ...]

    @classmethod
    def of(
        cls, loss: FusedLoss, logits: Any, target: Any, voxel_weight: Any, extras: Extras | None
    ) -> Shapes:
        """Check what is known of the shapes and dtypes.

        Raises:
            TypeError, ValueError: as `fastloss.arrays.arrange`; a rank or a number of channels that
                is not known; other fields than the loss reads.
        """
        if logits.shape.rank is None:
            raise ValueError("logits: expected a known rank in a tf.function, got none")
        axis = loss.channel_axis
        others = [target, voxel_weight, *(extras.arrays if extras is not None else ())]
        shape = _joined(tuple(logits.shape), [o for o in others if o is not None], axis)
        if shape[axis] is None:
            raise ValueError(f"logits: expected a known number of channels, got shape {shape}")
        whole = tuple(_UNKNOWN + i if n is None else n for i, n in enumerate(shape))
        given: dict[str, Any] = {}
        if extras is not None:
            given = _more(extras, whole, axis)
        arrays = arrange(
            _stand_in(logits, whole, axis),
            _stand_in(target, whole, axis),
            None if voxel_weight is None else _stand_in(voxel_weight, whole, axis),
            activation=loss.activation,
            channel_axis=axis,
            regions_by_class=loss.regions_by_class,
            **given,
        )
        loss.request(arrays)
        loss.check_field_names(() if extras is None else extras.names)
        return cls(loss, shape, arrays, _value_shape(loss, arrays, shape, extras))

    @property
    def classes(self) -> int:
        return int(self.arrays.logits.shape[1])

    @property
    def dense(self) -> bool:
        return self.arrays.dense

    def form(self, name: str) -> Any:
        """The `fastloss.fields.Form` of a field that the loss makes."""
        return self.loss.makers[name].field_form(self.classes, self.dense)

    def field(self, name: str) -> tuple[int | None, ...]:
        """The static shape of that field."""
        axis = self.loss.channel_axis % len(self.logits)
        if self.form(name).by_class:
            return self.logits
        return tuple(n for i, n in enumerate(self.logits) if i != axis)


def _joined(logits: tuple[int | None, ...], others: list[Any], axis: int) -> tuple[int | None, ...]:
    """The shape of the logits, with what is known of other arrays' shapes."""
    whole, found = len(logits), list(logits)
    for other in others:
        rank = other.shape.rank
        if rank not in (whole, whole - 1):
            continue
        axes = [i for i in range(whole) if rank == whole or i != axis % whole]
        for i, n in zip(axes, other.shape, strict=True):
            # A first dimension of one may stand for all samples.
            if found[i] is None and i != axis % whole and (i or n != 1):
                found[i] = n
    return tuple(found)


def _stand_in(array: Any, logits: tuple[int, ...], axis: int) -> Borrowed:
    """An array of a tensor's shape and dtype; dimensions that are not known are the logits'."""
    rank = array.shape.rank
    if rank is None:
        shape = logits
    else:
        like = logits
        if rank == len(logits) - 1:
            like = tuple(n for i, n in enumerate(logits) if i != axis % len(logits))
        shape = tuple(
            (like[i] if i < len(like) else _UNKNOWN) if n is None else n
            for i, n in enumerate(array.shape)
        )
    name = array.dtype.name
    item = np.zeros((), np.uint16 if name == "bfloat16" else name)
    return Borrowed(np.broadcast_to(item, shape), name)


def _more(extras: Extras, logits: tuple[int, ...], axis: int) -> dict[str, Any]:
    given: dict[str, Any] = {
        "fields": {name: _stand_in(field, logits, axis) for name, field in extras.fields}
    }
    if extras.regions is not None:
        given["regions"] = _stand_in(extras.regions, logits, axis)
        given["rows"] = extras.region_count or 1
    return given


def _value_shape(
    loss: FusedLoss, arrays: Arrays, logits: tuple[int | None, ...], extras: Extras | None
) -> tuple[int | None, ...]:
    axis = loss.channel_axis % len(logits)
    if loss.maps_voxels:
        by_class = loss.activation == "sigmoid"
        return tuple(n for i, n in enumerate(logits) if i != axis or by_class)
    batch, classes = arrays.logits.shape[:2]
    regions = 0
    if extras is not None and extras.regions is not None:
        regions = extras.region_count or _UNKNOWN
    each = [term.value_shape(batch, classes, regions) for _, term in loss.terms]
    shape = np.broadcast_shapes(*each)
    known = logits[0] is not None and regions != _UNKNOWN
    # A first dimension above 1 is that of samples or regions; that of classes is known.
    return tuple(n if known or i or n == 1 else None for i, n in enumerate(shape))
