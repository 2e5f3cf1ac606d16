"""How far a command has come, on a terminal or in a log."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TextIO

WIDTH = 30


class Progress:
    """A bar on a terminal; elsewhere a line at every tenth of the way."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.done = total, 0
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.start = perf_counter()

    def step(self, problem: str = "") -> None:
        """One more is done; ``problem`` is a line to stay."""
        self.done += 1
        if problem:
            self.say(problem)
        seconds = perf_counter() - self.start
        left = seconds / self.done * (self.total - self.done)
        count = f"{self.done:>{len(str(self.total))}}/{self.total}"
        if self.terminal:
            full = WIDTH * self.done // self.total
            bar = "█" * full + "░" * (WIDTH - full)
            rest = f"{left:.0f} s left" if self.done < self.total else f"in {seconds:.1f} s"
            self.stream.write(f"\r{bar} {count}, {rest}\x1b[K")
            if self.done == self.total:
                self.stream.write("\n")
        elif 10 * self.done // self.total > 10 * (self.done - 1) // self.total:
            self.stream.write(f"[{seconds:5.1f} s] {count}\n")
        self.stream.flush()

    def say(self, line: str) -> None:
        """A line above the bar."""
        clear = "\r\x1b[K" if self.terminal else ""
        self.stream.write(f"{clear}{line}\n")
        self.stream.flush()
