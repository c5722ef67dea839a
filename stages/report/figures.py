"""The report's pictures, as PNG bytes that depend on nothing but the arguments."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from stages.ground.places import step_of
from stages.report.text import class_name, legible

INK, MUTED, GRID = "#1f2328", "#6b7280", "#e5e7eb"
TRAINING, VALIDATION, CHOSEN = "#9aa5b4", "#2456a6", "#c2410c"
SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#c9daf1", "#5b8bd0", "#173a75"])

DPI = 150
NAME_LENGTH = 24
MAX_NUMBERED_CLASSES = 20  # with more, the numbers in the cells are smaller than anyone can read
MAX_PERCENT_CLASSES = 8
MAX_NAMED_TICKS = 40
INCHES_A_LETTER = 0.085
LARGEST = 1e100  # of a number that is drawn

STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, and its copy is found first
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a label such as `$x$` is a name, not a formula
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@contextmanager
def _fixed_style() -> Iterator[None]:
    """matplotlib's own defaults and ours: a user's matplotlibrc must not change the bytes of an out."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _png(width: float, height: float, draw: Callable[[Figure], None]) -> bytes:
    # Everything happens inside the style: matplotlib reads parts of it only when the file is written.
    with _fixed_style():
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        # Software holds matplotlib's version and would differ between machines with the same picture.
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


@cache
def _drawable() -> frozenset[int]:
    return frozenset(FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())


def _tick_name(index: int, name: str) -> str:
    """The class's name; its id before it where the font lacks characters, which would all look the same."""
    text = class_name(name, NAME_LENGTH)
    drawn = "".join(character if ord(character) in _drawable() else "□" for character in text)
    return text if drawn == text else f"{index}: {drawn}"


def _plottable(values: Any) -> NDArray[np.float64]:
    """`values`, NaN where no axis reaches: matplotlib cannot lay out one from -1e308 to 1e308."""
    found = np.asarray(values, np.float64)
    return np.where(np.abs(found) <= LARGEST, found, np.nan)


def _number(value: float) -> str:
    """Four places; a number too long for them in its short form."""
    return f"{value:.4f}" if abs(value) < 1e9 else f"{value:.4g}"


def confusion_counts(label: NDArray[np.int64], prediction: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Rows per (label, prediction), shape (classes, classes)."""
    cells = label * classes + prediction
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes).astype(np.int64)


def _write_cells(axes: Axes, counts: NDArray[np.int64], share: NDArray[np.float64]) -> None:
    with_percent = len(counts) <= MAX_PERCENT_CLASSES
    for (row, column), count in np.ndenumerate(counts):
        if count == 0 and not with_percent:
            continue  # in a large matrix the zeros hide the numbers that matter
        text = f"{count:,}\n{share[row, column]:.0%}" if with_percent else f"{count:,}"
        colour = "white" if share[row, column] > 0.45 else INK
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9 if with_percent else 8)


def confusion_figure(counts: NDArray[np.int64], label_names: Sequence[str]) -> bytes:
    """PNG of the confusion matrix: a row per true label, shaded by the share of that label's rows.

    `counts` are those of `confusion_counts`.
    """
    classes = len(label_names)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    numbered = classes <= MAX_NUMBERED_CLASSES
    ticks = range(0, classes, -(-classes // MAX_NAMED_TICKS))
    names = [_tick_name(index, label_names[index]) for index in ticks]

    cell = 1.4 if classes <= 3 else 0.75 if classes <= MAX_PERCENT_CLASSES else 0.42  # inches
    height = max(3.6, 1.4 + cell * classes) if numbered else 8.0

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        # Rare confusions among many classes are a few per cent: the square root keeps them visible.
        image = axes.imshow(share, cmap=SHADES, norm=PowerNorm(1.0 if numbered else 0.5, vmin=0, vmax=1))
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        size = 9 if numbered else 6.5
        axes.set_xticks(ticks, names, fontsize=size)
        axes.set_yticks(ticks, names, fontsize=size)
        if not numbered:
            axes.tick_params(axis="x", rotation=90)
        elif max(map(len, names)) * INCHES_A_LETTER > cell:
            axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")
        if numbered:
            axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
            axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
            axes.grid(which="minor", color=GRID, linewidth=0.8)
            axes.tick_params(which="both", length=0)
            _write_cells(axes, counts, share)
        else:
            bar = figure.colorbar(image, ax=axes, shrink=0.6, format="{x:.0%}")
            bar.set_label("share of the label's rows")
            bar.outline.set_visible(False)

    return _png(height * 1.15, height, draw)


def _padded_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """From below the least finite value to above the greatest; never an empty range."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    # A constant needs room too, and more of it the larger it is: 1e9 +- 1 would be no range to fp32.
    padding = (high - low) * 0.05 or max(abs(low) * 0.05, 1.0)
    return low - padding, high + padding


def scatter_figure(label: NDArray[np.float64], prediction: NDArray[np.float64]) -> bytes:
    """PNG with a dot per row at (label, prediction); on the diagonal the two are equal.

    Rows where either is not finite, or larger than any axis, have no dot.
    """
    label, prediction = _plottable(label), _plottable(prediction)
    low, high = _padded_range(np.concatenate([label, prediction]))
    opacity = min(max(100 / max(len(label), 1), 0.08), 0.7)  # so that a crowd is seen as one

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.plot(label, prediction, "o", color=VALIDATION, alpha=opacity, markersize=4, markeredgewidth=0)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.set_aspect("equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("label")
        axes.set_ylabel("predicted")

    return _png(4.4, 4.4, draw)


def precision_recall_figure(curves: pd.DataFrame, names: Sequence[str]) -> bytes:
    """PNG with a line for each of `names`, at most ten; `curves` has the columns precision, recall and label.

    A name that the font lacks is drawn by its place among `names`, from 1.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for index, name in enumerate(names):
            curve = curves[curves["label"] == name]
            # The space: matplotlib leaves what begins with an underscore out of the legend.
            text, marker = f" {_tick_name(index + 1, name)}", "o" if len(curve) == 1 else ""
            axes.plot(curve["recall"], curve["precision"], color=f"C{index}", label=text, marker=marker)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        figure.legend(loc="outside right upper")

    return _png(7.0, 4.0, draw)


def _mark_chosen(axes: Axes, step: int) -> None:
    axes.axvline(step, color=CHOSEN, linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def _draw_losses(axes: Axes, train: pd.DataFrame, evals: pd.DataFrame) -> None:
    axes.set_title("Loss")
    # Markers where a line alone would show nothing: a single row.
    axes.plot(
        train["step"],
        _plottable(train["loss"]),
        color=TRAINING,
        label="training",
        marker="o" if len(train) == 1 else "",
    )
    axes.plot(evals["step"], _plottable(evals["loss"]), color=VALIDATION, label="validation", marker="o", markersize=4)
    axes.legend(loc="best")
    axes.tick_params(labelbottom=False)


def _draw_learning_rate(axes: Axes, train: pd.DataFrame) -> None:
    axes.set_title("Learning rate")
    axes.plot(train["step"], _plottable(train["learning_rate"]), color=TRAINING, marker="o" if len(train) == 1 else "")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")


def _draw_metric(axes: Axes, evals: pd.DataFrame, metric: str, chosen_step: int) -> None:
    axes.set_title(f"Validation {legible(metric, NAME_LENGTH)}")
    axes.plot(evals["step"], _plottable(evals[metric]), color=VALIDATION, marker="o", markersize=4)
    chosen = evals[evals["step"] == chosen_step]
    axes.plot(
        chosen["step"],
        _plottable(chosen[metric]),
        "o",
        markersize=9,
        color=CHOSEN,
        label=f"chosen: step {chosen_step:,}",
    )
    axes.legend(loc="best")
    axes.set_xlabel("step")


def curves_figure(train: pd.DataFrame, evals: pd.DataFrame, metric: str, chosen_step: int) -> bytes:
    """PNG of the training over its steps: both losses, the learning rate, and the metric that decided.

    `train` has the columns step, loss and learning_rate and may have no rows; `evals` has step, loss and `metric`.
    """

    def draw(figure: Figure) -> None:
        panels = figure.subplot_mosaic([["loss", "metric"], ["rate", "metric"]], height_ratios=[3, 1.2])
        panels["loss"].sharex(panels["rate"])
        panels["metric"].sharex(panels["rate"])
        _draw_losses(panels["loss"], train, evals)
        _draw_learning_rate(panels["rate"], train)
        _draw_metric(panels["metric"], evals, metric, chosen_step)
        for axes in panels.values():
            _mark_chosen(axes, chosen_step)
        for panel in ("rate", "metric"):
            panels[panel].xaxis.set_major_locator(MaxNLocator(6, integer=True))

    return _png(9.0, 4.2, draw)


def candidates_figure(candidates: dict[str, dict[str, float]], metric: str, chosen: str) -> bytes:
    """PNG with a dot per candidate at its score; `candidates` maps `step-00000230` to its metrics.

    Dots, not bars: candidates differ in the third digit, and a bar's axis has to start at zero.
    """
    names = sorted(candidates, key=step_of)
    scores = [candidates[name].get(metric, float("nan")) for name in names]
    ticks = [f"step {step_of(name):,}" for name in names]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="x")
        for row, (name, score, place) in enumerate(zip(names, scores, _plottable(scores), strict=True)):
            if np.isnan(place):
                ticks[row] += f" ({_number(score)})"  # without a dot
                continue
            colour = CHOSEN if name == chosen else VALIDATION
            axes.plot([place], [row], "o", markersize=8, color=colour)
            axes.annotate(_number(score), (place, row), (9, 0), textcoords="offset points", va="center", color=colour)
        axes.set_yticks(range(len(names)), ticks)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.margins(x=0.15)
        axes.set_title(f"Validation {legible(metric, NAME_LENGTH)}")

    return _png(7.0, 0.9 + 0.32 * len(names), draw)
