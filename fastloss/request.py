"""The request to a kernel: one small frozen record."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from fastloss.sums import Sum, as_sum, name_of, table

ACTIVATIONS = ("softmax", "sigmoid", "none")


class Places(dict[str | Sum, int]):
    """The place of every sum in a table, by the `Sum` or by its name."""

    def __missing__(self, name: str | Sum) -> int:
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
    first axis is in the order of ``sums``.
    """

    activation: str
    dense: bool
    ignore_index: int | None
    needs: frozenset[str | Sum]
    """Sums, and the names of families of sums: see `fastloss.sums.family`."""

    def ignores_number(self, classes: int) -> bool:
        """Whether the voxels of a dense target that hold ``ignore_index`` are ignored, which
        otherwise names the class that is."""
        ignore = self.ignore_index
        return ignore is not None and not (classes > 1 and 0 <= ignore < classes)

    @cached_property
    def sums(self) -> tuple[Sum, ...]:
        return table(self.needs, self.activation)

    @cached_property
    def index(self) -> Places:
        """The place of every sum, also by its name."""
        return Places((total, i) for i, total in enumerate(self.sums))

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
