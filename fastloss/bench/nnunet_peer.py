"""nnU-Net's losses, from its package if installed, else reimplemented."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from fastloss.bench.errors import Unavailable
from fastloss.bench.losses import SMOOTH

Function = Callable[[Any, Any], Any]


def nnunet_source() -> str:
    """Which of the two is used, for a report."""
    try:
        _own()
    except ImportError as error:
        return f"nnU-Net: its formula written out, as nnunetv2 is not there ({error})"
    return f"nnU-Net: its own classes, of nnunetv2 {version('nnunetv2')}"


def nnunet(loss: str) -> tuple[Function, float]:
    """The function, and the number to add to its value, as nnU-Net's Dice is negative.

    It takes logits and a label map of integers with a channel axis, int16 in nnU-Net.
    """
    try:
        functions = _own()
    except ImportError:
        functions = _formula()
    if loss not in functions:
        raise Unavailable(f"nnU-Net has no {loss}")
    return functions[loss], 1.0 if "dice" in loss else 0.0


def _own() -> dict[str, Function]:
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
    from nnunetv2.utilities.helpers import softmax_helper_dim1

    options = {"batch_dice": False, "smooth": SMOOTH, "do_bg": True, "ddp": False}
    return {
        "dice": MemoryEfficientSoftDiceLoss(softmax_helper_dim1, **options),
        "cross_entropy": RobustCrossEntropyLoss(),
        "dice_ce": DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss),
    }


def _formula() -> dict[str, Function]:
    """Soft Dice, with a one-hot target made under no_grad, and cross-entropy."""
    import torch

    def dice(logits: Any, target: Any) -> Any:
        probability = torch.softmax(logits, 1)
        axes = tuple(range(2, logits.ndim))
        with torch.no_grad():
            one_hot = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
            one_hot.scatter_(1, target.long(), 1)
            reference = one_hot.sum(axes)
        overlap = (probability * one_hot).sum(axes, dtype=torch.float32)
        total = probability.sum(axes, dtype=torch.float32) + reference
        return -((2 * overlap + SMOOTH) / torch.clip(total + SMOOTH, 1e-8)).mean()

    def cross_entropy(logits: Any, target: Any) -> Any:
        return torch.nn.functional.cross_entropy(logits, target[:, 0].long())

    return {
        "dice": dice,
        "cross_entropy": cross_entropy,
        "dice_ce": lambda logits, target: dice(logits, target) + cross_entropy(logits, target),
    }
