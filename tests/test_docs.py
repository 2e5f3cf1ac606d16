"""The examples in docstrings and in the README run and give the printed results."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT, need, need_backend

import fastloss

MODULES = ["fastloss"] + [
    m.name
    for m in pkgutil.walk_packages(fastloss.__path__, "fastloss.")
    if not m.name.startswith(("fastloss._", "fastloss.bench", "fastloss.__main__"))
]
FOLDER = Path(fastloss.__file__).parent.parent
NEEDED = {
    "fastloss.frameworks.cupy": "cupy",
    "fastloss.frameworks.tensorflow": "tensorflow",
    "fastloss.frameworks.torch": "torch",
    "fastloss.keras": "keras",
    "fastloss.dropin": "torch",
    "fastloss.torch": "torch",
    "fastloss.dask": "dask",
    "fastloss.monai": "torch",
    "fastloss.nnunet": "torch",
    **{
        f"fastloss.compare.{name}": "torch"
        for name in ("cost", "network", "nnunet_trainer", "prediction", "runner", "training")
    },
    "fastloss.nnunet.trainer": "nnunetv2",
}
"""The package that modules with this prefix import."""


def has_examples(name: str) -> bool:
    path = FOLDER / name.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ">>>" in path.read_text(encoding="utf-8")


def imported(name: str) -> Any:
    """The module; skip with the name of a missing package."""
    for prefix, package in NEEDED.items():
        if name.startswith(prefix):
            need(package)
    try:
        return importlib.import_module(name)
    except ImportError:
        # Only a backend may be missing; `need_backend` skips, or fails where it is required.
        need_backend(name.rpartition(".")[2])
        raise


def test_modules_can_be_imported() -> None:
    for name in MODULES:
        assert imported(name).__name__ == name


@pytest.mark.parametrize("name", [name for name in MODULES if has_examples(name)])
def test_docstrings(backend: str, name: str) -> None:
    failed, tried = doctest.testmod(imported(name))
    assert failed == 0
    assert tried > 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    examples = sum(
        len(test.examples)
        for name in ("fastloss.loss", "fastloss.terms.region", "fastloss.terms.distribution")
        for test in finder.find(importlib.import_module(name))
    )
    assert examples >= 8


@pytest.mark.parametrize(
    ("page", "package"),
    [
        ("README.md", ""),
        ("README.md", "torch"),
        ("README.md", "tensorflow"),
        ("README.md", "keras"),
        ("CONTRIBUTING.md", ""),
    ],
)
def test_page(backend: str, page: str, package: str) -> None:
    """The Python blocks run in order, as one program; those that need a package only with it."""
    if package:
        need(package)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(
        r"(?:^<!-- needs: (\w+) -->\n)?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    )
    assert any(needed == package for needed, _ in blocks)
    names: dict[str, object] = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, (needed, block) in enumerate(blocks):
            if needed in ("", package):
                exec(compile(block, f"{page}, block {number}", "exec"), names)
    if page == "CONTRIBUTING.md":  # the example's derivatives are those of its formula
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(2, 3, 5, 4)), rng.integers(0, 3, (2, 5, 4))
        loss: Any = names["loss"]
        _, gradient = loss.value_and_grad(x, y)
        step = 1e-5 * rng.normal(size=x.shape)
        assert loss(x + step, y) - loss(x - step, y) == pytest.approx(
            2 * (gradient * step).sum(), rel=1e-6
        )
