"""The result of an explanation: the parts of a loss by term, sample and class, and its maps."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastloss.frameworks import borrow

ALL = "all"
"""Stands for the sample, or the class, of a part that is not split by it."""


class Voxel(NamedTuple):
    """A voxel of a map.

    Attributes:
        sample: its number in the batch.
        position: its indices along the spatial axes.
        value: that of the map.
        channel: where the map has a number for each channel; else None.
    """

    sample: int
    position: tuple[int, ...]
    value: float
    channel: int | None = None


class ExplainedTerm(NamedTuple):
    """A term, as `Explanation` has it."""

    name: str
    kind: str
    parts: np.ndarray
    regions: np.ndarray | None
    map: Any


class Explanation:
    """Where a loss comes from, as `fastloss.Loss.explain` finds it.

    Terms are called by their classes; the second ``Dice`` of a loss is "Dice 2".

    Attributes:
        value: the value of the loss.
        terms: by term, what it adds to the value, its factor included.
        parts: by term, the same by sample and class, (B, C) of float64; 1 in place of B or C where
            it is not split, as a Dice over the batch. The parts add up to that of ``terms``. The
            class of a term that sums over voxels is that of its sums, which for the cross-entropy
            of labels is the voxel's label; that of a `fastloss.PerRegion` is the lesion's.
        regions: by term, of those that are formed in regions, the same by sample, region and class,
            (B, R, C), in the order of the regions' numbers. What a `fastloss.PerRegion` adds for a
            sample without lesions stands in the first.
        kinds: by term, "share" or "gain": what its map holds, see `fastloss.Loss.explain`.
        maps: by term, an array of the caller's framework, float32 (float64 for float64 logits):
            (B, *spatial), of a sigmoid one number for each channel, as the logits lie. 0 where a
            voxel counts for nothing.
        map: the sum of the maps.
        exact: whether gains are exact rather than of first order.
    """

    def __init__(
        self,
        value: float,
        terms: Sequence[ExplainedTerm],
        total: Any,
        *,
        batch: int,
        classes: int,
        channel_axis: int | None,
        exact: bool,
    ) -> None:
        self.value, self.map, self.exact = value, total, exact
        self.parts = {each.name: each.parts for each in terms}
        self.terms = {name: float(table.sum()) for name, table in self.parts.items()}
        self.regions = {each.name: each.regions for each in terms if each.regions is not None}
        self.kinds = {each.name: each.kind for each in terms}
        self.maps = {each.name: each.map for each in terms}
        self._shape, self._channel_axis = (batch, classes), channel_axis

    def numbers(self, term: str | None = None) -> np.ndarray:
        """The map of a term, or of the whole loss, as an array of NumPy's.

        Raises:
            ValueError: no term of this name.
        """
        if term is not None and term not in self.maps:
            known = ", ".join(map(repr, self.maps))
            raise ValueError(f"term: expected one of {known}, got {term!r}")
        array = self.map if term is None else self.maps[term]
        view, _, place = borrow(array, "map")
        return view if place is None else place.numpy(array)

    def worst(self, n: int = 10, term: str | None = None) -> list[Voxel]:
        """The n voxels with the largest numbers in the map of a term, or in that of the loss.

        The largest comes first, and NaN before it; of equal ones, the first in the array.

        Raises:
            TypeError, ValueError: ``n`` is no integer of at least 0; no term of this name.
        """
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
            raise TypeError(f"n: expected an integer, got {n!r}")
        if n < 0:
            raise ValueError(f"n: expected at least 0, got {n}")
        numbers = self.numbers(term)
        flat = numbers.reshape(-1)
        count = min(int(n), flat.size)
        if not count:
            return []
        least = np.partition(flat, flat.size - count)[flat.size - count]  # NaN is above all
        above, at = np.flatnonzero(~(flat <= least)), np.flatnonzero(flat == least)
        places = np.concatenate([above, at[: max(count - len(above), 0)]])[:count]
        order = np.argsort(np.where(np.isnan(flat[places]), -np.inf, -flat[places]), kind="stable")
        return [self._voxel(numbers, int(place)) for place in places[order]]

    def _voxel(self, numbers: np.ndarray, place: int) -> Voxel:
        index = [int(i) for i in np.unravel_index(place, numbers.shape)]
        channel = None if self._channel_axis is None else index.pop(self._channel_axis)
        return Voxel(index[0], tuple(index[1:]), float(numbers.flat[place]), channel)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each sample and class: ``sample``, ``class``, the parts of the terms by name,
        and their ``total``.

        Parts that are not split by sample or class stand in rows whose sample or class is "all".
        Where a term has no part it is NaN.
        """
        samples, classes = self._shape
        found: dict[tuple[str, str], dict[str, float]] = {}
        # In their order, those of all last.
        for i in (*range(samples), ALL):
            for j in (*range(classes), ALL):
                for name, table in self.parts.items():
                    at = self._place(table, i, j)
                    if at is not None:
                        found.setdefault((str(i), str(j)), {})[name] = float(table[at])
        return [
            {"sample": sample, "class": label}
            | {name: parts.get(name, np.nan) for name in self.parts}
            | {"total": sum(parts.values())}
            for (sample, label), parts in found.items()
        ]

    def _place(self, table: np.ndarray, i: int | str, j: int | str) -> tuple[int, int] | None:
        """Where the part of this sample and class stands in the table of a term, if it has one."""
        at = []
        for number, size, whole in zip((i, j), table.shape, self._shape, strict=True):
            split = size == whole
            if split != isinstance(number, int):
                return None
            at.append(number if isinstance(number, int) else 0)
        return at[0], at[1]

    def region_rows(self) -> list[dict[str, Any]]:
        """The parts of regions that are not 0, the largest first: ``term``, ``sample``, ``region``,
        ``class`` and ``part``."""
        found = []
        for name, table in self.regions.items():
            sizes = table.shape[0], table.shape[2]
            for i, r, j in np.argwhere(table != 0).tolist():
                sample, label = (
                    str(number) if size == whole else ALL
                    for number, size, whole in zip((i, j), sizes, self._shape, strict=True)
                )
                part = float(table[i, r, j])
                found.append(
                    {"term": name, "sample": sample, "region": r, "class": label, "part": part}
                )
        return sorted(found, key=lambda row: -row["part"])

    def to_pandas(self) -> Any:
        """A pandas DataFrame of `rows`, indexed by sample and class. ImportError: no pandas."""
        import pandas

        return pandas.DataFrame(self.rows()).set_index(["sample", "class"])

    def to_csv(self, path: str | Path | None = None) -> str:
        """`rows` as comma-separated values, which are also written to ``path`` if given."""
        text = io.StringIO(newline="")
        columns = ["sample", "class", *self.parts, "total"]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        if path is not None:
            Path(path).write_text(text.getvalue(), encoding="utf-8")
        return text.getvalue()

    def by_class(self) -> dict[str, dict[str, float]]:
        """For each class, the parts of the terms over all samples; those that are not split by
        class, under "all"."""
        count = self._shape[1]
        sums = {name: table.sum(axis=0) for name, table in self.parts.items()}
        found: dict[str, dict[str, float]] = {}
        for label in (*range(count), ALL):
            for name, own in sums.items():
                if (len(own) == count) == isinstance(label, int):
                    at = label if isinstance(label, int) else 0
                    found.setdefault(str(label), {})[name] = float(own[at])
        return found

    def __repr__(self) -> str:
        """The parts by class, over all samples, and their sums."""
        lines = [["", *self.terms, "total"]]
        for label, parts in (*self.by_class().items(), ("sum", self.terms)):
            cells = [_shown(parts[name]) if name in parts else "" for name in self.terms]
            lines.append([label, *cells, _shown(sum(parts.values()))])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [f"Loss {_shown(self.value)}"]
        for first, *rest in lines:
            cells = [first.ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            text.append("  ".join(cells).rstrip())
        return "\n".join(text)


def _shown(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"
