"""MONAI's segmentation losses, computed by the fused kernels.

A pipeline changes one import::

    from fastloss.monai import DiceCELoss  # was: from monai.losses import DiceCELoss

Signatures, defaults, values, gradients, shapes, errors and state dicts are those of MONAI 1.6.1,
which need not be installed.

Options shared by the losses:

- include_background: whether channel 0 counts.
- to_onehot_y: the target is a label map (B, 1, *spatial). It is never expanded.
- sigmoid, softmax, other_act: at most one; without one, the input holds probabilities.
- squared_pred: squares in the sizes of the regions.
- jaccard: intersection over union in place of Dice.
- reduction: "mean", "sum" or "none".
- smooth_nr, smooth_dr: added to numerator and denominator.
- batch: regions are summed over the batch.
- weight: one number, or one per class that counts.
- soft_label: sizes and overlap from Σ|p|, Σ|g| and Σ|p−g|, which for soft targets is a metric
  (Wang et al. 2023, "Dice Semimetric Losses"). The same as without for hard targets.
- ignore_index: voxels with this label count for nothing. In a dense target: those of this
  channel, or where there is no such channel, those of none.

What is fused: value and gradient take one pass over the logits each, and no memory but the
gradient's. This holds for every loss and option except the following, which are computed by
PyTorch's operations:

- FocalLoss with ``reduction="none"``: one number per voxel. (The region loss of a compound one
  is still fused.)
- The sigmoid focal loss of a soft target, ``ignore_index`` as a channel of a soft target, and a
  mask of fractions: MONAI's formulas are not linear in these. Floating targets and masks in CPU
  memory are looked through for other numbers than 0 and 1; under ``torch.compile`` and on other
  devices integers alone (bool for a mask) are known to be hard.
- ``soft_label`` without ``squared_pred``, for a dense target or without activation.
- The focal loss of softmax with one channel that counts, or of a label map with
  ``ignore_index`` and without background.
- MaskedDiceLoss under ``torch.compile``, of a label map with background.
- BoundaryLoss, HausdorffDTLoss and LogHausdorffDTLoss of a subclass with its own distances, and an
  ``alpha`` that is not above 0.
- SoftclDiceLoss, and that part of SoftDiceclDiceLoss: activation, one-hot target and sums. The soft
  skeletons are computed by a kernel of their own in CPU memory. Its working memory is at most
  twice the probabilities, or where these are few, 121 of their planes (with ``iter_=3``); for the
  backward pass it keeps the probabilities alone. On a GPU PyTorch's pooling computes them, large
  batches sample by sample.
- The asymmetric unified focal loss, and its parts, with ``ignore_index``; AsymmetricFocalLoss with
  ``reduction="none"``. Otherwise PyTorch clamps the probabilities first, for which it takes their
  memory once.
- GeneralizedWassersteinDiceLoss under ``torch.compile``. On a GPU it copies the labels to the CPU.
- The shares of neighbours in NACLLoss, for which PyTorch takes the memory of the logits twice.
- Targets or weights that require a gradient, weights that are broadcast to other axes than the
  channels, negative options, integer logits, no spatial axis, empty tensors (whose mean is NaN).

DeepSupervisionLoss and MaskedLoss are modules around any loss, of this library or another.

Compound losses are one fused loss if their parts have the same activation: DiceCELoss with
softmax (sigmoid for a single channel), the focal ones with sigmoid. If not, as MONAI's
cross-entropy has always softmax and the focal loss sigmoid, each part is fused for itself.
``other_act`` runs in PyTorch and its result is read by the kernels.

The parts of a compound loss are attributes, as in MONAI, and what is set there counts from the next
call on: ``loss.cross_entropy.ignore_index = 0``. A part in whose place another module or a subclass
was put, one with hooks, and a method ``ce`` or ``bce`` of a subclass are called as they are, and
what they return is added.

Class weights, factors (``lambda_dice``, …), and ``alpha`` and ``beta`` may be others in every call,
written in whatever way: ``torch.compile`` makes nothing anew for them.

What differs from MONAI:

- float16 and bfloat16 logits give a float32 value; float64 logits are computed in float64 by the
  focal losses as well, and give a float64 value. The target's dtype does not matter.
- Labels that are no class raise ValueError (RuntimeError), those with a fraction as well, which
  MONAI truncates.
- Integers other than 0 and 1 in a target that is no label map, as in a mask of 0 and 255, raise
  ValueError (a value without meaning), unless they are the ``ignore_index`` of a single channel. On
  a GPU, and under ``torch.compile`` where the loss is not fused, they make the value NaN.
- Voxels that are ignored or masked count for nothing even where they hold NaN.
- The cross-entropy of voxels that all are ignored, or whose classes all have weight 0, is 0 (NaN).
- Integer and bool targets are taken in every loss. Second derivatives are computed where the loss
  is not fused.
- A number given as ``weight`` stays one in the state dict; MONAI expands it when first called.
- MaskedDiceLoss takes a module as ``other_act``.
- The distances of HausdorffDTLoss are float32, whatever the dtype of input and target; MONAI's are
  of that dtype, and of integers in a dense target cut to integers.
- The clDice losses take lines, (B, C, L), as well as images and volumes.
- DeepSupervisionLoss takes label maps of any dtype, and makes no float32 copy of half outputs for
  losses of this library.
- Class weights that lie on a GPU, or are met in code that ``torch.compile`` made, are not looked
  at beforehand: negative ones make the value NaN on a GPU, and ValueError on a CPU.
"""

from fastloss.monai._boundary import BoundaryLoss, HausdorffDTLoss, LogHausdorffDTLoss
from fastloss.monai._compound import DiceCELoss, DiceFocalLoss, GeneralizedDiceFocalLoss
from fastloss.monai._correlation import MCCLoss
from fastloss.monai._focal import FocalLoss
from fastloss.monai._neighbours import NACLLoss
from fastloss.monai._region import DiceLoss, GeneralizedDiceLoss, MaskedDiceLoss, TverskyLoss
from fastloss.monai._skeleton import SoftclDiceLoss, SoftDiceclDiceLoss
from fastloss.monai._unified_focal import (
    AsymmetricFocalLoss,
    AsymmetricFocalTverskyLoss,
    AsymmetricUnifiedFocalLoss,
)
from fastloss.monai._wasserstein import GeneralizedWassersteinDiceLoss
from fastloss.monai._wrappers import DeepSupervisionLoss, MaskedLoss

__all__ = [
    "AsymmetricFocalLoss",
    "AsymmetricFocalTverskyLoss",
    "AsymmetricUnifiedFocalLoss",
    "BoundaryLoss",
    "DeepSupervisionLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "GeneralizedWassersteinDiceLoss",
    "HausdorffDTLoss",
    "LogHausdorffDTLoss",
    "MCCLoss",
    "MaskedDiceLoss",
    "MaskedLoss",
    "NACLLoss",
    "SoftDiceclDiceLoss",
    "SoftclDiceLoss",
    "TverskyLoss",
]
