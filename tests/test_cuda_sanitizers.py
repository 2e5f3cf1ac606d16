"""The CUDA kernels on the CPU under the compiler's sanitizers: memory, arithmetic, and races."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from typing import NamedTuple

import cuda_cases
import cuda_emulation
import numpy as np
import pytest
from cuda_cases import Case
from device_backend import EmulatedDevice
from support import _absent

if shutil.which(cuda_emulation.compiler()[0]) is None:
    _absent("c++", FileNotFoundError(cuda_emulation.compiler()[0]))

SCRIPT = "import cuda_cases, json, sys; cuda_cases.main(json.loads(sys.argv[1]), sys.argv[2])"


class Job(NamedTuple):
    case: Case
    fault: str = ""
    special: bool = False
    """Compiled for this kind of call alone."""


def run_sanitized(jobs: Sequence[Job], sanitize: str) -> dict[Job, tuple[int, str]]:
    """The exit code and standard error of every job; a job's reference is checked in it."""
    sanitizer = sanitize.partition(",")[0]

    def run(part: list[Job]) -> list[tuple[int, str]]:
        told = [{**job._asdict(), "case": asdict(job.case)} for job in part]
        result = cuda_emulation.sanitized_python(
            SCRIPT, sanitizer, json.dumps(told), sanitize, timeout=600
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout)

    try:
        cuda_emulation._command(sanitizer)
    except OSError as error:
        _absent(f"sanitizer.{sanitize}", error)
    # One process for every type of logits, which it compiles the kernels for.
    parts = [[job for job in jobs if job.case.logits == t] for t in cuda_cases.FACTORS["logits"]]
    parts = [part for part in parts if part]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {
            job: (code, said)
            for part, found in zip(parts, pool.map(run, parts), strict=True)
            for job, (code, said) in zip(part, found, strict=True)
        }


def assert_clean(found: tuple[int, str]) -> None:
    assert found == (0, ""), found[1]


# --- Memory and arithmetic ------------------------------------------------------------------------

COVERING = cuda_cases.covering()
SPECIAL = [
    Job(Case("float32", 3, "contiguous", "softmax uint8", (8, 16), "all", blocks=2), special=True),
    Job(Case("float16", 14, "channels last", "softmax int64", (257,), "region"), special=True),
    Job(Case("bfloat16", 40, "contiguous", "softmax uint8", (8, 16), "top_k", ignore=255), special=True),
    Job(Case("float64", 5, "cropped", "softmax dense uint8", (19, 27), "smooth"), special=True),
    Job(Case("float32", 300, "in place", "softmax uint8", (33,), "squared", "float32"), special=True),
    Job(Case("float16", 2, "contiguous", "sigmoid dense bfloat16", (8, 16), "focal"), special=True),
]  # fmt: skip
# Faults, a case in which each does harm, and what a sanitizer says of it.
ADDRESS_FAULTS = [
    (Job(Case(spatial=(257,)), "a voxel too many"), "heap-buffer-overflow"),
    (Job(Case(classes=17, spatial=(3, 11)), "a class too many"), "heap-buffer-overflow"),
    (Job(Case(layout="channels last", spatial=(7,)), "the last piece is whole"), "heap-buffer-overflow"),
    (Job(Case(layout="channels last", spatial=(257,)), "pieces from anywhere"), "misaligned address"),
]  # fmt: skip


@pytest.fixture(scope="module")
def address_sanitized() -> dict[Job, tuple[int, str]]:
    jobs = [*map(Job, COVERING), *SPECIAL, *(job for job, _ in ADDRESS_FAULTS)]
    return run_sanitized(jobs, "address,undefined")


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_memory_and_arithmetic(address_sanitized, case):
    assert_clean(address_sanitized[Job(case)])


@pytest.mark.parametrize("job", SPECIAL, ids=lambda job: str(job.case))
def test_memory_and_arithmetic_of_specialised_kernels(address_sanitized, job):
    assert_clean(address_sanitized[job])


@pytest.mark.parametrize(("job", "message"), ADDRESS_FAULTS, ids=lambda x: getattr(x, "fault", ""))
def test_memory_faults_are_seen(address_sanitized, job, message):
    code, said = address_sanitized[job]
    assert code != 0
    assert message in said
    assert "kernels.cu" in said


# --- Races ----------------------------------------------------------------------------------------

RACES = {
    "one warp a voxel": Case(classes=3, spatial=(257,), blocks=1),
    "two voxels a thread": Case(classes=5, spatial=(8, 34), needs="region", blocks=1),
    "by label, two warps": Case(classes=17, spatial=(257,), needs="region", blocks=1),
    "by label, three warps": Case(classes=33, spatial=(9, 32), needs="all", blocks=1),
    "by label, seven warps": Case(classes=105, spatial=(3, 32), needs="focal", blocks=1),
    "rounds": Case(classes=300, spatial=(3, 11), needs="region", blocks=1),
    "channels last": Case(layout="channels last", spatial=(257,), needs="region", blocks=1),
    "channels last, three warps": Case(classes=33, layout="channels last", spatial=(97,), needs="region", blocks=1),
    "in place, three warps": Case(classes=33, layout="in place", spatial=(65,), needs="region", blocks=1),
    "dense": Case(classes=40, target="softmax dense float32", spatial=(97,), needs="region", blocks=1),
    "dense rounds": Case(classes=300, target="softmax dense uint8", spatial=(33,), needs="smooth", blocks=1),
    "sigmoid": Case(classes=17, target="sigmoid dense bfloat16", spatial=(3, 65), needs="smooth", blocks=1),
    "two blocks": Case(classes=14, spatial=(19, 27), needs="squared", blocks=4),
    "top k": Case(classes=3, spatial=(19, 27), needs="top_k", blocks=2),
    "flush": Case(classes=105, spatial=(545,), needs="region", blocks=1),
    "global": Case(classes=1500, spatial=(65,), needs="region", blocks=1),
}  # fmt: skip


@pytest.fixture(scope="module")
def thread_sanitized() -> dict[Job, tuple[int, str]]:
    return run_sanitized([*map(Job, RACES.values())], "thread")


@pytest.mark.parametrize("name", RACES)
def test_no_races(thread_sanitized, name):
    assert_clean(thread_sanitized[Job(RACES[name])])
