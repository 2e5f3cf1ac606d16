"""The Dice score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastloss.backends import current_backend
from fastloss.monai._inputs import ignore_mask
from fastloss.monai.metrics._components import component_dice
from fastloss.monai.metrics._cumulative import CumulativeIterationMetric
from fastloss.monai.metrics._options import check_axes, check_tensors, deprecated, nan_like, plain
from fastloss.monai.metrics._reduction import do_metric_reduction
from fastloss.monai.metrics._sums import Overlap, Side, overlap, value_dtype


class DiceMetric(CumulativeIterationMetric):
    """The Dice score of masks or label maps, as ``monai.metrics.DiceMetric``.

    Args:
        include_background: whether class 0 counts.
        reduction: see `do_metric_reduction`.
        get_not_nans: whether ``aggregate`` also returns how many numbers are not NaN.
        ignore_empty: an empty reference gives NaN; if False, 1 if the prediction is empty too, and
            0 otherwise.
        num_classes: for label maps, how many classes there are, with the background.
        return_with_label: with ``reduction="mean_batch"``, ``aggregate`` returns a dict of numbers,
            rounded to four digits, by these names; True: "label_0", ….
        per_component: the mean over the components of the reference, of masks (B, 2, *spatial) of
            two or three spatial axes; see `DiceHelper`.
        ignore_index: see `fastloss.monai.metrics`.

    Raises:
        ValueError: when it is called, fewer than three axes, or tensors that do not fit.
        ImportError: ``per_component`` without SciPy.
    """

    def __init__(
        self,
        include_background: bool = True,
        reduction: str = "mean",
        get_not_nans: bool = False,
        ignore_empty: bool = True,
        num_classes: int | None = None,
        return_with_label: bool | list[str] = False,
        per_component: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.include_background = include_background
        self.reduction = reduction
        self.get_not_nans = get_not_nans
        self.ignore_empty = ignore_empty
        self.num_classes = num_classes
        self.return_with_label = return_with_label
        self.per_component = per_component
        self.ignore_index = ignore_index
        self.dice_helper = DiceHelper(
            include_background=include_background,
            reduction="none",
            get_not_nans=False,
            apply_argmax=False,
            ignore_empty=ignore_empty,
            num_classes=num_classes,
            per_component=per_component,
            ignore_index=ignore_index,
        )

    def _compute_tensor(self, y_pred: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        check_axes(y_pred, 3)
        found: Tensor = self.dice_helper(y_pred, y)
        return found

    def aggregate(self, reduction: str | None = None) -> Any:
        """The scores reduced, with ``get_not_nans`` also the number of those that are not NaN.

        Args:
            reduction: see `do_metric_reduction`; None: that of the metric.

        Raises:
            ValueError: an unknown reduction, or nothing was measured yet.
        """
        found, count = do_metric_reduction(self._rows(), reduction or self.reduction)
        value: Any = found
        if self.return_with_label and self.reduction == "mean_batch":
            names: Sequence[str]
            if isinstance(self.return_with_label, bool):
                first = int(not self.include_background)
                names = [f"label_{first + i}" for i in range(len(found))]
            else:
                names = self.return_with_label
            value = {k: round(v, 4) for k, v in zip(names, found.tolist(), strict=False)}
        return (value, count) if self.get_not_nans else value


def compute_dice(
    y_pred: Tensor,
    y: Tensor,
    include_background: bool = True,
    ignore_empty: bool = True,
    num_classes: int | None = None,
    per_component: bool = False,
    ignore_index: int | None = None,
) -> Tensor:
    """The Dice score of each sample and class, (B, C), as ``monai.metrics.compute_dice``.

    Args:
        y_pred, y: masks, (B, C, *spatial), or label maps, (B, 1, *spatial).
        include_background, ignore_empty, num_classes, per_component, ignore_index: see
            `DiceMetric`.

    Raises:
        ValueError: tensors that do not fit. ImportError: ``per_component`` without SciPy.
    """
    found: Tensor = DiceHelper(
        include_background=include_background,
        reduction="none",
        get_not_nans=False,
        apply_argmax=False,
        ignore_empty=ignore_empty,
        num_classes=num_classes,
        per_component=per_component,
        ignore_index=ignore_index,
    )(y_pred, y)
    return found


class DiceHelper:
    """The Dice score of scores, masks or label maps, as ``monai.metrics.DiceHelper``.

    Args:
        include_background: whether class 0 counts; None: as ``threshold``.
        threshold: the prediction is where the scores are above ½.
        apply_argmax: the prediction is the class of the largest score; None: unless ``threshold``.
        activate: with ``threshold``, sigmoid comes before it.
        get_not_nans: whether to return also how many numbers are not NaN.
        reduction: see `do_metric_reduction`.
        ignore_empty, num_classes, ignore_index: see `DiceMetric`.
        sigmoid, softmax: deprecated names of ``threshold`` and ``apply_argmax``.
        per_component: each voxel belongs to the nearest component of the reference, of voxels that
            touch at least by a corner; the score is the mean of the components'. It ignores no
            label.

    Source of ``per_component``: Jaus et al. 2024, "Every Component Counts".
    """

    def __init__(
        self,
        include_background: bool | None = None,
        threshold: bool = False,
        apply_argmax: bool | None = None,
        activate: bool = False,
        get_not_nans: bool = True,
        reduction: str = "mean_batch",
        ignore_empty: bool = True,
        num_classes: int | None = None,
        sigmoid: bool | None = None,
        softmax: bool | None = None,
        per_component: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        if sigmoid is not None:
            deprecated("sigmoid", "use threshold")
            threshold = sigmoid
        if softmax is not None:
            deprecated("softmax", "use apply_argmax")
            apply_argmax = softmax
        self.threshold = threshold
        self.reduction = reduction
        self.get_not_nans = get_not_nans
        self.include_background = threshold if include_background is None else include_background
        self.apply_argmax = not threshold if apply_argmax is None else apply_argmax
        self.activate = activate
        self.ignore_empty = ignore_empty
        self.num_classes = num_classes
        self.per_component = per_component
        self.ignore_index = ignore_index

    def compute_cc_dice(self, y_pred: Tensor, y: Tensor) -> Tensor:
        """The mean over the components of one sample, (1,).

        Args:
            y_pred, y: (1, 2, *spatial).
        """
        return component_dice(plain(y_pred), plain(y), self.ignore_empty)

    def compute_channel(self, y_pred: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The score of one mask, a scalar.

        Args:
            y_pred, y, mask: of one shape; where the mask is 0, nothing counts.
        """
        predicted, reference = (Side(plain(t)[None, None]) for t in (y_pred, y))
        counted = None if mask is None else plain(mask)[None, None]
        sums = overlap(predicted, reference, (0,), counted, binary=True)
        return self._score(sums, value_dtype(y))[0, 0]

    def __call__(self, y_pred: Tensor, y: Tensor) -> Any:
        """The score, with ``get_not_nans`` also the number of those that are not NaN.

        Args:
            y_pred: (B, C, *spatial), or with ``num_classes`` a label map (B, 1, *spatial).
            y: (B, C, *spatial), or a label map (B, 1, *spatial).

        Raises:
            ValueError: tensors that do not fit, or an unknown reduction. ImportError:
                ``per_component`` without SciPy.
        """
        check_tensors(y_pred, y)
        y_pred, y = plain(y_pred), plain(y)
        classes = y_pred.shape[1] if self.num_classes is None else self.num_classes
        # Where classes are known, one channel holds labels, not scores.
        labels = self.num_classes is not None and y_pred.shape[1] == 1 and classes > 1
        if self.apply_argmax and not labels and classes > 1:
            y_pred = _likeliest(y_pred)
        elif self.threshold and not labels:
            y_pred = (torch.sigmoid(y_pred) if self.activate else y_pred) > 0.5
        if self.per_component:
            _check_components(y_pred, y)
            pairs = zip(y_pred.split(1), y.split(1), strict=True)
            scores = torch.stack([self.compute_cc_dice(*pair) for pair in pairs])
        else:
            first = 0 if self.include_background else 1
            channels = range(first, classes) if classes > 1 else (1,)
            dtype = torch.float32 if y.shape[1] == 1 else value_dtype(y)
            scores = self._score(_sums(y_pred, y, channels, self.ignore_index), dtype)
        found, count = do_metric_reduction(scores, self.reduction)
        return (found, count) if self.get_not_nans else found

    def _score(self, sums: Overlap, dtype: torch.dtype) -> Tensor:
        size = sums.reference + sums.predicted
        score = 2 * sums.both / size
        if self.ignore_empty:
            empty = nan_like(score)
        else:
            empty = (size <= 0).to(score.dtype)
        return torch.where(sums.reference > 0, score, empty).to(dtype)


def _sums(y_pred: Tensor, y: Tensor, channels: Sequence[int], ignore_index: int | None) -> Overlap:
    predicted, reference = (Side(t, t.shape[1] == 1) for t in (y_pred, y))
    if y_pred.shape[0] != y.shape[0] or y_pred.shape[2:] != y.shape[2:]:
        raise ValueError(
            f"y: expected batch and spatial shape of y_pred, {tuple(y_pred.shape)}, got "
            f"{tuple(y.shape)}"
        )
    for name, side in (("y_pred", predicted), ("y", reference)):
        if not side.labels and max(channels, default=0) >= side.tensor.shape[1]:
            raise ValueError(
                f"{name}: expected one channel, or at least {max(channels) + 1}, got shape "
                f"{tuple(side.tensor.shape)}"
            )
    if predicted.labels and reference.labels and y_pred.is_cpu and y.is_cpu:
        found = _of_label_maps(y_pred, y, channels, ignore_index)
        if found is not None:
            return found
    return overlap(predicted, reference, channels, ignore_mask(y, ignore_index), binary=True)


def _of_label_maps(
    y_pred: Tensor, y: Tensor, channels: Sequence[int], ignore_index: int | None
) -> Overlap | None:
    """All classes in one pass; None for labels with a fraction, or more than fit."""
    classes = max(channels, default=0) + 1
    if classes > 65535:
        return None
    backend = current_backend()
    shape = (y.shape[0], 1, 1, y[:1].numel())
    found = []
    for labels in (y_pred, y):
        if labels.dtype in (torch.float16, torch.bfloat16):
            labels = labels.float()
        numbers = labels.reshape(shape).numpy()
        if numbers.dtype == np.bool_:
            numbers = numbers.view(np.uint8)
        indices = np.empty(shape, np.uint8 if classes < 256 else np.uint16)
        if backend.class_indices(numbers, classes, indices):
            return None
        found.append(indices)
    if ignore_index is not None:
        ignored = (y == ignore_index).reshape(shape).numpy()
        for indices in found:
            indices[ignored] = classes
    counts = np.empty((shape[0], classes + 1, classes + 1), np.int64)
    backend.confusion(found[0], found[1], counts)
    table = torch.from_numpy(counts).double()
    each = list(channels)
    both = table.diagonal(dim1=1, dim2=2)
    return Overlap(*(t[:, each] for t in (both, table.sum(1), table.sum(2))))


def _likeliest(scores: Tensor) -> Tensor:
    """The class of the largest score, (B, 1, *spatial)."""
    batch, channels = scores.shape[:2]
    if not scores.is_cpu or not scores.is_floating_point() or channels > 256:
        return scores.argmax(dim=1, keepdim=True)
    found = np.empty((batch, 1, 1, scores[:1, :1].numel()), np.uint8)
    grid = scores.reshape(batch, channels, 1, 1, -1)
    name = str(scores.dtype).removeprefix("torch.")
    array = grid.view(torch.uint16).numpy() if name == "bfloat16" else grid.numpy()
    current_backend().likeliest(array, name, found)
    return torch.from_numpy(found).reshape(batch, 1, *scores.shape[2:])


def _check_components(y_pred: Tensor, y: Tensor) -> None:
    if y_pred.shape != y.shape or y.ndim not in (4, 5) or y.shape[1] != 2:
        raise ValueError(
            "per_component: expected y_pred and y of shape (batch, 2, *spatial) with two or three "
            f"spatial axes, got {tuple(y_pred.shape)} and {tuple(y.shape)}"
        )
