"""The loss on the correlation of prediction and target."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.options import check_number
from fastloss.terms.per_class import VOXELS, ClassTerm


class MCC(ClassTerm):
    """1 − the Matthews correlation coefficient, (n O − P G + s_nr) / √(P G (n−P) (n−G) + s_dr).

    n is the number of voxels, or the sum of their weights. With TP = O, FP = P − O, FN = G − O and
    TN = n − P − G + O it is 1 − (TP TN − FP FN + s_nr) over the root of the product of the four
    margins. It is in [0, 2]: 0 where all is right, 1 where prediction and target have nothing to do
    with each other, 2 where all is wrong. Unlike Dice it counts the voxels of the rest as much as
    those of the class. A class that is neither there nor predicted costs 0, as does one that is
    everywhere and so predicted; one that is nowhere, or everywhere, and otherwise predicted costs
    1 and has no gradient.

    Args:
        smooth_nr, smooth_dr: added to numerator and, within the root, to the denominator; at
            least 0.
        include_background, batch, weight, reduction: as in `fastloss.RegionTerm`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Abhishek & Hamarneh 2021, "Matthews correlation coefficient loss for deep convolutional
    networks: application to skin lesion segmentation".

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.MCC(smooth_dr=0), activation="none")
    >>> p, g = np.array([[[1.0, 0, 0, 0]]]), np.array([[[1.0, 1, 0, 0]]])
    >>> print(round(float(loss(p, g)), 3))  # 1 − 2/√12
    0.423
    """

    requires = frozenset({"region"})
    _always_defined = True
    """Whether it is 1 where the root is 0, rather than NaN or infinite."""

    def __init__(self, *, smooth_nr: float = 0.0, smooth_dr: float = 1e-5, **options: Any) -> None:
        super().__init__(**options)
        self.smooth_nr = check_number("smooth_nr", smooth_nr)
        self.smooth_dr = check_number("smooth_dr", smooth_dr)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("overlap", "predicted", "reference", VOXELS)

    def of_target(self, *sums: np.ndarray) -> Any:
        # Prediction and target change places.
        overlap, predicted, reference, voxels = sums
        _, slopes = self.of_sums(overlap, reference, predicted, voxels)
        margins = reference * (voxels - reference)
        return (("reference", np.where(margins != 0, dict(slopes)["predicted"], 0.0)),)

    def of_sums(self, *sums: np.ndarray) -> Any:
        overlap, predicted, reference, voxels = sums
        margins = reference * (voxels - reference)
        with np.errstate(divide="ignore", invalid="ignore"):
            numerator = voxels * overlap - predicted * reference + self.smooth_nr
            square = predicted * (voxels - predicted) * margins + self.smooth_dr
            root = np.sqrt(square)
            by_numerator = 1.0 / root
            by_square = -0.5 * numerator / (square * root)
            value = 1.0 - numerator / root
            by_overlap = -voxels * by_numerator
            by_predicted = reference * by_numerator
            by_predicted = by_predicted - by_square * margins * (voxels - 2.0 * predicted)
        wrong = (predicted != overlap) | (reference != overlap)
        # Where a class is everywhere or nowhere, nothing changes the value. The two derivatives
        # would say so by cancelling each other, voxel by voxel and to rounding.
        varies = wrong & (margins != 0)
        if self._always_defined:
            # Rounding can leave the product a little below 0.
            value = np.where(square > 0, value, 1.0)
            varies = varies & (square > 0)
        value = np.where(wrong, value, 0.0)
        by_overlap, by_predicted = (np.where(varies, a, 0.0) for a in (by_overlap, by_predicted))
        return value, (("overlap", by_overlap), ("predicted", by_predicted))
