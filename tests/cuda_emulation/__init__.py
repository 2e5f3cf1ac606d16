"""CUDA kernels compiled as C++ and run on the CPU, thread by thread.

It checks the results of kernels and the synchronisation of their threads: a barrier that some
threads never reach is an error, uninitialised shared memory reads as NaN, a misaligned access is an
error, and the compiler's sanitizers work as in any C++. It says nothing about speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ORDERS = ("forward", "reverse", "random")
MOST_SHARED_BYTES = 227 * 1024
"""The most shared memory of a block, on any GPU."""
KEPT_SECONDS = 7 * 24 * 3600
"""A compiled library that was unused for this long is removed."""

_ALIGNMENT = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]

Triple = tuple[int, int, int]


class CompileError(RuntimeError):
    """The source does not compile; the message is the compiler's."""


class LaunchError(RuntimeError):
    """The threads of a block violated a rule of CUDA."""


class Library:
    """Kernels compiled from CUDA source text for the CPU.

    kernels: by name, the C++ type of the one struct that a kernel takes by value. A name may be
    qualified or have template arguments. include: folders of headers. sanitize: for the compiler's
    -fsanitize, as "address,undefined" or "thread"; the process must run with `preload`'s
    environment. threads: each thread of a block is one of the operating system, not a fiber;
    "thread" wants it. A source that does not compile raises CompileError.
    """

    def __init__(
        self,
        source: str,
        kernels: dict[str, str],
        *,
        include: Sequence[Path] = (),
        sanitize: str = "",
        threads: bool = False,
        optimise: str = "-O1",
    ) -> None:
        sanitizers = [name for name in sanitize.split(",") if name]
        if "thread" in sanitizers and not threads:
            raise ValueError('sanitize: "thread" sees only threads; expected threads=True with it')
        for name, symbol in (("address", "__asan_init"), ("thread", "__tsan_init")):
            if name in sanitizers and not hasattr(ctypes.CDLL(None), symbol):
                raise RuntimeError(
                    f"sanitize: {name!r} needs its runtime library in the process from the start; "
                    f"run Python with the environment of preload({name!r})"
                )
        flags = ["-std=c++17", optimise, "-g1", "-fPIC", "-ffp-contract=off"]
        # The loader may otherwise merge equal symbols of two libraries.
        flags.append("-fvisibility=hidden")
        if threads:
            flags += ["-DFL_EMULATION_THREADS", "-pthread"]
        if sanitizers:
            flags.append("-fno-omit-frame-pointer")
        path = _build(_translation_unit(source, kernels), include, flags, sanitizers)
        self._numbers = {name: i for i, name in enumerate(kernels)}
        self._lock = threading.Lock()
        self._library = ctypes.CDLL(str(path))
        self._library.fl_emulation_argument_bytes.restype = ctypes.c_ulonglong
        self._launch = self._library.fl_emulation_launch
        # AddressSanitizer has redzones between the variables, and needs no poison in them.
        if "address" not in sanitizers:
            self._poison_statics(path)

    def launch(
        self,
        kernel: str,
        grid: Triple,
        block: Triple,
        shared_bytes: int,
        arguments: bytes,
        *,
        order: str = "forward",
        seed: int = 0,
    ) -> None:
        """Run a kernel to its end.

        arguments: the bytes of its struct, in which arrays are addresses (`array.ctypes.data`).
        order: of the blocks, and in which the threads of a block take turns: "forward", "reverse"
        or "random" (by `seed`). LaunchError names the kernel, the block and the thread.
        """
        if kernel not in self._numbers:
            raise ValueError(f"kernel: got {kernel!r}; expected one of {sorted(self._numbers)}")
        number = self._numbers[kernel]
        grid = _sizes("grid", grid, (2**31 - 1, 65535, 65535))
        block = _sizes("block", block, (1024, 1024, 64))
        if block[0] * block[1] * block[2] > 1024:
            raise ValueError(f"block: got {block}; expected 1024 threads at most")
        if not 0 <= shared_bytes <= MOST_SHARED_BYTES:
            raise ValueError(f"shared_bytes: got {shared_bytes}; expected 0…{MOST_SHARED_BYTES}")
        size = self._library.fl_emulation_argument_bytes(number)
        if len(arguments) != size:
            raise ValueError(
                f"arguments: got {len(arguments)} bytes; expected the {size} of {kernel}'s struct"
            )
        if order not in ORDERS:
            raise ValueError(f"order: got {order!r}; expected one of {ORDERS}")
        # Kernels may require an aligned struct, which Python's bytes are not.
        room = ctypes.create_string_buffer(size + 64)
        address = -(-ctypes.addressof(room) // 64) * 64
        ctypes.memmove(address, arguments, size)
        message = ctypes.create_string_buffer(2048)
        with self._lock:
            failed = self._launch(
                number,
                (ctypes.c_uint * 3)(*grid),
                (ctypes.c_uint * 3)(*block),
                ctypes.c_ulonglong(shared_bytes),
                ctypes.c_void_p(address),
                ORDERS.index(order),
                ctypes.c_ulonglong(seed),
                message,
                ctypes.c_ulonglong(len(message)),
            )
        if failed:
            raise LaunchError(message.value.decode(errors="replace"))

    def _poison_statics(self, path: Path) -> None:
        """Tell the runtime the addresses of static __shared__ variables, local symbols in .bss."""
        symbols = subprocess.run(
            ["nm", "--print-size", "--defined-only", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        base, found = 0, []
        for line in symbols.splitlines():
            fields = line.split()
            if fields[-1] == "fl_emulation_kernels":
                base = int(fields[0], 16)
            elif len(fields) == 4 and fields[2] == "b" and fields[3].startswith("_ZZ"):
                found.append((int(fields[0], 16), int(fields[1], 16)))
        offsets = (ctypes.c_longlong * len(found))(*(start - base for start, _ in found))
        sizes = (ctypes.c_ulonglong * len(found))(*(size for _, size in found))
        self._library.fl_emulation_set_statics(offsets, sizes, len(found))


def preload(sanitizer: str) -> dict[str, str]:
    """The environment in which Python can load a library with "address" or "thread".

    FileNotFoundError: the compiler has no such runtime library.
    """
    name = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    command = [*compiler(), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(found):
        raise FileNotFoundError(f"{name}: the compiler {compiler()[0]} has none")
    # CPython keeps memory until process exit: leaks are not checked.
    options = {
        "address": {"ASAN_OPTIONS": "detect_leaks=0"},
        "thread": {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66"},
    }[sanitizer]
    return {"LD_PRELOAD": found, **options}


def sanitized_python(
    code: str, sanitizer: str, *arguments: str, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter that can load libraries with this sanitizer.

    OSError: the sanitizer does not work here.
    """
    path = [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [*_command(sanitizer), "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={
            **os.environ,
            **preload(sanitizer),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            # Threads beyond those of the kernels only cost time here.
            "OPENBLAS_NUM_THREADS": "1",
        },
        check=False,
    )


@functools.cache
def _command(sanitizer: str) -> tuple[str, ...]:
    """The interpreter, started such that the sanitizer works."""
    said = ""
    # Some releases of ThreadSanitizer fail with too much address space randomisation.
    for command in ((sys.executable,), ("setarch", platform.machine(), "-R", sys.executable)):
        try:
            result = subprocess.run(
                [*command, "-c", ""],
                capture_output=True,
                text=True,
                env={**os.environ, **preload(sanitizer)},
                check=False,
            )
        except FileNotFoundError:  # no setarch
            continue
        if result.returncode == 0:
            return command
        said = said or result.stderr.strip()
    raise OSError(f"{sanitizer} sanitizer: {said}")


def _sizes(name: str, sizes: Sequence[int], most: Triple) -> Triple:
    x, y, z = sizes
    if not all(1 <= size <= limit for size, limit in zip((x, y, z), most, strict=True)):
        raise ValueError(f"{name}: got {tuple(sizes)}; expected sizes from 1 to {most}")
    return x, y, z


def _translation_unit(source: str, kernels: dict[str, str]) -> str:
    """The source, with a table of functions that call its kernels."""
    lines = ['#include "cuda_shim.h"', '#line 1 "kernels.cu"', source, '#line 1 "table.cpp"']
    table = []
    for i, (name, argument) in enumerate(kernels.items()):
        lines.append(
            f"static void fl_emulation_call_{i}(const void* argument) {{\n"
            f"  static_assert(std::is_trivially_copyable<{argument}>::value,\n"
            f'                "a kernel takes a struct of plain bytes");\n'
            f"  {name}(*static_cast<const {argument}*>(argument));\n}}"
        )
        text = name.replace("\\", "\\\\").replace('"', '\\"')
        table.append(f'    {{"{text}", fl_emulation_call_{i}, sizeof({argument})}},')
    lines.append(
        'extern "C" const fl_emulation::Kernel fl_emulation_kernels[];\n'
        "const fl_emulation::Kernel fl_emulation_kernels[] = {"
    )
    return "\n".join([*lines, *table, '    {"", nullptr, 0}};', ""])


def _build(
    text: str, include: Sequence[Path], flags: Sequence[str], sanitizers: Sequence[str]
) -> Path:
    """The shared library of the text, compiled now or cached by any process of this user."""
    include = [Path(folder).resolve() for folder in include]
    headers = sorted(
        path
        for folder in include
        for path in folder.rglob("*")
        if path.suffix in {".h", ".hpp", ".cuh", ".cu", ".inc"}
    )
    # A GPU refuses misaligned accesses. Without the sanitizer's library our runtime handles them.
    checks = [] if "undefined" in sanitizers else _ALIGNMENT
    parts = ["library", text, *sanitizers, *(f"{path}\n{path.read_text()}" for path in headers)]
    folder = _cache()
    library = folder / f"{_digest([*parts, *flags, *checks])}.so"
    if _there(library):
        return library
    with locked(library):
        if not _there(library):  # else another process has just compiled it
            _forget(folder)
            _make(library, text, include, flags, sanitizers, checks)
    return library


def _there(path: Path) -> bool:
    """Whether a file was compiled; it then counts as used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file to compile: processes that need the same one wait for the first."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(
    library: Path,
    text: str,
    include: Sequence[Path],
    flags: Sequence[str],
    sanitizers: Sequence[str],
    checks: Sequence[str],
) -> None:
    folder = library.parent
    folders = [f"-I{path}" for path in (HERE, *include)]
    sanitize = [f"-fsanitize={','.join(sanitizers)}"] if sanitizers else []
    if "undefined" in sanitizers:
        sanitize.append("-fno-sanitize-recover=undefined")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        (work / "kernels.cpp").write_text(text)
        options = [*flags, *sanitize, *checks, *folders]
        _compile([*options, "-c", "kernels.cpp", "-o", "kernels.o"], work)
        objects = ["kernels.o", str(_runtime(flags, sanitizers))]
        _compile([*flags, *sanitize, "-shared", *objects, "-o", "library.so"], work)
        os.replace(work / "library.so", library)


def _runtime(flags: Sequence[str], sanitizers: Sequence[str]) -> Path:
    """The object file of runtime.cpp, which all libraries of these flags share."""
    flags = [*(flag for flag in flags if not flag.startswith("-O")), "-O2"]
    if "thread" in sanitizers:
        flags.append("-DFL_EMULATION_TSAN")
    if "address" in sanitizers:
        flags.append("-fsanitize=address")
    if "undefined" in sanitizers:
        flags.append("-DFL_EMULATION_UBSAN")
    folder = _cache()
    path = folder / f"{_digest(['runtime', *flags])}.o"
    if _there(path):
        return path
    with locked(path), tempfile.TemporaryDirectory(dir=folder) as name:
        if not _there(path):
            work = Path(name)
            _compile(
                [*flags, f"-I{HERE}", "-c", str(HERE / "runtime.cpp"), "-o", "runtime.o"], work
            )
            os.replace(work / "runtime.o", path)
    return path


def _digest(parts: Sequence[str]) -> str:
    """The cache key of these parts, our own files and the compiler."""
    digest = hashlib.sha256()
    own = [(HERE / name).read_text() for name in ("cuda_shim.h", "runtime.cpp")]
    for part in [*parts, *own, _compiler_version()]:
        digest.update(f"{len(part.encode())}\n{part}".encode())
    return digest.hexdigest()[:32]


def _compile(arguments: Sequence[str], folder: Path) -> None:
    command = [*compiler(), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, or g++."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


@functools.cache
def _version_of(compiler: tuple[str, ...]) -> str:
    command = [*compiler, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compiler_version() -> str:
    command = compiler()
    return f"{command} {_version_of(tuple(command))}"


def _cache() -> Path:
    """The folder of compiled libraries, not writable by other users."""
    folder = Path(tempfile.gettempdir()) / f"fastloss-cuda-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
        raise RuntimeError(f"{folder} could be written to by others; remove it")
    return folder


def _forget(folder: Path) -> None:
    """Remove libraries that were not used for long."""
    oldest = time.time() - KEPT_SECONDS
    for path in folder.iterdir():
        try:
            if path.lstat().st_mtime >= oldest:
                continue
            if path.is_dir():  # left by a process killed while compiling
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        except FileNotFoundError:  # another process was faster
            pass
