"""What drop-ins for the losses of other projects share: from options and tensors to one loss."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fastloss.frameworks import adapter_of
from fastloss.frameworks.base import fixed as fixed
from fastloss.loss import Loss
from fastloss.terms.base import Term

Recipe = tuple[type[Term], tuple[tuple[str, Any], ...]]
"""A term that is not made yet: its class and options, hashable."""


class Fused(NamedTuple):
    """What the kernels are asked, and what the value is then divided by."""

    recipe: Recipe
    activation: str
    logits: Tensor
    target: Tensor
    voxel_weight: Tensor | None = None
    ignore_index: int | None = None
    divisor: int = 1


def recipe(kind: type[Term], **options: Any) -> Recipe:
    return kind, tuple(options.items())


def evaluate(*parts: tuple[float, Fused]) -> Tensor:
    """The weighted sum of parts that read the same tensors through the same activation."""
    first = parts[0][1]
    recipes = [(factor, part.recipe) for factor, part in parts]
    # Made by the adapter, where `torch.compile` does not look.
    loss = partial(_loss, first.activation, first.ignore_index, *recipes)
    adapter = adapter_of(first.logits, "input")
    value: Tensor = adapter.value(loss, first.logits, first.target, first.voxel_weight)
    return value if first.divisor == 1 else value / first.divisor


def _loss(*recipe: Any) -> Loss:
    return _cached(*recipe)


@lru_cache(maxsize=256)
def _cached(activation: str, ignore_index: int | None, *parts: tuple[float, Recipe]) -> Loss:
    terms = [factor * kind(**dict(options)) for factor, (kind, options) in parts]
    return Loss(*terms, activation=activation, ignore_index=ignore_index)


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
    """The numbers of a small tensor, read anew only after it was changed.

    Reading may wait for a device, and breaks a graph that is being compiled.
    """

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._version = -1
        self._values: tuple[float, ...] = ()

    def __call__(self, tensor: Tensor) -> tuple[float, ...]:
        if torch.compiler.is_compiling():
            return self._values
        version = -1 if tensor.is_inference() else tensor._version
        if tensor is not self._tensor or version != self._version or version == -1:
            self._values = tuple(float(v) for v in tensor.detach().flatten().tolist())
            self._tensor, self._version = tensor, version
        return self._values
