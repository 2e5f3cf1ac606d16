"""Trainers for nnU-Net whose losses are fused.

Three lines install them, in a folder of your own that nnU-Net looks through::

    mkdir -p ~/trainers
    echo "from fastloss.nnunet.trainer import *" > ~/trainers/fused.py
    export nnUNet_extTrainer=~/trainers

and ``-tr`` names one like any other::

    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerFastloss

- ``nnUNetTrainerFastloss``: nnU-Net's default loss.
- ``nnUNetTrainerFastlossBoundary``: that + the boundary loss, whose factor grows with the epoch.
- ``nnUNetTrainerFastlossSkeletonRecall``: that + skeleton recall, for thin structures.
- ``nnUNetTrainerFastlossCCDiceCE``: that + connected-component Dice and cross-entropy, in which
  small lesions count as much as large ones.
- ``nnUNetTrainerFastlossBlob``: that + the part of the blob loss for each lesion.

Prediction looks the trainer up by the same name, so keep the file and the variable. A version of
nnU-Net that does not know ``nnUNet_extTrainer`` finds the same file in its own folder
``nnunetv2/training/nnUNetTrainer/``.

Any other trainer becomes fused by the mixins `FusedLoss`, `BoundaryLoss`, `SkeletonRecallLoss`,
`CCDiceCELoss` and `BlobLoss`, in the same file::

    from fastloss.nnunet.trainer import FusedLoss
    from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerDiceLoss import (
        nnUNetTrainerDiceLoss,
    )

    class nnUNetTrainerDiceLossFastloss(FusedLoss, nnUNetTrainerDiceLoss):
        pass

and a subclass sets options, as the attributes say::

    class nnUNetTrainerBoundary200Epochs(nnUNetTrainerFastlossBoundary):
        last_boundary_factor = 0.5

        def __init__(self, plans, configuration, fold, dataset_json, device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs = 200

The loss is computed on the tensors' device, which must have a `fastloss` backend. Distances,
skeletons and lesions are made in the workers of nnU-Net's data loader, by a transform after
nnU-Net's own; no file of nnU-Net is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from fastloss.nnunet._convert import from_nnunet
from fastloss.nnunet._fields import (
    WithBlobs,
    WithBoundary,
    WithCCDiceCE,
    WithField,
    WithSkeletonRecall,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "BlobLoss",
    "BoundaryLoss",
    "CCDiceCELoss",
    "FusedLoss",
    "SkeletonRecallLoss",
    "nnUNetTrainerFastloss",
    "nnUNetTrainerFastlossBlob",
    "nnUNetTrainerFastlossBoundary",
    "nnUNetTrainerFastlossCCDiceCE",
    "nnUNetTrainerFastlossSkeletonRecall",
]


class FusedLoss:
    """A mixin that replaces whichever loss a trainer builds by ours; list it first among the bases.

    Raises:
        TypeError: when the loss is built, if `fastloss.nnunet` has no counterpart.
    """

    def _build_loss(self) -> nn.Module:
        base: Any = super()
        return from_nnunet(base._build_loss())


class _FieldLoss(FusedLoss):
    """A mixin that adds a term to the loss, and makes its field in the data loader."""

    fields_in_loader = True
    """Whether the data loader's workers make the field. If not, each training step does, and the
    batches are smaller: of many classes a field of distances is much larger than the image."""
    field_dtype = "float16"
    """Of a field of distances from the loader: "float16", which rounds them by 0.05 % at most, or
    "float32"."""

    loss: Any
    label_manager: Any
    enable_deep_supervision: bool

    def _with_term(self, loss: nn.Module) -> WithField:
        raise NotImplementedError(f"{type(self).__name__} must define _with_term")

    def _build_loss(self) -> nn.Module:
        return self._with_term(super()._build_loss())

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()
        return self._with_fields(base.get_training_transforms(*args, **kwargs))

    def get_validation_transforms(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()
        return self._with_fields(base.get_validation_transforms(*args, **kwargs))

    def _with_fields(self, transforms: Any) -> Any:
        if not self.fields_in_loader:
            return transforms
        from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

        classes = self.label_manager.num_segmentation_heads
        return ComposeTransforms(
            [transforms, self.loss.append_fields(classes, dtype=self.field_dtype)]
        )

    def train_step(self, batch: dict[str, Any]) -> Any:
        base: Any = super()
        return self._step(base.train_step, batch)

    def validation_step(self, batch: dict[str, Any]) -> Any:
        base: Any = super()
        return self._step(base.validation_step, batch)

    def _step(self, step: Callable[[dict[str, Any]], Any], batch: dict[str, Any]) -> Any:
        target = batch["target"]
        if self.enable_deep_supervision or not isinstance(target, list):
            return step(batch)
        # Without deep supervision nnU-Net's steps expect one target, not a list.
        loss, fields = self.loss, target[1:]

        def with_fields(output: Any, one: Any) -> Any:
            return loss(output, [one, *(f.to(one.device, non_blocking=True) for f in fields)])

        self.loss = with_fields
        try:
            return step({**batch, "target": target[0]})
        finally:
            self.loss = loss


class BoundaryLoss(_FieldLoss):
    """A mixin that adds the boundary loss to a trainer's loss, Dice + cross-entropy by default.

    loss + α · `fastloss.Boundary`, where α grows linearly with the epoch, from
    ``first_boundary_factor`` in the first to ``last_boundary_factor`` in the last. With deep
    supervision the boundary loss is that of the output of full resolution alone, with the factor
    α: see `WithBoundary`. Regions and an ignore label are taken as they come; the background, which
    regions have not, does not count.

    Distances are in units of the shortest edge of a voxel, by the spacing of the plans, so that α
    means the same for every data set.

    Raises:
        TypeError: when the loss is built, if it is not one of nnU-Net's Dice with a cross-entropy.
        ValueError: a factor that is not finite.

    Source: Kervadec et al. 2019, "Boundary loss for highly unbalanced segmentation".
    """

    first_boundary_factor = 0.01
    last_boundary_factor = 1.0

    configuration_manager: Any
    current_epoch: int
    num_epochs: int
    print_to_log_file: Callable[..., None]

    @property
    def boundary_factor(self) -> float:
        """α in the current epoch."""
        share = min(self.current_epoch / max(self.num_epochs - 1, 1), 1.0)
        first, last = self.first_boundary_factor, self.last_boundary_factor
        return first + (last - first) * share

    def _with_term(self, loss: nn.Module) -> WithField:
        spacing = self.configuration_manager.spacing
        relative = tuple(float(size) / min(spacing) for size in spacing)
        return WithBoundary(loss, self.boundary_factor, spacing=relative)

    def on_train_epoch_start(self) -> None:
        base: Any = super()
        base.on_train_epoch_start()
        self.loss.weight = self.boundary_factor
        self.print_to_log_file(f"Boundary factor: {self.boundary_factor:.5f}")


class SkeletonRecallLoss(_FieldLoss):
    """A mixin that adds skeleton recall to a trainer's loss, Dice + cross-entropy by default.

    loss + ``skeleton_recall_factor`` · negative recall of the skeletons, which are dilated
    ``skeleton_dilations`` times. Each output of deep supervision has it: see `WithSkeletonRecall`.
    As the Dice, the recall is that of the batch if the plans say so, over all ranks. Regions and an
    ignore label are taken as they come; each region has its own skeleton.

    Raises:
        TypeError: when the loss is built, if it is not one of nnU-Net's Dice with a cross-entropy.
        ValueError: an attribute out of its range.

    Source: Kirchhoff et al. 2024, "Skeleton recall loss for connectivity conserving and resource
    efficient segmentation of thin tubular structures".
    """

    skeleton_recall_factor = 1.0
    skeleton_dilations = 2

    configuration_manager: Any
    is_ddp: bool

    def _with_term(self, loss: nn.Module) -> WithField:
        return WithSkeletonRecall(
            loss,
            self.skeleton_recall_factor,
            dilations=self.skeleton_dilations,
            batch_dice=self.configuration_manager.batch_dice,
            ddp=self.is_ddp,
        )


class _LesionLoss(_FieldLoss):
    """A mixin that adds a term of every lesion."""

    lesion_factor: float
    """The factor of the term."""
    lesion_weight = "equal"
    """How lesions are weighed: "equal", "inverse_volume" or "inverse_sqrt_volume"."""

    configuration_manager: Any


class CCDiceCELoss(_LesionLoss):
    """A mixin that adds connected-component Dice + cross-entropy to a trainer's loss.

    loss + ``lesion_factor`` · `fastloss.CCDiceCE`, in which every lesion counts alike; with deep
    supervision of each output: see `WithCCDiceCE`. Nearness is measured in the spacing of the
    plans. An ignore label is taken as it comes.

    Raises:
        TypeError: when the loss is built, if it is not one of nnU-Net's Dice with a cross-entropy
            of labels, as for a data set with regions.
        ValueError: an attribute out of its range.

    Source: Bouteille et al. 2025, "Learning to Look Closer: a new instance-wise loss for small
    cerebral lesion segmentation".
    """

    lesion_factor = 1.0

    def _with_term(self, loss: nn.Module) -> WithField:
        spacing = tuple(float(size) for size in self.configuration_manager.spacing)
        return WithCCDiceCE(
            loss, self.lesion_factor, lesion_weight=self.lesion_weight, spacing=spacing
        )


class BlobLoss(_LesionLoss):
    """A mixin that adds the part of the blob loss for each lesion to a trainer's loss.

    loss + ``lesion_factor`` · `fastloss.BlobDiceCE`, the blob loss divided by α, ``lesion_factor``
    being β/α; with deep supervision of each output: see `WithBlobs`. An ignore label is taken as it
    comes.

    Raises:
        TypeError, ValueError: as `CCDiceCELoss`.

    Source: Kofler et al. 2023, "blob loss: instance imbalance aware loss functions for semantic
    segmentation".
    """

    lesion_factor = 0.5

    def _with_term(self, loss: nn.Module) -> WithField:
        return WithBlobs(loss, self.lesion_factor, lesion_weight=self.lesion_weight)


class nnUNetTrainerFastloss(FusedLoss, nnUNetTrainer):
    """nnU-Net's default trainer with its default loss, fused."""


class nnUNetTrainerFastlossBoundary(BoundaryLoss, nnUNetTrainer):
    """nnU-Net's default trainer with its default loss + a growing share of the boundary loss."""


class nnUNetTrainerFastlossSkeletonRecall(SkeletonRecallLoss, nnUNetTrainer):
    """nnU-Net's default trainer with its default loss + skeleton recall."""


class nnUNetTrainerFastlossCCDiceCE(CCDiceCELoss, nnUNetTrainer):
    """nnU-Net's default trainer with its default loss + that of every lesion and its region."""


class nnUNetTrainerFastlossBlob(BlobLoss, nnUNetTrainer):
    """nnU-Net's default trainer with its default loss + that of every lesion and the background."""
