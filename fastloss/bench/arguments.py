"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def results_file(text: str) -> Path:
    """A CSV file that can be appended to, checked before minutes of measuring."""
    path = Path(text)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a CSV file in a folder there is, got {text!r}")
    return path


def subset(choices: Sequence[str], *, everything: bool = False) -> Callable[[str], tuple[str, ...]]:
    """A comma-separated selection; with ``everything``, also "all" and "none"."""

    def convert(text: str) -> tuple[str, ...]:
        if everything and text in ("all", "none"):
            return tuple(choices) if text == "all" else ()
        names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(
                    f"expected some of {', '.join(choices)}"
                    + (", or 'all' or 'none'" if everything else "")
                    + f", got {name!r}"
                )
        if not names:
            raise argparse.ArgumentTypeError("expected at least one name")
        return names

    return convert


def device_name(text: str, count: int | None = None) -> str:
    """The full name of a PyTorch device.

    Args:
        text: "cuda" (the first device), "cuda:N" or "cpu".
        count: the number of CUDA devices; None: as many as exist.
    """
    import torch

    if count is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device: Any = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"expected cuda, cuda:N or cpu, got {text!r}")
    if device.type == "cpu":
        return "cpu"
    index = device.index or 0
    if index >= count:
        raise argparse.ArgumentTypeError(
            f"{text} is not there, PyTorch {torch.__version__} sees {count} CUDA devices; "
            "--device cpu makes a smoke run"
        )
    return f"cuda:{index}"  # torch.cuda.set_device needs an index
