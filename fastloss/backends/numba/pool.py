"""Threads that take blocks in turn.

Numba's own threading layers do not serve here: one aborts when two Python threads use it at
once, another when a process forked from one that used it does. The kernels release the GIL, so
that plain threads will do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress


class Pool:
    """Runs a function on several threads; in a forked child it starts its own."""

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._workers = 0

    def run(self, function: Callable[[], None], threads: int) -> None:
        """Call the function from so many threads, one of them the caller's.

        The function takes turns with itself until nothing is left to do, so a thread that is
        still busy elsewhere when the caller's has returned is not waited for.
        """
        if threads <= 1:
            function()
            return
        others = []
        with suppress(RuntimeError):  # no more threads start, as at the end of the process
            for _ in range(threads - 1):
                others.append(self._executor_for(threads - 1).submit(function))
        try:
            function()
        finally:
            begun = [other for other in others if not other.cancel()]
            errors = [other.exception() for other in begun]  # waits for them
        for error in errors:
            if error is not None:
                raise error

    def _executor_for(self, workers: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None or self._workers < workers:
                # The old one, if there is one, ends when the calls that have it do.
                self._executor = ThreadPoolExecutor(workers, thread_name_prefix="fastloss")
                self._workers = workers
            return self._executor
