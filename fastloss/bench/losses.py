"""The losses that can be measured, by name."""

from __future__ import annotations

from collections.abc import Callable

import fastloss as fl

# Options that are the same for all implementations.
GAMMA = 2.0
TVERSKY_ALPHA, TVERSKY_BETA = 0.3, 0.7
SMOOTH = 1e-5
_LOSS_SCALE = 65536.0  # the initial scale of torch.amp.GradScaler

_LOSSES: dict[str, Callable[[], fl.Loss]] = {
    "dice_ce": lambda: fl.Dice() + fl.CrossEntropy(),
    "dice": lambda: fl.Loss(fl.Dice()),
    "cross_entropy": lambda: fl.Loss(fl.CrossEntropy()),
    "focal": lambda: fl.Loss(fl.Focal(gamma=GAMMA)),
    "dice_focal": lambda: fl.Dice() + fl.Focal(gamma=GAMMA),
    "tversky": lambda: fl.Loss(fl.Tversky(alpha=TVERSKY_ALPHA, beta=TVERSKY_BETA)),
    "jaccard": lambda: fl.Loss(fl.Jaccard()),
    "generalized_dice": lambda: fl.Loss(fl.GeneralizedDice()),
}

LOSSES = tuple(_LOSSES)


def make_loss(name: str) -> fl.Loss:
    """The loss of this name, on softmax logits, with smoothing 1e-5 where it has smoothing."""
    return _LOSSES[name]()


def loss_scale(dtype: str) -> float:
    """The loss scale for logits of this dtype, as in training.

    Unscaled gradients are about one over the number of voxels, below float16's smallest number.
    """
    return _LOSS_SCALE if dtype == "float16" else 1.0
