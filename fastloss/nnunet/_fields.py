"""nnU-Net's compound losses together with a term that reads a field of the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastloss.dropin import Fused, Recipe, Scheduled, as_built, evaluate, fixed, recipe, times
from fastloss.loss import Loss, Term
from fastloss.nnunet._compound import (
    Compound,
    DC_and_BCE_loss,
    DC_and_CE_loss,
    DC_and_topk_loss,
    OfLabels,
)
from fastloss.nnunet._deep_supervision import DeepSupervisionWrapper
from fastloss.nnunet._loader import AppendFields
from fastloss.nnunet._terms import NegativeSkeletonRecall
from fastloss.options import check_choice, check_spacing
from fastloss.terms import BlobDiceCE, Boundary, CCDiceCE

_COMPOUNDS = (DC_and_CE_loss, DC_and_topk_loss, DC_and_BCE_loss)


class WithField(Scheduled):
    """Σ_i w_i · loss(output_i, target_i) + weight · Σ_i v_i · term(output_i, target_i, field_i).

    i are the resolutions of deep supervision, w its weights. Both losses of an output are computed
    together, in two passes over its logits.
    """

    scheduled = ("weight", "weight_factors")

    everywhere: ClassVar[bool]
    """Whether v is w, or 1 for the first output, that of full resolution, and 0 for the others."""
    field: ClassVar[str]
    """The name of the field that the term reads."""

    def __init__(
        self, loss: Any, weight: float, weight_factors: Sequence[float] | None, term: Recipe
    ) -> None:
        super().__init__()
        if isinstance(loss, DeepSupervisionWrapper):
            if weight_factors is None:
                weight_factors = loss.weight_factors
            loss = loss.loss
        if not isinstance(loss, Compound):
            names = ", ".join(kind.__name__ for kind in _COMPOUNDS)
            raise TypeError(
                f"loss: expected one of {names} of fastloss.nnunet, got {type(loss).__name__}"
            )
        self.loss = loss
        self.weight = weight
        self.weight_factors = None if weight_factors is None else tuple(weight_factors)
        self._term = term

    def forward(self, net_output: Any, target: Any) -> Any:
        """The loss.

        Args:
            net_output: logits, (B, C, *spatial); or with deep supervision a list of them, the first
                of full resolution.
            target: what ``loss`` takes; or a list of one target per output, after which the fields
                may come that `append_fields` makes: otherwise they are made here.

        Raises:
            ValueError: not one weight or target per output, or another number of fields.
        """
        several = isinstance(net_output, (list, tuple))
        outputs = list(net_output) if several else [net_output]
        given = list(target) if isinstance(target, (list, tuple)) else [target]
        count = len(outputs)
        weights: list[Any] = [1.0] * count
        if several and self.has("weight_factors"):
            weights = self.factors("weight_factors")
        if len(weights) != count:
            raise ValueError(f"net_output: expected {len(weights)}, one per weight, got {count}")
        targets, fields = given[:count], given[count:]
        wanted = count if self.everywhere else 1
        if len(targets) != count or len(fields) not in (0, wanted):
            raise ValueError(
                f"target: expected {count}, one per output, and {wanted} fields or none, got "
                f"{len(given)} arrays"
            )
        fields += [None] * (count - len(fields))
        total: Any = 0
        for i, x in enumerate(outputs):
            own = self._factor(i, weights[i])
            if weights[i] is not None or own is not None:
                total = total + self._of_output(weights[i], own, x, targets[i], fields[i])
        return total

    def _factor(self, output: int, weight: Any) -> Any:
        """The term's factor for an output whose loss has this weight; None: it is left out."""
        if not self.is_on("weight"):
            return None
        own = self.factor("weight")
        if self.everywhere:
            return None if weight is None else own * weight
        return own if output == 0 else None

    def _of_output(self, weight: Any, own: Any, x: Tensor, y: Tensor, field: Tensor | None) -> Any:
        loss = self.loss
        if own is None:
            return times(weight, loss(x, y))
        given: dict[str, Any] = {}
        if field is not None:
            given = {"fields": {self.field: field}, "region_count": self._region_count(field)}
        request: Fused = loss.request(self._term, x, y)
        if weight is None:
            return evaluate((own, request), **given)
        # One with hooks, or of a subclass, has to be called.
        parts = loss.fused(x, y) if as_built(loss, *_COMPOUNDS) else None
        if parts is None:
            return times(weight, loss(x, y)) + evaluate((own, request), **given)
        weighted = [(weight * factor, part) for factor, part in parts]
        return evaluate(*weighted, (own, request), **given)

    def _region_count(self, field: Tensor) -> int | None:
        """How many regions a sample has at most, where the field is a map of them."""
        return None

    def append_fields(self, classes: int, *, dtype: str = "float32") -> AppendFields:
        """A transform for nnU-Net's data loader, which makes the fields in its workers.

        Args:
            classes: the number of channels of the logits.
            dtype: "float32" or "float16", of fields of floating numbers.

        Raises:
            ValueError, TypeError: an argument out of its range.
        """
        regions = isinstance(self.loss, DC_and_BCE_loss)
        ignore = self.loss.ignore_label if isinstance(self.loss, OfLabels) else None
        term = self._term.kind(**dict(self._term.options))
        return AppendFields(
            Loss(term, activation="sigmoid" if regions else "softmax", ignore_index=ignore),
            classes,
            regions=regions,
            everywhere=self.everywhere,
            dtype=check_choice("dtype", dtype, ("float32", "float16")),
        )


class WithBoundary(WithField):
    """A compound loss + weight · the boundary loss of the output of full resolution.

    The boundary loss is the mean over samples, classes and voxels of p φ, φ being the signed
    distance to the boundary: see `fastloss.Boundary`. With deep supervision only the first output
    has one, with ``weight`` itself for its factor: distances on coarser grids are those of other
    boundaries, and their unit is another.

    Ignored voxels count for nothing, and are of no class for φ. Set ``weight`` before any call, as
    in a schedule: nothing is compiled anew.

    Args:
        loss: `DC_and_CE_loss`, `DC_and_topk_loss` or `DC_and_BCE_loss`; or one of these in a
            `DeepSupervisionWrapper`, whose weights are then used.
        weight: the factor of the boundary loss; the paper's grows from 0.01.
        weight_factors: the weights of deep supervision; None: those of the wrapper, or all 1.
        spacing: the size of a voxel, one number or one per spatial axis; None: 1.
        include_background: whether channel 0 counts; None: for regions alone.

    Raises:
        TypeError: a ``loss`` of another class. ValueError: an option out of its range.

    Source: Kervadec et al. 2019, "Boundary loss for highly unbalanced segmentation".
    """

    everywhere = False
    field = "boundary"

    def __init__(
        self,
        loss: Any,
        weight: float = 0.01,
        weight_factors: Sequence[float] | None = None,
        *,
        spacing: Any = None,
        include_background: bool | None = None,
    ) -> None:
        if include_background is None:
            include_background = _has_regions(loss)
        spacing = check_spacing(spacing)
        term = recipe(Boundary, spacing=spacing, include_background=bool(include_background))
        super().__init__(loss, weight, weight_factors, term)


class WithSkeletonRecall(WithField):
    """A compound loss + weight · the negative skeleton recall, −1 being perfect.

    The recall is (Σ p s + smooth) / (Σ s + smooth), s being the skeleton of the target as a tube:
    see `fastloss.SkeletonRecall`. Of a label map the skeleton is that of all foreground, and each
    of its voxels counts for its own class; of regions each has its own. With deep supervision every
    output has the term, with the weight of its loss. Its field is then that of full resolution at
    the nearest voxels if it comes from the data loader, as in the paper's code, and is made of the
    coarser target if not.

    Ignored voxels count for nothing, and are of no class for s.

    Args:
        loss, weight_factors: as in `WithBoundary`.
        weight: the factor of the term.
        dilations: how often the skeleton is dilated.
        batch_dice: sum over the samples before the formula, so that the batch is one volume.
        do_bg: whether channel 0 counts; None: for regions alone.
        smooth: added to numerator and denominator, at least 0.
        ddp: with ``batch_dice``, sum over the samples of all ranks of the default process group.

    Raises:
        TypeError: a ``loss`` of another class. ValueError: an option out of its range. ImportError:
            when a skeleton is made, without scikit-image.

    Source: Kirchhoff et al. 2024, "Skeleton recall loss for connectivity conserving and resource
    efficient segmentation of thin tubular structures".
    """

    everywhere = True
    field = "skeleton"

    def __init__(
        self,
        loss: Any,
        weight: float = 1.0,
        weight_factors: Sequence[float] | None = None,
        *,
        dilations: int = 2,
        batch_dice: bool = False,
        do_bg: bool | None = None,
        smooth: float = 1e-5,
        ddp: bool = True,
    ) -> None:
        term = recipe(
            NegativeSkeletonRecall,
            dilations=dilations,
            ddp=bool(ddp),
            batch=bool(batch_dice),
            include_background=bool(_has_regions(loss) if do_bg is None else do_bg),
            smooth_nr=fixed(smooth),
            smooth_dr=fixed(smooth),
        )
        super().__init__(loss, weight, weight_factors, term)


class _WithLesions(WithField):
    """A compound loss + weight · a term of every lesion."""

    everywhere = True
    field = "regions"
    kind: ClassVar[type[Term]]

    def __init__(
        self,
        loss: Any,
        weight: float = 1.0,
        weight_factors: Sequence[float] | None = None,
        *,
        lesion_weight: str = "equal",
        **options: Any,
    ) -> None:
        if _has_regions(loss):
            raise TypeError(
                "loss: regions may overlap, and have no lesions apart; expected DC_and_CE_loss or "
                "DC_and_topk_loss, got DC_and_BCE_loss"
            )
        options["weight"] = lesion_weight
        if "spacing" in options:
            options["spacing"] = check_spacing(options["spacing"])
        self.kind(**options)  # raises the errors about the options
        super().__init__(loss, weight, weight_factors, recipe(self.kind, **options))

    def _region_count(self, field: Tensor) -> int | None:
        if not field.is_cuda:
            return None
        # A power of 2, as kernels are compiled for each number.
        return max(8, 1 << int(field.max()).bit_length())


class WithCCDiceCE(_WithLesions):
    """A compound loss + weight · connected-component Dice + cross-entropy: `fastloss.CCDiceCE`.

    Each voxel belongs to the lesion of the target that is nearest to it, and every lesion counts
    alike. With deep supervision every output has the term, with the weight of its loss. Its regions
    are then those of full resolution at the nearest voxels if they come from the data loader, and
    are made of the coarser target if not; a lesion that the coarser target lacks does not count.

    Ignored voxels count for nothing, and are of no lesion. On a GPU a call with regions from the
    data loader waits for their number.

    Args:
        loss: `DC_and_CE_loss` or `DC_and_topk_loss`; or one of these in a
            `DeepSupervisionWrapper`, whose weights are then used.
        weight: the factor of the term.
        weight_factors: the weights of deep supervision; None: those of the wrapper, or all 1.
        lesion_weight: how lesions are weighed, the ``weight`` of `fastloss.CCDiceCE`.
        **options: the others of `fastloss.CCDiceCE`.

    Raises:
        TypeError: a ``loss`` of another class. ValueError: an option out of its range.

    Source: Bouteille et al. 2025, "Learning to Look Closer: a new instance-wise loss for small
    cerebral lesion segmentation".
    """

    kind = CCDiceCE


class WithBlobs(_WithLesions):
    """A compound loss + weight · Dice + cross-entropy of every lesion: `fastloss.BlobDiceCE`.

    For a lesion the others are left out, and the background counts. It is the blob loss divided by
    α where ``weight`` is β/α, ½ in the paper. Otherwise as `WithCCDiceCE`; the options are those of
    `fastloss.BlobDiceCE`.

    Source: Kofler et al. 2023, "blob loss: instance imbalance aware loss functions for semantic
    segmentation".
    """

    kind = BlobDiceCE

    def __init__(
        self,
        loss: Any,
        weight: float = 0.5,
        weight_factors: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(loss, weight, weight_factors, **options)


def _has_regions(loss: Any) -> bool:
    return isinstance(getattr(loss, "loss", loss), DC_and_BCE_loss)
