"""Code that all drop-ins share: from options and tensors to one loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastloss.borrowed import Extras
from fastloss.frameworks.torch.adapter import ADAPTER
from fastloss.frameworks.torch.tensors import is_exporting, is_readable, plain
from fastloss.loss import Term
from fastloss.structure import Recipe as Recipe
from fastloss.structure import recipe as _recipe
from fastloss.tracing import fixed as fixed

Values = tuple[float, ...] | Tensor
"""One number, or one per class: a tensor where they cannot be read without waiting for a device, or
are to be an operand of what is being compiled."""


class Fused(NamedTuple):
    """A request to the kernels, and the divisor of the value."""

    recipe: Recipe
    activation: str
    logits: Tensor
    target: Tensor
    voxel_weight: Tensor | None = None
    ignore_index: int | None = None
    divisor: int = 1


def recipe(kind: type[Term], **options: Any) -> Recipe:
    """A term of this class; an option that is a number may be a tensor, of (C,) or no axes."""
    return _recipe(kind, options)


def evaluate(
    *parts: tuple[Any, Fused],
    fields: Mapping[str, Tensor] | None = None,
    region_count: int | None = None,
) -> Tensor:
    """The weighted sum of parts that read the same tensors through the same activation.

    A factor is a number, or where it is being compiled a tensor of one. ``fields`` and
    ``region_count`` as in a call of `fastloss.Loss`.
    """
    first = parts[0][1]
    options = (("activation", first.activation), ("ignore_index", first.ignore_index))
    recipes = [part.recipe._replace(factor=factor) for factor, part in parts]
    value: Tensor = ADAPTER.evaluate(
        options,
        recipes,
        first.logits,
        first.target,
        first.voxel_weight,
        Extras.of(fields, None, region_count),
    )
    return value if first.divisor == 1 else value / first.divisor


def numbers_of(tensor: Tensor) -> Values:
    """The numbers of a small tensor, which is read in every call or not at all."""
    if not is_readable(tensor):
        return tensor.detach()
    tensor = plain(tensor)
    numbers: list[float] = (tensor if tensor.ndim == 1 else tensor.flatten()).tolist()
    return tuple(numbers)


def are_sizes(numbers: Values) -> bool:
    """Whether a term takes these as weights, as far as can be told."""
    return isinstance(numbers, Tensor) or all(0 <= n < math.inf for n in numbers)


def product(a: Values | None, b: Values, device: torch.device) -> Values:
    """The products of two numbers for each class; None stands for ones."""
    if a is None:
        return b
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return tuple(x * y for x, y in zip(a, b, strict=True))
    return on_device(a, device) * on_device(b, device)


def on_device(numbers: Values, device: torch.device) -> Tensor:
    """The numbers in float64 on a device, for which nothing waits."""
    tensor = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.float64)
    return tensor.to(device, torch.float64, non_blocking=True)


def after_zeros(count: int, numbers: Values) -> Values:
    """The numbers with some that are 0 in front of them."""
    if not isinstance(numbers, Tensor):
        return (0.0,) * count + numbers
    return torch.cat([numbers.new_zeros(count), numbers]) if count else numbers


class Scheduled(nn.Module):
    """A module that has attributes which are numbers and may be others in every call.

    `torch.compile` takes an attribute that is a number for a constant. So there is an array beside
    each, which it takes for an operand.
    """

    scheduled: ClassVar[tuple[str, ...]] = ()
    """The attributes: one number, or a sequence of them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.scheduled:
            super().__setattr__(name, value)
            return
        array = None
        if value is not None and not isinstance(value, Tensor):
            if isinstance(value, (int, float, np.number)):
                value = float(value)
            elif isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str):
                value = tuple(float(v) for v in value)
            if isinstance(value, (float, tuple)) and self.takes(name, value):
                array = np.array(value, np.float64, ndmin=1)
        super().__setattr__(name, value)
        off = () if array is None else tuple((array == 0).tolist())
        before = vars(self).get("_off_of_" + name, off)
        # One that is switched on shows that there is a schedule: from then on none is left out.
        if len(before) == len(off) and any(b and not o for b, o in zip(before, off, strict=True)):
            before = (False,) * len(off)
        if len(before) == len(off):
            off = tuple(o and b for o, b in zip(off, before, strict=True))
        vars(self)["_array_of_" + name], vars(self)["_off_of_" + name] = array, off

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self.scheduled:
            setattr(self, name, getattr(self, name))

    def takes(self, name: str, value: Any) -> bool:
        """Whether this may be an operand; what may not is looked at when it is used."""
        return all(math.isfinite(v) for v in (value if isinstance(value, tuple) else (value,)))

    def factors(self, name: str) -> list[Any]:
        """The numbers of an attribute: tensors of no axes where it is being compiled.

        None for a number that is 0; or, as compiled code serves whatever comes, that always was.
        """
        if _takes_operands():
            array = getattr(self, "_array_of_" + name)
            if array is not None:
                tensor, off = torch.as_tensor(array), getattr(self, "_off_of_" + name)
                return [None if off[i] else tensor[i] for i in range(len(off))]
        value = getattr(self, name)
        several = isinstance(value, (tuple, list)) or (isinstance(value, Tensor) and value.ndim > 0)
        values = value if several else [value]
        return [None if not isinstance(v, Tensor) and v == 0 else v for v in values]

    def has(self, name: str) -> bool:
        """Whether an attribute is not None."""
        if _takes_operands() and getattr(self, "_array_of_" + name) is not None:
            return True
        return getattr(self, name) is not None

    def is_on(self, name: str) -> bool:
        """Whether the number of an attribute may be another than 0; see `factors`."""
        if _takes_operands() and getattr(self, "_array_of_" + name) is not None:
            return not getattr(self, "_off_of_" + name)[0]
        value = getattr(self, name)
        return isinstance(value, Tensor) or value != 0

    def factor(self, name: str) -> Any:
        """The number of an attribute, 0 included: a tensor where it is being compiled."""
        operand = self.operand(name) if _takes_operands() else None
        return getattr(self, name) if operand is None else operand

    def operand(self, name: str) -> Any:
        """As `factor`, but None for what cannot be an operand of a loss."""
        if _takes_operands():
            array = getattr(self, "_array_of_" + name)
            return None if array is None else torch.as_tensor(array)[0]
        value = getattr(self, name)
        return value if isinstance(value, (int, float)) and self.takes(name, value) else None


def _takes_operands() -> bool:
    """Whether something is being compiled that will meet other numbers, as what is exported will
    not."""
    return torch.compiler.is_compiling() and not is_exporting()


def times(factor: Any, value: Any) -> Any:
    """factor · value, of the value's dtype."""
    if isinstance(factor, float) and factor == 1:
        return value
    if isinstance(factor, Tensor) and isinstance(value, Tensor) and factor.dtype != value.dtype:
        return (factor * value).to(value.dtype)
    return factor * value


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def as_built(part: Any, *kinds: type) -> bool:
    """Whether a part of a sum is one of these classes itself, and so may be fused with the others.

    It is not if a user put another module in its place, a subclass included, or hooks on it, or
    replaced its ``forward``: then it has to be called.
    """
    return (
        type(part) in kinds
        and "forward" not in part.__dict__
        and not has_hooks(part)
        and not _has_any_global_hook()
    )


def has_hooks(module: torch.nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def overridden(loss: object, kind: type, name: str) -> bool:
    """Whether a subclass, or a user of this object, has put another method in place of ours."""
    return name in loss.__dict__ or getattr(type(loss), name) is not getattr(kind, name)


def is_size(value: Any) -> bool:
    """Whether this is a number that a term takes as a weight or exponent."""
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def fixed_count(count: int) -> int:
    """The number, which compiled code then takes for a constant rather than for a variable."""
    return len((None,) * count)


def kernels_take(logits: Tensor, target: Tensor) -> bool:
    return (
        logits.is_floating_point()
        and not target.is_complex()
        and logits.ndim > 2
        and logits.device == target.device
        and not (target.requires_grad and torch.is_grad_enabled())
    )


def in_graph() -> bool:
    """Whether operations are recorded, and with them every choice that the numbers decide."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_binary(tensor: Tensor) -> bool:
    """Whether a target is known to hold zeros and ones alone.

    Floating ones are looked through, where that neither waits for a device nor breaks a graph.
    """
    if not tensor.is_floating_point():
        return True
    if in_graph() or not tensor.is_cpu:
        return False
    # Slab by slab: little memory is needed, and soft targets show at the first one.
    thickness = max(1, 2**18 * tensor.shape[2] // max(1, tensor.numel()))
    slabs = tensor.split(thickness, dim=2)
    return all(bool(((slab == 0) | (slab == 1)).all()) for slab in slabs)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class Numbers:
    """Held by pickles of older versions; nothing reads it."""
