"""Confusion matrices that add up: over batches, parts of a volume, and processes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from fastloss.metrics import overlap
from fastloss.metrics.empty import empties_of, value_of
from fastloss.metrics.inputs import read_classes, read_pair
from fastloss.metrics.metric import find_metrics
from fastloss.metrics.scores import Scores

MOST_LABELS = 4096
"""Of a matrix, which has the square of that in numbers."""


def confusion_matrix(
    prediction: Any,
    reference: Any,
    *,
    classes: Any = None,
    activation: str | None = None,
    ignore_index: int | None = None,
    mask: Any = None,
) -> np.ndarray:
    """How many voxels of each label are predicted as each, over a batch.

    Args:
        prediction, reference, options: as `evaluate` has them.

    Returns:
        ``matrix[reference, prediction]``, (labels, labels) of int64, where each voxel has one
        label. Where the classes are masks that may overlap ("sigmoid" and "none"), a table of four
        for each class, (classes, 2, 2): ``[[TN, FP], [FN, TP]]``.

    Raises:
        ValueError, TypeError: as `evaluate`; ValueError for labels from 4096 on.

    >>> import numpy as np, fastloss as fl
    >>> fl.metrics.confusion_matrix(np.array([[0, 1, 1, 2]]), np.array([[0, 1, 2, 2]]))
    array([[1, 0, 0],
           [0, 1, 0],
           [0, 1, 1]])
    """
    accumulator = ConfusionAccumulator(
        classes=classes, activation=activation, ignore_index=ignore_index
    )
    return accumulator.update(prediction, reference, mask=mask).matrix


class ConfusionAccumulator:
    """A confusion matrix over all voxels that are shown to it, and the overlap metrics of them all.

    A score is that of all voxels together, as if they were one volume ("global" or "micro" Dice),
    and not a mean over samples, for which see `evaluate`. So parts may be cut anywhere: batches,
    chunks of a volume, what each process of several holds. Accumulators with the same options add:
    ``a + b``, ``sum(several)``. They can be pickled.

    Args:
        classes, include_background, activation, ignore_index: as `evaluate` has them. Without
            ``classes`` the matrix of label maps grows with the largest label.

    Raises:
        ValueError, TypeError: as `evaluate`, in `update`; ValueError for labels from 4096 on.

    >>> import numpy as np, fastloss as fl
    >>> total = fl.metrics.ConfusionAccumulator(classes=2)
    >>> for part in np.array([[[0, 1, 1, 1]], [[0, 0, 0, 1]]]):
    ...     total = total.update(part, np.array([[0, 0, 1, 1]]))
    >>> total.matrix
    array([[3, 1],
           [1, 3]])
    >>> print(total.scores("dice"))
    Scores of 1 sample
            dice
    1     0.7500
    mean  0.7500
    """

    def __init__(
        self,
        *,
        classes: Any = None,
        include_background: bool | None = None,
        activation: str | None = None,
        ignore_index: int | None = None,
    ) -> None:
        self._options = {
            "classes": classes,
            "include_background": include_background,
            "activation": activation,
            "ignore_index": ignore_index,
        }
        self._names: tuple[str, ...] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all voxels."""
        self._matrix: np.ndarray | None = None

    @property
    def matrix(self) -> np.ndarray:
        """A copy of the counts, as `confusion_matrix` returns them; (0, 0) before any update."""
        return np.zeros((0, 0), np.int64) if self._matrix is None else self._matrix.copy()

    def update(self, prediction: Any, reference: Any, *, mask: Any = None) -> ConfusionAccumulator:
        """Count the voxels of a batch, or of a part of one; itself.

        Args:
            prediction, reference, mask: as `evaluate` has them.
        """
        pair = read_pair(prediction, reference, mask=mask, **self._options)
        labels = pair.groups[0].members.shape[1] - 1
        if labels > MOST_LABELS:
            raise ValueError(
                f"prediction: expected labels below {MOST_LABELS} for a confusion matrix, got "
                f"{labels} labels"
            )
        each = [overlap.matrices(group, pair.counted, pooled=True)[0] for group in pair.groups]
        self._add(np.stack(each) if pair.overlapping else each[0], pair.classes)
        return self

    def _add(self, matrix: np.ndarray, names: tuple[str, ...] | None) -> None:
        own = self._matrix
        if own is None:
            self._matrix, self._names = matrix.copy(), names
            return
        if own.ndim != matrix.ndim:
            raise ValueError("expected label maps, or masks that may overlap, but got both")
        if own.ndim == 3 and own.shape != matrix.shape:
            raise ValueError(f"expected masks of {len(own)} classes, as before, got {len(matrix)}")
        if len(matrix) > len(own):
            own, matrix = matrix.copy(), own
        own[tuple(map(slice, matrix.shape))] += matrix
        self._matrix = own

    def __add__(self, other: ConfusionAccumulator) -> ConfusionAccumulator:
        if not isinstance(other, ConfusionAccumulator):
            return NotImplemented
        if other._options != self._options:
            raise ValueError(
                f"expected accumulators with the same options, got {self._options} and "
                f"{other._options}"
            )
        total = ConfusionAccumulator(**self._options)
        for part in (self, other):
            if part._matrix is not None:
                total._add(part._matrix, part._names)
        return total

    def __radd__(self, other: Any) -> ConfusionAccumulator:
        if other == 0:  # with which `sum` begins
            return self + ConfusionAccumulator(**self._options)
        return NotImplemented

    def all_reduce(self, process_group: Any = True) -> ConfusionAccumulator:
        """The sum over the processes of a group; each of them must call this.

        Args:
            process_group: of torch.distributed; True: the default group; None: this process alone.

        Raises:
            RuntimeError: torch.distributed is not initialised. TypeError: no process group.
        """
        parts = [self]
        if process_group is not None:
            from fastloss.frameworks.torch.distributed import gathered

            parts = gathered(self, process_group)
        return reduce(operator.add, parts, ConfusionAccumulator(**self._options))

    def counts(self) -> dict[str, overlap.Counts]:
        """True and false positives and negatives, by the name of the class.

        Raises:
            ValueError: no voxels were counted, and no ``classes`` given.
        """
        matrix = self._matrix
        if matrix is not None and matrix.ndim == 3:
            assert self._names is not None
            return {
                name: overlap.Counts(int(tp), int(fp), int(fn), int(tn))
                for name, ((tn, fp), (fn, tp)) in zip(self._names, matrix, strict=True)
            }
        if matrix is None and self._options["classes"] is None:
            raise ValueError("expected an update, or classes=, before the counts of classes")
        found = 0 if matrix is None else len(matrix)
        names, labels = read_classes(
            self._options["classes"], found, bool(self._options["include_background"])
        )
        size = max(found, 1 + max(label for each in labels for label in each))
        joint = overlap.Joint.of_matrix(self.matrix)
        return dict(zip(names, joint.counts(labels, size), strict=True))

    def scores(
        self, metrics: Sequence[str] | str = ("dice", "iou"), *, empty: Any = None
    ) -> Scores:
        """Overlap metrics of all voxels together: a table with one sample, named "all".

        Args:
            metrics: names of overlap metrics in `METRICS`, or such as "f2".
            empty: as `evaluate` has it.

        Raises:
            ValueError: no such metric; no voxels were counted, and no ``classes`` given; a class
                without voxels where ``empty`` is "error".
        """
        wanted = find_metrics(metrics, overlap.METRICS, overlap.PATTERNS)
        empties = empties_of(empty, {name: metric.empty for name, metric in wanted.items()})
        counts = self.counts()
        table: dict[str, list[list[float]]] = {name: [[]] for name in wanted}
        for label, each in counts.items():
            predicted, true = each.tp + each.fp > 0, each.tp + each.fn > 0
            for name, metric in wanted.items():
                value = value_of(empties[name], predicted, true, f"{name} of class {label!r}")
                table[name][0].append(metric.formula(each) if value is None else value)
        return Scores(table, samples=["all"], classes=tuple(counts))

    def __repr__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self._options.items() if v is not None)
        return f"ConfusionAccumulator({given})"
