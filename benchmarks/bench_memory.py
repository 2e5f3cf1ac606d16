"""What is the peak memory of a call for value and gradient, without its inputs?

Each implementation is measured in a separate process, whose time means nothing. The result is in
extra_info: ``peak_bytes``, and ``peak_per_logits_bytes``, its ratio to the bytes of the logits. 1
is the gradient itself.
"""

from __future__ import annotations

import pytest
from conftest import BACKEND, case_of

from fastloss.bench.apart import peak_memory, saved
from fastloss.bench.errors import Unavailable
from fastloss.bench.implementations import FRAMEWORKS, PEERS


@pytest.mark.parametrize("name", [BACKEND, *FRAMEWORKS, *PEERS])
def test_memory(name, benchmark, threads):
    case = case_of(96, 4)
    with saved(case) as folder:
        try:
            peak = benchmark.pedantic(
                peak_memory, args=(name, folder, "dice_ce", threads), rounds=1
            )
        except Unavailable as error:
            pytest.skip(f"{name}: {error}")
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    benchmark.extra_info["peak_bytes"] = peak
    benchmark.extra_info["peak_per_logits_bytes"] = round(peak / case.nbytes, 2)
