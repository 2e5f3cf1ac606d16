"""Compiled CUDA kernels: they compile without error, do not spill registers, and use wide loads.

No GPU is needed. ``FASTLOSS_TEST_ALL_ARCHITECTURES=1`` compiles every kind of call for every
architecture. Run as a script, it prints the resources of each kernel; see ``--help``.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_variants
import pytest
import support
from cuda_variants import Kind

from fastloss.backends.cuda.backend import _OPTIONS
from fastloss.backends.cuda.call import DENSE, GENERAL, LABELS, TWO_CLASSES

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")
MAIN = "sm_90"
"""Every kind of call is compiled for this architecture, and some for each of the others."""
# CuPy adds the last option.
OPTIONS = (*_OPTIONS, "-ftz=true")


@dataclass(frozen=True)
class Usage:
    """The resources of a kernel: registers per thread, the others in bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int

    @property
    def in_memory(self) -> bool:
        """Whether registers are spilled to memory."""
        return bool(self.stack or self.spill_stores or self.spill_loads)


_REPORT = re.compile(
    r"Function properties for (\w+)\n"
    r"\W*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r"(?:.*Used (\d+) registers(?:.*?(\d+) bytes smem)?)?"
)


def usages(report: str) -> dict[str, Usage]:
    """The report of ``ptxas --verbose`` by function. Called functions have no own registers."""
    found = {}
    for name, stack, stores, loads, registers, shared in _REPORT.findall(report):
        found[name] = Usage(
            int(registers or 0), int(stack), int(stores), int(loads), int(shared or 0)
        )
    return found


@functools.cache
def nvcc(text: str, names: tuple[str, ...], architecture: str) -> tuple[dict[str, Usage], bytes]:
    """The `usages` and the cubin of a source that must compile to all these kernels."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        source.write_text(text)
        command = ["nvcc", *OPTIONS, "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
        command += ["-o", str(cubin), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"nvcc for {architecture}:\n{result.stdout}{result.stderr}"
        found, binary = usages(result.stderr), cubin.read_bytes()
    missing = [name for name in names if not (name in found and found[name].registers)]
    assert not missing, f"nvcc for {architecture} reports nothing of {missing}:\n{result.stderr}"
    return found, binary


def need_nvcc() -> None:
    if shutil.which("nvcc") is None:
        support._absent("nvcc", ImportError("not on the PATH"))


def file_of_package(package: str, pattern: str) -> Path:
    """A file of an installed NVIDIA package; skip with the package's name if missing."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        support._absent(package, error)
    for file in files:
        if file.match(pattern):
            return Path(str(file.locate()))
    support._absent(package, ImportError(f"it has no file {pattern}"))
    raise AssertionError


def for_all(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Run in as many threads as there are processors, as the work is a compiler's."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(work, items))


EVERYTHING = os.environ.get("FASTLOSS_TEST_ALL_ARCHITECTURES", "0") not in ("", "0")
"""Whether every kind of call is compiled for every architecture, which takes minutes."""


def kinds_for(architecture: str) -> list[Kind]:
    """Kinds that have every value of every factor, others per architecture; more for `MAIN`."""
    if EVERYTHING:
        return list(cuda_variants.kinds())
    found = cuda_variants.covering(start=30 * ARCHITECTURES.index(architecture))
    more = cuda_variants.kinds()[::5] if architecture == MAIN else ()
    return list(dict.fromkeys([*found, *more]))


def general_kinds_for(architecture: str) -> list[cuda_variants.GeneralKind]:
    """Half of them for `MAIN`, and an eighth for each of the others."""
    kinds = cuda_variants.general_kinds()
    if EVERYTHING:
        return kinds
    return kinds[::2] if architecture == MAIN else kinds[1 + ARCHITECTURES.index(architecture) :: 8]


# ------------------------------------------------------------------------------ the kinds of calls


def test_any_two_values_of_a_call_meet() -> None:
    met = {pair for kind in cuda_variants.kinds() for pair in cuda_variants.pairs(kind)}
    assert all(cuda_variants.possible(kind) for kind in cuda_variants.kinds())
    for activation, target, terms, kernel in (
        ("softmax", "uint8", "top_k", "apply"),
        ("softmax", "int64", "dice+ce", "reduce"),
        ("sigmoid", "dense uint8", "focal1.5", "apply"),
        ("none", "dense float32", "tversky", "reduce"),
    ):
        for dtype in cuda_variants.FACTORS["logits"]:
            for classes in cuda_variants.FACTORS["classes"]:
                for layout in cuda_variants.FACTORS["layout"]:
                    kind = Kind(kernel, dtype, layout, classes, activation, target, terms, "uint8")
                    assert met.issuperset(cuda_variants.pairs(kind)), str(kind)


@pytest.mark.parametrize(
    "constant", ["staged", "interleaved", "packed_target", "packed_weight", "keep_sums", "large",
                 "with_losses", "global_sums", "global_table", "rounds", "vector", "warps",
                 "staged_bytes", "path"]
)  # fmt: skip
def test_every_path_through_the_kernels_occurs(constant: str) -> None:
    taken = {cuda_variants.compiled(kind).constant(constant) for kind in cuda_variants.kinds()}
    least = {
        "vector": {1, 2, 4, 8},
        "staged_bytes": {2, 4, 8, 16},
        "warps": {1, 2},
        "rounds": {1, 2},
        "path": {TWO_CLASSES, LABELS, DENSE},
    }
    assert taken >= least.get(constant, {0, 1})


def test_common_calls_take_a_fast_path() -> None:
    kinds = cuda_variants.kinds()
    slow = [str(k) for k in kinds if cuda_variants.compiled(k).constant("path") == GENERAL]
    assert not slow


# ------------------------------------------------------------------------------ nvcc


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_passes_keep_their_numbers_in_registers(architecture: str) -> None:
    need_nvcc()

    def of(kind: Kind) -> list[str]:
        made = cuda_variants.compiled(kind)
        found, _ = nvcc(made.text, made.names, architecture)
        return [f"{kind}: {name} {u}" for name, u in found.items() if u.in_memory]

    kinds = kinds_for(architecture)
    bad = [line for lines in for_all(of, kinds) for line in lines]
    assert not bad, f"{len(bad)} of {len(kinds)} for {architecture}\n" + "\n".join(bad)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_general_kernel_keeps_its_numbers_in_registers(architecture: str) -> None:
    """The general kernel does not spill for common tables that no fast path takes."""
    need_nvcc()

    def of(kind: cuda_variants.GeneralKind) -> list[str]:
        made = cuda_variants.compiled_general(kind)
        found, _ = nvcc(made.text, made.names, architecture)
        return [f"{kind}: {name} {u}" for name, u in found.items() if u.in_memory]

    kinds = general_kinds_for(architecture)
    bad = [line for lines in for_all(of, kinds) for line in lines]
    assert not bad, f"{len(bad)} of {len(kinds)} for {architecture}\n" + "\n".join(bad)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_kernels_keep_their_numbers_in_registers(architecture: str) -> None:
    need_nvcc()

    def of(item: tuple[str, tuple[str, tuple[str, ...]]]) -> list[str]:
        what, (text, names) = item
        found, _ = nvcc(text, names, architecture)
        return [f"{what}: {name} {u}" for name, u in found.items() if u.in_memory]

    bad = [line for lines in for_all(of, cuda_variants.other_kernels().items()) for line in lines]
    assert not bad, f"for {architecture}\n" + "\n".join(bad)


def test_report_of_a_kernel_whose_numbers_are_in_memory() -> None:
    need_nvcc()
    text = """
    extern "C" __global__ void good(float* x) { x[threadIdx.x] *= 2; }
    extern "C" __global__ void bad(float* x, int n) {
      float many[200];
      for (int i = 0; i < 200; ++i) many[i] = x[i];
      x[threadIdx.x] = many[n];
    }
    """
    found, _ = nvcc(text, ("good", "bad"), MAIN)
    assert not found["good"].in_memory
    assert found["bad"].in_memory
    assert found["bad"].stack >= 800
    with pytest.raises(AssertionError, match="reports nothing of"):
        nvcc(text, ("good", "absent"), MAIN)


# ------------------------------------------------------------------------------ instructions


def machine_code(cubin: Path, kernel: str) -> str:
    """The disassembly of a kernel."""
    tool = shutil.which("nvdisasm") or file_of_package("nvidia-cuda-nvdisasm", "*/bin/nvdisasm*")
    result = subprocess.run(
        [str(tool), "--print-code", str(cubin)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    sections = re.split(r"^\.text\.(\w+):$", result.stdout, flags=re.MULTILINE)
    return dict(zip(sections[1::2], sections[2::2], strict=True))[kernel]


def instructions(cubin: Path, kernel: str) -> list[str]:
    """The instructions of a kernel with their modifiers, as ``LDG.E.128``."""
    return re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)",
        machine_code(cubin, kernel),
        re.MULTILINE,
    )


def longest_loop(code: str) -> int:
    """The number of instructions of the longest loop."""
    places: dict[str, int] = {}
    count = longest = 0
    for line in code.splitlines():
        if label := re.match(r"\s*\.(\w+):$", line):
            places[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line):
            count += 1
            jump = re.search(r"\bBRA\b.*`\(\.(\w+)\)", line)
            if jump and jump[1] in places:
                longest = max(longest, count - places[jump[1]])
    return longest


def test_longest_loop() -> None:
    need_nvcc()
    text = """extern "C" __global__ void loops(float* x, int n) {
      #pragma unroll 1
      for (int i = 0; i < n; ++i) x[i] = 1;
    }
    extern "C" __global__ void straight(float* x) { *x = 1; }"""
    _, binary = nvcc(text, ("loops", "straight"), MAIN)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "made.cubin"
        cubin.write_bytes(binary)
        assert 4 <= longest_loop(machine_code(cubin, "loops")) <= 20
        # The padding after the end of a kernel jumps to itself.
        assert longest_loop(machine_code(cubin, "straight")) <= 1


def of_width(found: list[str], name: str, bits: int) -> int:
    """The number of accesses to global memory of this many bits."""
    return sum(i.split(".")[0] == name and str(bits) in i.split(".") for i in found)


@pytest.mark.parametrize("classes", [2, 4, 14])
@pytest.mark.parametrize("logits", ["float32", "float16"])
def test_logits_and_gradient_move_in_wide_accesses(
    logits: str, classes: int, tmp_path: Path
) -> None:
    need_nvcc()
    for kernel in ("reduce", "apply"):
        kind = Kind(kernel, logits, "contiguous", classes, "softmax", "uint8", "dice+ce")
        made = cuda_variants.compiled(kind)
        bits = made.constant("vector") * (32 if logits == "float32" else 16)
        assert bits == 128 if (logits, classes) != ("float16", 14) else bits >= 64
        cubin = tmp_path / f"{kernel}.cubin"
        cubin.write_bytes(nvcc(made.text, made.names, MAIN)[1])
        found = instructions(cubin, f"fastloss_{kernel}")
        assert of_width(found, "LDG", bits) >= classes
        if kernel == "apply":
            assert of_width(found, "STG", bits) >= classes
            # The pass writes only the gradient.
            assert of_width(found, "STG", bits) == sum(i.startswith("STG") for i in found)


# ------------------------------------------------------------------------------ NVRTC


class Nvrtc:
    """NVRTC, the compiler that CuPy uses."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def compile(self, text: str, options: Iterable[str]) -> tuple[int, str, bytes]:
        """The status, 0 on success; the log; and the cubin."""
        program = ctypes.c_void_p()
        created = self._library.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None
        )
        assert created == 0, f"nvrtcCreateProgram: error {created}"
        given = [option.encode() for option in options]
        status = self._library.nvrtcCompileProgram(
            program, len(given), (ctypes.c_char_p * len(given))(*given)
        )
        log = self._read(program, "ProgramLog").rstrip(b"\0").decode()
        cubin = self._read(program, "CUBIN") if status == 0 else b""
        self._library.nvrtcDestroyProgram(ctypes.byref(program))
        return status, log, cubin

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        assert getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert getattr(self._library, f"nvrtcGet{what}")(program, buffer) == 0
        return buffer.raw


@functools.cache
def nvrtc() -> Nvrtc:
    return Nvrtc(file_of_package("nvidia-cuda-nvrtc", "*/libnvrtc.so.*"))


def assert_nvrtc_compiles(what: object, text: str, names: Iterable[str]) -> None:
    start = time.perf_counter()
    status, log, cubin = nvrtc().compile(text, (*OPTIONS, f"--gpu-architecture={MAIN}"))
    print(f"{time.perf_counter() - start:.2f} s  {what}")
    assert status == 0, f"{what}: error {status}\n{log}"
    for name in names:
        assert f".text.{name}\0".encode() in cubin, f"{what}: no kernel {name}"


@pytest.mark.slow
def test_nvrtc_compiles_the_passes() -> None:
    def check(kind: Kind) -> None:
        made = cuda_variants.compiled(kind)
        assert_nvrtc_compiles(kind, made.text, made.names)

    def check_general(kind: cuda_variants.GeneralKind) -> None:
        made = cuda_variants.compiled_general(kind)
        assert_nvrtc_compiles(kind, made.text, made.names)

    nvrtc()
    for_all(check, cuda_variants.covering(start=0))
    for_all(check_general, cuda_variants.general_kinds()[1::6])


@pytest.mark.slow
def test_nvrtc_compiles_the_other_kernels() -> None:
    for what, (text, names) in cuda_variants.other_kernels().items():
        assert_nvrtc_compiles(what, text, names)


def test_nvrtc_says_what_is_wrong() -> None:
    status, log, _ = nvrtc().compile("#include <cmath>\n", OPTIONS)
    assert status != 0
    assert "cmath" in log


# ------------------------------------------------------------------------------ a table for tuning

PLAN = (
    "vector", "per_thread", "warps", "groups", "rounds", "staged", "interleaved", "keep_sums"
)  # fmt: skip


def print_table(architecture: str, kinds: Sequence[Kind]) -> None:
    """Print registers, threads and memory of kinds of calls, and the instructions per logit of a
    thread: those of the longest loop, without cold branches."""
    width = max(len(str(kind)) for kind in kinds)
    columns = "registers threads shared stack stores loads a-logit"
    print(f"{architecture:{width}} {columns}  {' '.join(PLAN)}")

    def of(kind: Kind) -> str:
        made = cuda_variants.compiled(kind)
        plan = "/".join(str(made.constant(name)) for name in PLAN)
        lines = []
        try:
            found, _ = nvcc(made.text, made.names, architecture)
            usual = "#define FL_USUAL\n" + made.text
            _, binary = nvcc(usual, made.names, architecture)
        except AssertionError as error:
            return f"{kind}: {error}"
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "made.cubin"
            cubin.write_bytes(binary)
            loop = longest_loop(machine_code(cubin, made.names[0]))
        each = loop / (made.constant("vector") * made.constant("per_thread"))
        for name, u in found.items():
            if name == made.names[0] or u.in_memory:
                label = str(kind) if name == made.names[0] else f"  {name}"
                lines.append(
                    f"{label:{width}} {u.registers:9} {made.threads:7} {made.shared:6} {u.stack:5} "
                    f"{u.spill_stores:6} {u.spill_loads:5} {each:7.1f}  {plan}"
                )
        return "\n".join(lines)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for line in pool.map(of, kinds):
            print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What every kernel takes of a GPU.")
    parser.add_argument("architecture", nargs="*", default=[MAIN], help="default: %(default)s")
    parser.add_argument("--matching", default="", help="only kinds whose name has this in it")
    parser.add_argument("--random", type=int, metavar="N", help="N kinds at random instead")
    parser.add_argument("--seed", type=int, default=0, help="of those; default: %(default)s")
    given = parser.parse_args()
    several = cuda_variants.kinds()
    if given.random:
        several = tuple(cuda_variants.at_random(given.random, given.seed))
    for one in given.architecture:
        print_table(one, [kind for kind in several if given.matching in str(kind)])
    sys.exit(0)
