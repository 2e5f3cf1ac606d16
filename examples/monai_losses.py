"""MONAI's Dice + cross-entropy, as organs.py and ``compare --losses`` take a loss of yours."""

from __future__ import annotations

from monai.losses import DiceCELoss
from torch import Tensor

# As "dice_ce": the Dice of the batch, without the background.
_LOSS = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)


def dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of logits (B, C, D, H, W) and labels (B, D, H, W)."""
    found: Tensor = _LOSS(logits, labels[:, None])
    return found
