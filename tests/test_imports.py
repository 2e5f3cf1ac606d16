"""Imports run downward: what is lower knows nothing of what is built on it."""

from __future__ import annotations

import subprocess
import sys

from support import ROOT, need


def test_imports_run_downward_and_in_no_circle() -> None:
    """Deferred imports and those for types included: the contracts of pyproject.toml."""
    need("importlinter")
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
