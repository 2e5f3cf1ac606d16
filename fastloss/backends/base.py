"""The interface of a backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.arrays import Arrays
from fastloss.maps import Map
from fastloss.request import Request


class Backend:
    """The passes over the voxels. It knows the request, never a framework or a term.

    A row is a sample, or, where there are regions, one of `Arrays.rows` regions of a sample; the
    rows of a sample follow each other. Voxels of weight 0, of the ignored label or of no region
    count for nothing, whatever logits and fields hold there.
    """

    name = ""

    def reduce(
        self,
        request: Request,
        arrays: Arrays,
        sums: np.ndarray,
        voxels: np.ndarray,
        voxel_map: Map | None = None,
    ) -> None:
        """Write the sums of ``request.sums``, (S, rows, C), and of the voxel weights, (rows,).

        Also a map of kind "voxel", if one is wanted, in the same pass.

        Raises:
            ValueError: a label outside [0, C) that is not ignored, an integer other than 0 and 1 in
                a dense target, or a negative voxel weight.
        """
        raise NotImplementedError(f"{type(self).__name__} must define reduce")

    def apply(
        self, request: Request, arrays: Arrays, coefficients: np.ndarray, out: np.ndarray
    ) -> None:
        """Write the gradient by the logits, given the derivative by each sum, (S, rows, C).

        ``out`` has the shape and dtype of ``arrays.logits`` and may be the same memory. The
        arrays are those of an earlier `reduce`, which checked them.
        """
        raise NotImplementedError(f"{type(self).__name__} must define apply")

    def write_map(self, request: Request, arrays: Arrays, voxel_map: Map) -> None:
        """Write one number per voxel, or per voxel and class: see `Map`.

        Raises:
            ValueError: as `reduce`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define write_map")

    def get_num_threads(self) -> int:
        """The number of threads that compute."""
        return 1

    def set_num_threads(self, number: int) -> None:
        """Let at most this many threads compute, where the backend has threads."""


def bad_labels(count: int, first: Any, request: Request, classes: int) -> ValueError:
    """The error for labels that are no class, or what `bad_numbers` says of a dense target."""
    if request.dense:
        number = request.ignore_index if request.ignores_number(classes) else None
        return bad_numbers(count, first, number, classes)
    ignored = "" if request.ignore_index is None else f" or ignore_index={request.ignore_index}"
    shown = int(first) if float(first).is_integer() else float(first)
    plural = "label is" if count == 1 else "labels are"
    return ValueError(
        f"target: expected labels in [0, {classes}){ignored}, but {count} {plural} not; the first "
        f"is {shown}"
    )


def bad_numbers(count: int, first: Any, ignored: int | None, classes: int) -> ValueError:
    """The error for integers in a dense target that are neither 0 nor 1 nor ``ignored``."""
    allowed = "0 or 1" if ignored is None else f"0 or 1 or ignore_index={ignored}"
    kind = "a mask" if classes == 1 else "a dense target"
    plural = "number is" if count == 1 else "numbers are"
    return ValueError(
        f"target: expected {allowed} in {kind} of integers, but {count} {plural} not; the first is "
        f"{int(first)}"
    )


def bad_weights(count: int, first: Any) -> ValueError:
    """The error for negative or undefined voxel weights."""
    plural = "number is" if count == 1 else "numbers are"
    return ValueError(
        f"voxel_weight: expected finite numbers of at least 0, but {count} {plural} not; the first "
        f"is {float(first):g}"
    )
