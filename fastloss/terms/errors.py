"""Losses on sums of errors: of |p − g|, and of its square."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.options import check_number, check_switch
from fastloss.statistics import Statistics
from fastloss.sums import OVERLAP, Sum
from fastloss.terms.linear import ClassWeighted
from fastloss.terms.per_class import VOXELS, ClassTerm
from fastloss.terms.region import ratio

ERROR = Sum("one", "error")
_SQUARES = Sum("target", "p_squared")
_SQUARES_OF_REST = Sum("rest", "p_squared")


class AbsoluteError(ClassWeighted):
    """Absolute error, Σ_c w_c |p_c − g_c|, of soft targets as of hard ones.

    `fastloss.MeanAbsoluteError` is the same for hard targets, and quicker. Where p = g exactly, the
    slope is 0. Options as in `ClassWeighted`.

    Source: Ghosh et al. 2017, "Robust loss functions under label noise for deep neural networks".

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.AbsoluteError(), activation="none")
    >>> print(round(float(loss(np.array([[0.8, 0.2]]), np.array([[0.5, 0.5]]))), 3))
    0.6
    """

    requires = frozenset({ERROR})

    def coefficients(self, statistics: Statistics) -> dict[Any, float]:
        return {ERROR: 1.0}


class DiceSemimetric(ClassTerm):
    """Dice semimetric loss, 1 − (P + G − E + s_nr) / (P + G + s_dr) with E = Σ |p − g|.

    Dice of a soft target is not least where p = g; this is, and is 0 there. Of a hard target the
    two are the same, and `fastloss.Dice` is quicker. With ``jaccard`` it is the Jaccard metric
    loss, 1 − (P + G − E + s_nr) / (P + G + E + s_dr). Where p = g exactly, the slope of E is 0.

    Args:
        jaccard: Jaccard in place of Dice.
        smooth_nr, smooth_dr: added to numerator and denominator, at least 0.
        include_background, batch, weight, reduction: as in `fastloss.RegionTerm`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Sources: Wang et al. 2023, "Dice semimetric losses: optimizing the Dice score with soft labels";
    Wang et al. 2023, "Jaccard metric losses: optimizing the Jaccard index with soft labels".

    >>> import numpy as np, fastloss as fl
    >>> g = np.array([[[0.5, 0.25, 0, 0]]])
    >>> for term in (fl.DiceSemimetric(), fl.Dice()):
    ...     print(fl.Loss(term, activation="none")(g, g).round(3))
    0.0
    0.583
    """

    requires = frozenset({"region", ERROR})

    def __init__(
        self,
        *,
        jaccard: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.jaccard = check_switch("jaccard", jaccard)
        self.smooth_nr = check_number("smooth_nr", smooth_nr)
        self.smooth_dr = check_number("smooth_dr", smooth_dr)

    @property
    def reads(self) -> tuple[str | Sum, ...]:
        return ("predicted", "reference", ERROR)

    def of_sums(self, *sums: np.ndarray) -> Any:
        value, by_size, by_error = self._slopes(*sums)
        return value, (("predicted", by_size), (ERROR, by_error))

    def of_target(self, *sums: np.ndarray) -> Any:
        return (("reference", self._slopes(*sums)[1]),)

    def _slopes(self, predicted: np.ndarray, reference: np.ndarray, error: np.ndarray) -> Any:
        """The value, its derivative by the sizes, and by E."""
        size = predicted + reference
        whole = size + error if self.jaccard else size
        index, inverse = ratio(
            size - error + self.smooth_nr, whole + self.smooth_dr, self.smooth_dr
        )
        by_error = (1.0 + index) * inverse if self.jaccard else inverse
        return 1.0 - index, (index - 1.0) * inverse, by_error


class SensitivitySpecificity(ClassTerm):
    """Squared errors of the class and of the rest, r Σ g (1−p)² / (G + s) + (1−r) Σ (1−g) p² /
    (n − G + s).

    n is the number of voxels, or the sum of their weights. Both parts are linear in g, which is how
    soft targets are understood; for hard ones the errors are (g − p)². A part of which there is no
    voxel is 0.

    Args:
        r: the share of the sensitivity, in [0, 1]; the paper takes 0.05.
        smooth_dr: s, at least 0.
        include_background, batch, weight, reduction: as in `fastloss.RegionTerm`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Brosch et al. 2015, "Deep convolutional encoder networks for multiple sclerosis lesion
    segmentation".

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.SensitivitySpecificity(r=0.5, smooth_dr=0), activation="none")
    >>> print(loss(np.array([[[0.5, 1, 0.5, 0]]]), np.array([[[1.0, 1, 0, 0]]])))
    0.125
    """

    requires = frozenset({OVERLAP, _SQUARES, _SQUARES_OF_REST})

    def __init__(self, *, r: float = 0.05, smooth_dr: float = 1e-5, **options: Any) -> None:
        super().__init__(**options)
        self.r = check_number("r", r, 0.0, 1.0)
        self.smooth_dr = check_number("smooth_dr", smooth_dr)

    @property
    def reads(self) -> tuple[str | Sum, ...]:
        return (OVERLAP, _SQUARES, _SQUARES_OF_REST, "reference", VOXELS)

    def of_sums(self, *sums: np.ndarray) -> Any:
        value, _, ours, rest = self._parts(*sums)
        slopes = ((OVERLAP, -2.0 * ours), (_SQUARES, ours), (_SQUARES_OF_REST, rest))
        return value, slopes

    def of_target(self, *sums: np.ndarray) -> Any:
        return (("reference", self._parts(*sums)[1]),)

    def _parts(
        self,
        overlap: np.ndarray,
        squares: np.ndarray,
        squares_of_rest: np.ndarray,
        reference: np.ndarray,
        voxels: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        """The value, its derivative by G, and the factors of the two sums of squares."""
        # Rounding can leave the first sum of squares a little below 0.
        missed = np.maximum(reference - 2.0 * overlap + squares, 0.0)
        ours = self.r * _inverse(reference + self.smooth_dr)
        rest = (1.0 - self.r) * _inverse(voxels - reference + self.smooth_dr)
        value = missed * ours + squares_of_rest * rest
        by_reference = ours
        if self.r > 0:
            by_reference = by_reference - missed * ours * ours / self.r
        if self.r < 1:
            by_reference = by_reference + squares_of_rest * rest * rest / (1.0 - self.r)
        return value, by_reference, ours, rest


def _inverse(size: np.ndarray) -> np.ndarray:
    """1 / size, and 0 where it is 0."""
    found: np.ndarray = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    return found
