"""The losses that are measured: this library's in its uses, MONAI's and nnU-Net's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastloss.bench.errors import Unavailable
from fastloss.bench.losses import SMOOTH, make_loss
from fastloss.bench.nnunet_peer import nnunet, nnunet_source

Function = Callable[[Any, Any], Any]

OURS = ("fastloss", "fastloss out=", "fastloss compiled")
EAGER = ("MONAI", "nnU-Net")
COMPILED = ("MONAI compiled", "nnU-Net compiled")


class Call:
    """One implementation on one input: Dice + cross-entropy of softmax logits and a label map.

    Peers get labels with a channel axis, in the dtype that their pipelines have; and for half
    precision logits autocast, under which they are used, and without which their sums overflow.
    """

    def __init__(self, name: str, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.name = name
        kind, _, how = name.partition(" ")
        self.logits = logits.detach().requires_grad_(True)
        self.labels = labels
        self.offset = 0.0
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._out = torch.empty_like(logits) if how == "out=" else None
        self.note = ""
        self._function: Function
        if kind == "fastloss":
            self._function = self._loss = make_loss("dice_ce")
        else:
            self.labels = labels.to(torch.int16 if kind == "nnU-Net" else torch.int64)[:, None]
            self._function, self.offset, self.note = {"MONAI": _monai, "nnU-Net": _nnunet}[kind]()
            if logits.dtype != torch.float32:
                self._autocast = lambda: torch.autocast(logits.device.type, logits.dtype)
        if how == "compiled":
            for limit in ("recompile_limit", "cache_size_limit"):
                # Each input is compiled for; past the limit calls would run uncompiled.
                if hasattr(torch._dynamo.config, limit):
                    setattr(torch._dynamo.config, limit, 256)
            function = self._function  # which may be an object that torch.compile does not take
            self._function = torch.compile(lambda x, y: function(x, y), dynamic=False)

    def forward(self) -> Any:
        with torch.no_grad(), self._autocast():
            return self._function(self.logits, self.labels)

    def forward_backward(self) -> Any:
        """The value; the gradient is then `gradient`."""
        if self._out is not None:
            return self._loss.value_and_grad(self.logits, self.labels, out=self._out)[0]
        with self._autocast():
            value = self._function(self.logits, self.labels)
        value.backward()
        return value.detach()

    def reset(self) -> None:
        self.logits.grad = None

    @property
    def gradient(self) -> torch.Tensor:
        gradient = self.logits.grad if self._out is None else self._out
        assert gradient is not None
        return gradient


def _monai() -> tuple[Function, float, str]:
    try:
        from monai.losses import DiceCELoss
    except ImportError as error:
        raise Unavailable(f"MONAI is not installed ({error})") from None
    loss = DiceCELoss(to_onehot_y=True, softmax=True, smooth_nr=SMOOTH, smooth_dr=SMOOTH)
    return loss, 0.0, ""


def _nnunet() -> tuple[Function, float, str]:
    return *nnunet("dice_ce"), nnunet_source()


class Output(torch.autograd.Function):
    """Gives logits the place of a network's output in a graph, without memory of its own."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        return None, None
