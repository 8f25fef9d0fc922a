"""The course's pictures, in one style: readable in print and on dark pages, with no meaning carried by colour alone."""

import io
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from companion.errors import CompanionError

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


def plot_trade_off(
    points: Iterable[Any],
    *,
    x: str,
    y: str,
    maximize: str | Collection[str] = (),
    label: str | None = None,
    units: Mapping[str, str] | None = None,
    log: str | Collection[str] = (),
) -> Picture:
    """Two objectives against each other: filled points lie on the Pareto front of these two, hollow ones are dominated.

    Args:
        points: as `companion.metrics.pareto_front` takes them.
        x: the objective from left to right.
        y: the objective from bottom to top.
        maximize: those of the two of which more is better; of the others less is.
        label: the key or attribute to write beside each point.
        units: of an objective, for its axis: ``{"latency": "ms"}``.
        log: the axes to be logarithmic, ``x`` or ``y`` by the names of their objectives.

    Raises:
        CompanionError: as `companion.metrics.pareto_front`, or ``maximize`` or ``log`` names something else.
    """
    from companion.metrics.trade_offs import look_up, objective, pareto_front

    points = list(points)
    up, logarithmic = ({names} if isinstance(names, str) else set(names) for names in (maximize, log))
    for name in sorted((up | logarithmic) - {x, y}):
        raise CompanionError(f"{name!r} is on no axis: they are {x!r} and {y!r}.")
    front = pareto_front(points, maximize=up, minimize={x, y} - up)
    places = [(objective(point, x, i), objective(point, y, i)) for i, point in enumerate(points)]
    for name, values in zip((x, y), zip(*places, strict=True), strict=False):
        if name in logarithmic and min(values) <= 0:
            raise CompanionError(f"a logarithmic axis has no place for {name} {min(values):g}.")
    best = [any(point is one for one in front) for point in points]
    with rc_context(STYLE):
        figure = Picture(figsize=(6.5, 4))
        axis = figure.subplots()
        # The edge of what the front dominates: from a point it goes towards the worse end of x first.
        edge = sorted(place for place, on_front in zip(places, best, strict=True) if on_front)
        step = "steps-pre" if x in up else "steps-post"
        axis.plot(*np.reshape(edge, (-1, 2)).T, "o--", drawstyle=step, label="Pareto front")
        rest = [place for place, on_front in zip(places, best, strict=True) if not on_front]
        axis.plot(*np.reshape(rest, (-1, 2)).T, "o", color=COLOURS[0], markerfacecolor="white", label="dominated")
        for name, side, which in ((x, axis.xaxis, "x"), (y, axis.yaxis, "y")):
            text = f"{name} in {units[name]}" if units and name in units else name
            # Beside the vertical axis the text is turned, and its arrow with it.
            side.set_label_text(f"{text}   (better →)" if name in up else f"(← better)   {text}")
            if name in logarithmic:
                axis.set(**{f"{which}scale": "log"})
                side.set_major_formatter("{x:g}")
                shown = [place[which == "y"] for place in places]
                if shown and max(shown) < 10 * min(shown):  # within a decade the numbers between are labelled, too
                    side.set_minor_formatter("{x:g}")
        axis.margins(x=0.22, y=0.15)  # room for names
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
        if label is not None:
            # Towards the better corner, where the edge does not run; of dominated points the other way.
            corners = [((x in up) == on_front, (y in up) == on_front) for on_front in best]
            _label(figure, [str(look_up(point, label, i)) for i, point in enumerate(points)], places, corners)
    return figure


def _label(
    figure: Figure, texts: list[str], places: list[tuple[float, float]], corners: list[tuple[bool, bool]]
) -> None:
    """Write each text beside its place: at its corner (whether right, whether above), or where else it is not over
    another, with a line to its place."""
    (axis,) = figure.axes
    figure.draw_without_rendering()  # after which it is known what lies where
    dots = axis.transData.transform(np.reshape(places, (-1, 2)))
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in dots]
    room = Bbox.from_extents(axis.bbox.x0, axis.bbox.y0, figure.bbox.x1, axis.bbox.y1 + 10)
    line = {"arrowstyle": "-", "linewidth": 0.5, "color": "gray", "shrinkA": 0, "shrinkB": 4}
    for text, place, (x, y), (right, above) in zip(texts, places, dots, corners, strict=True):
        note = axis.annotate(text, place, (0, 0), textcoords="offset points", fontsize=9, arrowprops=line)
        note.set_in_layout(False)  # or the axes would make room for it, and everything move
        size = Text.get_window_extent(note)
        for lines, to_right, upwards in itertools.product(range(12), (right, not right), (above, not above)):
            aside, up = 4 if to_right else -4, (3 + 8 * lines) * (1 if upwards else -1)
            left = x + aside * figure.dpi / 72 - (0 if to_right else size.width)
            bottom = y + up * figure.dpi / 72 - (0 if upwards else size.height)
            box = Bbox.from_bounds(left, bottom, size.width, size.height)
            if room.count_contains(box.get_points()) == 2 and not any(map(box.overlaps, taken)):
                break
        else:  # there is no such place
            to_right, upwards, aside, up = right, above, 4 if right else -4, 3 if above else -3
        note.set(position=(aside, up), ha="left" if to_right else "right", va="bottom" if upwards else "top")
        taken.append(box)


def plot_roofline(found: Any, *, others: Iterable[Any] = ()) -> Picture:
    """A `companion.metrics.Roofline`: each layer's FLOPS over its FLOPs per byte, under the roof of the machine.

    Args:
        found: the roofline; a symbol for each kind of layer, its area grows with the layer's share of the time.
        others: roofs of other machines (`companion.metrics.ACCELERATORS`), without points: nothing was measured there.
    """
    layers, roof, others = found.layers, found.roof, list(others)
    total = sum(layer.measured for layer in layers)
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    spread = [layer.cost.intensity for layer in layers]
    x = np.geomspace(min(spread) / 3, max(max(spread), *(r.ridge for r in (roof, *others))) * 3, 200)
    with rc_context(STYLE):
        figure = Picture(figsize=(8, 4.5))
        axis = figure.subplots()
        for each, line in zip((roof, *others), itertools.cycle(LINES)):
            heights = np.minimum(each.bytes_per_second * x, each.flops_per_second)
            axis.plot(x, heights, color="black" if each is roof else "gray", linestyle=line, label=each.name)
        for kind, symbol, colour in zip(kinds, itertools.cycle("o^sDvP*X"), itertools.cycle(COLOURS)):
            ours = [layer for layer in layers if layer.kind == kind]
            axis.scatter(
                [layer.cost.intensity for layer in ours],
                [layer.flops_per_second for layer in ours],
                s=[20 + 600 * layer.measured / total for layer in ours],
                marker=symbol, facecolors="none", edgecolors=colour, linewidths=1.5, label=kind,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte moved", ylabel="FLOPS")
        for place, text in ((0.02, "← bound by memory"), (0.98, "bound by arithmetic →")):
            axis.text(place, 0.02, text, transform=axis.transAxes, ha="left" if place < 0.5 else "right", fontsize=9)
        handles, labels = axis.get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
        for handle in legend.legend_handles:
            if isinstance(handle, PathCollection):
                handle.set_sizes([40])  # a symbol in the legend stands for a kind, not for a size
    return figure


def plot_magnitudes(found: Mapping[str, Any], formats: Iterable[Any]) -> Picture:
    """Shares of gradients by power of two, above the ranges of number formats: what lies outside a range is lost.

    Args:
        found: `companion.train.gradient_magnitudes` by name, such as one without and one with loss scaling.
        formats: of `companion.train.FORMATS`; each a bar from its smallest to its largest number, hatched where it is
            subnormal and has fewer digits.
    """
    formats = list(formats)
    exponents = sorted({e for one in found.values() for e in one.counts} or {0})
    with rc_context(STYLE):
        figure = Picture(figsize=(8, 3 + 0.35 * len(formats)))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, max(1, len(formats))))
        for (name, one), line in zip(found.items(), itertools.cycle(LINES)):
            heights = [100 * one.counts.get(e, 0) / max(1, one.nonzero) for e in range(exponents[0], exponents[-1] + 1)]
            edges = range(exponents[0], exponents[-1] + 2)
            upper.stairs(heights, edges, label=name, linestyle=line, linewidth=1.5)
        upper.set(ylabel="% of the gradients\nthat are not zero")
        upper.legend(loc="upper right")
        upper.set_xlim(exponents[0] - 4, max(exponents[-1] + 4, 18))  # float16's upper end is at 2^16
        for row, each in enumerate(formats):
            smallest, normal, end = (math.log2(x) for x in (each.smallest, each.smallest_normal, 2 * 2.0**each.top))
            lower.barh(row, end - normal, left=normal, height=0.6, color="gray", edgecolor="gray")
            lower.barh(row, normal - smallest, left=smallest, height=0.6, fill=False, hatch="////", edgecolor="gray")
        lower.set(yticks=range(len(formats)), ylim=(len(formats) - 0.5, -0.5), xlabel="magnitude")
        lower.set_yticklabels([each.name for each in formats])
        lower.xaxis.set_major_formatter(lambda exponent, _: f"$2^{{{exponent:.0f}}}$")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        lower.set_axisbelow(True)
        for edge in {edge for each in formats for edge in (math.log2(each.smallest), each.top + 1)}:
            upper.axvline(edge, color="gray", linewidth=0.8, linestyle=":")
    return figure


def plot_timeline(events: Iterable[Any], *, title: str = "") -> Picture:
    """What each stage of a pipeline did when: a row for each stage, a block with its number for each microbatch.

    Args:
        events: of `companion.train.parallel.timeline`. Forward is plain, backward hatched, what is empty is the bubble.
        title: above the picture.
    """
    events = list(events)
    looks: dict[str, Any] = {
        "forward": {"facecolor": "white"},
        "backward": {"facecolor": "#cfe3f2", "hatch": "////"},
    }
    stages = sorted({event.stage for event in events})
    with rc_context(STYLE):
        figure = Picture(figsize=(9, 1.1 + 0.45 * max(1, len(stages))))
        axis = figure.subplots()
        for kind, look in looks.items():
            ours = [event for event in events if event.kind == kind]
            for event in ours:
                axis.broken_barh(
                    [(event.start, event.end - event.start)],
                    (event.stage - 0.4, 0.8),
                    edgecolor=COLOURS[0], linewidth=0.8, label=kind if event is ours[0] else None, **look,
                )  # fmt: skip
                axis.text(
                    (event.start + event.end) / 2, event.stage, str(event.microbatch),
                    ha="center", va="center", fontsize=8,
                    bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"},
                )  # fmt: skip
        axis.set(yticks=stages, ylim=(max(1, len(stages)) - 0.5, -0.5), xlabel="seconds")
        axis.set_yticklabels([f"stage {stage}" for stage in stages])
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(visible=False)
        if events:
            figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def plot_exchanges(exchanges: Iterable[Any], *, title: str = "") -> Picture:
    """Which tensor was on its way between workers when: a row for each, first a wait for the slower worker (hatched).

    Args:
        exchanges: of `companion.train.horovod.read_timeline`; the first to be ready is time 0 and the topmost row.
        title: above the picture.
    """
    exchanges = sorted(exchanges, key=lambda exchange: exchange.ready)
    rows = list(dict.fromkeys(exchange.tensor for exchange in exchanges))
    looks: dict[str, Any] = {
        "waits for the other workers": {"facecolor": "white", "hatch": "////"},
        "on its way": {"facecolor": COLOURS[0]},
    }
    with rc_context(STYLE):
        figure = Picture(figsize=(9, 1.1 + 0.25 * max(1, len(rows))))
        axis = figure.subplots()
        for label, look in looks.items():
            for i, exchange in enumerate(exchanges):
                times = (exchange.ready, exchange.start) if "hatch" in look else (exchange.start, exchange.end)
                start, end = (1e3 * (time - exchanges[0].ready) for time in times)
                axis.broken_barh(
                    [(start, end - start)],
                    (rows.index(exchange.tensor) - 0.4, 0.8),
                    edgecolor=COLOURS[0], linewidth=0.8, label=None if i else label, **look,
                )  # fmt: skip
        axis.set(yticks=range(len(rows)), ylim=(max(1, len(rows)) - 0.5, -0.5), xlabel="milliseconds")
        axis.set_yticklabels(rows)
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(visible=False)
        if exchanges:
            figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def plot_scaling(measured: Mapping[int, float], *, unit: str = "samples per second") -> Picture:
    """Throughput against the number of workers, with the line on which n workers do n times the work of one.

    Args:
        measured: throughput by number of workers; the line goes through that of the fewest.
        unit: of the throughput.
    """
    workers = sorted(measured)
    with rc_context(STYLE):
        figure = Picture(figsize=(5, 3.2))
        axis = figure.subplots()
        axis.plot(workers, [measured[n] for n in workers], "o-", label="measured")
        axis.plot(workers, [measured[workers[0]] * n / workers[0] for n in workers], label="in proportion")
        axis.set(xlabel="workers", ylabel=unit, ylim=(0, None))
        axis.set_xticks(workers)
        axis.legend()
    return figure


ENDS = ("high", "value", "low")


def plot_speed_ups(found: Mapping[str, Any]) -> Picture:
    """How many times as fast as their baseline things are, each with its 95 % interval.

    Args:
        found: comparisons of the same things, as `companion.metrics.compare_latency` returns them, by name.
    """
    names = list(dict.fromkeys(name for each in found.values() for name in each.ratios))
    with rc_context(STYLE):
        figure = Picture(figsize=(6, 0.8 + 0.4 * len(names)))
        axis = figure.subplots()
        axis.axvline(1, color="black", linewidth=0.8)
        for i, (series, each) in enumerate(found.items()):
            offset = 0.25 * (i - (len(found) - 1) / 2)
            rows = [names.index(name) + offset for name in each.ratios]
            # The inverse of a ratio of times is one of speeds.
            low, speed, high = (1 / np.array([getattr(r, end) for r in each.ratios.values()]) for end in ENDS)
            look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "fmt": "osD^v"[i % 5], "linestyle": ""}
            axis.errorbar(speed, rows, xerr=[speed - low, high - speed], capsize=3, label=series, **look)
        axis.set(yticks=range(len(names)), ylim=(max(1, len(names)) - 0.5, -0.5), xlim=(0, None))
        axis.set_yticklabels(names)
        baselines = sorted({each.baseline for each in found.values()})
        axis.set_xlabel(f"times as fast as {', '.join(baselines)}")
        axis.grid(visible=False, axis="y")
        if len(found) > 1:
            figure.legend(loc="outside upper right", ncols=len(found), frameon=False, fontsize=8)
    return figure


MARKS = "os^Dv*PX"


def plot_load(found: Mapping[str, Mapping[int, Any]], *, percentile: float = 50.0) -> Picture:
    """Latency against throughput of several servers, each a line from few connections to many: right and low is best.

    Args:
        found: by server, what its clients saw by the number of connections, which is written at each point; each has
            a ``throughput`` and a method ``latency(percentile)``, as `companion.serve.load.Load` and
            `companion.serve.Simulated` have.
        percentile: of the latencies, in 0..100.
    """
    with rc_context(STYLE):
        figure = Picture(figsize=(7, 4))
        axis = figure.subplots()
        for (name, runs), mark in zip(found.items(), itertools.cycle(MARKS)):
            points = [(run.throughput, 1e3 * run.latency(percentile)) for _, run in sorted(runs.items())]
            axis.plot(*np.reshape(points, (-1, 2)).T, marker=mark, markerfacecolor="white", label=name)
            for connections, point in zip(sorted(runs), points, strict=True):
                axis.annotate(str(connections), point, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", yscale="log", xlabel="answers a second   (better →)")
        axis.set_ylabel(f"(← better)   latency in ms, {'median' if percentile == 50 else f'p{percentile:g}'}")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(LogFormatter())  # 100, not 10²
            side.set_minor_formatter(LogFormatter())
        if found:
            figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def plot_batches(found: Mapping[str, Iterable[int]]) -> Picture:
    """In batches of which size the items went through the model: a row of bars for each server.

    Args:
        found: by server, the sizes of its batches. A bar is the share of all items, so that a few large batches weigh
            as much as the many small ones that they replace.
    """
    sizes = {
        name: np.bincount(np.asarray(list(batches), dtype=np.int64), minlength=1) for name, batches in found.items()
    }
    with rc_context(STYLE):
        figure = Picture(figsize=(7, 0.6 + 1.1 * max(1, len(sizes))))
        axes = figure.subplots(max(1, len(sizes)), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axis, (name, times) in zip(axes, sizes.items(), strict=False):
            items = times * np.arange(len(times))
            axis.bar(np.arange(len(times)), 100 * items / max(1, items.sum()), color=COLOURS[0])
            axis.set_title(name, fontsize=9, loc="left")
            axis.set_ylabel("% of items", fontsize=8)
        axes[-1].set_xlabel("items in the batch")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
