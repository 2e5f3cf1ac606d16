"""Losses of Dask arrays: the same numbers as of the whole volume, a chunk at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import need

import fastloss as fl

da = need("dask.array")
import fastloss.dask  # noqa: E402

SHAPE = (2, 3, 12, 10, 8)
LOSSES = {
    "dice_ce": fl.Dice(batch=True, include_background=False) + fl.CrossEntropy(label_smoothing=0.1),
    "tversky_focal": fl.Tversky(alpha=0.3, beta=0.7) + 2 * fl.Focal(),
    "sigmoid": fl.Loss(fl.Jaccard(), fl.CrossEntropy(), activation="sigmoid", ignore_index=2),
}


@pytest.fixture
def volume():
    random = np.random.default_rng(0)
    logits = random.normal(size=SHAPE).astype(np.float32)
    labels = random.integers(0, 3, (SHAPE[0], *SHAPE[2:])).astype(np.uint8)
    return logits, labels, random.random(labels.shape).astype(np.float32)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunks", [(2, 3, 4, 5, 8), (1, 3, 12, 10, 8), (2, 1, 5, 5, 3)])
def test_value_and_gradient_are_those_of_the_whole(volume, name, chunks):
    logits, labels, weight = volume
    loss = LOSSES[name]
    value, gradient = loss.value_and_grad(logits, labels, weight)
    parts = da.from_array(logits, chunks=chunks)
    for target in (labels, labels[:, None], da.from_array(labels, chunks=(1, 3, 10, 8))):
        found = fastloss.dask.value(loss, parts, target, weight)
        assert found == pytest.approx(value, rel=1e-6)
        lazy = fastloss.dask.gradient(loss, parts, target, weight)
        assert (lazy.shape, lazy.dtype) == (SHAPE, np.float32)
        np.testing.assert_allclose(lazy.compute(), gradient, rtol=1e-5, atol=1e-9)


def test_dense_targets_fields_and_known_statistics(volume):
    logits, labels, _ = volume
    loss = fl.Dice() + 0.1 * fl.Boundary()
    dense = np.moveaxis(np.eye(3, dtype=np.float32)[labels], -1, 1)
    fields = loss.fields(labels, classes=3, spacing=(3, 1, 1))
    value, gradient = loss.value_and_grad(logits, dense, fields=fields)
    parts = da.from_array(logits, chunks=(2, 3, 4, 5, 4))
    statistics = fastloss.dask.statistics(loss, parts, dense, fields=fields)
    assert loss.value(statistics) == pytest.approx(value, rel=1e-6)
    lazy = fastloss.dask.gradient(
        loss, parts, dense, fields=fields, statistics=statistics, upstream=2
    )
    np.testing.assert_allclose(lazy.compute(), 2 * gradient, rtol=1e-5, atol=1e-8)


def test_from_zarr_to_zarr_a_chunk_at_a_time(volume, tmp_path):
    zarr = need("zarr")
    logits, labels, _ = volume
    for name, array, chunks in (("x", logits, (2, 3, 4, 5, 8)), ("y", labels, (2, 4, 5, 8))):
        da.from_array(array, chunks=chunks).to_zarr(str(tmp_path / name))
    log = tmp_path / "log"

    def note(chunk):
        with log.open("a") as file:
            file.write(f"{chunk.size}\n")
        return chunk

    parts = da.from_zarr(str(tmp_path / "x")).map_blocks(note, meta=logits[:0])
    loss = fl.Dice() + fl.CrossEntropy()
    lazy = fastloss.dask.gradient(loss, parts, da.from_zarr(str(tmp_path / "y")))
    lazy.to_zarr(str(tmp_path / "gradient"))
    reads = [int(line) for line in log.read_text().split()]
    assert max(reads) == 2 * 3 * 4 * 5 * 8
    assert sum(reads) == 2 * logits.size  # for the statistics, and for the gradient
    written = zarr.open_array(str(tmp_path / "gradient"), mode="r")[...]
    np.testing.assert_allclose(
        written, loss.value_and_grad(logits, labels)[1], rtol=1e-5, atol=1e-9
    )


def test_bad_input(volume):
    logits, labels, weight = volume
    parts = da.from_array(logits, chunks=(2, 3, 4, 5, 8))
    with pytest.raises(TypeError, match="logits: expected a Dask array, got ndarray"):
        fastloss.dask.value(fl.Dice(), logits, labels)
    with pytest.raises(ValueError, match=r"target: expected spatial axes \(12, 10, 8\)"):
        fastloss.dask.value(fl.Dice(), parts, labels[..., :-1])
    with pytest.raises(ValueError, match=r"voxel_weight: expected spatial axes \(12, 10, 8\)"):
        fastloss.dask.gradient(fl.Dice(), parts, labels, weight[0])
    with pytest.raises(ValueError, match="target: expected labels in"):
        fastloss.dask.value(fl.Dice(), parts, labels + 7)
    with pytest.raises(TypeError, match="fields: expected arrays by name"):
        fastloss.dask.value(fl.Dice(), parts, labels, fields=[labels])


def test_example():
    need("zarr")
    script = Path(__file__).resolve().parent.parent / "examples" / "dask_zarr.py"
    arguments = ["--classes", "3", "--edge", "16", "--chunk", "8"]
    path = os.pathsep.join(filter(None, [str(script.parent.parent), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert "value and gradient of 0.00 GB" in run.stdout
