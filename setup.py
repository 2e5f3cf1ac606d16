"""Builds the C++ kernels once per instruction set, into one extension that chooses at run time.

The CUDA sources are installed as they are: they are compiled where a GPU is.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
SOURCES = Path("csrc") / "cpu"
KERNELS = ("passes.cpp", "soft_skeleton.cpp", "voronoi.cpp")  # compiled once per instruction set
BINDINGS = (
    "module.cpp",
    "distance.cpp",
    "surface.cpp",
    "counts.cpp",
    "components.cpp",
    "bind_voronoi.cpp",
    "bind_soft_skeleton.cpp",
)

# FASTLOSS_CXXFLAGS adds flags, for instance those of a sanitizer.
EXTRA = os.environ.get("FASTLOSS_CXXFLAGS", "").split()
COMMON = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
          "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi", "-g0", *EXTRA]  # fmt: skip

ISAS = {
    "x86_64_v2": ["-march=x86-64-v2"],
    "x86_64_v3": ["-march=x86-64-v3"],
    # GCC's own headers leave variables without a value there.
    "x86_64_v4": [
        "-march=x86-64-v4",
        "-mprefer-vector-width=512",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
}


def instruction_sets() -> dict[str, list[str]]:
    """The kernels to build: flags by name. "baseline" is what the compiler assumes by itself."""
    machine = platform.machine().lower()
    x86 = machine in ("x86_64", "amd64") and sys.maxsize > 2**32
    return {"baseline": [], **(ISAS if x86 else {})}


class CopyCudaSources(build_py):
    """Puts the CUDA sources into the package, where `fastloss.backends.cuda.source` finds them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # which uses those of the checkout
            for source, target in self.cuda_sources().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target, preserve_mode=False)

    def cuda_sources(self) -> dict[str, str]:
        """From where each is copied to where."""
        folder = Path("csrc")
        sources = [*sorted(folder.glob("*.h")), *sorted((folder / "cuda").glob("*.[ch]*"))]
        return {str(s): str(Path(self.build_lib, "fastloss", s)) for s in sources}

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *self.cuda_sources().values()]


class BuildKernels(build_ext):
    """Compiles the passes per instruction set; goes on without them where that cannot be done."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_kernels(ext)
        except Exception as error:
            print(
                "\n*** fastloss: the C++ kernels could not be built, so Numba or NumPy will "
                "compute, slower.\n*** Install a C++17 compiler with OpenMP and reinstall. "
                f"({error})\n",
                file=sys.stderr,
            )

    def run(self) -> None:
        super().run()
        # `python -m fastloss` in the checkout imports the checkout: it needs the kernels as well.
        if not self.inplace:
            for ext in self.extensions:
                built = Path(self.get_ext_fullpath(ext.name))
                target = HERE / "fastloss" / built.name
                if built.exists() and os.access(target.parent, os.W_OK):
                    self.copy_file(str(built), str(target))

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]

    def copy_extensions_to_source(self) -> None:
        built = [e for e in self.extensions if Path(self.build_lib, self.get_ext_filename(
            self.get_ext_fullname(e.name))).exists()]  # fmt: skip
        everything, self.extensions = self.extensions, built
        try:
            super().copy_extensions_to_source()
        finally:
            self.extensions = everything

    def build_kernels(self, ext: Extension) -> None:
        import pybind11

        compiler = self.compiler
        sets = {n: f for n, f in instruction_sets().items() if self.compiles(f)}
        if not sets:
            raise RuntimeError("the compiler cannot build a C++17 program with GNU vectors")
        openmp = ["-fopenmp"] if self.compiles(["-fopenmp"], link=["-fopenmp"]) else []
        headers = ["csrc", str(SOURCES)]
        tasks = [
            (
                str(SOURCES / source),
                [*COMMON, *flags, f"-DFASTLOSS_ISA={name}"],
                headers,
                name,
            )
            for name, flags in sets.items()
            for source in KERNELS
        ]
        names = " ".join(f"X({name})" for name in sets)
        tasks += [
            (
                str(SOURCES / source),
                [*COMMON, *openmp, f"-DFASTLOSS_ISAS={names}"],
                [*headers, pybind11.get_include(), *self.include_dirs],
                "module",
            )
            for source in BINDINGS
        ]

        def compile_one(task: tuple[str, list[str], list[str], str]) -> list[str]:
            source, flags, include, name = task
            folder = os.path.join(self.build_temp, name)
            return compiler.compile(
                [source], output_dir=folder, include_dirs=include, extra_postargs=flags
            )

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = [o for made in pool.map(compile_one, tasks) for o in made]
        compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[*openmp, *EXTRA],
            target_lang="c++",
        )

    def compiles(self, flags: list[str], link: list[str] | None = None) -> bool:
        """Whether the compiler takes these flags."""
        program = (
            "typedef float V __attribute__((vector_size(16)));\n"
            "V f(V a, V b) { return a < b ? a : b; }\nint main() { return 0; }\n"
        )
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(program)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=["-std=c++17", *flags]
                )
                if link is not None:
                    self.compiler.link_executable(
                        objects, str(Path(folder) / "probe"), extra_postargs=link,
                        target_lang="c++",
                    )  # fmt: skip
            except Exception:
                return False
        return True


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fastloss._cpu", [str(SOURCES / "module.cpp")], optional=True)],
        cmdclass={"build_ext": BuildKernels, "build_py": CopyCudaSources},
    )
