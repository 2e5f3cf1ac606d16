"""MONAI's Dice + cross-entropy, as `python -m fastloss compare` and organs.py take a loss."""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss
from torch import Tensor

# As "dice_ce": the Dice of the batch, without the background.
_LOSS = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)


def dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of logits (B, C, D, H, W) and labels (B, D, H, W).

    >>> logits = torch.zeros(1, 2, 4, 4, 4)
    >>> labels = (torch.arange(64) < 16).long().reshape(1, 4, 4, 4)
    >>> round(float(dice_ce(logits, labels)), 4)  # 1 - 2 · 8 / (32 + 16) + log 2
    1.3598
    """
    found: Tensor = _LOSS(logits, labels[:, None])
    return found
