"""From a component's formula and the caller's tensors to one fused loss."""

from __future__ import annotations

from torch import Tensor

from fastloss.dropin import Fused, Recipe, is_binary, kernels_take
from fastloss.monai._inputs import Inputs


def fuse(inputs: Inputs, made: Recipe, activation: str | None = None) -> Fused | None:
    """This formula on these tensors, or None where the kernels cannot compute it."""
    if not kernels_take(inputs.logits, inputs.target):
        return None
    if inputs.logits.numel() == 0:  # of which MONAI's mean is NaN
        return None
    index, weight = inputs.ignore_index, None
    if index is not None:
        if not isinstance(index, int):
            return None
        if not inputs.labels and inputs.logits.shape[1] > 1:
            weight = _dense_voxel_weight(inputs.target, index)
            if weight is None:
                return None
            index = None
    if activation is None:
        activation = inputs.activation
    return Fused(made, activation, inputs.logits, inputs.target, weight, index)


def _dense_voxel_weight(target: Tensor, ignore_index: int) -> Tensor | None:
    """1 where a voxel counts; None where it may count in part, which is no voxel weight.

    (MONAI multiplies logits and target by the mask, so that a fraction enters products squared.)
    """
    if not 0 <= ignore_index < target.shape[1]:
        return target.sum(dim=1, keepdim=True) > 0
    ignored = target[:, ignore_index : ignore_index + 1]
    return ignored == 0 if is_binary(ignored) else None
