"""nnU-Net's losses, computed by the fused kernels.

A trainer changes its imports::

    from fastloss.nnunet import DC_and_CE_loss  # was: from nnunetv2.training.loss.compound_losses

or none at all: `fastloss.nnunet.trainer` has trainers to name with ``-tr``, and `from_nnunet`
converts a loss that was already built. Signatures, defaults, values and gradients are those of
nnU-Net 2.8, which need not be installed.

`compute_metrics_on_folder` evaluates a folder as nnU-Net does, and adds HD95, ASSD and NSD.

`WithBoundary` and `WithSkeletonRecall` add a term that nnU-Net does not have, and make what it
reads in the workers of the data loader.

Cross-entropy and Dice are one fused loss, which takes two passes over the logits and no memory but
the gradient's; an ignore channel of regions adds one byte per voxel, and top-k cross-entropy one
number per voxel and a third pass. PyTorch's operations compute the following:

- ``apply_nonlin`` other than `softmax_helper_dim1` of several channels, ``torch.sigmoid`` and None.
  Its result is read by the kernels.
- Cross-entropy with ``reduction="none"``, with negative class weights, or of one vector of logits
  per sample; binary cross-entropy with ``reduction="none"`` or with weights that are not one per
  channel; top-k cross-entropy with ``label_smoothing``.
- A Dice or cross-entropy of another class, as ``dice_class`` or in place of the attributes ``dc``
  and ``ce``, or with hooks.

Cross-entropy and Dice are two fused losses where ``ce_kwargs`` has an ``ignore_index`` that is a
class, which the Dice loss does count.

Class weights, ``weight_ce``, ``weight_dice`` and ``weight_factors`` may change in every call,
however they are written: ``torch.compile`` does not recompile for them, except once for a part or
an output whose weight was 0 at first and then is not.

With ``ddp`` the sums of the batch Dice are reduced over the ranks of the default process group;
the cross-entropy remains that of each rank, as in nnU-Net.

Differences from nnU-Net:

- float16 and bfloat16 logits are computed in float32 and give a float32 value; float64 logits are
  computed in float64 and give a float64 value.
- Labels that are no class raise ValueError (RuntimeError or IndexError), including those with a
  fraction, which nnU-Net truncates. Negative numbers in ``smooth`` or a mask raise ValueError, and
  so do masks of other shapes than (B or 1, 1, *spatial), and a background that is the only class
  and is excluded (NaN).
- Integers other than 0 and 1 in regions or in the target of a single channel, as in a mask of 0 and
  255, raise ValueError (a value without meaning); on a GPU they make the value NaN.
- Logits without a spatial axis are one voxel per sample for every Dice loss
  (``MemoryEfficientSoftDiceLoss`` summed over all axes).
- ``DC_and_CE_loss`` and ``DC_and_topk_loss`` of a dense target raise ValueError (its channel 0 was
  read as labels), unless ``weight_ce`` is 0.
- Voxels that are ignored or masked contribute nothing even where they hold NaN.
- The largest k percent are at least one voxel (NaN), and voxels that tie for the last places share
  them in the gradient.
- The cross-entropy over no voxel, or over voxels whose classes all have weight 0, is 0 (NaN). So
  is the mean Dice of an empty batch.
- ``ddp`` accepts batches of unequal size on the ranks, including empty ones.
- ``DeepSupervisionWrapper`` raises ValueError for fewer outputs than weights, and takes None for
  weights that are all 1, as its documentation says (TypeError).
- Dictionaries of options are not modified.
- Class weights on a GPU, or in code compiled by ``torch.compile``, are not checked beforehand:
  negative ones give NaN on a GPU, and ValueError on a CPU.
"""

from fastloss.nnunet._compound import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from fastloss.nnunet._convert import from_nnunet
from fastloss.nnunet._deep_supervision import DeepSupervisionWrapper
from fastloss.nnunet._dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss, softmax_helper_dim1
from fastloss.nnunet._entropy import RobustCrossEntropyLoss, TopKLoss
from fastloss.nnunet._evaluation import compute_metrics_on_folder
from fastloss.nnunet._fields import WithBoundary, WithSkeletonRecall

__all__ = [
    "DC_and_BCE_loss",
    "DC_and_CE_loss",
    "DC_and_topk_loss",
    "DeepSupervisionWrapper",
    "MemoryEfficientSoftDiceLoss",
    "RobustCrossEntropyLoss",
    "SoftDiceLoss",
    "TopKLoss",
    "WithBoundary",
    "WithSkeletonRecall",
    "compute_metrics_on_folder",
    "from_nnunet",
    "softmax_helper_dim1",
]
