"""Losses that read a field of the target: its distances, its boundary, its skeleton."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.distance import MOST_AXES, signed_distance, signed_of_masks
from fastloss.fields import Form, Spacing, Target, boundary_voxels, powers, spacing_of
from fastloss.loss import Pullback
from fastloss.options import check_dilations, check_number, check_spacing, check_switch
from fastloss.statistics import Statistics
from fastloss.sums import OVERLAP, PREDICTED_SQUARED, REFERENCE, REFERENCE_SQUARED, Sum
from fastloss.terms.per_class import VOXELS, ClassTerm
from fastloss.terms.skeletons import tube


class FieldTerm(ClassTerm):
    """A loss that reads a field, which it makes of the target where a call is given none.

    To make it takes longer than the loss: `fastloss.Loss.fields` makes it ahead. Ignored voxels
    are of no class for the field, as are those whose label is not in [0, C); voxel weights do not
    change it. Where a target is soft, a class is where it is above ½. Fields of arrays on a GPU are
    made there, without waiting; a skeleton in the processor's memory, for which the call waits.

    Args:
        spacing: the size of a voxel, one number or one per spatial axis, above 0; None: 1.
        include_background, batch, weight, reduction: as in `fastloss.RegionTerm`.

    Raises:
        ValueError, TypeError: an option out of its range; in a call, a ``spacing`` that has not
            one number for each spatial axis.
    """

    def __init__(self, *, spacing: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.spacing = check_spacing(spacing)
        # Of the object, as of a class torch.compile cannot read a frozenset in a term made inside.
        self.requires = frozenset([key for key in self.reads if key != VOXELS])

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if "on_gpu" not in own and ("make_field" in own or "derive_field" in own):
            cls.on_gpu = False  # written for NumPy's arrays, until it says otherwise


class Boundary(FieldTerm):
    """Boundary loss, the mean over the voxels of p φ, φ being the signed distance to the boundary.

    φ is −(d − 1) within the class, d being the distance to the nearest voxel outside, and the
    distance to the class elsewhere; it is 0 where a sample has no voxel of a class, or no other,
    which then costs nothing and has no gradient. The value may be negative. It is meant as an
    addition to a region loss, with a factor from 0.01 that grows: ``fl.GeneralizedDice() + 0.01 *
    fl.Boundary()``; `torch.compile` makes nothing anew for other factors.

    The field is called ``"boundary"``. The 1 is one voxel, whatever the spacing, as in the paper's
    code. Options as in `FieldTerm`.

    Source: Kervadec et al. 2019, "Boundary loss for highly unbalanced segmentation".

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.Boundary(), activation="none")
    >>> labels = np.array([[0, 0, 1, 1]])
    >>> print(loss(np.array([[[1.0, 1, 1, 0], [0, 0, 0, 1]]]), labels))
    -0.125
    """

    makes = "boundary"
    on_gpu = True
    _mean = Sum("one", "p", field="boundary")

    @property
    def reads(self) -> tuple[str | Sum, ...]:
        return (self._mean, VOXELS)

    def of_sums(self, *sums: np.ndarray) -> Any:
        total, voxels = sums
        scale = _inverse(voxels) * np.ones_like(total)
        return total * scale, ((self._mean, scale),)

    def of_target(self, *sums: np.ndarray) -> Any:
        return ()

    def make_field(self, target: Target, spacing: Spacing) -> Any:
        return _distances(target, spacing, "kervadec")


class _DistanceTerm(FieldTerm):
    """A loss that reads the distances to the boundary, the field ``"distance"``."""

    makes = "distance"
    on_gpu = True

    def make_field(self, target: Target, spacing: Spacing) -> Any:
        return _distances(target, spacing, "unsigned")


class HausdorffDT(_DistanceTerm):
    """Hausdorff loss by distance transforms, the mean over the voxels of (p − g)² (D_p^α + D_g^α).

    D is the distance to the boundary: of a voxel of the class, to the nearest that is not of it,
    else to the nearest that is; 0 everywhere where a sample has no voxel of a class, or no other.
    D_g is that of the target, D_p that of the voxels where p > ½, which has no gradient. Voxels
    that do not count are not among these.

    The field is called ``"distance"``, and is D_g. Where it is given, D_p alone is measured in a
    call. As D_p reaches over the whole sample, chunks of a volume cannot be joined.

    Args:
        alpha: the exponent α, above 0.
        log: the logarithm of 1 + the loss, taken of what the reduction leaves.
        spacing: as in `FieldTerm`. D_p is measured with it too, so it is that of the samples also
            where D_g is given.
        include_background, batch, weight, reduction: as in `FieldTerm`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Karimi & Salcudean 2019, "Reducing the Hausdorff distance in medical image segmentation
    with convolutional neural networks".

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.HausdorffDT(), activation="none")
    >>> p = np.array([[[1.0, 1, 0, 0], [0, 0, 1, 1]]])
    >>> print(loss(p, np.array([[0, 0, 0, 1]])))
    0.5
    """

    looks = True
    on_gpu = True

    def __init__(self, *, alpha: float = 2.0, log: bool = False, **options: Any) -> None:
        self.alpha = check_number("alpha", alpha)
        if self.alpha == 0:
            raise ValueError("alpha: expected a number above 0, got 0")
        self.log = check_switch("log", log)
        super().__init__(**options)

    @property
    def derives(self) -> str:
        return f"hausdorff({self.alpha!r})"

    @property
    def _sums(self) -> tuple[Sum, Sum, Sum]:
        """Σ D p², Σ D g p and Σ D g², D being the two distances together."""
        return (
            Sum("one", "p_squared", field=self.derives),
            Sum("target", "p", field=self.derives),
            Sum("target_squared", "one", field=self.derives),
        )

    @property
    def reads(self) -> tuple[str | Sum, ...]:
        return (*self._sums, VOXELS)

    def of_sums(self, *sums: np.ndarray) -> Any:
        squares, products, references, voxels = sums
        scale = _inverse(voxels) * np.ones_like(squares)
        value = (squares - 2.0 * products + references) * scale
        return value, ((self._sums[0], scale), (self._sums[1], -2.0 * scale))

    def of_target(self, *sums: np.ndarray) -> Any:
        squares, _, _, voxels = sums
        return ((self._sums[2], _inverse(voxels) * np.ones_like(squares)),)

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        value, pullback = super().combine(statistics)
        if not self.log:
            return value, pullback
        # Rounding can leave the sum of squares a little below 0.
        slope = 1.0 / (1.0 + np.maximum(value, 0.0))
        return np.log1p(np.maximum(value, 0.0)), lambda upstream: pullback(upstream * slope)

    def parts(self, statistics: Statistics) -> np.ndarray:
        parts = super().parts(statistics)
        total = max(float(parts.sum()), 0.0)
        # Of the logarithm every part has the share that it has of the loss.
        return parts * (np.log1p(total) / total) if self.log and total else parts

    def fall(self, statistics: Statistics, row: int, sums: np.ndarray) -> np.ndarray:
        fall = super().fall(statistics, row, sums)
        if not self.log:
            return fall
        now = np.maximum(super().combine(statistics)[0], 0.0)
        found: np.ndarray = np.log1p(now) - np.log1p(np.maximum(now - fall, 0.0))
        return found

    def derive_field(self, field: Any, mask: Any) -> Any:
        spacing = spacing_of(self.spacing, len(mask.shape) - 2)
        predicted = signed_of_masks(mask, spacing=spacing, convention="unsigned")
        return powers(self.alpha, predicted, field)


class GeneralizedSurface(_DistanceTerm):
    """Generalised surface loss, 1 − Σ (D (1 − (g + p)))² / (Σ D² + ε).

    D is the distance to the boundary of the target, the field ``"distance"``, as in `HausdorffDT`.
    It is in [0, 1]: 0 where the prediction is right, 1 where it is wrong everywhere. Where a sample
    has no voxel of a class, or no other, it is 1 and has no gradient.

    Args:
        smooth_dr: ε, at least 0.
        include_background: whether class 0 counts; the paper leaves it out.
        spacing, batch, weight, reduction: as in `FieldTerm`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Celaya et al. 2023, "A generalized surface loss for reducing the Hausdorff distance in
    medical imaging segmentation".
    """

    on_gpu = True
    _squared = "distance_squared"
    _sums = (
        Sum("one", "one", field=_squared),
        Sum("target", "one", field=_squared),
        Sum("target_squared", "one", field=_squared),
        Sum("rest", "p", field=_squared),
        Sum("one", "p_squared", field=_squared),
    )

    def __init__(
        self, *, smooth_dr: float = 1e-5, include_background: bool = False, **options: Any
    ) -> None:
        super().__init__(include_background=include_background, **options)
        self.smooth_dr = check_number("smooth_dr", smooth_dr)

    @property
    def derives(self) -> str:
        return self._squared

    @property
    def reads(self) -> tuple[str | Sum, ...]:
        return self._sums

    def of_sums(self, *sums: np.ndarray) -> Any:
        whole, reference, reference_squared, product, squared = sums
        inverse = _inverse(whole + self.smooth_dr)
        # (1 − g − p)² = (1−g)² − 2 (1−g) p + p²
        right = whole - 2.0 * reference + reference_squared - 2.0 * product + squared
        return 1.0 - right * inverse, ((self._sums[3], 2.0 * inverse), (self._sums[4], -inverse))

    def of_target(self, *sums: np.ndarray) -> Any:
        inverse = _inverse(sums[0] + self.smooth_dr)
        return ((self._sums[1], 2.0 * inverse), (self._sums[2], -inverse))

    def derive_field(self, field: Any, mask: Any) -> Any:
        return powers(2.0, field)


class BoundaryDoU(FieldTerm):
    """Boundary difference over union, (Z + Y − 2 I + s) / (Z + Y − (1 + α) I + s).

    Z = Σ p², Y = Σ g², I = Σ p g, and α = min(2 (1 − (K + s)/(S + s)) − 1, 0.8), where K is the
    number of boundary voxels of the class and S that of all of its voxels: the smaller a class, the
    more its boundary counts. A voxel of a class is a boundary voxel where a voxel that shares a
    face with it is of another class, or outside the array. A class that is neither there nor
    predicted costs 1.

    The field is called ``"boundary_voxels"``, and is 1 there. ``spacing`` has no meaning for it.
    The paper sums over the batch first: ``batch=True``.

    Args:
        smooth: s, above 0.
        include_background, batch, weight, reduction: as in `FieldTerm`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Sun et al. 2023, "Boundary difference over union loss for medical image segmentation".
    """

    makes = "boundary_voxels"
    on_gpu = True
    _boundary = Sum("target", "one", field="boundary_voxels")

    def __init__(self, *, smooth: float = 1e-5, **options: Any) -> None:
        super().__init__(**options)
        self.smooth = check_number("smooth", smooth)
        if self.smooth == 0:
            raise ValueError("smooth: expected a number above 0, got 0")

    @property
    def reads(self) -> tuple[str | Sum, ...]:
        return (OVERLAP, PREDICTED_SQUARED, REFERENCE_SQUARED, REFERENCE, self._boundary)

    def of_sums(self, *sums: np.ndarray) -> Any:
        value, alpha, inverse = self._parts(*sums)
        by_overlap = (-2.0 + (1.0 + alpha) * value) * inverse
        return value, ((OVERLAP, by_overlap), (PREDICTED_SQUARED, (1.0 - value) * inverse))

    def of_target(self, *sums: np.ndarray) -> Any:
        overlap, _, _, reference, boundary = sums
        value, alpha, inverse = self._parts(*sums)
        by_alpha = np.where(alpha < 0.8, value * inverse * overlap, 0.0)
        by_boundary = -2.0 * by_alpha / (reference + self.smooth)
        by_reference = -by_boundary * (boundary + self.smooth) / (reference + self.smooth)
        return (
            (REFERENCE_SQUARED, (1.0 - value) * inverse),
            (self._boundary, by_boundary),
            (REFERENCE, by_reference),
        )

    def _parts(
        self,
        overlap: np.ndarray,
        predicted: np.ndarray,
        squared: np.ndarray,
        reference: np.ndarray,
        boundary: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        """The value, α, and 1 over the denominator."""
        smooth = self.smooth
        alpha = 2.0 * (1.0 - (boundary + smooth) / (reference + smooth)) - 1.0
        alpha = np.minimum(alpha, 0.8)
        inverse = 1.0 / (predicted + squared - (1.0 + alpha) * overlap + smooth)
        return (predicted + squared - 2.0 * overlap + smooth) * inverse, alpha, inverse

    def field_form(self, classes: int, dense: bool) -> Form:
        return Form("bool", dense)

    def make_field(self, target: Target, spacing: Spacing) -> Any:
        spacing_of(spacing, target.axes)
        return boundary_voxels(target)


class SkeletonRecall(FieldTerm):
    """Skeleton recall, 1 − (Σ p s + s_nr) / (Σ s + s_dr), for thin structures that must hold
    together.

    s is the target's skeleton, made a tube by ``dilations`` steps: of a label map, that of all
    classes but 0 together, and each voxel of the tube counts for its own class. Of a dense target
    with sigmoid, whose channels may overlap, or of one channel, every channel has its own. The
    value is that of the paper plus 1. A class without a voxel costs 0 unless ``smooth_nr`` is 0.

    The field is called ``"skeleton"``: a second label map, or masks. `fastloss.skeleton` makes it
    as well, of scikit-image; ``spacing`` has no meaning for it.

    Args:
        dilations: how often the skeleton is dilated, by the voxels that share a face, at least 0.
        smooth_nr, smooth_dr: added to numerator and denominator, at least 0.
        include_background: whether class 0 counts, of which a label map's tube has no voxel.
        batch, weight, reduction: as in `FieldTerm`.

    Raises:
        ImportError: in a call without the field, where scikit-image is not installed.
        ValueError, TypeError: an option out of its range.

    Source: Kirchhoff et al. 2024, "Skeleton recall loss for connectivity conserving and resource
    efficient segmentation of thin tubular structures".
    """

    makes = "skeleton"
    _recalled = Sum("one", "p", field="skeleton")
    _size = Sum("one", "one", field="skeleton")

    def __init__(
        self,
        *,
        dilations: int = 2,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        include_background: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(include_background=include_background, **options)
        self.dilations = check_dilations(dilations)
        self.smooth_nr = check_number("smooth_nr", smooth_nr)
        self.smooth_dr = check_number("smooth_dr", smooth_dr)

    @property
    def making(self) -> tuple[Any, ...]:
        return (self.makes, self.spacing, self.dilations)

    @property
    def reads(self) -> tuple[str | Sum, ...]:
        return (self._recalled, self._size)

    def of_sums(self, *sums: np.ndarray) -> Any:
        recalled, size = sums
        inverse = _inverse(size + self.smooth_dr)
        return 1.0 - (recalled + self.smooth_nr) * inverse, ((self._recalled, -inverse),)

    def of_target(self, *sums: np.ndarray) -> Any:
        return ()

    def field_form(self, classes: int, dense: bool) -> Form:
        if dense or classes == 1:
            return Form("bool", dense)
        return Form("uint8" if classes < 256 else "int32", False)

    def make_field(self, target: Target, spacing: Spacing) -> np.ndarray:
        spacing_of(spacing, target.axes)
        classes = target.classes
        if target.masks is not None:
            if target.activation == "sigmoid" or classes == 1:
                return _each(target.masks, self.dilations)
            foreground = np.logical_or.reduce(target.masks[:, 1:], axis=1, keepdims=True)
            tubes = np.repeat(_each(foreground, self.dilations), classes, axis=1)
            tubes &= target.masks
            tubes[:, 0] = False  # as of a label map
            return tubes
        labels = target.labels
        foreground = (labels > 0) & (labels < classes)
        there = _each(foreground[:, None], self.dilations)[:, 0]
        if classes == 1:
            return there
        dtype, none = ("uint8", 255) if classes < 256 else ("int32", -1)
        return np.where(there, labels, none).astype(dtype)


def _each(masks: np.ndarray, dilations: int) -> np.ndarray:
    """The tubes of masks, (B, C, *spatial), within them."""
    tubes = np.zeros(masks.shape, bool)
    for index in np.ndindex(*masks.shape[:2]):
        tubes[index] = tube(masks[index], dilations)
    return tubes


def _distances(target: Target, spacing: Spacing, convention: str) -> Any:
    """Distances to the boundary of every class, (B, C, *spatial) float32."""
    sizes = spacing_of(spacing, target.axes)
    if not 1 <= len(sizes) <= MOST_AXES:
        raise ValueError(
            f"target: expected one to {MOST_AXES} spatial axes to measure along, got {len(sizes)}"
        )
    how: dict[str, Any] = {"spacing": sizes, "convention": convention}
    if target.labels is not None:
        return signed_distance(target.labels, target.classes, **how)
    return signed_of_masks(target.masks, **how)


def _inverse(size: np.ndarray) -> np.ndarray:
    """1 / size, and 0 where nothing was counted."""
    inverse: np.ndarray = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    return inverse
