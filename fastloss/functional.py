"""Each loss as one function call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from fastloss.frameworks import adapter_of
from fastloss.loss import Loss
from fastloss.terms import (
    CrossEntropy,
    Dice,
    Focal,
    GeneralizedDice,
    Jaccard,
    TopKCrossEntropy,
    Tversky,
)
from fastloss.terms.base import Term

_LOSS_OPTIONS = ("activation", "ignore_index", "channel_axis", "validate")
_FOCAL_OPTIONS = ("gamma", "alpha")
_CROSS_ENTROPY_OPTIONS = ("label_smoothing",)


def cross_entropy_loss(logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
    """Cross-entropy; options of `fastloss.CrossEntropy` and `fastloss.Loss`, arrays as there."""
    return _value((logits, target, voxel_weight), _loss, (CrossEntropy,), options)


def focal_loss(logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
    """Focal loss; options of `fastloss.Focal` and `fastloss.Loss`, arrays as there."""
    return _value((logits, target, voxel_weight), _loss, (Focal,), options)


def dice_loss(logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
    """Soft Dice loss; options of `fastloss.Dice` and `fastloss.Loss`, arrays as there."""
    return _value((logits, target, voxel_weight), _loss, (Dice,), options)


def jaccard_loss(logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
    """Soft Jaccard loss; options of `fastloss.Jaccard` and `fastloss.Loss`, arrays as there."""
    return _value((logits, target, voxel_weight), _loss, (Jaccard,), options)


def tversky_loss(logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
    """Tversky loss; options of `fastloss.Tversky` and `fastloss.Loss`, arrays as there."""
    return _value((logits, target, voxel_weight), _loss, (Tversky,), options)


def generalized_dice_loss(
    logits: Any, target: Any, voxel_weight: Any = None, **options: Any
) -> Any:
    """Generalised Dice loss; options of `fastloss.GeneralizedDice` and `fastloss.Loss`."""
    return _value((logits, target, voxel_weight), _loss, (GeneralizedDice,), options)


def top_k_cross_entropy_loss(
    logits: Any, target: Any, voxel_weight: Any = None, **options: Any
) -> Any:
    """Cross-entropy of the hardest voxels; options of `fastloss.TopKCrossEntropy` and
    `fastloss.Loss`."""
    return _value((logits, target, voxel_weight), _loss, (TopKCrossEntropy,), options)


def dice_ce_loss(
    logits: Any,
    target: Any,
    voxel_weight: Any = None,
    *,
    dice_factor: float = 1.0,
    ce_factor: float = 1.0,
    **options: Any,
) -> Any:
    """``dice_factor`` · Dice + ``ce_factor`` · cross-entropy, in the same two passes.

    Args:
        **options: ``label_smoothing`` goes to `fastloss.CrossEntropy`, ``ce_weight`` as its
            ``weight``; those of `fastloss.Loss` to it; the others to `fastloss.Dice`.
    """
    return _value((logits, target, voxel_weight), dice_ce, options, dice_factor, ce_factor)


def dice_focal_loss(
    logits: Any,
    target: Any,
    voxel_weight: Any = None,
    *,
    dice_factor: float = 1.0,
    focal_factor: float = 1.0,
    **options: Any,
) -> Any:
    """``dice_factor`` · Dice + ``focal_factor`` · focal loss, in the same two passes.

    Args:
        **options: ``gamma`` and ``alpha`` go to `fastloss.Focal`; those of `fastloss.Loss` to it;
            the others to `fastloss.Dice`.
    """
    return _value((logits, target, voxel_weight), dice_focal, options, dice_factor, focal_factor)


def dice_ce(options: dict[str, Any], dice_factor: float, ce_factor: float) -> Loss:
    """The loss of `dice_ce_loss`."""
    factors = (dice_factor, ce_factor)
    return _loss((Dice, CrossEntropy), options, factors, _CROSS_ENTROPY_OPTIONS, "ce_weight")


def dice_focal(options: dict[str, Any], dice_factor: float, focal_factor: float) -> Loss:
    """The loss of `dice_focal_loss`."""
    return _loss((Dice, Focal), options, (dice_factor, focal_factor), _FOCAL_OPTIONS)


def _value(arrays: tuple[Any, Any, Any], make: Callable[..., Loss], *arguments: Any) -> Any:
    return adapter_of(arrays[0], "logits").value(partial(make, *arguments), *arrays)


def _loss(
    terms: tuple[type[Term], ...],
    options: dict[str, Any],
    factors: tuple[float, ...] = (1.0,),
    second: tuple[str, ...] = (),
    second_weight: str = "",
) -> Loss:
    """The loss for these options, made once where they are hashable."""
    key = tuple((k, _hashable(v)) for k, v in options.items())
    return _cached(terms, key, tuple(factors), second, second_weight)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, np.ndarray)):
        return tuple(np.asarray(value).tolist())
    if hasattr(value, "__dlpack__") or hasattr(value, "__array__"):
        return tuple(np.asarray(value).reshape(-1).tolist())
    return value


@lru_cache(maxsize=256)
def _cached(
    terms: tuple[type[Term], ...],
    options: tuple[tuple[str, Any], ...],
    factors: tuple[float, ...],
    second: tuple[str, ...],
    second_weight: str,
) -> Loss:
    whole, first_options, second_options = {}, {}, {}
    for name, value in options:
        if name in _LOSS_OPTIONS:
            whole[name] = value
        elif name in second:
            second_options[name] = value
        elif name and name == second_weight:
            second_options["weight"] = value
        else:
            first_options[name] = value
    made = [terms[0](**first_options)]
    if len(terms) > 1:
        # Both follow one reduction, or the sum would mix two.
        if "reduction" in first_options:
            second_options["reduction"] = first_options["reduction"]
        made.append(terms[1](**second_options))
    return Loss(*(f * t for f, t in zip(factors, made, strict=True)), **whole)
