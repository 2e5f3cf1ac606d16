"""Threads for the Numba kernels: they share out blocks, and the caller works along.

Numba's own threading layers do not serve here: one aborts when two Python threads use it at
once, another when a process forked from one that used it does. The kernels release the GIL, so
that plain threads will do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import count
from queue import SimpleQueue


class Job:
    """A function of block ranges, run over all of ``blocks`` by whoever has time."""

    def __init__(self, function: Callable[[int, int], None], blocks: int, chunk: int) -> None:
        self._function = function
        self._blocks = blocks
        self._chunk = chunk
        self._chunks = -(-blocks // chunk)
        # Steps of an itertools.count are atomic.
        self._started, self._finished = count(), count(1)
        self._done = threading.Event()
        self._error: BaseException | None = None

    def work(self) -> None:
        """Take chunks until none is left."""
        while (number := next(self._started)) < self._chunks:
            begin = number * self._chunk
            try:
                if self._error is None:
                    self._function(begin, min(begin + self._chunk, self._blocks))
            except BaseException as error:
                self._error = error
            if next(self._finished) == self._chunks:
                self._done.set()

    def wait(self) -> None:
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

    def run(self, function: Callable[[int, int], None], blocks: int, threads: int) -> None:
        """Call function(begin, end) on ranges that together make up all the blocks."""
        threads = min(threads, blocks)
        if threads <= 1:
            function(0, blocks)
            return
        if self._started < threads - 1:
            with self._lock:
                while self._started < threads - 1:
                    name = f"fastloss-{self._started}"
                    threading.Thread(target=self._serve, name=name, daemon=True).start()
                    self._started += 1
        # Several chunks a thread, as a thread may be held up.
        job = Job(function, blocks, max(1, blocks // (8 * threads)))
        for _ in range(threads - 1):
            self._queue.put(job)
        job.work()
        job.wait()

    def _serve(self) -> None:
        queue = self._queue
        while True:
            queue.get().work()
