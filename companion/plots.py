"""The course's pictures, in one style: readable in print and on dark pages, with no meaning carried by colour alone."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which colour-blind readers tell apart, each with a line style of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))

STYLE: Any = {
    "figure.facecolor": "white",  # a page may be dark, the picture brings its own paper
    "savefig.facecolor": "white",
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=LINES),
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "font.size": 10,
}


class Picture(Figure):
    """A figure that notebooks draw by itself, without pyplot's global state: no backend to choose, none left open."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()

    def __repr__(self) -> str:
        width, height = self.get_size_inches()
        return f"<Picture {width:g}×{height:g} inches, {len(self.axes)} axes>"


def plot_images(images: Any, titles: Sequence[str], *, columns: int = 10) -> Picture:
    """A sheet of pictures, float [N, 3, H, W] in 0..1, each with its title above it."""
    rows = max(1, -(-len(images) // columns))
    with rc_context(STYLE):
        figure = Picture(figsize=(columns, 1.25 * rows))
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, image, title in zip(axes.flat, images, titles, strict=False):
            axis.imshow(np.moveaxis(np.asarray(image), 0, -1), interpolation="nearest")
            axis.set_title(title, fontsize=9)
    return figure


def plot_history(history: Any) -> Picture:
    """Loss and validation score by epoch of a `companion.train.History`; marks the epoch whose weights were kept."""
    epochs = [row.epoch for row in history.epochs]
    with rc_context(STYLE):
        figure = Picture(figsize=(8, 3))
        left, right = figure.subplots(1, 2)
        left.plot(epochs, [row.train_loss for row in history.epochs], label="training")
        left.plot(epochs, [row.validation_loss for row in history.epochs], label="validation")
        left.set(xlabel="epoch", ylabel="loss", yscale="log")
        left.legend()
        right.plot(epochs, [100 * row.validation_score for row in history.epochs])
        best = history.epochs[history.best_epoch - 1]
        right.plot(best.epoch, 100 * best.validation_score, "o", label=f"kept: epoch {best.epoch}")
        right.set(xlabel="epoch", ylabel=f"validation {history.score} in %")
        right.legend(loc="lower right")
        for axis in (left, right):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def plot_confusion(targets: Any, predictions: Any, labels: Sequence[str]) -> Picture:
    """How many samples of each class (rows) were taken for each class (columns), from two int [N]."""
    n = len(labels)
    counts = np.bincount(np.asarray(targets) * n + np.asarray(predictions), minlength=n * n).reshape(n, n)
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Picture(figsize=(5, 4.5))
        axis = figure.subplots()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
        axis.set(xticks=range(n), yticks=range(n), xlabel="predicted", ylabel="true")
        axis.set_xticklabels(labels, rotation=0 if max(map(len, labels)) < 4 else 45)
        axis.set_yticklabels(labels)
    return figure
