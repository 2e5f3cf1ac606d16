"""How long does the import take, beyond NumPy's, which every user imports anyway?

extra_info has the median milliseconds of ``import fastloss`` after ``import numpy``, each in a new
process; the benchmark's own time is that of the processes.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median

PROGRAM = """
from time import perf_counter
import numpy
start = perf_counter()
import fastloss
print(perf_counter() - start)
"""


def test_import(benchmark):
    seconds = []

    def measure():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
        )
        seconds.append(float(done.stdout))

    benchmark.pedantic(measure, rounds=9, warmup_rounds=1)
    benchmark.extra_info["import_over_numpy_ms"] = round(median(seconds) * 1e3, 2)
