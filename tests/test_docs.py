"""Examples in docstrings and in the README run and give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import warnings

import pytest
from support import ROOT

import fastloss

MODULES = ["fastloss"] + [
    m.name
    for m in pkgutil.walk_packages(fastloss.__path__, "fastloss.")
    if not m.name.startswith(("fastloss._", "fastloss.bench", "fastloss.__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(backend: str, name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    failed, _ = doctest.testmod(module)
    assert failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    examples = sum(
        len(test.examples)
        for name in ("fastloss.loss", "fastloss.terms.region", "fastloss.terms.distribution")
        for test in finder.find(importlib.import_module(name))
    )
    assert examples >= 8


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README.md here")
def test_readme(backend: str) -> None:
    """The Python blocks in order, as one program."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = {"__name__": "readme"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, block in enumerate(blocks):
            try:
                if ">>>" in block:
                    test = doctest.DocTestParser().get_doctest(
                        block, names, f"block {number}", "README.md", 0
                    )
                    runner = doctest.DocTestRunner()
                    runner.run(test, clear_globs=False)
                    names.update(test.globs)
                    assert runner.failures == 0
                else:
                    exec(compile(block, f"README.md, block {number}", "exec"), names)
            except ImportError as error:
                pytest.skip(f"README.md, block {number}: {error}")
