"""Threads for the Numba kernels: all run the same function, which shares out blocks.

Numba's own threading layers do not serve here: one aborts when two Python threads use it at
once, another when a process forked from one that used it does. The kernels release the GIL, so
that plain threads will do. A thread enters a kernel only once, as it must hold the GIL to.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Job:
    """A function that takes turns with itself, until nothing is left to do."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._running = 0
        self._error: BaseException | None = None

    def work(self) -> None:
        """Call the function, unless it is too late for that."""
        with self._lock:
            function = self._function
            if function is None:
                return
            self._running += 1
        try:
            function()
        except BaseException as error:
            self._error = error
        del function  # and with it the arrays, before anybody is told
        with self._lock:
            self._running -= 1
            if self._function is None and not self._running:
                self._done.set()

    def finish(self) -> None:
        """Wait for those who began; nobody begins any more."""
        with self._lock:
            self._function = None
            if not self._running:
                self._done.set()
        self._done.wait()
        if self._error is not None:
            raise self._error


class Pool:
    """Threads that wait for jobs. They are started when first needed, in a forked child anew."""

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Job] = SimpleQueue()
        self._started = 0

    def run(self, function: Callable[[], None], threads: int) -> None:
        """Call the function from so many threads, until it returns in the one that called."""
        if threads <= 1:
            function()
            return
        if self._started < threads - 1:
            with self._lock:
                while self._started < threads - 1:
                    name = f"fastloss-{self._started}"
                    threading.Thread(target=self._serve, name=name, daemon=True).start()
                    self._started += 1
        job = Job(function)
        for _ in range(threads - 1):
            self._queue.put(job)
        job.work()
        job.finish()

    def _serve(self) -> None:
        queue = self._queue
        while True:
            queue.get().work()
