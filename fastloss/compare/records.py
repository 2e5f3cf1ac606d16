"""Records of a comparison of losses: the numbers of every run, as JSON and CSV."""

from __future__ import annotations

import base64
import csv
import io
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import inf, isfinite, isnan, nan
from typing import Any, TypeVar

import numpy as np

FORMAT = "fastloss.compare 1"


@dataclass(frozen=True)
class Score:
    """A metric of one class of a held-out case, after training with a loss.

    Attributes:
        loss: the name of the loss.
        seed, fold: which run it is of. Runs of the same seed and fold are paired over losses.
        case: the name of the case.
        metric: a name that ``fastloss.metrics.evaluate`` takes.
        label: the name of the class.
        value: NaN where there is none, as for a class that neither mask has.
        size: of the class in the reference, in mm³; NaN if it is not known.
    """

    loss: str
    seed: int
    fold: int
    case: str
    metric: str
    label: str
    value: float
    size: float = nan


@dataclass(frozen=True)
class LesionScore:
    """The Dice of one lesion of the reference; 0 if it was missed. ``size`` is in mm³."""

    loss: str
    seed: int
    fold: int
    case: str
    label: str
    size: float
    dice: float


@dataclass(frozen=True)
class CurvePoint:
    """One moment of a training.

    Attributes:
        loss, seed, fold: which run.
        step: how many steps of the optimiser were done.
        loss_value: the training loss.
        metric: the mean Dice of the held-out cases; NaN where it was not measured.
        seconds: since the training began, validation left out.
    """

    loss: str
    seed: int
    fold: int
    step: int
    loss_value: float
    metric: float = nan
    seconds: float = nan


@dataclass(frozen=True)
class Cost:
    """How dear a loss is.

    Attributes:
        loss: its name.
        loss_ms: milliseconds of its forward and backward pass on one batch of the training.
        step_ms: of a whole step of the training.
        peak_bytes: memory that the two passes take beside the logits, at their peak.
    """

    loss: str
    loss_ms: float
    step_ms: float
    peak_bytes: int


@dataclass(frozen=True)
class Failure:
    """A run that has no scores, and why."""

    loss: str
    seed: int
    fold: int
    message: str


@dataclass(frozen=True, eq=False)
class Picture:
    """``image`` is (height, width, 3), red, green and blue of uint8."""

    loss: str
    case: str
    caption: str
    image: np.ndarray


@dataclass
class Study:
    """All that a comparison measured.

    Attributes:
        name: what was compared, for a heading.
        reference: the loss that all others are compared with.
        losses: all names, in the order in which they are shown.
        options: the settings, as JSON takes them.
        scores, lesions, curves, costs, failures, pictures: what was measured.

    Raises:
        ValueError: the reference, or the loss of a record, is none of the losses; a loss named
            twice.
    """

    name: str
    reference: str
    losses: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    lesions: list[LesionScore] = field(default_factory=list)
    curves: list[CurvePoint] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError where names do not fit, as after records were added."""
        if len(set(self.losses)) < len(self.losses):
            raise ValueError(f"losses: expected different names, got {self.losses}")
        if self.reference not in self.losses:
            raise ValueError(f"reference: expected one of {self.losses}, got {self.reference!r}")
        for kind in (*TABLES, "pictures"):
            for name in {record.loss for record in getattr(self, kind)}:
                if name not in self.losses:
                    raise ValueError(f"{kind}: expected losses of {self.losses}, got {name!r}")

    @property
    def metrics(self) -> list[str]:
        """The metrics that were measured, in their first order."""
        return list(dict.fromkeys(score.metric for score in self.scores))

    @property
    def labels(self) -> list[str]:
        """The classes that were measured, in their first order."""
        return list(dict.fromkeys(score.label for score in self.scores))

    @property
    def cases(self) -> list[str]:
        """The held-out cases, in their first order."""
        return list(dict.fromkeys(score.case for score in self.scores))

    def to_dict(self, *, pictures: bool = True) -> dict[str, Any]:
        """Everything as JSON has it: tables by column, NaN as None."""
        found: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "reference": self.reference,
            "losses": list(self.losses),
            "options": _plain(self.options),
        }
        for kind, record in TABLES.items():
            names = [each.name for each in fields(record)]
            rows = [[_plain(getattr(row, name)) for name in names] for row in getattr(self, kind)]
            found[kind] = {"columns": names, "rows": rows}
        if pictures:
            found["pictures"] = [
                {
                    "loss": each.loss,
                    "case": each.case,
                    "caption": each.caption,
                    "shape": list(each.image.shape),
                    "zlib": base64.b64encode(zlib.compress(each.image.tobytes(), 6)).decode(),
                }
                for each in self.pictures
            ]
        return found

    def to_json(self, *, pictures: bool = True) -> str:
        """As text; `from_json` reads it. ``pictures=False`` leaves the pictures out."""
        return json.dumps(self.to_dict(pictures=pictures), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Study:
        """A study from the text of `to_json`.

        Raises:
            ValueError: no such text.
        """
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"text: expected the JSON of a study, got {error}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            kind = found.get("format") if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"text: expected a study of format {FORMAT!r}, got {kind!r}")
        try:
            tables: dict[str, Any] = {
                kind: _records(record, found[kind]) for kind, record in TABLES.items()
            }
            pictures = [_picture(each) for each in found.get("pictures", ())]
            return cls(
                found["name"],
                found["reference"],
                list(found["losses"]),
                dict(found["options"]),
                pictures=pictures,
                **tables,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"text: expected a whole study, but {error!r}") from None

    def to_csv(self) -> str:
        """The scores, a row for each."""
        return _csv(Score, self.scores)

    def lesions_csv(self) -> str:
        """The Dice of single lesions, a row for each."""
        return _csv(LesionScore, self.lesions)


TABLES: dict[str, type] = {
    "scores": Score,
    "lesions": LesionScore,
    "curves": CurvePoint,
    "costs": Cost,
    "failures": Failure,
}
T = TypeVar("T")


def _plain(value: Any) -> Any:
    """As JSON has it: without NaN, infinity, NumPy's numbers, tuples and paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, np.ndarray)):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not isfinite(value):
        return None if isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


_READ: dict[str, Callable[[Any], Any]] = {
    "float": lambda value: (
        nan if value is None else {"Infinity": inf, "-Infinity": -inf}.get(value) or float(value)
    ),
    "int": int,
    "str": str,
}


def _records(record: type[T], table: Mapping[str, Any]) -> list[T]:
    read = {each.name: _READ[str(each.type)] for each in fields(record)}  # type: ignore[arg-type]
    names = table["columns"]
    return [
        record(**{name: read[name](value) for name, value in zip(names, row, strict=True)})
        for row in table["rows"]
    ]


def _picture(found: Mapping[str, Any]) -> Picture:
    pixels = np.frombuffer(zlib.decompress(base64.b64decode(found["zlib"])), np.uint8)
    image = pixels.reshape(found["shape"])
    return Picture(found["loss"], found["case"], found["caption"], image)


def _csv(record: type, rows: Iterable[Any]) -> str:
    names = [each.name for each in fields(record)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return text.getvalue()
