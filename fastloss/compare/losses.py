"""The losses that can be compared: those registered here by name, and the user's own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import fastloss as fl
from fastloss.loss import Loss, Term

Spacing = tuple[float, ...]
Maker = Callable[[Spacing, float], "Loss | Term"]
"""A loss by the spacing of the data, relative to its shortest edge, and by how much of the training
is done, from 0 to 1."""

BOUNDARY_FACTORS = (0.01, 0.1)
"""Of the boundary loss, at the beginning and at the end of a training; it grows linearly."""
HAUSDORFF_FACTOR = 0.01
SKELETON_FACTOR = 1.0
BLOB_FACTOR = 0.5
TOP_K = 10.0
"""Percent of the voxels."""
REMEDY = "NAME=module:object gives one of your own"
_NAME = re.compile(r"[\w.+-]+")


def _dice(**options: Any) -> fl.Dice:
    # Of the whole batch: in a patch alone, a class that is missing would cost 1.
    return fl.Dice(batch=True, include_background=False, **options)


def _boundary_factor(done: float) -> float:
    first, last = BOUNDARY_FACTORS
    return first + (last - first) * done


LOSSES: Mapping[str, Maker] = {
    "dice_ce": lambda spacing, done: _dice() + fl.CrossEntropy(),
    "ce": lambda spacing, done: fl.CrossEntropy(),
    "dice": lambda spacing, done: _dice(),
    "squared_dice": lambda spacing, done: _dice(squared=True),
    "jaccard_ce": lambda spacing, done: (
        fl.Jaccard(batch=True, include_background=False) + fl.CrossEntropy()
    ),
    "tversky_ce": lambda spacing, done: (
        fl.Tversky(alpha=0.3, beta=0.7, batch=True, include_background=False) + fl.CrossEntropy()
    ),
    "generalized_dice": lambda spacing, done: fl.GeneralizedDice(batch=True),
    "focal": lambda spacing, done: fl.Focal(gamma=2.0),
    "dice_focal": lambda spacing, done: _dice() + fl.Focal(gamma=2.0),
    "dice_topk": lambda spacing, done: _dice() + fl.TopKCrossEntropy(k=TOP_K),
    "lovasz_ce": lambda spacing, done: fl.LovaszSoftmax() + fl.CrossEntropy(),
    "unified_focal": lambda spacing, done: fl.UnifiedFocal(),
    "mcc_ce": lambda spacing, done: fl.MCC(include_background=False) + fl.CrossEntropy(),
    "dice_gce": lambda spacing, done: _dice() + fl.GeneralizedCrossEntropy(),
    "dice_ce_boundary": lambda spacing, done: (
        _dice()
        + fl.CrossEntropy()
        + _boundary_factor(done) * fl.Boundary(include_background=False, spacing=spacing)
    ),
    "boundary_dou_ce": lambda spacing, done: (
        fl.BoundaryDoU(include_background=False) + fl.CrossEntropy()
    ),
    "hausdorff": lambda spacing, done: (
        _dice()
        + fl.CrossEntropy()
        + HAUSDORFF_FACTOR * fl.HausdorffDT(include_background=False, spacing=spacing)
    ),
    "skeleton_recall": lambda spacing, done: (
        _dice()
        + fl.CrossEntropy()
        + SKELETON_FACTOR * fl.SkeletonRecall(include_background=False, batch=True)
    ),
    "cc_dice_ce": lambda spacing, done: _dice() + fl.CrossEntropy() + fl.CCDiceCE(spacing=spacing),
    "blob_dice_ce": lambda spacing, done: (
        _dice() + fl.CrossEntropy() + BLOB_FACTOR * fl.BlobDiceCE()
    ),
}
"""Dice and its kin leave the background out and are those of the batch; boundary losses measure in
units of the shortest edge of a voxel."""


class UnknownLoss(ValueError):
    """A loss that is not there; the message lists those that are."""


def read_losses(text: str) -> dict[str, str]:
    """What each loss of a comma-separated list is, by the name that it goes by.

    An item is a registered name, ``module:object``, or either under another name, as
    ``mine=module:object``.

    Raises:
        UnknownLoss: an item that is none of these, or cannot be imported.
        ValueError: no loss, or two of one name.
    """
    found: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, given, spec = item.partition("=")
        if not given:
            name, spec = item.rpartition(":")[2], item
        if not _NAME.fullmatch(name):
            raise ValueError(f"--losses: expected a name of letters and digits, got {name!r}")
        if name in found:
            raise ValueError(
                f"--losses: {name!r} is there twice; NAME={spec} gives it another name"
            )
        if spec not in LOSSES:
            _imported(spec)
        found[name] = spec
    if not found:
        raise ValueError("--losses: expected at least one")
    return found


def _imported(spec: str) -> Any:
    module, colon, attribute = spec.partition(":")
    if not colon:
        raise UnknownLoss(
            f"--losses: expected names among {', '.join(LOSSES)}, or module:object, got {spec!r}"
        )
    return imported(module, attribute, "--losses")


def imported(module: str, attribute: str, option: str) -> Any:
    """An object of a module; UnknownLoss, naming the option, if it is not there."""
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownLoss(f"{option}: {module}:{attribute} is not there: {error}") from None
    if not callable(found):
        kind = type(found).__name__
        raise UnknownLoss(f"{option}: {module}:{attribute} is no function, but {kind}")
    return found


class TrainingLoss:
    """A loss as a training calls it.

    Args:
        spec: a registered name, or ``module:object``: a loss of this library, a function of
            (logits, labels), or a class that is called without arguments and makes either.
        spacing: of the voxels, in mm.
        ignore_index: the label of voxels that count for nothing. A function of the user's sees it.

    Raises:
        UnknownLoss: a loss that is not there.
    """

    def __init__(
        self, spec: str, spacing: Sequence[float] = (1.0, 1.0, 1.0), ignore_index: int | None = None
    ) -> None:
        shortest = min(spacing)
        self.spacing = tuple(float(size) / shortest for size in spacing)
        self.ignore_index = ignore_index
        self.maker = LOSSES.get(spec)
        self.own: Any = None
        if self.maker is None:
            self.own = _imported(spec)
            if isinstance(self.own, type):
                self.own = self.own()
            if isinstance(self.own, (Loss, Term)):
                self.own = self._whole(self.own)

    def at(self, done: float) -> Callable[[Any, Any], Any]:
        """The loss of logits (B, C, D, H, W) and labels (B, D, H, W) of int64.

        Args:
            done: which part of the training is done, from 0 to 1.
        """
        if self.maker is None:
            found: Callable[[Any, Any], Any] = self.own
            return found
        return self._whole(self.maker(self.spacing, done))

    def explain(self, probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        """Where the loss of a prediction comes from, (D, H, W), as `fastloss.Loss.explain` says.

        Args:
            probabilities: (classes, D, H, W).
            labels: (D, H, W).

        Returns:
            None for a function of the user's, which has no parts.
        """
        loss = self.at(1.0)
        if not isinstance(loss, Loss):
            return None
        logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
        found: np.ndarray = loss.explain(logits[None], labels[None]).map[0]
        return found

    def _whole(self, loss: Loss | Term) -> Loss:
        if self.ignore_index is None:
            return Loss(loss)
        return Loss(loss, ignore_index=self.ignore_index)
