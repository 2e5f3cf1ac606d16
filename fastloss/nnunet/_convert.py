"""Converts the losses of nnU-Net's trainers to ours."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastloss.dropin import has_hooks
from fastloss.nnunet._compound import (
    DICE_CLASSES,
    DC_and_BCE_loss,
    DC_and_CE_loss,
    DC_and_topk_loss,
)
from fastloss.nnunet._deep_supervision import DeepSupervisionWrapper
from fastloss.nnunet._entropy import RobustCrossEntropyLoss, TopKLoss

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_pre_hooks",
    "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip


def from_nnunet(loss: nn.Module) -> nn.Module:
    """The same loss of this module, with the options of nnU-Net's.

    Args:
        loss: a module of ``nnunetv2.training.loss``, torch.compile'd or not. Parts of other
        classes,
            such as a custom Dice loss, and hooks are kept as they are.

    Raises:
        TypeError: not a loss of nnU-Net's. Subclasses are refused, as they may compute anything.
    """
    converted = _converted(loss)
    if converted is None:
        kind = type(loss)
        raise TypeError(
            f"loss: expected a loss of nnunetv2.training.loss, got {kind.__module__}."
            f"{kind.__qualname__}, which has no counterpart in fastloss.nnunet"
        )
    return converted


def _converted(loss: Any) -> nn.Module | None:
    if hasattr(loss, "_orig_mod") and not has_hooks(loss):
        loss = loss._orig_mod  # what torch.compile wraps
    kind = type(loss)
    package, _, module = kind.__module__.rpartition(".")
    if package == "fastloss.nnunet":
        own: nn.Module = loss
        return own
    convert = _CONVERTERS.get((module, kind.__name__))
    if package != "nnunetv2.training.loss" or convert is None or "forward" in loss.__dict__:
        return None
    new = convert(loss)
    for name in _HOOKS:  # the same dictionaries, so that a hook's handle removes it from both
        setattr(new, name, getattr(loss, name))
    return new


def _part(module: nn.Module) -> nn.Module:
    return _converted(module) or module


def _dice(loss: Any) -> nn.Module:
    names = ["apply_nonlin", "batch_dice", "do_bg", "smooth", "ddp"]
    names += ["clip_tp"] * (type(loss).__name__ == "SoftDiceLoss")
    return DICE_CLASSES[type(loss).__name__](**{name: getattr(loss, name) for name in names})


def _cross_entropy(loss: Any) -> nn.Module:
    return RobustCrossEntropyLoss(
        weight=loss.weight,
        ignore_index=loss.ignore_index,
        reduction=loss.reduction,
        label_smoothing=loss.label_smoothing,
    )


def _top_k(loss: Any) -> nn.Module:
    return TopKLoss(loss.weight, loss.ignore_index, loss.k, loss.label_smoothing)


def _dc_and_topk(loss: Any) -> nn.Module:
    new = DC_and_topk_loss({}, {}, loss.weight_ce, loss.weight_dice, loss.ignore_label)
    new.dc, new.ce = _part(loss.dc), _part(loss.ce)
    return new


def _dc_and_ce(loss: Any) -> nn.Module:
    new = DC_and_CE_loss({}, {}, loss.weight_ce, loss.weight_dice, loss.ignore_label)
    new.dc, new.ce = _part(loss.dc), _part(loss.ce)
    return new


def _dc_and_bce(loss: Any) -> nn.Module:
    new = DC_and_BCE_loss({}, {}, loss.weight_ce, loss.weight_dice, loss.use_ignore_label)
    new.dc, new.ce = _part(loss.dc), loss.ce
    return new


def _deep_supervision(loss: Any) -> nn.Module:
    return DeepSupervisionWrapper(from_nnunet(loss.loss), loss.weight_factors)


_CONVERTERS = {
    ("dice", "SoftDiceLoss"): _dice,
    ("dice", "MemoryEfficientSoftDiceLoss"): _dice,
    ("robust_ce_loss", "RobustCrossEntropyLoss"): _cross_entropy,
    ("robust_ce_loss", "TopKLoss"): _top_k,
    ("compound_losses", "DC_and_CE_loss"): _dc_and_ce,
    ("compound_losses", "DC_and_topk_loss"): _dc_and_topk,
    ("compound_losses", "DC_and_BCE_loss"): _dc_and_bce,
    ("deep_supervision", "DeepSupervisionWrapper"): _deep_supervision,
}
