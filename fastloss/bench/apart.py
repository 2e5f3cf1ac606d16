"""Measurements in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastloss
from fastloss.bench.errors import Unavailable
from fastloss.bench.inputs import Case, save_case


@contextmanager
def saved(case: Case) -> Iterator[Path]:
    """A folder that holds the case while the ``with`` block runs."""
    with tempfile.TemporaryDirectory(prefix="fastloss-") as folder:
        save_case(case, Path(folder))
        yield Path(folder)


def run_apart(task: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Run a task of `fastloss.bench.worker` on a saved case; return its answer.

    Raises:
        Unavailable: it failed; the message is its last line of output.
    """
    order = json.dumps({"task": task, "folder": str(folder), **options})
    environment = os.environ | {
        # malloc returns freed memory to the system at once, whatever was allocated before.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(_search_path()),
    }
    done = subprocess.run(
        [sys.executable, "-m", "fastloss.bench.worker", order],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        complaint = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise Unavailable(complaint)
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _search_path() -> list[str]:
    own = str(Path(fastloss.__file__).parent.parent)
    return [own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def peak_memory(name: str, folder: Path, loss: str, threads: int) -> int | None:
    """The peak memory of one call for value and gradient in bytes, without its inputs.

    The gradient is included. None where the system does not report it.
    """
    peak = run_apart("memory", folder, implementation=name, loss=loss, threads=threads)["peak"]
    return None if peak is None else int(peak)
