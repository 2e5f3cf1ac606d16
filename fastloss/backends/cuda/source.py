"""The CUDA sources, joined into one text for the compiler."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from fastloss.backends.cuda.call import GENERAL, TYPES

_PACKAGE = Path(__file__).resolve().parents[2]
_COMMENT = re.compile(r"[ \t]*//.*$", re.MULTILINE)
_INCLUDE = re.compile(r'^#include "([\w./]+)"\n', re.MULTILINE)


def folder() -> Path:
    """The folder of the sources: in the installed package, or in a checkout."""
    for place in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (place / "cuda" / "passes.cu").exists():
            return place
    raise FileNotFoundError("the CUDA sources were not installed with fastloss; reinstall it")


@cache
def source(name: str) -> str:
    """A source with its includes, every file once, without comments.

    Comments are not ASCII, which compilers may require, and editing them should not invalidate
    cached kernels.
    """
    seen: set[str] = set()

    def text_of(path: Path) -> str:
        def replace(match: re.Match[str]) -> str:
            included = match.group(1)
            if included in seen:
                return ""
            seen.add(included)
            for place in (folder() / "cuda" / included, folder() / included):
                if place.exists():
                    return text_of(place)
            raise FileNotFoundError(included)

        text = _COMMENT.sub("", path.read_text(encoding="utf-8")).replace("#pragma once\n", "")
        return _INCLUDE.sub(replace, text)

    return text_of(folder() / "cuda" / name)


PASSES = {
    "reduce": ("fastloss_reduce", "fastloss_finish"),
    "apply": ("fastloss_apply",),
    "map": ("fastloss_map",),
    "largest": ("fastloss_largest_weight",),
}
"""The names of the kernels of a pass."""


def source_of(constants: tuple[tuple[str, object], ...]) -> str:
    """The name of the source that computes a kind of call."""
    return "general.cu" if dict(constants)["path"] == GENERAL else "passes.cu"


def specialised(constants: tuple[tuple[str, object], ...], kernel: str) -> str:
    """The kernels of a pass, one of `PASSES`, compiled for one kind of call."""
    lines = ["#define FL_SPECIAL", f"#define FL_{kernel.upper()}"]
    for name, value in constants:
        if isinstance(value, tuple):
            kind = "double" if name in ("gamma", "parameter") else "int"
            numbers = ", ".join(repr(v) for v in value) or "0"
            lines.append(f"static __device__ constexpr {kind} FL_{name}[] = {{{numbers}}};")
        else:
            lines.append(f"#define FL_{name} ({value})")
    return "\n".join(lines) + "\n" + source(source_of(constants))


def describe(constants: tuple[tuple[str, object], ...]) -> str:
    """The constants of a kernel as readable text."""
    c = dict(constants)
    activation = ("softmax", "sigmoid", "probabilities")[int(str(c["activation"]))]
    logits = TYPES[int(str(c["logits_type"]))]
    return f"{activation} of {c['classes']} classes in {logits}"
