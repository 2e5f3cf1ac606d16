"""Imports run downward: a layer imports nothing from the layers above it."""

from __future__ import annotations

import subprocess
import sys

from support import ROOT, need


def test_imports_run_downward_and_in_no_circle() -> None:
    """The contracts of pyproject.toml hold, for deferred and typing imports too."""
    need("importlinter")
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
