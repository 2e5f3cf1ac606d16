"""Errors before or during a measurement."""

from __future__ import annotations


class BadArgument(ValueError):
    """An invalid option of the benchmark; the message names it."""

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"argument {argument}: {message}")


class Unavailable(Exception):
    """An implementation that cannot be measured here; the message says why."""


def reason(error: BaseException, limit: int = 160) -> str:
    """The first line of an error, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
