"""Distances and boundary losses beside their peers, all in one run, as a table.

    python benchmarks/distances.py [--repeats N] [--quick] [--labels FILE.nii.gz]

Labels are the phantom torso of 14 classes, spacing (1.5, 1.5, 3). With --labels there are rows of
a real label volume too, with the spacing that its header tells: the organ of the most voxels, and
the signed maps of all organs. The sdist of totalsegmentator has some (tests/reference_files):

    pip download --no-deps --no-binary :all: totalsegmentator

Functions take turns; figures are medians. Peers that are not installed (edt, scipy, monai, torch)
are left out, by name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import fastloss as fl
from fastloss.bench import machine, table
from fastloss.bench.measure import Timed, interleave
from fastloss.bench.memory import peak
from fastloss.bench.phantom import phantom

SPACING = (1.5, 1.5, 3.0)
FAR = 10 * 1.5  # ten voxels
Spacing = tuple[float, ...]
Functions = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="samples of each (default: 5)")
    parser.add_argument("--quick", action="store_true", help="volumes of 64³ in place of 128³")
    parser.add_argument("--labels", type=Path, help="a label volume that nibabel reads")
    options = parser.parse_args()
    fl.set_num_threads(machine.threads())
    print(machine.machine_text(machine.machine()))
    edge = 64 if options.quick else 128
    rows = []
    real = () if options.labels is None else _real(options.labels)
    for title, functions, demands in (*real, *cases(edge)):
        print(f"{title} ...", file=sys.stderr, flush=True)
        seconds = interleave(
            {name: Timed(function) for name, function in functions.items()}, options.repeats
        )
        own = next(iter(functions))
        for name, demand in demands.items():
            if name not in seconds:
                continue
            ratio = seconds[name] / seconds[own]
            if demand.startswith("≤"):
                ratio = 1 / ratio
            cells = (table.milliseconds(seconds[own]), table.milliseconds(seconds[name]))
            rows.append((title, *cells, name, f"{ratio:.2f}", demand))
    print(table.text_table(("case", "ms", "other's ms", "other", "ratio", "demand"), rows))


def cases(edge: int) -> Any:
    """Titles, functions by name with our own first, and by name what the ratio is to be."""
    labels = phantom((edge,) * 3, 14).astype(np.uint8)
    for size in (edge, 2 * edge):
        whole = labels if size == edge else phantom((size,) * 3, 14).astype(np.uint8)
        for place, mask in [("inside", whole == 2), ("outside", whole != 2), ("body", whole != 0)]:
            functions = {"fastloss": _transform(mask)}
            functions |= _peers(lambda name, m=mask: _peer(name, m))
            yield f"{place}, {size}³", functions, {"edt": "≥ 3", "scipy": "≥ 12"}

    def maps(limit: float | None = None, dtype: str = "float32") -> Callable[[], object]:
        out = np.empty((1, 14, *labels.shape), dtype)
        return lambda: fl.signed_distance(
            labels[None], 14, spacing=SPACING, max_distance=limit, dtype=dtype, out=out
        )

    signed = {"fastloss": maps()}
    signed |= _peers(lambda name: _signed_peer(name, labels))
    yield f"14 signed maps, {edge}³", signed, {"scipy": "≥ 20", "edt": "≥ 3"}
    both = {"to 10 voxels": maps(FAR), "all": maps(), "float16": maps(dtype="float16")}
    yield f"14 signed maps, {edge}³, to 10 voxels", both, {"all": "≥ 2.5"}
    yield from _losses(edge, labels)


def _real(path: Path) -> Any:
    """Cases of a label volume."""
    image: Any = import_module("nibabel").load(path)
    numbers = np.asarray(image.dataobj)
    spacing = tuple(float(size) for size in image.header.get_zooms()[: numbers.ndim])
    present, labels = np.unique(numbers, return_inverse=True)
    labels = np.ascontiguousarray(labels.reshape(numbers.shape).astype(np.uint16))
    classes = len(present)
    if classes <= 255:
        labels = labels.astype(np.uint8)
    shape = "×".join(map(str, labels.shape))
    title = f"{path.name}, {shape} at {'×'.join(f'{size:g}' for size in spacing)} mm"
    organ = 1 + int(np.bincount(labels.ravel(), minlength=classes)[1:].argmax())
    for place, mask in [("inside", labels == organ), ("outside", labels != organ)]:
        functions = {"fastloss": _transform(mask, spacing)}
        functions |= _peers(lambda name, m=mask: _peer(name, m, spacing))
        yield f"{title}, {place}", functions, {"edt": "≥ 3", "scipy": "≥ 12"}
    out = np.empty((1, classes, *labels.shape), np.float32)
    signed: Functions = {
        "fastloss": lambda: fl.signed_distance(labels[None], classes, spacing=spacing, out=out)
    }
    signed |= _peers(lambda name: _signed_peer(name, labels, classes, spacing))
    yield f"{title}, {classes} signed maps", signed, {"scipy": "≥ 20", "edt": "≥ 3"}


def _transform(mask: np.ndarray, spacing: Spacing = SPACING) -> Callable[[], object]:
    out = np.empty(mask.shape, np.float32)
    return lambda: fl.distance_transform(mask, spacing=spacing, out=out)


def _peers(make: Callable[[str], Callable[[], object]]) -> Functions:
    found: Functions = {}
    for name in ("edt", "scipy"):
        try:
            found[name] = make(name)
        except ImportError:
            print(f"{name}: not installed", file=sys.stderr)
    return found


def _peer(name: str, mask: np.ndarray, spacing: Spacing = SPACING) -> Callable[[], object]:
    if name == "edt":
        edt = import_module("edt")
        return lambda: edt.edt(mask, anisotropy=spacing, parallel=machine.threads())
    ndimage = import_module("scipy.ndimage")
    return lambda: ndimage.distance_transform_edt(mask, sampling=spacing)


def _signed_peer(
    name: str, labels: np.ndarray, classes: int = 14, spacing: Spacing = SPACING
) -> Callable[[], object]:
    transform = {"edt": "edt", "scipy": "scipy.ndimage"}[name]
    import_module(transform)

    def run() -> None:
        for c in range(classes):
            mask = labels == c
            inside, outside = _peer(name, mask, spacing)(), _peer(name, ~mask, spacing)()
            np.where(mask, 1 - inside, outside)  # type: ignore[operator]

    return run


def _losses(edge: int, labels: np.ndarray) -> Any:
    try:
        torch = import_module("torch")
        losses = import_module("monai.losses")
        ours = import_module("fastloss.monai")
    except ImportError as error:
        print(f"losses: {error}", file=sys.stderr)
        return
    torch.set_num_threads(machine.threads())
    generator = torch.Generator().manual_seed(0)

    def step(loss: Any, x: Any, target: Any, **more: Any) -> Callable[[], object]:
        def run() -> None:
            x.grad = None
            loss(x, target, **more).backward()

        return run

    few = torch.from_numpy(np.where(labels < 4, labels, 0).astype(np.int64))[None, None]
    # A prediction as it is in training: the target, blurred, and noise.
    one_hot = torch.nn.functional.one_hot(few[:, 0], 4).movedim(-1, 1).float()
    smooth = torch.nn.functional.avg_pool3d(one_hot, 7, 1, 3)
    noise = torch.randn(smooth.shape, generator=generator)
    x4 = (8 * smooth + 0.5 * noise).requires_grad_()
    options = {"softmax": True, "to_onehot_y": True}
    steps = {
        "fastloss": step(ours.HausdorffDTLoss(**options), x4, few),
        "monai": step(losses.HausdorffDTLoss(**options), x4, few),
    }
    yield f"HausdorffDTLoss, C4 {edge}³", steps, {"monai": "≥ 20"}

    target = torch.from_numpy(labels.astype(np.int64))[None, None]
    x14 = torch.randn((1, 14, *labels.shape), generator=generator).requires_grad_()
    steps = {
        "fastloss": step(ours.BoundaryLoss(**options), x14, target),
        "monai": step(losses.BoundaryLoss(**options), x14, target),
    }
    yield f"BoundaryLoss, C14 {edge}³", steps, {"monai": "≥ 15"}

    label_map = torch.from_numpy(labels)[None]
    both = fl.Dice() + fl.CrossEntropy()
    three = both + 0.01 * fl.Boundary()
    out = torch.empty_like(x14).detach()
    x = x14.detach()

    def fused(loss: Any, **more: Any) -> Callable[[], object]:
        return lambda: loss.value_and_grad(x, label_map, out=out, **more)

    for dtype, demand in [("float32", "≤ 1.8"), ("float16", "≤ 1.5")]:
        fields = three.fields(label_map, classes=14, spacing=SPACING, dtype=dtype)
        steps = {
            f"fields of {dtype}": fused(three, fields=fields),
            "Dice + CE alone": fused(both),
        }
        yield f"Dice + CE + Boundary, C14 {edge}³, {dtype}", steps, {"Dice + CE alone": demand}
        most = _peak(fused(three, fields=fields))
        print(f"memory of a call beside {dtype} fields and gradient: {most}")


def _peak(call: Callable[[], object]) -> str:
    """The peak memory of a call, once all of it is warm."""
    call()
    found = peak(call)
    return "not told by this system" if found is None else f"{found / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
