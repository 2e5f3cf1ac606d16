"""Each loss as one function call.

Every function takes the arrays and the options of its terms, those of `fastloss.Loss`, and
``regions=`` and ``region_count=`` as a loss does.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np

from fastloss.borrowed import Extras
from fastloss.frameworks import adapter_of
from fastloss.loss import Loss
from fastloss.structure import recipe
from fastloss.terms import (
    CrossEntropy,
    Dice,
    Focal,
    GeneralizedDice,
    Jaccard,
    TopKCrossEntropy,
    Tversky,
)
from fastloss.terms.base import Term, readable, refuse_gradient

_LOSS_OPTIONS = ("activation", "ignore_index", "channel_axis", "validate")
_EXTRAS = ("fields", "regions", "region_count")
_FOCAL_OPTIONS = ("gamma", "alpha")
_CROSS_ENTROPY_OPTIONS = ("label_smoothing",)


def cross_entropy_loss(logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
    """Cross-entropy; options of `fastloss.CrossEntropy` and `fastloss.Loss`, arrays as there."""
    return _value((logits, target, voxel_weight), (CrossEntropy,), options)


def focal_loss(logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
    """Focal loss; options of `fastloss.Focal` and `fastloss.Loss`, arrays as there."""
    return _value((logits, target, voxel_weight), (Focal,), options)


def dice_loss(logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
    """Soft Dice loss; options of `fastloss.Dice` and `fastloss.Loss`, arrays as there."""
    return _value((logits, target, voxel_weight), (Dice,), options)


def jaccard_loss(logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
    """Soft Jaccard loss; options of `fastloss.Jaccard` and `fastloss.Loss`, arrays as there."""
    return _value((logits, target, voxel_weight), (Jaccard,), options)


def tversky_loss(logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
    """Tversky loss; options of `fastloss.Tversky` and `fastloss.Loss`, arrays as there."""
    return _value((logits, target, voxel_weight), (Tversky,), options)


def generalized_dice_loss(
    logits: Any, target: Any, voxel_weight: Any = None, **options: Any
) -> Any:
    """Generalised Dice loss; options of `fastloss.GeneralizedDice` and `fastloss.Loss`."""
    return _value((logits, target, voxel_weight), (GeneralizedDice,), options)


def top_k_cross_entropy_loss(
    logits: Any, target: Any, voxel_weight: Any = None, **options: Any
) -> Any:
    """Cross-entropy of the hardest voxels; options of `fastloss.TopKCrossEntropy` and
    `fastloss.Loss`."""
    return _value((logits, target, voxel_weight), (TopKCrossEntropy,), options)


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
    arrays, factors = (logits, target, voxel_weight), (dice_factor, ce_factor)
    terms = (Dice, CrossEntropy)
    return _value(arrays, terms, options, factors, _CROSS_ENTROPY_OPTIONS, "ce_weight")


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
    arrays, factors = (logits, target, voxel_weight), (dice_factor, focal_factor)
    return _value(arrays, (Dice, Focal), options, factors, _FOCAL_OPTIONS)


def dice_ce(options: dict[str, Any], dice_factor: float, ce_factor: float) -> Loss:
    """The loss of `dice_ce_loss`."""
    factors = (dice_factor, ce_factor)
    return _loss((Dice, CrossEntropy), options, factors, _CROSS_ENTROPY_OPTIONS, "ce_weight")


def dice_focal(options: dict[str, Any], dice_factor: float, focal_factor: float) -> Loss:
    """The loss of `dice_focal_loss`."""
    return _loss((Dice, Focal), options, (dice_factor, focal_factor), _FOCAL_OPTIONS)


def _value(
    arrays: tuple[Any, Any, Any],
    terms: tuple[type[Term], ...],
    options: dict[str, Any],
    factors: tuple[float, ...] = (1.0,),
    second: tuple[str, ...] = (),
    second_weight: str = "",
) -> Any:
    adapter = adapter_of(arrays[0], "logits")
    extras = Extras.of(*(options.pop(name, None) for name in _EXTRAS))
    if adapter.takes_numbers(arrays[0], options.values()):
        for name, value in options.items():
            if value is not None and not isinstance(value, (bool, int, float, str, list, tuple)):
                refuse_gradient(name, value)
        whole, parts = _split(terms, options, second, second_weight)
        recipes = [recipe(*p, f) for p, f in zip(parts, factors, strict=True)]
        return adapter.evaluate(tuple(whole.items()), recipes, *arrays, extras)
    made = partial(_loss, terms, options, factors, second, second_weight)
    return adapter.value(made, *arrays, extras=extras)


def _loss(
    terms: tuple[type[Term], ...],
    options: dict[str, Any],
    factors: tuple[float, ...],
    second: tuple[str, ...],
    second_weight: str = "",
) -> Loss:
    """The loss for these options, made once where they are hashable."""
    key = tuple((k, _hashable(k, v)) for k, v in options.items())
    return _cached(terms, key, tuple(factors), second, second_weight)


def _hashable(name: str, value: Any) -> Any:
    if isinstance(value, (str, int, float)):
        return value
    refuse_gradient(name, value)
    if value is None or isinstance(value, (tuple, frozenset)):
        return value
    array = np.asarray(readable(name, value))
    if not isinstance(value, (list, np.ndarray)):
        array = array.reshape(-1) if array.ndim else array
    if array.ndim == 0:
        return array.item()
    return tuple(array.tolist() if array.ndim == 1 else map(tuple, array.tolist()))


@lru_cache(maxsize=256)
def _cached(
    terms: tuple[type[Term], ...],
    options: tuple[tuple[str, Any], ...],
    factors: tuple[float, ...],
    second: tuple[str, ...],
    second_weight: str,
) -> Loss:
    whole, parts = _split(terms, dict(options), second, second_weight)
    made = [kind(**own) for kind, own in parts]
    return Loss(*(f * t for f, t in zip(factors, made, strict=True)), **whole)


def _split(
    terms: tuple[type[Term], ...],
    options: dict[str, Any],
    second: tuple[str, ...],
    second_weight: str,
) -> tuple[dict[str, Any], list[tuple[type[Term], dict[str, Any]]]]:
    """The options of the loss, and the classes and options of the terms."""
    whole, first_options, second_options = {}, {}, {}
    for name, value in options.items():
        if name in _LOSS_OPTIONS:
            whole[name] = value
        elif name in second:
            second_options[name] = value
        elif name and name == second_weight:
            second_options["weight"] = value
        else:
            first_options[name] = value
    parts = [(terms[0], first_options)]
    if len(terms) > 1:
        # Both follow one reduction, or the sum would mix two.
        if "reduction" in first_options:
            second_options["reduction"] = first_options["reduction"]
        parts.append((terms[1], second_options))
    return whole, parts
