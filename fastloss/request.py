"""The request to a kernel: one small frozen record."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from fastloss.histogram import HISTOGRAMS, layout
from fastloss.sums import Sum, as_sum, name_of, table

ACTIVATIONS = ("softmax", "sigmoid", "none")


class Places(dict[str | Sum, Any]):
    """The place of every sum in a table, by the `Sum` or by its name; of a histogram a slice."""

    def __missing__(self, name: str | Sum) -> Any:
        try:
            place = self.get(as_sum(name))
        except (KeyError, ValueError):
            place = None
        if place is None:
            there = ", ".join(name_of(total) for total in self if isinstance(total, Sum))
            raise KeyError(f"expected one of the sums {there}, got {name!r}")
        self[name] = place
        return place


@dataclass(frozen=True)
class Request:
    """The sums that one loss needs, for one kind of target.

    The sums over the voxels of every row and class form an array (S, rows, C) of float64, whose
    first axis is in the order of ``sums``. Behind them are those of the ``histograms``.
    """

    activation: str
    dense: bool
    ignore_index: int | None
    needs: frozenset[str | Sum]
    """Sums, the names of families of sums (see `fastloss.sums.family`) and of histograms."""

    def ignores_number(self, classes: int) -> bool:
        """Whether the voxels of a dense target that hold ``ignore_index`` are ignored, which
        otherwise names the class that is."""
        ignore = self.ignore_index
        return ignore is not None and not (classes > 1 and 0 <= ignore < classes)

    @cached_property
    def sums(self) -> tuple[Sum, ...]:
        return table(self.needs, self.activation)

    @cached_property
    def histograms(self) -> tuple[str, ...]:
        """The kinds of error that are counted: see `fastloss.histogram`."""
        return tuple(kind for kind in HISTOGRAMS if kind in self.needs)

    @cached_property
    def slots(self) -> int:
        """S: how many sums there are, with those of histograms."""
        return len(self.sums) + sum(layout(kind).slots for kind in self.histograms)

    @cached_property
    def index(self) -> Places:
        """The place of every sum, also by its name; by that of a histogram those of its slots."""
        places = Places((total, i) for i, total in enumerate(self.sums))
        first = len(self.sums)
        for kind in self.histograms:
            places[kind] = slice(first, first + layout(kind).slots)
            first += layout(kind).slots
        return places

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that the sums read, in the order of `Arrays.fields`."""
        return tuple(sorted({total.field for total in self.sums} - {""}))


@lru_cache(maxsize=1024)
def make_request(
    activation: str, dense: bool, ignore_index: int | None, needs: frozenset[str | Sum]
) -> Request:
    """The Request with these fields; the same object each time, so that its layout is made once."""
    return Request(activation, dense, ignore_index, needs)
