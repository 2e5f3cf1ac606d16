"""Files of a comparison: its options, and the result of each run that is done."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastloss.compare.judging import Run
from fastloss.compare.records import Study

OPTIONS = "options.json"


class OtherOptions(ValueError):
    """The folder holds a comparison with other options; the message names one."""


class Store:
    """A folder of results. Files are complete or not there: they are renamed when written.

    Args:
        folder: it is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, options: Mapping[str, Any]) -> None:
        """Keep the options, or check that they are those that are kept.

        Raises:
            OtherOptions: they are others.
            OSError: a folder that cannot be made or written.
        """
        kept = self.options()
        wanted = json.loads(json.dumps(options))
        if kept is not None:
            for name in {**kept, **wanted}:
                if kept.get(name) != wanted.get(name):
                    raise OtherOptions(
                        f"--out: {str(self.folder)!r} holds a comparison with other options: "
                        f"{name} is {_short(kept.get(name))} there, and {_short(wanted.get(name))} "
                        "now; name another folder, or remove it"
                    )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(self.folder / OPTIONS, json.dumps(wanted, indent=1).encode())

    def options(self) -> dict[str, Any] | None:
        """Those that are kept; None in a new folder. OtherOptions: a file that is no such."""
        path = self.folder / OPTIONS
        if not path.exists():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise OtherOptions(f"--out: {str(path)!r} cannot be read: {error}") from None

    def save(self, kind: str, key: str, found: Study) -> None:
        """The records of a run, or of another part of the work."""
        text = found.to_json()
        self._write(self._path(kind, key), text.encode())

    def load(self, kind: str, key: str) -> Study | None:
        """What was saved; None if nothing was, or it cannot be read."""
        path = self._path(kind, key)
        try:
            return Study.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def save_predictions(
        self, run: Run, predictions: Mapping[str, np.ndarray], maps: Mapping[str, np.ndarray]
    ) -> None:
        """Label maps by case, and for some cases a map of where the loss comes from."""
        path = self._path("predictions", key_of(run)).with_suffix(".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            arrays: dict[str, Any] = {"labels": np.array(list(predictions))}
            arrays |= {f"map{i}": each for i, each in enumerate(predictions.values())}
            arrays |= {f"loss{list(predictions).index(name)}": each for name, each in maps.items()}
            np.savez_compressed(file, **arrays)
        os.replace(file.name, path)

    def load_predictions(self, run: Run) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        """Those that were saved, each with the map of its loss."""
        path = self._path("predictions", key_of(run)).with_suffix(".npz")
        if not path.exists():
            return {}
        with np.load(path) as found:
            return {
                str(name): (found[f"map{i}"], found.get(f"loss{i}"))
                for i, name in enumerate(found["labels"])
            }

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.json"

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)


def key_of(run: Run) -> str:
    """The name of its file."""
    return "_".join(f"{name}{value}" if name != "loss" else value for name, value in _parts(run))


def _parts(run: Run) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in asdict(run).items()]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}…"
