"""Text tables."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first left-aligned, the others right-aligned.

    A header may have two lines, separated by a line feed.
    """
    depth = max(h.count("\n") for h in header) + 1
    heads = [h.split("\n") + [""] * (depth - 1 - h.count("\n")) for h in header]
    lines = [[h[i] for h in heads] for i in range(depth)]
    widths = [max(len(line[i]) for line in (*lines, *rows)) for i in range(len(header))]
    rule = ["─" * w for w in widths]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (*lines, rule, *rows)
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same in Markdown."""
    align = ["---"] + ["---:"] * (len(header) - 1)
    heads = [h.replace("\n", " ") for h in header]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, align, *rows))


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value is None:
        return "-"
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    text = f"{value:#.{digits}g}"
    return text.rstrip(".")


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else number(seconds * 1e3)


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else number(seconds * 1e6)


def error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def mebibytes(count: float | None) -> str:
    return "-" if count is None else number(count / 2**20)


def times(ratio: float | None) -> str:
    return "-" if ratio is None else number(ratio) + "×"
