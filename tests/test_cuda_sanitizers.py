"""The CUDA kernels on the CPU under the compiler's sanitizers: memory, arithmetic, and races.

Compiling the kernels takes minutes: ``pytest -m slow`` runs these tests, and so does `.ci/run`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import cuda_cases
import cuda_emulation
import pytest
from cuda_cases import Case
from device_backend import EmulatedDevice
from support import _absent, made_once

if shutil.which(cuda_emulation.compiler()[0]) is None:
    _absent("c++", FileNotFoundError(cuda_emulation.compiler()[0]))

pytestmark = pytest.mark.slow

SCRIPT = "import cuda_cases, json, sys; cuda_cases.main(json.loads(sys.argv[1]), sys.argv[2])"


class Job(NamedTuple):
    case: Case
    fault: str = ""
    special: bool = False
    """Whether the kernels are compiled for this kind of call only."""


def run_sanitized(jobs: Sequence[Job], sanitize: str) -> dict[Job, tuple[int, str]]:
    """The exit code and standard error of every job; each compares with the reference itself."""
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
    # Separate processes for each dtype of logits, for which they compile the kernels.
    by_type = [[job for job in jobs if job.case.logits == t] for t in cuda_cases.FACTORS["logits"]]
    by_type = [part for part in by_type if part]
    parts = [part[i::2] for part in by_type for i in range(2)] if len(by_type) == 1 else by_type
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
LAST = "channels last"
SPECIAL = [
    Job(case, special=True)
    for case in (
        Case("float32", 3, "contiguous", "softmax uint8", (8, 16), "all", blocks=2),
        Case("float16", 14, "channels last", "softmax int64", (257,), "region"),
        Case("bfloat16", 40, "contiguous", "softmax uint8", (8, 16), "top_k", ignore=255),
        Case("float64", 5, "cropped", "softmax dense uint8", (19, 27), "smooth"),
        Case("float32", 300, "in place", "softmax uint8", (33,), "squared", "float32"),
        Case("float16", 2, "contiguous", "sigmoid dense bfloat16", (8, 16), "focal"),
        Case("float32", 5, "contiguous", "softmax uint8", (19, 27), "unusual", extras="two fields"),
        Case("float32", 3, "cropped", "softmax uint8", (257,), "region", extras="40 regions"),
        Case(
            "float16", 4, LAST, "sigmoid dense uint8", (257,), "all", extras="3 regions", blocks=2
        ),
        Case("float64", 9, "reversed", "softmax int64", (19, 27), "smooth", map_kind="voxel"),
        Case("float32", 2, "contiguous", "none dense float16", (7,), "squared", map_kind="error"),
        Case("float32", 5, "packed", "softmax int64", (3, 11), "region", "float32"),
        Case("float16", 3, "packed", "sigmoid int16", (257,), "all", extras="3 regions"),
        Case("float64", 3, "packed", "softmax float32", (7,), "squared", map_kind="class"),
    )
]
# Faults, each in a case in which it does harm, and the expected report.
ADDRESS_FAULTS = [
    (Job(Case(), "a voxel too many"), "heap-buffer-overflow"),
    (Job(Case(classes=41), "a class too many"), "heap-buffer-overflow"),
    (Job(Case(layout=LAST, batch=1), "the last tile is whole"), "heap-buffer-overflow"),
    (Job(Case(layout=LAST), "pieces from anywhere"), "misaligned address"),
    (Job(Case(needs="unusual"), "a voxel too many"), "heap-buffer-overflow"),
    (Job(Case(classes=17, extras="40 regions"), "any region"), "heap-buffer-overflow"),
]


@pytest.fixture(scope="module")
def address_sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[Job, tuple[int, str]]:
    jobs = [*map(Job, COVERING), *SPECIAL, *(job for job, _ in ADDRESS_FAULTS)]
    shared = tmp_path_factory.getbasetemp().parent
    return made_once(shared, "address", lambda: run_sanitized(jobs, "address,undefined"))


def test_memory_and_arithmetic(address_sanitized):
    bad = {str(case): address_sanitized[Job(case)] for case in COVERING}
    bad = {case: found for case, found in bad.items() if found != (0, "")}
    assert not bad, "\n".join(f"{case}: {said}" for case, (_, said) in bad.items())


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
    "few classes": Case("float32", 3, spatial=(257,), blocks=1, batch=1),
    "four voxels a thread": Case("float32", 5, spatial=(8, 65), needs="region", blocks=1, batch=1),
    "two blocks, two samples": Case("float32", 14, spatial=(129,), needs="squared", blocks=4),
    "17 classes": Case("float32", 17, spatial=(193,), needs="region", blocks=1, batch=1),
    "40 classes": Case("float32", 40, spatial=(9, 32), needs="squared", blocks=1, batch=1),
    "105 classes": Case("float32", 105, spatial=(33,), needs="focal", blocks=1, batch=1),
    "300 classes": Case("float32", 300, spatial=(33,), needs="region", blocks=1, batch=1),
    "1030 classes": Case("float32", 1030, spatial=(9,), needs="focal", blocks=1, batch=1),
    "channels last": Case(
        "float32", 3, "channels last", spatial=(641,), needs="region", blocks=1, batch=1
    ),
    "channels last, 33 classes": Case(
        "float32", 33, "channels last", spatial=(97,), needs="smooth", blocks=1, batch=1
    ),
    "in place, 40 classes": Case(
        "float32", 40, "in place", spatial=(65,), needs="region", blocks=1, batch=1
    ),
    "dense, 40 classes": Case(
        "float32", 40, "in place", "softmax dense float32", (97,), "region", blocks=1, batch=1
    ),
    "dense, 130 classes": Case(
        "float32", 130, "contiguous", "softmax dense uint8", (17,), "region", blocks=1, batch=1
    ),
    "sigmoid": Case(
        "float32", 17, "contiguous", "sigmoid dense bfloat16", (193,), "smooth", blocks=1, batch=1
    ),
    "top k": Case("float32", 3, spatial=(200,), needs="top_k", blocks=1, batch=1),
    "any table": Case("float32", 3, spatial=(400,), needs="unusual", blocks=1, batch=1),
    "many classes of any table": Case(
        "float32", 105, spatial=(140,), needs="unusual", blocks=1, batch=1
    ),
    "fields of any table": Case(
        "float32", 3, "in place", spatial=(200,), extras="two fields", blocks=1, batch=1
    ),
    "regions": Case("float32", 4, spatial=(400,), extras="3 regions", blocks=1, batch=1),
    "many regions": Case(
        "float32", 17, spatial=(200,), needs="region", extras="40 regions", blocks=1, batch=1
    ),
    "33 tiles": Case("float32", 40, spatial=(4224,), needs="region", blocks=1, batch=1),
    "17 tiles of few classes": Case("float32", 3, spatial=(8704,), blocks=1, batch=1),
    "channels last, 40 classes": Case(
        "float32", 40, "channels last", spatial=(193,), needs="region", blocks=1, batch=1
    ),
}


# The means that prevent races, and a case that needs each.
RACE_FAULTS = {
    "exchange has one half": "40 classes",
    "warps take no turns": "40 classes",
    "every lane adds": "1030 classes",
    "the label's logit comes late": "in place, 40 classes",
    "no barrier in exchange": "105 classes",
    "no barrier in next_tile": "channels last",
    "no barrier in store_tile": "channels last",
    "no barrier in store_tile, 2.": "channels last",
    "no barrier in Coefficients": "four voxels a thread",
    "no barrier in finish_numbers": "few classes",
    "no barrier in Sums": "four voxels a thread",
    "no barrier in take_tallies": "few classes",
    "no barrier in take_tallies, 2.": "17 tiles of few classes",
    "no barrier in finish": "four voxels a thread",
    "no barrier in reduce_block": "channels last",
    "no barrier in Accumulators": "any table",
    "no barrier in write_partial": "any table",
    "no barrier in Derivatives": "any table",
    "no barrier in count_digits": "top k",
    "no barrier in count_digits, 2.": "top k",
    "no barrier in share": "top k",
}


@pytest.fixture(scope="module")
def thread_sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[Job, tuple[int, str]]:
    jobs = [*map(Job, RACES.values()), *(Job(RACES[n], fault) for fault, n in RACE_FAULTS.items())]
    shared = tmp_path_factory.getbasetemp().parent
    return made_once(shared, "thread", lambda: run_sanitized(jobs, "thread"))


def test_every_barrier_has_a_case():
    needed = {f"no barrier in {name}" for name in cuda_cases.barriers()}
    assert needed == {fault for fault in RACE_FAULTS if fault.startswith("no barrier")}


@pytest.mark.parametrize("name", RACES)
def test_no_races(thread_sanitized, name):
    assert_clean(thread_sanitized[Job(RACES[name])])


@pytest.mark.parametrize(("fault", "name"), RACE_FAULTS.items())
def test_races_are_seen(thread_sanitized, fault, name):
    code, said = thread_sanitized[Job(RACES[name], fault)]
    assert code == 66, said
    assert "data race" in said
    assert "kernels.cu" in said


# --- The order of blocks and threads --------------------------------------------------------------

ORDERED = [
    Case("float32", 3, spatial=(19, 27)),
    Case("float16", 17, "cropped", "softmax int64", (257,), "focal", ignore=255),
    Case("float64", 40, spatial=(8, 16), needs="squared"),
    Case("float32", 300, spatial=(3, 11), needs="region"),
    Case("bfloat16", 5, "channels last", "softmax uint8", (19, 27), "smooth", "float32"),
    Case("float32", 33, "in place", "softmax dense float32", (257,), "region"),
    Case("float32", 14, "reversed", "sigmoid int16", (19, 27), "focal"),
    Case("float32", 3, "contiguous", "softmax uint8", (19, 27), "top_k"),
    Case("float32", 3, "contiguous", "softmax uint8", (19, 27), "unusual", extras="3 regions"),
    Case("bfloat16", 40, LAST, "softmax dense float32", (257,), extras="two fields"),
]


@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(case):
    expected = cuda_cases.run(case, EmulatedDevice())
    for order in ("reverse", "random"):
        for got, other in zip(
            cuda_cases.run(case, EmulatedDevice(order=order)), expected, strict=True
        ):
            assert got.tobytes() == other.tobytes()
