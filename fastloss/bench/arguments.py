"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def results_file(text: str) -> Path:
    """A CSV file that can be added to: better said now than after minutes of measuring."""
    path = Path(text)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a CSV file in a folder there is, got {text!r}")
    return path


def subset(choices: Sequence[str], *, everything: bool = False) -> Callable[[str], tuple[str, ...]]:
    """A comma-separated choice; with ``everything``, also "all" and "none"."""

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


def torch_device(text: str, count: int) -> Any:
    """The torch.device of this name, with its index.

    Args:
        text: "cuda" (the first device), "cuda:N" or "cpu".
        count: the number of CUDA devices.
    """
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"expected cuda, cuda:N or cpu, got {text!r}")
    if device.type == "cpu":
        return device
    index = device.index or 0
    if index >= count:
        raise argparse.ArgumentTypeError(
            f"{text} is not there, PyTorch {torch.__version__} sees {count} CUDA devices; "
            "--device cpu makes a smoke run"
        )
    return torch.device("cuda", index)  # torch.cuda.set_device takes no device without one
