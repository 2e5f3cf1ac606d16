"""NumPy arrays, and bfloat16 ones by way of the ml_dtypes package."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.borrowed import Borrowed
from fastloss.frameworks.base import Adapter

# The name of a dtype takes NumPy longer to spell than a small volume takes to read. Of the dtypes
# that compare equal only native ones are here.
_PLAIN = {
    np.dtype(name): name
    for name in (
        "float16", "float32", "float64", "bool",
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    )
}  # fmt: skip


class NumpyAdapter(Adapter):
    def serves(self, array: Any) -> bool:
        return isinstance(array, np.ndarray)

    def borrow(self, array: Any, name: str, *, write: bool = False) -> Borrowed:
        if type(array) is np.ndarray and (not write or array.flags.writeable):
            known = _PLAIN.get(array.dtype)
            if known is not None:
                return Borrowed(array, known)
        dtype = array.dtype
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name}: a masked array's mask would be lost; pass array.data, and the mask as "
                "voxel_weight"
            )
        if not dtype.isnative:
            raise TypeError(f"{name}: expected native byte order, got {dtype!r}; use .astype")
        if write and not array.flags.writeable:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
        if dtype.kind == "V" and dtype.name == "bfloat16":
            return Borrowed(array.view(np.uint16), "bfloat16")
        return Borrowed(array, dtype.name)
