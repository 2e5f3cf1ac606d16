"""The implementations that run in PyTorch: this library, MONAI, and nnU-Net."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from fastloss.bench.errors import Unavailable
from fastloss.bench.implementations import Call
from fastloss.bench.inputs import Case
from fastloss.bench.losses import GAMMA, SMOOTH, TVERSKY_ALPHA, TVERSKY_BETA, make_loss
from fastloss.bench.nnunet_peer import nnunet

INSTALL = "pip install 'fastloss[peers]'"

Function = Callable[[Any, Any], Any]


class TorchCall(Call):
    """A loss module: forward under no_grad, or forward and .backward() into a new .grad."""

    def __init__(self, kind: str, case: Case, loss: str, threads: int, *, compiled: bool) -> None:
        try:
            import torch
        except ImportError as error:
            raise Unavailable(f"PyTorch is not there ({error}); {INSTALL}") from None
        self.torch = torch
        self.offset = 0.0
        if kind == "nnunet":
            function, self.offset = nnunet(loss)
        else:
            function = (_monai if kind == "monai" else _fastloss)(loss, case.classes)
        torch.set_num_threads(threads)
        if compiled:
            # One process may measure more shapes than the limit, past which calls run uncompiled.
            for limit in ("recompile_limit", "cache_size_limit"):
                if hasattr(torch._dynamo.config, limit):
                    setattr(torch._dynamo.config, limit, 256)
            function = torch.compile(function, dynamic=False)
        self.function: Function = function
        memory = case.logits
        if case.dtype == "bfloat16":
            self.logits = torch.from_numpy(memory.view(np.int16)).view(torch.bfloat16)
        else:
            self.logits = torch.from_numpy(memory)
        self.logits.requires_grad_(True)
        # As each library's own pipeline hands them over; nnU-Net's is faster by this, compiled.
        labels: Any = {"torch": case.target.dtype, "monai": np.int64, "nnunet": np.int16}[kind]
        self.target = torch.from_numpy(case.target.astype(labels, copy=False))
        if kind != "torch":
            self.target = self.target[:, None]

    def forward(self) -> object:
        with self.torch.no_grad():
            return self.function(self.logits, self.target)

    def forward_backward(self) -> object:
        value = self.function(self.logits, self.target)
        value.backward()
        return value

    def reset(self) -> None:
        self.logits.grad = None

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def result(self) -> tuple[float, np.ndarray]:
        self.reset()
        value: Any = self.forward_backward()
        gradient = self.logits.grad
        assert gradient is not None
        if gradient.dtype == self.torch.bfloat16:
            gradient = gradient.float()  # exact, and NumPy has no bfloat16 of its own
        return float(value.detach()) + self.offset, gradient.numpy()


def _fastloss(loss: str, classes: int) -> Function:
    return make_loss(loss)


def _monai(loss: str, classes: int) -> Function:
    try:
        from monai import losses
    except ImportError as error:
        raise Unavailable(f"MONAI is not there ({error}); {INSTALL}") from None
    shared: dict[str, Any] = {"to_onehot_y": True, "softmax": True}
    smooth: dict[str, Any] = {"smooth_nr": SMOOTH, "smooth_dr": SMOOTH}
    if loss == "dice_ce":
        return losses.DiceCELoss(**shared, **smooth)
    if loss == "dice":
        return losses.DiceLoss(**shared, **smooth)
    if loss == "jaccard":
        # Numerator and denominator are twice ours, so the smoothing is as well.
        return losses.DiceLoss(**shared, jaccard=True, smooth_nr=2 * SMOOTH, smooth_dr=2 * SMOOTH)
    if loss == "tversky":
        return losses.TverskyLoss(**shared, **smooth, alpha=TVERSKY_ALPHA, beta=TVERSKY_BETA)
    if loss == "generalized_dice":
        return losses.GeneralizedDiceLoss(**shared, **smooth)
    if "focal" in loss:
        # Its mean runs over the classes too, of which all but one are 0 at each voxel.
        focal = losses.FocalLoss(to_onehot_y=True, use_softmax=True, gamma=GAMMA)
        if loss == "focal":
            return lambda logits, target: classes * focal(logits, target)
        # Its DiceFocalLoss takes the sigmoid form of the focal loss, whatever Dice takes.
        dice = losses.DiceLoss(**shared, **smooth)
        return lambda logits, target: dice(logits, target) + classes * focal(logits, target)
    raise Unavailable(f"MONAI has no {loss} of its own")
