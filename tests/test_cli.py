"""``python -m fastloss``: its output, its files, and its errors."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import need, need_backend, python

import fastloss as fl
from fastloss.bench.memory import peak, reset_peak


def command(
    *arguments: str, absent: tuple[str, ...] = (), **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m fastloss …``, with some packages made unimportable."""
    return python(
        "import runpy, sys\n"
        + "".join(f"sys.modules[{name!r}] = None\n" for name in absent)
        + f"sys.argv = ['fastloss', *{arguments!r}]\n"
        "runpy.run_module('fastloss', run_name='__main__', alter_sys=True)\n",
        timeout=300,
        **{"FASTLOSS_BACKEND": None, **environment},
    )


def bench(
    *arguments: str,
    backends: str = "reference",
    peers: str = "none",
    frameworks: str = "none",
    absent: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    return command(
        "bench",
        "--volume",
        "phantom",
        "--size",
        "8",
        "--repeats",
        "1",
        "--backends",
        backends,
        "--peers",
        peers,
        "--frameworks",
        frameworks,
        *arguments,
        absent=absent,
    )


def test_info() -> None:
    result = command("info")
    assert result.returncode == 0
    assert fl.__version__ in result.stdout
    for name in ("cpu", "numba", "reference"):
        assert f"\n  {name} " in result.stdout
    assert not result.stderr


def test_info_names_the_remedy_for_what_is_missing() -> None:
    result = command("info", absent=("fastloss._cpu", "numba"))
    assert result.returncode == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert "missing" in lines["cpu"]
    assert "compiler" in lines["cpu"]
    assert "missing" in lines["numba"]
    assert "pip install" in lines["numba"]
    assert "available" in lines["reference"]
    assert "missing" in lines["cuda"] or "available" in lines["cuda"]
    assert "default backend  reference" in result.stdout


def test_info_with_an_unknown_backend_in_the_environment() -> None:
    result = command("info", FASTLOSS_BACKEND="cuda")
    assert "Traceback" not in result.stderr
    assert "'cuda'" in result.stdout + result.stderr


def test_peak_of_a_call() -> None:
    """The memory that a call has at once, over that before it, though it is free again after."""
    pages = 32 << 20
    found = peak(lambda: np.ones(pages, np.uint8).sum() + np.ones(pages, np.uint8).sum())
    if found is None:
        assert not reset_peak()
        assert not os.access("/proc/self/clear_refs", os.W_OK)
        pytest.skip("this system does not tell the peak of a process")
    assert 0.95 * pages < found < 1.5 * pages


def test_bench_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    result = bench("--losses", "dice_ce", "--classes", "3", "--batch", "2", "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert "dice_ce" in result.stdout
    assert "reference" in result.stdout
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["logits_shape"] == [2, 3, 8, 8, 8]
    (row,) = report["rows"]
    assert (row["loss"], row["implementation"]) == ("dice_ce", "reference")
    assert row["forward"] > 0
    assert row["forward_backward"] > 0
    assert row["value_error"] < 1e-6
    assert row["gradient_error"] < 1e-6


def test_bench_of_the_kernels(tmp_path: Path) -> None:
    need_backend("cpu")
    file = tmp_path / "results.json"
    result = bench("--dtype", "float16", "--json", str(file), backends="cpu,reference")
    assert result.returncode == 0, result.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = report["rows"]
    assert [row["implementation"] for row in rows] == ["cpu", "reference"]
    assert all(row["value_error"] < 1e-6 and row["gradient_error"] < 1e-3 for row in rows)
    own, reference = rows
    logits = math.prod(report["logits_shape"])
    for row in rows:
        assert row["ns_per_logit"] == pytest.approx(row["forward_backward"] / logits * 1e9)
    # The reference is not written to be fast, and no slowest implementation.
    assert own["speedup_over_slowest"] == 1
    times = own["forward_backward"], reference["forward_backward"]
    assert reference["speedup_over_slowest"] == pytest.approx(times[0] / times[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_through_pytorch(tmp_path: Path, dtype: str) -> None:
    need("torch")
    need("ml_dtypes")
    file = tmp_path / "results.json"
    result = bench("--dtype", dtype, "--json", str(file), frameworks="torch")
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["implementation"] for row in rows] == ["reference", "torch"]
    assert "fastloss in PyTorch" in result.stdout
    rounding = 1e-6 if dtype == "float32" else 1e-2
    assert all(row["value_error"] < 1e-6 and row["gradient_error"] < rounding for row in rows)


def test_a_missing_peer_is_a_line_not_an_error(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    absent = ("jax", "jaxlib", "torch", "monai")
    result = bench("--json", str(file), peers="jax,monai", absent=absent)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stdout.splitlines() if "pip install" in line]
    assert any("jax" in line.lower() for line in lines)
    assert any("monai" in line.lower() for line in lines)
    report = json.loads(file.read_text(encoding="utf-8"))
    assert len(report["missing"]) == 2
    assert len(report["rows"]) == 1


def test_bench_leaves_numba_out_and_says_so() -> None:
    """By default Numba is skipped, as it compiles for half a minute. Time and memory come first."""
    need_backend("cpu")
    need_backend("numba")
    result = command("bench", "--volume", "phantom", "--size", "8", "--repeats", "1",
                     "--peers", "none", "--frameworks", "none")  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "fastloss (C++): " in lines[3]
    assert "MiB of extra memory" in lines[3]
    assert "no peer was measured" in lines[4]
    assert any("timed once" in line for line in lines)
    (numba,) = (line for line in lines if "Numba" in line)
    assert "--backends cpu,numba,reference" in numba


def test_a_missing_backend_is_a_line_too() -> None:
    result = bench(backends="cpu,reference", absent=("fastloss._cpu",))
    assert result.returncode == 0, result.stderr
    assert "compiler" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--size", "0"), "--size"),
        (("--size", "8x8"), "--size"),
        (("--size", "large"), "--size"),
        (("--classes", "1"), "--classes"),
        (("--batch", "0"), "--batch"),
        (("--repeats", "0"), "--repeats"),
        (("--repeats", "x"), "--repeats"),
        (("--dtype", "int8"), "--dtype"),
        (("--losses", "hinge"), "--losses"),
        (("--losses", ""), "--losses"),
        (("--backends", "cuda"), "--backends"),
        (("--peers", "keras"), "--peers"),
        (("--frameworks", "caffe"), "--frameworks"),
        (("--volume", "nowhere.nii.gz"), "--volume"),
        (("--json", "no/such/folder/file.json"), "--json"),
        (("--speed", "9"), "--speed"),
    ],
)
def test_bad_arguments(arguments: tuple[str, str], named: str) -> None:
    result = bench(*arguments)
    assert result.returncode == 2
    assert named in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not result.stdout


@pytest.mark.parametrize("arguments", [(), ("train",), ("info", "--fast")])
def test_bad_commands(arguments: tuple[str, ...]) -> None:
    result = command(*arguments)
    assert result.returncode == 2
    assert "usage" in result.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("bench", "--help"), ("info", "--help")])
def test_help(arguments: tuple[str, ...]) -> None:
    result = command(*arguments)
    assert result.returncode == 0
    assert "usage" in result.stdout
