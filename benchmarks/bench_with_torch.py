"""Does sharing a process with PyTorch and its threads cost time?

extra_info has ``seconds_alone``, ``seconds_after_torch`` and their ``ratio``, medians over pairs
of new processes; the benchmark's own time is that of the processes.
"""

from __future__ import annotations

from importlib.util import find_spec
from statistics import median

import pytest
from conftest import BACKEND, case_of

from fastloss.bench.apart import run_apart, saved


@pytest.mark.parametrize("size", [32, 96])
def test_with_torch(size, benchmark, threads):
    if find_spec("torch") is None:
        pytest.skip("torch is not there; pip install 'fastloss[peers]'")
    seconds = {False: [], True: []}

    with saved(case_of(size, 4)) as folder:

        def pair():
            for after_torch in seconds:
                answer = run_apart(
                    "time",
                    folder,
                    implementation=BACKEND,
                    loss="dice_ce",
                    threads=threads,
                    after_torch=after_torch,
                    repeats=15,
                )
                seconds[after_torch].append(answer["seconds"])

        benchmark.pedantic(pair, rounds=5)
    alone, after = median(seconds[False]), median(seconds[True])
    benchmark.extra_info["seconds_alone"] = alone
    benchmark.extra_info["seconds_after_torch"] = after
    benchmark.extra_info["ratio"] = round(after / alone, 3)
