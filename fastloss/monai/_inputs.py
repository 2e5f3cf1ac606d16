"""The caller's tensors, checked against each other; and expanded, for what is not fused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.backends.targets import bad_numbers
from fastloss.dropin import at_least_float32


class Inputs(NamedTuple):
    """One call's tensors, as they came.

    Attributes:
        logits: (B, C, *spatial), or what ``other_act`` made of them.
        activation: "softmax", "sigmoid" or "none".
        target: a label map (B, 1, *spatial) if ``labels``, else (B, C, *spatial).
        first: the first channel that counts: 1 without background.
        ignore_index: see `ignore_mask`.
    """

    logits: Tensor
    activation: str
    target: Tensor
    labels: bool
    first: int
    ignore_index: int | None = None

    @property
    def channels(self) -> int:
        """How many channels count."""
        return self.logits.shape[1] - self.first

    def expanded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits and dense target of the channels that count, and the mask of both."""
        x, g = at_least_float32(self.logits), self.target
        if self.labels:
            if self.ignore_index is not None:
                g = torch.where(g == self.ignore_index, torch.zeros_like(g), g)
            g = one_hot(g, self.logits.shape[1], x.dtype)
        elif not g.is_floating_point():
            g = floating(g, x.dtype, self.ignore_index)
        mask = ignore_mask(self.target, self.ignore_index)
        return x[:, self.first :], g[:, self.first :], mask

    def probabilities(self) -> tuple[Tensor, Tensor]:
        """Probabilities and dense target of the channels that count, 0 where ignored."""
        p = activate(at_least_float32(self.logits), self.activation)
        p, g, mask = self._replace(logits=p).expanded()
        return (p, g) if mask is None else (p * mask, g * mask)


def activate(logits: Tensor, activation: str) -> Tensor:
    if activation == "softmax":
        return torch.softmax(logits, 1)
    return torch.sigmoid(logits) if activation == "sigmoid" else logits


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    shape = (labels.shape[0], classes, *labels.shape[2:])
    return torch.zeros(shape, dtype=dtype, device=labels.device).scatter_(1, labels.long(), 1)


def floating(target: Tensor, dtype: torch.dtype, ignore_index: int | None) -> Tensor:
    """A dense target of integers in floating numbers.

    Other integers than 0 and 1, or a single channel's ``ignore_index``, are an error, as for the
    kernels; NaN where it takes a wait for a device or a break in a graph to know of them.
    """
    bad = (target != 0) & (target != 1)
    ignored = ignore_index if target.shape[1] == 1 else None
    if ignored is not None:
        bad &= target.long() != ignored
    if torch.compiler.is_compiling() or not target.is_cpu:
        return target.to(dtype).masked_fill(bad, math.nan)
    if bad.any():
        raise bad_numbers(int(bad.sum()), target[bad][0], ignored, target.shape[1])
    return target.to(dtype)


def ignore_mask(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """1 where a voxel counts, (B, 1, *spatial); None if all do.

    A voxel is ignored where a label map or single channel holds ``ignore_index``; where that
    channel of several is 1; and, if there is no such channel, where all of them are 0.
    """
    if ignore_index is None:
        return None
    dtype = target.dtype if target.is_floating_point() else torch.float32
    if target.shape[1] == 1:
        return (target != ignore_index).to(dtype)
    if 0 <= ignore_index < target.shape[1]:
        return 1 - target[:, ignore_index : ignore_index + 1].to(dtype)
    return (target.sum(dim=1, keepdim=True) > 0).to(dtype)


def check_shapes(
    logits: Tensor, target: Tensor, labels: bool, classes: int, error: type[Exception]
) -> Tensor:
    """The target, of which each sample and voxel has its counterpart in the logits."""
    shape = target.shape
    if labels:
        target = target if target.ndim > 1 else target.reshape(-1, 1)
        if target.shape[1] != 1:
            raise AssertionError(
                "target: with to_onehot_y=True expected a label map with one channel, got shape "
                f"{tuple(shape)}"
            )
        shape = torch.Size((target.shape[0], classes, *target.shape[2:]))
    if shape != logits.shape:
        wanted = "a label map for" if labels else "the shape of"
        raise error(
            f"target: expected {wanted} the input, {tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    return target


def check_pair(input: Tensor, target: Tensor) -> None:
    """Checks that the compound losses make first."""
    if input.dim() != target.dim():
        raise ValueError(
            "target: expected as many axes as the input, (B, 1, *spatial) for a label map; got "
            f"shape {tuple(target.shape)} for input {tuple(input.shape)}"
        )
    if target.shape[1] not in (1, input.shape[1]):
        raise ValueError(
            f"target: expected 1 or {input.shape[1]} channels, as the input has, got shape "
            f"{tuple(target.shape)}"
        )


def check_mask(input: Tensor, target: Tensor, mask: Tensor) -> None:
    shapes = f"mask {tuple(mask.shape)}, input {tuple(input.shape)}"
    if input.dim() != mask.dim():
        warnings.warn(f"mask: expected as many axes as the input; {shapes}", stacklevel=3)
    if mask.shape[0] not in (1, input.shape[0]):
        raise ValueError(f"mask: expected the input's batch size, or 1; {shapes}")
    if target.dim() > 1:
        if mask.shape[1] != 1:
            raise ValueError(f"mask: expected one channel; {shapes}")
        if input.shape[2:] != mask.shape[2:]:
            warnings.warn(f"mask: expected the input's spatial shape; {shapes}", stacklevel=3)


def ignored_for_one_channel(option: str) -> None:
    warnings.warn(f"the prediction has a single channel: {option} is ignored", stacklevel=4)


def check_activation(sigmoid: bool, softmax: bool, other_act: Callable[..., Any] | None) -> None:
    if other_act is not None and not callable(other_act):
        raise TypeError(f"other_act: expected None or a callable, got {type(other_act).__name__}")
    if int(sigmoid) + int(softmax) + int(other_act is not None) > 1:
        raise ValueError("sigmoid, softmax, other_act: expected at most one of them")


def check_option(name: str, value: object, choices: tuple[str, ...]) -> str:
    """The choice that equals ``value``, which may be a member of an enumeration of strings."""
    for choice in choices:
        if value == choice:
            return choice
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
