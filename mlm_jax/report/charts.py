"""The charts of the report: curves drawn by Matplotlib as SVG that takes its colours and font from the page around it.

`page.py` decides what is drawn; here is how it looks.
"""

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Colours that stand for the page's own (page.css), so that a chart follows it from light to dark.
_INK, _GRID, _BASELINE = "#010101", "#010102", "#010103"
_VARIABLES = {_INK: "--muted", _GRID: "--grid", _BASELINE: "--baseline"}
MAX_RUNS = 8
_RUNS = [f"#01020{run}" for run in range(MAX_RUNS)]
_VARIABLES |= {color: f"--run{run}" for run, color in enumerate(_RUNS)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 8.5,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
}
_MOST_POINTS = 400  # of one curve: about what the width of a chart can show


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a chart.

    `run` is the colour, None the neutral one of a baseline. `kind`: train (thin), held_out (thick, dotted with its
    measurements) or baseline (dashed).
    """

    steps: Sequence[int]
    values: Sequence[float | None]
    run: int | None
    kind: str = "train"


def chart(label: str, curves: Sequence[Curve], *, form: str, boundaries: Sequence[int], width_inches: float) -> str:
    """One chart as an <svg> element, or an empty string where no curve has a value.

    Args:
        label: what it shows, for readers who cannot see it.
        curves: the lines, the first at the back.
        form: how values are scaled and written: plain, rate, percent, count or log.
        boundaries: steps at which a stage ends.
        width_inches: at the one scale of all charts; the page stretches them alike.
    """
    curves = [curve for curve in curves if any(value is not None for value in curve.values)]
    if not curves:
        return ""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": label}):
        figure = Figure(figsize=(width_inches, 0.9 + width_inches * 0.35), layout="constrained")
        axes = figure.subplots()
        for boundary in boundaries:
            axes.axvline(boundary, color=_GRID, linewidth=1.2, zorder=0)
        for curve in curves:
            _draw(axes, curve)
        _scale(axes, form)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True)
    return _for_page(written.getvalue(), label)


def _draw(axes: Axes, curve: Curve) -> None:
    color = _BASELINE if curve.run is None else _RUNS[curve.run]
    steps, values = _thin(curve)
    if curve.kind == "baseline":
        axes.plot(steps, values, color=color, linewidth=1.3, linestyle=(0, (4, 3)))
    elif curve.kind == "held_out":
        axes.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=2.8 if len(steps) < 60 else 0)
    else:
        axes.plot(steps, values, color=color, linewidth=1.0, alpha=0.6, marker="." if len(steps) == 1 else "")


def _thin(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """The curve in at most `_MOST_POINTS` points, each the mean of its neighbours; NaN where nothing was measured."""
    steps = np.asarray(curve.steps, float)
    values = np.asarray([np.nan if value is None else value for value in curve.values], float)
    if len(steps) <= _MOST_POINTS:
        return steps, values
    means = []
    for part in np.array_split(np.arange(len(steps)), _MOST_POINTS):
        known = values[part][np.isfinite(values[part])]
        means.append((steps[part].mean(), known.mean() if len(known) else np.nan))
    thinned = np.asarray(means)
    return thinned[:, 0], thinned[:, 1]


def _scale(axes: Axes, form: str) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if form == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        return
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if form == "percent":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    elif form == "count":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if form != "plain":  # of a loss, the floor is not 0
        axes.set_ylim(bottom=0)


def _for_page(svg: str, label: str) -> str:
    """Matplotlib's file as an element of a page: no prolog, no metadata, no size or colours of its own."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg role="img" aria-label="{label}" viewBox="\1">', svg, count=1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
