"""A section as a PNG."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ext._extras import missing_extra
from hf_ext.cli.charts import SHADES, Curve, HeatMap, Raster, Shades
from hf_ext.cli.report import NUM_COLOURS, Bars, Section, Steps


if TYPE_CHECKING:
    from matplotlib.axes import Axes


_COLUMNS = 100
_MAX_ROWS = 12
_WIDTH = 11.0
# A monospaced character is about 0.6 of its size wide: this one fills its column.
_FONT_SIZE = 72 * _WIDTH / _COLUMNS / 0.62
_FILLS = ("#cfe6ff", "#ffe2b3", "#cdeccf", "#f3d3ee")
_INK, _SOFT, _BAR, _ACCENT = "#1d2129", "#5a6270", "#8f9bb0", "#c2570c"
_LINES = (_ACCENT, "#2f6fb0", _SOFT, "#2e8b57")


def draw(section: Section, path: Path) -> None:
    """
    Draws a section's charts, two in a row, and below them one text: the first whose tokens are shaded, or else the
    first that has more than one token in a step.

    Args:
        section (`Section`):
            What to draw.
        path (`Path`):
            Where the PNG goes.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra that installs it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra(error, needed_by="a picture") or error from error

    charts = [block for block in section.blocks if isinstance(block, (Bars, Curve, HeatMap, Raster))]
    pairs = [charts[start : start + 2] for start in range(0, len(charts), 2)]
    text = _text_of(section)
    rows = _laid_out(text) if text else []
    heights = [2.6 if all(isinstance(chart, Bars) for chart in pair) else 3.4 for pair in pairs]
    heights += [0.5 + 0.3 * len(rows)] * bool(text)
    # A Figure without pyplot has no window and leaves no state behind.
    figure = Figure(figsize=(_WIDTH, 0.5 + sum(heights)), dpi=150, layout="constrained")
    figure.suptitle(section.title, color=_INK, fontsize=15, fontweight="bold", x=0.01, ha="left")
    if heights:
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, pair in zip(parts, pairs, strict=False):
            for axes, chart in zip(part.subplots(1, len(pair), squeeze=False)[0], pair, strict=True):
                _draw_chart(axes, chart)
        if text:
            _draw_text(parts[-1].subplots(), text, rows)
    figure.savefig(path)


def _text_of(section: Section) -> Steps | Shades | None:
    shaded = [block for block in section.blocks if isinstance(block, Shades)]
    steps = [block for block in section.blocks if isinstance(block, Steps)]
    return next(iter(shaded), None) or next((b for b in steps if any(len(step) > 1 for step in b.steps)), None)


def _draw_chart(axes: Axes, chart: Bars | Curve | HeatMap | Raster) -> None:
    if isinstance(chart, Bars):
        _draw_bars(axes, chart)
    elif isinstance(chart, Curve):
        _draw_curve(axes, chart)
    elif isinstance(chart, Raster):
        _draw_raster(axes, chart)
    else:
        _draw_heat_map(axes, chart)
    axes.set_title(chart.title, loc="left", color=_INK, fontsize=11)


def _draw_bars(axes: Axes, chart: Bars) -> None:
    labels, values, shown = zip(*chart.items, strict=True)
    longest = max(values)
    bars = axes.barh(labels, values, color=[_ACCENT if value == longest else _BAR for value in values], height=0.6)
    axes.bar_label(bars, shown, padding=4, color=_INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    if chart.reference is not None:
        axes.axvline(chart.reference, color=_SOFT, linestyle=":", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)


def _draw_curve(axes: Axes, chart: Curve) -> None:
    for (name, points), colour in zip(chart.series, itertools.cycle(_LINES), strict=False):
        x, y, _ = zip(*points, strict=True)
        axes.plot(x, y, marker="o" if chart.dots else None, markersize=4, color=colour, label=name)
    axes.set_xlabel(chart.x_label, color=_SOFT, fontsize=9)
    axes.set_ylabel(chart.y_label, color=_SOFT, fontsize=9)
    axes.set_xticks(chart.x_ticks, chart.x_names)
    axes.set_yticks(chart.y_ticks, chart.y_names)
    axes.grid(color="#e6e8ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_SOFT)
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=9)


def _draw_heat_map(axes: Axes, chart: HeatMap) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("share", SHADES)
    axes.imshow(chart.values, cmap=colours, vmin=0, vmax=1, aspect="auto")
    slant: dict[str, Any] = {"rotation": 25, "ha": "right"} if max(map(len, chart.columns)) > 8 else {}
    axes.set_xticks(range(len(chart.columns)), chart.columns, fontsize=8, color=_SOFT, **slant)
    axes.set_yticks(range(len(chart.rows)), chart.rows, fontsize=8, color=_SOFT)
    axes.set_xlabel(chart.x_label, color=_SOFT, fontsize=9)
    axes.set_ylabel(chart.y_label, color=_SOFT, fontsize=9)
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)
    if len(chart.rows) <= _MAX_ROWS:
        for y, values in enumerate(chart.values):
            for x, value in enumerate(values):
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8, color=_INK)


def _draw_raster(axes: Axes, chart: Raster) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    (left, right), (low, high) = chart.extent, chart.bounds or (None, None)
    colours = LinearSegmentedColormap.from_list("share", SHADES)
    edges = (left, right, len(chart.values) - 0.5, -0.5)
    axes.imshow(chart.values, cmap=colours, vmin=low, vmax=high, aspect="auto", extent=edges, interpolation="nearest")
    if chart.line:
        axes.plot(*zip(*chart.line, strict=True), color=_LINES[1], linewidth=1.5)
    axes.set_yticks(range(len(chart.rows or ())), chart.rows or (), fontsize=8, color=_SOFT)
    axes.set_xlabel(chart.x_label, color=_SOFT, fontsize=9)
    axes.set_ylabel(chart.y_label, color=_SOFT, fontsize=9)
    axes.tick_params(left=False, labelsize=8, colors=_SOFT)
    axes.spines[:].set_visible(False)


# One character and the number of the step or token that it belongs to; -1 is the prompt.
_Character = tuple[str, int]


def _laid_out(block: Steps | Shades) -> list[list[_Character]]:
    """Breaks the text into rows of a monospaced grid, between words where it can."""
    if isinstance(block, Steps):
        texts = [block.prompt, *("".join(step) for step in block.steps)]
    else:
        texts = ["", *(text for text, _, _ in block.tokens)]
    characters = [(character, step) for step, text in enumerate(texts, start=-1) for character in text]
    rows: list[list[_Character]] = [[]]
    for character, step in characters:
        if character == "\n":
            rows.append([])
            continue
        if len(rows[-1]) == _COLUMNS:
            spaces = [i for i, (written, _) in enumerate(rows[-1]) if written == " "]
            start = spaces[-1] + 1 if spaces else _COLUMNS
            rows.append(rows[-1][start:])
            del rows[-2][start:]
        rows[-1].append((character, step))
    if len(rows) > _MAX_ROWS:
        rows = [*rows[: _MAX_ROWS - 1], [(character, -1) for character in "..."]]
    return rows


def _draw_text(axes: Axes, block: Steps | Shades, rows: Sequence[Sequence[_Character]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    if isinstance(block, Steps):
        fills: Sequence[Any] = [_FILLS[step % NUM_COLOURS] for step in range(len(block.steps))]
    else:
        colours = LinearSegmentedColormap.from_list("share", SHADES)
        fills = [colours(block.level(value)) for _, value, _ in block.tokens]
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(len(rows), 0)
    axes.axis("off")
    axes.set_title(textwrap.shorten(f"{block.title}: {block.summary}", 130), loc="left", color=_INK, fontsize=11)
    for y, row in enumerate(rows):
        for x, (_, step) in enumerate(row):
            if step >= 0:
                # A hair wider than its cell, lest the page shine through between two of one colour.
                axes.add_patch(Rectangle((x, y + 0.06), 1.02, 0.88, facecolor=fills[step], linewidth=0))
        # Character by character: no font is exactly as wide as the grid.
        for x, (character, step) in enumerate(row):
            axes.text(
                x + 0.5,
                y + 0.5,
                character if character.isprintable() else "·",
                family="monospace",
                fontsize=_FONT_SIZE,
                color=_SOFT if step < 0 else _INK,
                ha="center",
                va="center_baseline",
                parse_math=False,
            )
