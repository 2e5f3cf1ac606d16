"""Modules around any loss, of this library or another."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.loss import _Loss

from fastloss.monai._inputs import check_mask
from fastloss.monai._module import Module


class DeepSupervisionLoss(_Loss):
    """The weighted sum of a loss over outputs at several resolutions.

    As ``monai.losses.DeepSupervisionLoss``.

    Args:
        loss: a module or function of (input, target), of this library or another.
        weight_mode: the weights of the levels: "exp": 1, ½, ¼, … down to 1/16; "two": 1, then ½;
            "same": 1.
        weights: the weights themselves, which come before ``weight_mode`` if they are as many as
            there are levels, or more.
    """

    def __init__(
        self, loss: Any, weight_mode: str = "exp", weights: list[float] | None = None
    ) -> None:
        super().__init__()
        self.loss = loss
        self.weight_mode = weight_mode
        self.weights = weights
        self.interp_mode = "nearest-exact"

    def get_weights(self, levels: int = 1) -> list[float]:
        """The weights of so many levels."""
        levels = max(1, levels)
        if self.weights is not None and len(self.weights) >= levels:
            return self.weights[:levels]
        if self.weight_mode == "exp":
            return [max(0.5**level, 0.0625) for level in range(levels)]
        return [1.0] + [0.5 if self.weight_mode == "two" else 1.0] * (levels - 1)

    def get_loss(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of one level, to whose resolution the target is brought by its nearest voxel."""
        if input.shape[2:] != target.shape[2:]:
            target = self._resized(target, input.shape[2:])
        value: Tensor = self.loss(input, target)
        return value

    def _resized(self, target: Tensor, size: torch.Size) -> Tensor:
        # PyTorch resizes no integers but bytes; float64 holds every label.
        kept = target.is_floating_point() or target.dtype == torch.uint8
        wide = target if kept else target.double()
        return functional.interpolate(wide, size=size, mode=self.interp_mode).to(target.dtype)

    def forward(self, input: Tensor | list[Tensor] | None, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: the outputs, (B, C, *spatial) each, the largest first; or one tensor, which has
                no weight.
            target: as ``loss`` takes it, at the resolution of the first.

        Raises:
            ValueError: ``input`` is None.
        """
        if isinstance(input, (list, tuple)):
            weights = self.get_weights(levels=len(input))
            total = torch.tensor(0.0, device=target.device)
            for weight, level in zip(weights, input, strict=False):
                total = total + weight * self.get_loss(self._floating(level), target)
            return total
        if input is None:
            raise ValueError("input: expected a tensor or a list of tensors, got None")
        value: Tensor = self.loss(self._floating(input), target)
        return value

    def _floating(self, input: Tensor) -> Tensor:
        """In float32 for the losses of others; ours compute so without a copy."""
        return input if isinstance(self.loss, Module) else input.float()


class MaskedLoss(_Loss):
    """A loss of input and target times a mask, as ``monai.losses.MaskedLoss``.

    Args:
        loss: a loss, of this library or another: a module, a function of (input, target), or a
            class, which is made with the other arguments.
        loss_args, loss_kwargs: for the class.

    Raises:
        ValueError: ``loss`` is not callable; when it is called, a mask of another batch size than
            1 or the input's, or with several channels.

    Logits times 0 are 0, of which sigmoid makes ½: give it a loss of probabilities, or see
    `MaskedDiceLoss`.
    """

    def __init__(self, loss: Callable[..., Any], *loss_args: Any, **loss_kwargs: Any) -> None:
        super().__init__()
        self.loss: Any = loss(*loss_args, **loss_kwargs) if inspect.isclass(loss) else loss
        if not callable(self.loss):
            raise ValueError(f"loss: expected a callable, got {type(self.loss).__name__}")

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            input: (B, C, *spatial).
            target: (B, C, *spatial), or as ``loss`` takes it.
            mask: (B, 1, *spatial) or (1, 1, *spatial). None, with a warning: all voxels count.
        """
        value: Tensor
        if mask is None:
            warnings.warn("mask: none was given, all voxels count", stacklevel=2)
            value = self.loss(input, target)
        else:
            check_mask(input, target, mask)
            value = self.loss(input * mask, target * mask)
        return value
