"""nnU-Net's soft Dice losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastloss.dropin import Fused, evaluate, fixed, recipe
from fastloss.nnunet._terms import NegativeDice


def softmax_helper_dim1(x: Tensor) -> Tensor:
    """Softmax over the channels, as ``nnunetv2.utilities.helpers.softmax_helper_dim1``."""
    return torch.softmax(x, 1)


class Dice(nn.Module):
    """The base class of both Dice losses."""

    clip_tp: float | None = None

    def __init__(
        self,
        apply_nonlin: Callable[[Tensor], Tensor] | None,
        batch_dice: bool,
        do_bg: bool,
        smooth: float,
        ddp: bool,
    ) -> None:
        super().__init__()
        if not 0 <= smooth < math.inf:
            raise ValueError(f"smooth: expected a finite number of at least 0, got {smooth!r}")
        self.do_bg = do_bg
        self.batch_dice = batch_dice
        self.apply_nonlin = apply_nonlin
        self.smooth = smooth
        self.ddp = ddp

    def forward(self, x: Tensor, y: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """The mean Dice, negative: −1 is perfect.

        Args:
            x: (B, C, *spatial), logits, or probabilities with ``apply_nonlin=None``.
            y: a label map (B, *spatial) or (B, 1, *spatial); or dense, of the shape of x.
            loss_mask: None, or (B, 1, *spatial) or (1, 1, *spatial): voxels of 0 are ignored.
        """
        return evaluate((1.0, self.fused(x, y, loss_mask)))

    def fused(
        self,
        x: Tensor,
        y: Tensor,
        loss_mask: Tensor | None = None,
        ignore_index: int | None = None,
    ) -> Fused:
        activation = activation_of(self.apply_nonlin, x.shape[1])
        if activation is None:
            assert self.apply_nonlin is not None
            x, activation = self.apply_nonlin(x), "none"
        clip_tp = self.clip_tp
        term = recipe(
            NegativeDice,
            clip_tp=None if clip_tp is None else fixed(clip_tp),
            ddp=bool(self.ddp),
            batch=bool(self.batch_dice),
            include_background=bool(self.do_bg),
            smooth_nr=fixed(self.smooth),
            smooth_dr=fixed(self.smooth),
        )
        return Fused(term, activation, x, y.detach(), loss_mask, ignore_index)


def activation_of(function: Callable[[Tensor], Tensor] | None, channels: int) -> str | None:
    """The kernels' name of this function; None if they do not support it."""
    if function is None:
        return "none"
    if function is torch.sigmoid:
        return "sigmoid"
    softmax = function is softmax_helper_dim1 or (
        getattr(function, "__name__", "") == "softmax_helper_dim1"
        and getattr(function, "__module__", "") == "nnunetv2.utilities.helpers"
    )
    # nnU-Net reads a single-channel target as dense, which no softmax kernel supports.
    return "softmax" if softmax and channels > 1 else None


class SoftDiceLoss(Dice):
    """−(2 TP + smooth) / max(2 TP + FP + FN + smooth, 1e-8), as nnU-Net's class of this name.

    Args:
        apply_nonlin: from logits to probabilities: `softmax_helper_dim1` (ours or nnU-Net's) and
            ``torch.sigmoid`` are computed by the kernels, other functions by PyTorch. None: x
            holds probabilities.
        batch_dice: sum over the samples before the formula, so that the batch is one volume.
        do_bg: whether channel 0 counts.
        smooth: at least 0.
        ddp: with ``batch_dice``, sum over the samples of all ranks of the default process group.
            The gradient is then multiplied by the number of ranks, by which
            DistributedDataParallel divides.
        clip_tp: the least value of TP.

    Raises:
        ValueError: a negative ``smooth``; when it is called, tensors that do not fit each other,
            or no class that counts. RuntimeError: ``ddp`` and ``batch_dice`` without a process
            group.
    """

    def __init__(
        self,
        apply_nonlin: Callable[[Tensor], Tensor] | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
        clip_tp: float | None = None,
    ) -> None:
        super().__init__(apply_nonlin, batch_dice, do_bg, smooth, ddp)
        self.clip_tp = clip_tp


class MemoryEfficientSoftDiceLoss(Dice):
    """`SoftDiceLoss` without ``clip_tp``, as nnU-Net's class of this name."""

    def __init__(
        self,
        apply_nonlin: Callable[[Tensor], Tensor] | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
    ) -> None:
        super().__init__(apply_nonlin, batch_dice, do_bg, smooth, ddp)
