"""A trainer for nnU-Net whose loss is fused.

Three lines install it, in a folder of your own that nnU-Net looks through::

    mkdir -p ~/trainers
    echo "from fastloss.nnunet.trainer import nnUNetTrainerFastloss" > ~/trainers/fused.py
    export nnUNet_extTrainer=~/trainers

and ``-tr`` names it like any other::

    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerFastloss

Prediction looks the trainer up by the same name, so keep the file and the variable. A version of
nnU-Net that does not know ``nnUNet_extTrainer`` finds the same file in its own folder
``nnunetv2/training/nnUNetTrainer/``.

Any other trainer becomes fused by the mixin, in the same file::

    from fastloss.nnunet.trainer import FusedLoss
    from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerDiceLoss import (
        nnUNetTrainerDiceLoss,
    )

    class nnUNetTrainerDiceLossFastloss(FusedLoss, nnUNetTrainerDiceLoss):
        pass

The loss is computed on the tensors' device, which must have a `fastloss` backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from fastloss.nnunet._convert import from_nnunet

if TYPE_CHECKING:
    from torch import nn


class FusedLoss:
    """A mixin that replaces whichever loss a trainer builds by ours; list it first among the bases.

    Raises:
        TypeError: when the loss is built, if `fastloss.nnunet` has no counterpart.
    """

    def _build_loss(self) -> nn.Module:
        base: Any = super()
        return from_nnunet(base._build_loss())


class nnUNetTrainerFastloss(FusedLoss, nnUNetTrainer):
    """nnU-Net's default trainer with its default loss, fused."""
