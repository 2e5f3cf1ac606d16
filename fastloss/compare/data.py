"""Cases to train and judge on: images with label maps, from files or made."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastloss.evaluation.files import (
    ENDINGS,
    LabelMap,
    Mismatch,
    check_same_grid,
    read_image,
    read_label_map,
    stem,
)
from fastloss.evaluation.run import labels_in


class Volume(NamedTuple):
    """A case."""

    name: str
    image: np.ndarray
    """(channels, D, H, W) of float32."""
    labels: np.ndarray
    """(D, H, W) of uint8 or uint16: an index into the classes, or the number of classes where a
    voxel counts for nothing."""
    spacing: tuple[float, float, float]
    """Of D, H and W, in mm."""


class Source(Protocol):
    """Where cases come from. It is small, and pickled for processes, which load what they need."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the cases."""

    @property
    def classes(self) -> tuple[str, ...]:
        """By index; the first is the background."""

    @property
    def channels(self) -> int:
        """Of the images."""

    @property
    def problems(self) -> tuple[tuple[str, str], ...]:
        """Names of what is wrong with the data and was left out, and why."""

    def load(self, name: str) -> Volume:
        """A case, its image normalised."""

    def describe(self) -> dict[str, Any]:
        """What tells it from other sources, as JSON has it."""


class BadData(ValueError):
    """Data that no comparison can be made of; the message names the file or option."""


@dataclass(frozen=True)
class Files:
    """Cases in NIfTI files, all of which were looked at once."""

    images: Mapping[str, tuple[Path, ...]]
    """For each case a file for each channel."""
    references: Mapping[str, Path]
    labels: tuple[tuple[int, ...], ...]
    """For each class the numbers that its voxels have in the files."""
    classes: tuple[str, ...]
    ignored: int | None
    """The number of voxels that count for nothing."""
    problems: tuple[tuple[str, str], ...]
    checksums: Mapping[str, int]
    """Of the label maps."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.references)

    @property
    def channels(self) -> int:
        return len(next(iter(self.images.values())))

    def load(self, name: str) -> Volume:
        channels = [read_image(path).voxels for path in self.images[name]]
        image = np.stack([normalised(channel) for channel in channels])
        return self.load_labels(name)._replace(image=image)

    def load_labels(self, name: str) -> Volume:
        """A case whose image is empty."""
        reference = read_label_map(self.references[name])
        d, h, w = reference.spacing
        image = np.empty((self.channels, 0, 0, 0), np.float32)
        return Volume(name, image, self.indices(reference.voxels), (d, h, w))

    def indices(self, voxels: np.ndarray) -> np.ndarray:
        """Numbers of a file as indices into the classes."""
        numbers = [number for each in self.labels for number in each]
        table = np.zeros(1 + max(*numbers, int(voxels.max())), np.uint16)
        for index, each in enumerate(self.labels):
            table[list(each)] = index
        if self.ignored is not None:
            table[self.ignored : self.ignored + 1] = len(self.classes)
        found: np.ndarray = table[voxels]
        return found if len(self.classes) > 254 else found.astype(np.uint8)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "files",
            "cases": {
                name: [self.checksums[name], *(path.stat().st_size for path in self.images[name])]
                for name in self.names
            },
            "labels": [list(each) for each in self.labels],
            "ignored": self.ignored,
        }


def normalised(channel: np.ndarray) -> np.ndarray:
    """Between its percentiles 0.5 and 99.5, then of mean 0 and deviation 1; float32."""
    numbers = np.nan_to_num(channel.astype(np.float32))
    sample = numbers.ravel()[:: max(1, numbers.size // 200_000)]
    numbers = np.clip(numbers, *np.percentile(sample, (0.5, 99.5)))
    found: np.ndarray = (numbers - numbers.mean()) / max(float(numbers.std()), 1e-6)
    return found.astype(np.float32)


# ---------------------------------------------------------------------- nnU-Net's raw layout


def open_folder(folder: Path) -> Files:
    """A data set in nnU-Net's raw layout.

    ``imagesTr/NAME_0000.nii.gz``, a file for each channel, ``labelsTr/NAME.nii.gz`` and
    ``dataset.json``. A label called "ignore" counts for nothing. A case that is incomplete, cannot
    be read or does not fit together is left out, and is one of the problems.

    Raises:
        BadData: a folder of another layout, labels that are regions, or no case that is good.
    """
    settings = _dataset(folder)
    names, ignored = _labels_of(settings, folder)
    wanted = settings.get("channel_names", settings.get("modality"))
    ending = str(settings.get("file_ending", ""))
    if ending and ending not in ENDINGS:
        raise BadData(f"--data: expected NIfTI files, but file_ending is {ending!r}")
    references = _by_stem(folder / "labelsTr")
    images: dict[str, tuple[Path, ...]] = {}
    problems = []
    for name in references:
        found = _channels_of(folder / "imagesTr", name)
        count = len(wanted) if wanted else max(len(found), 1)
        missing = [f"{name}_{i:04d}" for i in range(count) if i not in found]
        if missing:
            problems.append((name, f"imagesTr has no {', '.join(missing)}"))
        else:
            images[name] = tuple(found[i] for i in range(count))
    known = _by_stem(folder / "imagesTr")
    alone = {each.rpartition("_")[0] for each in known} - set(references)
    problems += [(name, "labelsTr has none for this image") for name in sorted(alone)]
    return _checked(images, references, names, ignored, problems)


def _dataset(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    for part in (path, folder / "imagesTr", folder / "labelsTr"):
        if not part.exists():
            raise BadData(
                f"--data: expected nnU-Net's raw layout (imagesTr, labelsTr, dataset.json), but "
                f"there is no {str(part)!r}"
            )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["labels"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise BadData(f"--data: {str(path)!r} has no labels that can be read") from None
    return dict(found)


def _labels_of(settings: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], int | None]:
    """The number of each class, in their order, and that of ignored voxels."""
    pairs = list(settings["labels"].items())
    if pairs and all(isinstance(value, str) for _, value in pairs):  # the decathlon's: number: name
        pairs = [(name, number) for number, name in pairs]
    found: dict[str, int] = {}
    for name, number in pairs:
        if isinstance(number, (list, tuple)) and len(number) != 1:
            raise BadData(
                f"--data: in {str(folder / 'dataset.json')!r} {name!r} is a region of the labels "
                f"{list(number)}; a softmax needs classes that do not overlap"
            )
        try:
            found[str(name)] = int(number[0] if isinstance(number, (list, tuple)) else number)
        except (TypeError, ValueError):
            raise BadData(f"--data: expected a number for the label {name!r}") from None
    ignored = found.pop("ignore", None)
    if len(set(found.values())) < len(found) or 0 not in found.values() or len(found) < 2:
        raise BadData(
            f"--data: expected labels that differ, with the background's 0 and at least one more, "
            f"got {found}"
        )
    return dict(sorted(found.items(), key=lambda item: item[1])), ignored


def _by_stem(folder: Path) -> dict[str, Path]:
    paths = sorted(folder.iterdir())
    return {
        stem(path): path
        for path in paths
        if path.name.lower().endswith(ENDINGS) and not path.name.startswith(".")
    }


def _channels_of(folder: Path, name: str) -> dict[int, Path]:
    found = {}
    for ending in ENDINGS:
        for path in folder.glob(f"{_literal(name)}_[0-9][0-9][0-9][0-9]{ending}"):
            found[int(stem(path)[-4:])] = path
    return found


def _literal(text: str) -> str:
    """For a glob: brackets and stars in a name are no patterns."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


# ---------------------------------------------------------------------- pairs by a pattern


def open_pairs(images: Sequence[str], labels: str, names: Sequence[str] = ()) -> Files:
    """Images and label maps whose paths agree but for one part, the name of the case.

    Args:
        images: for each channel a path in which a star stands for the name.
        labels: the same of the label maps.
        names: of the classes, the background first; by default the labels that occur.

    Raises:
        BadData: a pattern without a star or a file, names that do not suffice, or no good case.
    """
    references = _matches(labels, "--labels")
    channels = [_matches(pattern, "--data") for pattern in images]
    problems = [
        (name, f"no image as {pattern}")
        for name in references
        for pattern, found in zip(images, channels, strict=True)
        if name not in found
    ]
    complete = [name for name in references if all(name in found for found in channels)]
    numbers = {name: i for i, name in enumerate(names)} or None
    paths = {name: tuple(found[name] for found in channels) for name in complete}
    return _checked(paths, references, numbers, None, problems)


def _matches(pattern: str, option: str) -> dict[str, Path]:
    before, star, after = pattern.partition("*")
    if not star or "*" in after:
        raise BadData(f"{option}: expected a path with one star, the case's name, got {pattern!r}")
    base = Path(before).parent if not before.endswith(("/", "\\")) else Path(before)
    head = before[len(str(base)) :].lstrip("/\\") if str(base) != "." else before
    rest = [part for part in (head + "*" + after).replace("\\", "/").split("/") if part]
    found = {}
    for path in sorted(base.glob("/".join(rest))):
        text = path.relative_to(base).as_posix()
        name = text[len(head) : len(text) - len(after)]
        if name:
            found[name.replace("/", "_")] = path
    if not found:
        raise BadData(f"{option}: no file as {pattern!r}")
    return found


# ---------------------------------------------------------------------- what fits together


def _checked(
    images: Mapping[str, tuple[Path, ...]],
    references: Mapping[str, Path],
    names: Mapping[str, int] | None,
    ignored: int | None,
    problems: list[tuple[str, str]],
) -> Files:
    """The cases that are good; the numbers of classes are those that occur if not given."""
    seen: dict[str, set[int]] = {}
    checksums = {}
    for name in images:
        try:
            reference = _fitting(images[name], references[name])
            found = labels_in(reference.voxels)
            known = None if names is None else {*names.values(), ignored}
            if known is not None and found - known:
                raise Mismatch(f"the labels hold {min(found - known)}, which is no class")
        except Mismatch as error:
            problems.append((name, str(error)))
            continue
        seen[name] = found
        checksums[name] = zlib.crc32(reference.voxels.tobytes())
    if not seen:
        first = "; ".join(f"{name}: {why}" for name, why in problems[:3])
        raise BadData(f"--data: no case can be used ({first})")
    occur = set.union(*seen.values())
    if names is None:
        names = {("background" if n == 0 else str(n)): n for n in sorted(occur | {0})}
    absent = [name for name, number in names.items() if number not in occur and number != 0]
    problems += [(name, "no case has this label") for name in absent]
    if len(names) < 2 or len(absent) == len(names) - 1:
        raise BadData("--data: no case holds a label but the background's")
    return Files(
        {name: images[name] for name in seen},
        {name: references[name] for name in seen},
        tuple((number,) for number in names.values()),
        tuple(names),
        ignored,
        tuple(problems),
        checksums,
    )


def _fitting(images: Sequence[Path], labels: Path) -> LabelMap:
    """The label map. Mismatch: one that does not lie on the grid of the images, or is flat."""
    reference = read_label_map(labels)
    if reference.voxels.ndim != 3:
        raise Mismatch(f"expected three axes, got shape {reference.voxels.shape[::-1]}")
    for path in images:
        try:
            check_same_grid(read_image(path), reference, affine=False)
        except Mismatch as error:
            text = str(error).replace("the prediction", path.name)
            raise Mismatch(text.replace("the reference", "the label map")) from None
    return reference
