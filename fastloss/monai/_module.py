"""The base class of all drop-ins: modules with MONAI's options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from fastloss.dropin import Scheduled, Values, is_size, numbers_of
from fastloss.monai._inputs import (
    Inputs,
    activate,
    check_activation,
    check_option,
    check_shapes,
    ignored_for_one_channel,
)

REDUCTIONS = ("none", "mean", "sum")


class Module(Scheduled, _Loss):
    """A loss that shows the options it was given."""

    stored: ClassVar[dict[str, str]] = {"weight": "class_weight"}
    """The attributes of options that are called otherwise."""

    def takes(self, name: str, value: Any) -> bool:
        return is_size(value)

    def extra_repr(self) -> str:
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, self.stored.get(name, name), parameter.default)
            if isinstance(value, Tensor):
                value = value.tolist()
            if value != parameter.default and not isinstance(value, torch.nn.Module):
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class Component(Module):
    """One loss, alone or within a compound one."""

    class_weight: Tensor | None

    def __init__(
        self, include_background: bool, to_onehot_y: bool, reduction: str, ignore_index: int | None
    ) -> None:
        super().__init__(reduction=check_option("reduction", reduction, REDUCTIONS))
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.ignore_index = ignore_index

    def _inputs(
        self,
        logits: Tensor,
        activation: str,
        target: Tensor,
        *,
        classes: int,
        labels: bool,
        error: type[Exception] = AssertionError,
    ) -> Inputs:
        if self.to_onehot_y:
            if classes == 1:
                ignored_for_one_channel("to_onehot_y=True")
            elif labels:
                raise AssertionError(
                    "to_onehot_y: True for a compound loss, which makes the target one-hot, and "
                    f"for its {type(self).__name__} as well"
                )
            labels = bool(classes > 1)
        first = 0
        if not self.include_background:
            if classes == 1:
                ignored_for_one_channel("include_background=False")
            else:
                first = 1
        target = check_shapes(logits, target, labels, classes, error)
        return Inputs(logits, activation, target, labels, first, self.ignore_index)

    def _weight_numbers(self, name: str, weight: Tensor) -> Values:
        """The numbers of a weight, of which none may be negative."""
        numbers = numbers_of(weight)
        if not isinstance(numbers, Tensor) and any(n < 0 for n in numbers):
            raise ValueError(f"{name}: expected numbers of at least 0, got {list(numbers)}")
        return numbers

    def _hold_weight(self, weight: Any) -> None:
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))


class Activated(Component):
    """A component that turns logits into probabilities."""

    def __init__(
        self,
        include_background: bool,
        to_onehot_y: bool,
        sigmoid: bool,
        softmax: bool,
        other_act: Callable[..., Any] | None,
        reduction: str,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(include_background, to_onehot_y, reduction, ignore_index)
        check_activation(sigmoid, softmax, other_act)
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act

    def _read(self, input: Tensor, target: Tensor, *, labels: bool = False) -> Inputs:
        """The tensors of a call; ``labels`` as if ``to_onehot_y`` were set."""
        logits, activation = activated(input, self.sigmoid, self.softmax, self.other_act)
        return self._inputs(logits, activation, target, classes=input.shape[1], labels=labels)


def activated(
    input: Tensor, sigmoid: bool, softmax: bool, other_act: Callable[..., Any] | None
) -> tuple[Tensor, str]:
    """The tensor that the kernels read, and the activation that they still apply.

    More than one can be set after the loss was made. They are applied in this order, as in MONAI.
    """
    activation = "sigmoid" if sigmoid else "none"
    if softmax:
        if input.shape[1] == 1:
            ignored_for_one_channel("softmax=True")
        else:
            input = activate(input, activation)
            activation = "softmax"
    if other_act is not None:
        input, activation = other_act(activate(input, activation)), "none"
    return input, activation


def remember(module: Any, _: Any = None) -> None:
    """Does nothing: pickles of older versions name it."""
