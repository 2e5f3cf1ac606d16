"""Pictures of a run: the curves, and the tissues over the anatomy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import fastloss as fl
from brain.history import History
from brain.volume import CLASSES, SPACING, Brain, planes

TITLES = {
    "dice_ce": "Dice + cross-entropy",
    "dice_ce_boundary": "Dice + cross-entropy + boundary",
}
TISSUE_COLOURS = ("tab:orange", "tab:cyan")
# The second is dashed over the first, so that both are visible where they agree.
LINES = ({"linestyle": "-", "linewidth": 3.5, "alpha": 0.5}, {"linestyle": "--", "linewidth": 1.2})
VIEWS = {2: "axial", 1: "coronal", 0: "sagittal"}


def draw_curves(histories: list[History], path: Path) -> None:
    """The loss at each step, the Dice in the held-out slab, and how far two runs are apart."""
    both = len(histories) == 2
    figure = Figure(figsize=(15 if both else 10, 4.2), layout="constrained")
    axes = figure.subplots(1, 3 if both else 2)
    for history, line in zip(histories, LINES, strict=False):
        steps = range(1, len(history.loss) + 1)
        axes[0].plot(steps, history.loss, color="tab:purple", label=history.implementation, **line)
        for name, colour in zip(CLASSES[1:], TISSUE_COLOURS, strict=True):
            axes[1].plot(
                list(history.held_out),
                [dice[name] for dice in history.held_out.values()],
                color=colour,
                label=f"{name}, {history.implementation}",
                **line,
            )
    title = TITLES[histories[0].loss_name]
    axes[0].set(title=f"{title}, training patches", xlabel="step", ylabel="loss")
    axes[1].set(title="Held-out slab", xlabel="step", ylabel="Dice coefficient", ylim=(0, 1))
    if both:
        first, second = (np.array(history.loss) for history in histories)
        apart = np.abs(first - second) / np.abs(second)
        dtype = histories[0].dtype
        digit = float(np.finfo(dtype).eps)
        # A logarithmic axis cannot show the steps at which both are equal.
        floor = digit / 100
        axes[2].semilogy(range(1, len(apart) + 1), np.maximum(apart, floor), color="tab:grey")
        axes[2].axhline(digit, color="black", linewidth=0.8, linestyle=":")
        axes[2].annotate(f"{dtype}'s last digit", (1, digit), (0, 3), textcoords="offset points")
        axes[2].set(title="Relative difference of the losses", xlabel="step")
    for ax in axes[:2]:
        ax.legend()
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_overlay(brain: Brain, histories: list[History], path: Path) -> None:
    """Rows: the anatomy, the true tissues and the predicted ones; columns: the views."""
    views = planes(brain)
    rows: dict[str, list[np.ndarray | None]] = {
        "T1": [None for _ in views],
        "truth": [brain.labels.take(index, axis=axis) for axis, index in views],
    }
    for history in histories:
        rows[f"predicted,\n{history.implementation}"] = list(history.slices)
    figure = Figure(figsize=(11, 3.6 * len(rows)), layout="constrained", facecolor="black")
    grid = figure.subplots(len(rows), len(views))
    for axes, (name, labels) in zip(grid, rows.items(), strict=True):
        for ax, (axis, index), own in zip(axes, views, labels, strict=True):
            ax.imshow(_coloured(brain.image.take(index, axis=axis), own), origin="lower")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            _mark_held_out(ax, brain, axis)
        axes[0].set_ylabel(name, color="white", fontsize=13)
    for ax, (axis, _) in zip(grid[0], views, strict=True):
        held_out = "in the held-out slab" if axis == 1 else "held out: between the lines"
        ax.set_title(f"{VIEWS[axis]}, {held_out}", color="white")
    handles = [
        Patch(color=colour, label=name)
        for name, colour in zip(CLASSES[1:], TISSUE_COLOURS, strict=True)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, labelcolor="white", facecolor="black"
    )
    figure.savefig(path, dpi=110)


def draw_distances(brain: Brain, path: Path) -> None:
    """Rows: the tissues; columns: the views. The field that the boundary loss reads, in mm.

    It is that of the whole volume; the patches have their own.
    """
    views = planes(brain)
    made = fl.Boundary(spacing=SPACING).fields(brain.labels[None], classes=len(CLASSES))
    field = made["boundary"][0]
    figure = Figure(figsize=(12, 3.6 * (len(CLASSES) - 1)), layout="constrained")
    grid = figure.subplots(len(CLASSES) - 1, len(views))
    # Distances outside are much longer than those inside.
    limit = 2 * float(-field[1:].min())
    for label, axes in enumerate(grid, start=1):
        for ax, (axis, index) in zip(axes, views, strict=True):
            plane = field[label].take(index, axis=axis).T
            inside = np.equal(brain.labels.take(index, axis=axis).T, label)
            shown = ax.imshow(plane, origin="lower", cmap="RdBu", vmin=-limit, vmax=limit)
            ax.contour(inside, levels=[0.5], colors="black", linewidths=0.6)
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(CLASSES[label], fontsize=13)
    for ax, (axis, _) in zip(grid[0], views, strict=True):
        ax.set_title(VIEWS[axis])
    figure.colorbar(
        shown, ax=grid, label="signed distance to the boundary in mm", extend="max", shrink=0.8
    )
    figure.savefig(path, dpi=110)


def _coloured(image: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """(height, width, 3) in [0, 1]: the anatomy in grey under the colours of the tissues."""
    low, high = image.min(), np.percentile(image, 99.5)
    grey = np.clip((image - low) / (high - low), 0, 1).T[..., None].repeat(3, axis=2)
    if labels is not None:
        for label, colour in enumerate(TISSUE_COLOURS, start=1):
            where = np.equal(labels.T, label)
            grey[where] = 0.45 * grey[where] + 0.55 * np.array(to_rgb(colour))
    return grey


def _mark_held_out(ax: Axes, brain: Brain, axis: int) -> None:
    for edge in (brain.held_out.start - 0.5, brain.held_out.stop - 0.5):
        if axis == 2:
            ax.axhline(edge, color="white", linewidth=0.8, linestyle="--")
        elif axis == 0:
            ax.axvline(edge, color="white", linewidth=0.8, linestyle="--")
