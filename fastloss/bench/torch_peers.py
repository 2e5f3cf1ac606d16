"""The implementations that run in PyTorch: this library, MONAI, and nnU-Net."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from fastloss.bench.call import Call
from fastloss.bench.errors import Unavailable
from fastloss.bench.inputs import Case
from fastloss.bench.losses import (
    GAMMA,
    SMOOTH,
    TVERSKY_ALPHA,
    TVERSKY_BETA,
    loss_scale,
    make_loss,
)
from fastloss.bench.nnunet_peer import nnunet

INSTALL = "pip install 'fastloss[peers]'"

Function = Callable[[Any, Any], Any]


class TorchCall(Call):
    """A loss module: forward under no_grad, or forward and .backward() into a new .grad.

    Peers get labels with a channel axis, in the dtype of their pipelines, and autocast for
    half-precision logits, as in training; without it their sums overflow. "torch-out" writes the
    gradient into a reused buffer.
    """

    def __init__(self, name: str, case: Case, loss: str, threads: int) -> None:
        try:
            import torch
        except ImportError as error:
            raise Unavailable(f"PyTorch is not there ({error}); {INSTALL}") from None
        self.torch = torch
        self.offset = 0.0
        kind, _, how = name.partition("-")
        if kind == "nnunet":
            function, self.offset = nnunet(loss)
        else:
            function = (_monai if kind == "monai" else _fastloss)(loss, case.classes)
        torch.set_num_threads(threads)
        if how == "compile":
            # One process may measure more shapes than the recompile limit, beyond which calls run
            # uncompiled.
            for limit in ("recompile_limit", "cache_size_limit"):
                if hasattr(torch._dynamo.config, limit):
                    setattr(torch._dynamo.config, limit, 256)
            inner = function  # may be an object that torch.compile does not accept
            function = torch.compile(lambda x, y: inner(x, y), dynamic=False)
        self.function: Function = function
        self.is_numpy = isinstance(case.logits, np.ndarray)
        logits, target = case.logits, case.target
        if self.is_numpy and case.dtype == "bfloat16":
            logits = torch.from_numpy(logits.view(np.int16)).view(torch.bfloat16)
        self.logits = torch.as_tensor(logits).detach().requires_grad_(True)
        if kind == "torch":
            self.target = torch.as_tensor(target)
        else:
            # As in each library's own pipeline; compiled, nnU-Net's loss is faster this way.
            labels = "int16" if kind == "nnunet" else "int64"
            if self.is_numpy:
                target = torch.from_numpy(target.astype(labels, copy=False))
            self.target = target.to(getattr(torch, labels))[:, None]
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if kind != "torch" and self.logits.dtype in (torch.float16, torch.bfloat16):
            device, dtype = self.logits.device.type, self.logits.dtype
            self.autocast = lambda: torch.autocast(device, dtype)
        self.out = torch.empty_like(self.logits) if how == "out" else None
        self.loss = make_loss(loss)
        self.loss_scale = loss_scale(case.dtype)
        self.upstream: Any = None
        if self.loss_scale != 1:
            self.upstream = torch.tensor(self.loss_scale, device=self.logits.device)

    def forward(self) -> object:
        with self.torch.no_grad(), self.autocast():
            return self.function(self.logits, self.target)

    def forward_backward(self) -> object:
        if self.out is not None:
            # A number passed by the host: a tensor would be one more array to read.
            upstream = None if self.upstream is None else self.loss_scale
            return self.loss.value_and_grad(
                self.logits, self.target, out=self.out, upstream=upstream
            )[0]
        with self.autocast():
            value = self.function(self.logits, self.target)
        value.backward(self.upstream)
        return value.detach()

    def reset(self) -> None:
        self.logits.grad = None

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def result(self) -> tuple[float, Any]:
        self.reset()
        value: Any = self.forward_backward()
        gradient: Any = self.logits.grad if self.out is None else self.out
        assert gradient is not None
        if self.is_numpy:
            # Exact, and NumPy has no bfloat16 of its own.
            gradient = (gradient.float() if self.logits.itemsize == 2 else gradient).numpy()
        return float(value) + self.offset, gradient


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
        # Numerator and denominator are twice ours, so the smoothing must be doubled.
        return losses.DiceLoss(**shared, jaccard=True, smooth_nr=2 * SMOOTH, smooth_dr=2 * SMOOTH)
    if loss == "tversky":
        return losses.TverskyLoss(**shared, **smooth, alpha=TVERSKY_ALPHA, beta=TVERSKY_BETA)
    if loss == "generalized_dice":
        return losses.GeneralizedDiceLoss(**shared, **smooth)
    if "focal" in loss:
        # Its mean runs over the classes too, all but one of which are 0 at each voxel.
        focal = losses.FocalLoss(to_onehot_y=True, use_softmax=True, gamma=GAMMA)
        if loss == "focal":
            return lambda logits, target: classes * focal(logits, target)
        # Its DiceFocalLoss uses the sigmoid form of the focal loss, whatever Dice uses.
        dice = losses.DiceLoss(**shared, **smooth)
        return lambda logits, target: dice(logits, target) + classes * focal(logits, target)
    raise Unavailable(f"MONAI has no {loss} of its own")
