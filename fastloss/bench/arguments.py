"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def results_file(text: str) -> Path:
    """A CSV file that can be added to: better said now than after minutes of measuring."""
    path = Path(text)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a CSV file in a folder there is, got {text!r}")
    return path


def subset(choices: Sequence[str], *, everything: bool = False) -> Callable[[str], tuple[str, ...]]:
    """A comma-separated choice; with ``everything``, also "all" and "none"."""

    def convert(text: str) -> tuple[str, ...]:
        if everything and text in ("all", "none"):
            return tuple(choices) if text == "all" else ()
        names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(
                    f"expected some of {', '.join(choices)}"
                    + (", or 'all' or 'none'" if everything else "")
                    + f", got {name!r}"
                )
        if not names:
            raise argparse.ArgumentTypeError("expected at least one name")
        return names

    return convert
