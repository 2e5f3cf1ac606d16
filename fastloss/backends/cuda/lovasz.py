"""The combine step of losses that rank voxels by a histogram of errors, on a GPU.

The formulas of terms are recorded once and run by one block of threads, which is too few for the
bins. So a loss of this kind is computed ahead of that step, where it is one sum more, and the
derivatives by the bins are that by this sum times slopes. Nothing synchronises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastloss.backends.cuda.source import source
from fastloss.histogram import HISTOGRAMS, layout
from fastloss.protocol import FusedLoss
from fastloss.request import make_request
from fastloss.statistics import Statistics
from fastloss.sums import PREDICTED

if TYPE_CHECKING:
    from fastloss.backends.cuda.device import Device
    from fastloss.borrowed import Place

Combine = Callable[[FusedLoss, Statistics], tuple[Any, Callable[[Any], Any]]]

_MOST_SUMS = 64
# Mirrors `struct LovaszCall` in csrc/cuda/lovasz.cu.
LOVASZ_CALL = np.dtype(
    [
        ("sums", np.int64),
        ("histogram", np.int64),
        ("predicted", np.int64),
        ("wanted", np.int64),
        ("slopes", np.int64),
        ("of_class", np.int64),
        ("inner", np.int64),
        ("derivatives", np.int64),
        ("by_bins", np.int64),
        ("kind", np.int32),
        ("batch", np.int32),
        ("classes", np.int32),
        ("rows", np.int32),
        ("sums_of_table", np.int32),
        ("slot", np.int32),
        ("first", np.int32),
        ("adds", np.int32),
        ("slot_of", np.int32, _MOST_SUMS),
    ],
    align=True,
)
_RECORD = np.dtype(("V", LOVASZ_CALL.itemsize))
KERNELS = tuple(f"fastloss_lovasz_{name}" for name in ("scan", "value", "slopes"))
_THREADS, _BLOCKS = 256, 1024


def combine(
    place: Place, device: Device, others: Combine, loss: FusedLoss, statistics: Statistics
) -> tuple[Any, Callable[[Any], Any]]:
    """As `CudaBackend.combine`, of a loss that reads histograms; ``others``: of one without."""
    request = statistics.request
    slots, batch, classes = tuple(statistics.sums.shape)
    inner, ranked = loss.without_histograms()
    own = make_request(request.activation, request.dense, request.ignore_index, inner.needs)
    if len(own.sums) > _MOST_SUMS:
        raise ValueError(
            f"terms: at most {_MOST_SUMS} sums fit a ranking loss on a GPU, got {len(own.sums)}"
        )
    sums = place.empty((len(own.sums), batch, classes), "float64")
    scan, value_of, slopes_of = device.kernels(source("lovasz.cu"), KERNELS)
    of_sum = 8 * batch * classes
    calls: list[np.ndarray] = []
    kept: list[Any] = []
    seen: set[str] = set()
    for term, total in ranked:
        bins, rows = layout(term.histogram).bins, batch if term.per_sample else 1
        slopes = device.empty(max(1, 16 * bins * rows * classes))
        of_class = device.empty(max(1, 24 * rows * classes))
        call = np.zeros(1, LOVASZ_CALL)
        call["sums"] = place.address(statistics.sums)
        call["histogram"] = call["sums"] + of_sum * request.index[term.histogram].start
        call["predicted"] = call["sums"] + of_sum * request.index[PREDICTED]
        call["slopes"], call["of_class"] = slopes.address, of_class.address
        call["kind"] = HISTOGRAMS.index(term.histogram)
        call["batch"], call["classes"], call["rows"] = batch, classes, rows
        call["sums_of_table"], call["slot"] = len(request.sums), own.index[total]
        call["first"], call["adds"] = not calls, term.histogram in seen
        call["slot_of"][0, : len(request.sums)] = [own.index[s] for s in request.sums]
        kept += [slopes, of_class]
        if term.classes != "present":
            named = range(classes) if term.classes == "all" else term.classes
            wanted = device.upload(np.isin(np.arange(classes), list(named)).astype(np.float64))
            call["wanted"] = wanted.address
            kept.append(wanted)
        if rows:
            device.launch(scan, rows * classes, (_THREADS, 1), 0, call.copy().view(_RECORD))
        call["inner"] = place.address(sums)
        device.launch(value_of, 1, (_THREADS, 1), 0, call.copy().view(_RECORD))
        calls.append(call)
        seen.add(term.histogram)
    value, pull = others(inner, replace(statistics, request=own, sums=sums))

    def pullback(upstream: Any) -> Any:
        found = pull(upstream)
        whole = place.empty((slots, batch, classes), "float64")
        address = place.address(whole)
        for (term, _), call in zip(ranked, calls, strict=True):
            bins, places = layout(term.histogram).bins, request.index[term.histogram]
            call["inner"], call["derivatives"] = found.address, address
            call["by_bins"] = address + of_sum * (places.start + 2 * bins)
            grid = max(1, min(_BLOCKS, -(-2 * bins * batch * classes // _THREADS)))
            device.launch(slopes_of, grid, (_THREADS, 1), 0, call.copy().view(_RECORD))
        held = (found.kept, found.array, kept)
        return found._replace(array=whole, address=address, kept=held)

    return value, pullback
