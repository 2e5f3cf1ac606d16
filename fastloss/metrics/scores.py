"""The result of an evaluation: a table of metrics by sample and class."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Scores:
    """Values of metrics, one for each sample and class.

    ``scores["dice"]`` is an array (samples, classes). Means leave NaN out; infinite values are not
    left out.

    Attributes:
        samples: names of the rows.
        classes: names of the columns.
        values: metrics by name, each (samples, classes) of float64.
        about: how they were measured: definition, spacing, tolerance, …
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        samples: Sequence[str],
        classes: Sequence[str],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.samples, self.classes = tuple(map(str, samples)), tuple(map(str, classes))
        self.values = {name: np.asarray(table, np.float64) for name, table in values.items()}
        self.about = dict(about or {})
        shape = len(self.samples), len(self.classes)
        for name, table in self.values.items():
            if table.shape != shape:
                raise ValueError(f"values[{name!r}]: expected shape {shape}, got {table.shape}")

    def __getitem__(self, metric: str) -> np.ndarray:
        try:
            return self.values[metric]
        except KeyError:
            known = ", ".join(map(repr, self.values))
            raise KeyError(f"no metric {metric!r}; there are {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.samples)

    def by_class(self) -> dict[str, np.ndarray]:
        """For each metric, the mean over the samples for each class, (classes,)."""
        return {name: _mean(table, 0) for name, table in self.values.items()}

    def by_sample(self) -> dict[str, np.ndarray]:
        """For each metric, the mean over the classes for each sample, (samples,)."""
        return {name: _mean(table, 1) for name, table in self.values.items()}

    def mean(self) -> dict[str, float]:
        """For each metric, the mean over the classes of their means over the samples."""
        return {name: float(_mean(table, 0)) for name, table in self.by_class().items()}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each sample and class: ``sample``, ``class``, and the metrics by name."""
        return [
            {"sample": sample, "class": label}
            | {name: float(table[i, j]) for name, table in self.values.items()}
            for i, sample in enumerate(self.samples)
            for j, label in enumerate(self.classes)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, as JSON takes them but for NaN and infinity."""
        return {
            "samples": list(self.samples),
            "classes": list(self.classes),
            "values": {name: table.tolist() for name, table in self.values.items()},
            "mean": self.mean(),
            "about": self.about,
        }

    def to_pandas(self) -> Any:
        """A pandas DataFrame of `rows`, indexed by sample and class. ImportError: no pandas."""
        import pandas

        return pandas.DataFrame(self.rows()).set_index(["sample", "class"])

    def to_csv(self, path: str | Path | None = None) -> str:
        """`rows` as comma-separated values, which are also written to ``path`` if given."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["sample", "class", *self.values], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        if path is not None:
            Path(path).write_text(text.getvalue(), encoding="utf-8")
        return text.getvalue()

    @classmethod
    def concatenate(cls, parts: Sequence[Scores]) -> Scores:
        """The samples of several tables of the same metrics and classes, one after the other.

        ``about`` keeps what all of them share.

        Raises:
            ValueError: no table, or one of other metrics or classes.
        """
        if not parts:
            raise ValueError("parts: expected at least one table, got none")
        first = parts[0]
        for part in parts:
            if part.classes != first.classes or list(part) != list(first):
                raise ValueError(
                    f"parts: expected tables of {list(first)} for {list(first.classes)}, got one "
                    f"of {list(part)} for {list(part.classes)}"
                )
        return cls(
            {name: np.concatenate([part[name] for part in parts]) for name in first},
            samples=[sample for part in parts for sample in part.samples],
            classes=first.classes,
            about={
                name: value
                for name, value in first.about.items()
                if all(name in part.about and part.about[name] == value for part in parts)
            },
        )

    def __repr__(self) -> str:
        """Means by class, then over all."""
        header = ["", *self.values]
        by_class = self.by_class()
        lines = [
            [label, *(_shown(by_class[name][j]) for name in self.values)]
            for j, label in enumerate(self.classes)
        ]
        mean = self.mean()
        lines.append(["mean", *(_shown(mean[name]) for name in self.values)])
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        plural = "sample" if len(self.samples) == 1 else "samples"
        text = [f"Scores of {len(self.samples)} {plural}"]
        for line in [header, *lines]:
            first = line[0].ljust(widths[0])
            rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
            text.append("  ".join([first, *rest]).rstrip())
        return "\n".join(text)


def _mean(table: np.ndarray, axis: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaN; inf − inf
        found: np.ndarray = np.nanmean(table, axis=axis)
    return found


def _shown(value: float) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"
