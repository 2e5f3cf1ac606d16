"""The released source distribution, and the package built from it."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import support

NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")


def setup(folder: Path, *arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a copy of this checkout, unpacked."""
    support.need("setuptools")
    if not (support.ROOT / "MANIFEST.in").exists():
        pytest.skip("MANIFEST.in: this is no checkout")
    folder = tmp_path_factory.mktemp("release")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in ("csrc", "fastloss"):
        shutil.copytree(support.ROOT / name, checkout / name, ignore=NOT_SOURCES)
    for path in support.ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, checkout)
    setup(checkout, "sdist", "--formats=gztar", "--dist-dir", str(folder))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def built(released: Path) -> Path:
    """The package built from it, without the C++ kernels."""
    folder = released.parent / "built"
    setup(released, "build_py", "--build-lib", str(folder))
    return folder


def test_source_distribution_has_all_sources(released: Path) -> None:
    checkout = released.parent / "checkout"
    named = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    sources = {
        name
        for name in files_in(checkout)
        if name in named or name.startswith(("csrc/", "fastloss/"))
    }
    assert len(sources) > 80
    assert sources - files_in(released) == set()


def test_package_has_the_cuda_sources_and_no_others(built: Path) -> None:
    own = built.parent / "checkout" / "csrc"
    expected = {name for name in files_in(own) if name.startswith("cuda/")} | {
        "errors.h",
        "voxel.h",
    }
    assert files_in(built / "fastloss" / "csrc") == expected
    for name in expected:
        assert (built / "fastloss" / "csrc" / name).read_bytes() == (own / name).read_bytes()


def test_package_has_all_modules_and_their_types(built: Path) -> None:
    endings = (".py", ".pyi", "py.typed")
    own = {name for name in files_in(support.ROOT / "fastloss") if name.endswith(endings)}
    assert {"py.typed", "_cpu.pyi"} <= own
    assert own - files_in(built / "fastloss") == set()


def test_types_of_the_kernels_name_all_that_they_offer() -> None:
    support.need_backend("cpu")
    kernels = importlib.import_module("fastloss._cpu")
    stub = ast.parse((support.ROOT / "fastloss" / "_cpu.pyi").read_text(encoding="utf-8"))
    classes = [node for node in stub.body if isinstance(node, ast.ClassDef)]
    for what, types in ((kernels, stub), *((getattr(kernels, c.name), c) for c in classes)):
        assert defined(types) == {name for name in vars(what) if not name.startswith("_")}


def defined(parent: ast.Module | ast.ClassDef) -> set[str]:
    """The public classes and functions in it."""
    nodes = (n for n in parent.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)))
    return {node.name for node in nodes if not node.name.startswith("_")}


def test_installed_package_finds_its_cuda_sources(built: Path, tmp_path: Path) -> None:
    code = (
        "from fastloss.backends.cuda import source as s; print(s.folder());"
        "names = 'passes', 'top_k', 'copy', 'distance', 'class_indices', 'powers', "
        "'boundary_voxels';"
        "print(''.join(s.source(name + '.cu') for name in names), end='')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(built)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    where, text = result.stdout.split("\n", 1)
    assert Path(where) == built / "fastloss" / "csrc"
    assert "#include" not in text
    for kernel in (
        "reduce",
        "finish",
        "apply",
        "top_k_mean",
        "copy",
        "distance_lines",
        "class_indices",
        "powers",
        "boundary_voxels",
    ):
        assert f"fastloss_{kernel}(" in text
