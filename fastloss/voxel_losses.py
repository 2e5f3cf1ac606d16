"""The loss of every voxel, and the choice of the largest, for terms that sums do not determine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class VoxelLosses:
    """One number per voxel between the two passes: first its loss, then its share of the mean.

    Attributes:
        values: (B, voxels), float32, or float64 for float64 logits, the voxels of a sample in an
            order of the backend's own. The reduce pass writes m w_y (−log p_y).
        class_weight: (C,) float64, the weights w.
    """

    values: np.ndarray
    class_weight: np.ndarray

    def keep_largest(self, percent: float) -> float:
        """Leave the shares of the voxels in the mean of the largest losses; return that mean.

        ``percent`` of all voxels are kept, at least one. Where more than one voxel has the
        smallest loss that is kept, all of them share the places that are left.
        """
        flat = self.values.reshape(-1)
        if not flat.size:
            return 0.0
        kept = max(1, int(flat.size * percent / 100))
        threshold = np.partition(flat, flat.size - kept)[flat.size - kept]
        above, at = ~(flat <= threshold), flat == threshold  # NaN is above all
        rest = kept - int(np.count_nonzero(above))
        total = flat.sum(where=above, dtype=np.float64)
        if rest > 0:
            total += rest * np.float64(threshold)
        flat[...] = 0.0
        flat[above] = 1.0 / kept
        flat[at] = rest / (kept * max(1, int(np.count_nonzero(at))))
        return float(total / kept)
