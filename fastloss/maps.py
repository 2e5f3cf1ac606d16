"""One number per voxel, or per voxel and class, that a pass over the logits writes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("voxel", "class", "error", "label", "mask")
"""See `Map`."""


@dataclass(frozen=True, eq=False)
class Map:
    """An array that a pass fills.

    With s over the sums of the request, w_s their weights, f_s their functions and m the voxel
    weight:

    =========  ==========================================================  ==================
    kind       what is written                                             shape of ``out``
    =========  ==========================================================  ==================
    ``voxel``  Σ over s and c of k_sc · m w_s f_s(p_c)                      (B, voxels)
    ``class``  Σ over s of k_sc · m w_s f_s(p_c)                            (B, C, voxels)
    ``error``  m |g_c − p_c|                                                (B, C, voxels)
    ``label``  the class of the largest logit, the first of equal ones      (B, voxels)
    ``mask``   whether p_c > ½ and m > 0                                    (B, C, voxels)
    =========  ==========================================================  ==================

    Attributes:
        kind: one of `KINDS`.
        out: in C order, the voxels of a sample in the order of its spatial axes; of the dtype of
            the loss value, or for ``label`` uint8, int32 or int64, for ``mask`` uint8.
            Where there is one class, ``label`` says whether p > ½. The label of NaN is that of the
            first NaN.
        coefficients: k, (S, C) float64, for ``voxel`` and ``class``.
    """

    kind: str
    out: np.ndarray
    coefficients: np.ndarray | None = None
