"""A section as a PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ext._extras import missing_extra
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


def draw(section: Section, path: Path) -> None:
    """
    Draws a section's bar charts and, below, the first of its texts that has more than one token in a step.

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
        raise missing_extra(error, needed_by="the picture of `hf-ext demo`") or error from error

    charts = [block for block in section.blocks if isinstance(block, Bars)]
    texts = [block for block in section.blocks if isinstance(block, Steps)]
    text = next((block for block in texts if any(len(step) > 1 for step in block.steps)), None)
    rows = _laid_out(text) if text else []
    heights = [2.6] * bool(charts) + [0.5 + 0.3 * len(rows)] * bool(text)
    # A Figure without pyplot has no window and leaves no state behind.
    figure = Figure(figsize=(_WIDTH, 0.5 + sum(heights)), dpi=150, layout="constrained")
    figure.suptitle(section.title, color=_INK, fontsize=15, fontweight="bold", x=0.01, ha="left")
    if heights:
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        if charts:
            for axes, chart in zip(parts[0].subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
                _draw_bars(axes, chart)
        if text:
            _draw_text(parts[-1].subplots(), text, rows)
    figure.savefig(path)


def _draw_bars(axes: Axes, chart: Bars) -> None:
    labels, values, shown = zip(*chart.items, strict=True)
    longest = max(values)
    bars = axes.barh(labels, values, color=[_ACCENT if value == longest else _BAR for value in values], height=0.6)
    axes.bar_label(bars, shown, padding=4, color=_INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    if chart.reference is not None:
        axes.axvline(chart.reference, color=_SOFT, linestyle=":", linewidth=1)
    axes.invert_yaxis()
    axes.set_title(chart.title, loc="left", color=_INK, fontsize=11)
    axes.margins(x=0.12)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)


# One character and the step that wrote it; -1 is the prompt.
_Character = tuple[str, int]


def _laid_out(block: Steps) -> list[list[_Character]]:
    """Breaks the text into rows of a monospaced grid, between words where it can."""
    texts = [block.prompt, *("".join(step) for step in block.steps)]
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


def _draw_text(axes: Axes, block: Steps, rows: Sequence[Sequence[_Character]]) -> None:
    from matplotlib.patches import Rectangle

    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(len(rows), 0)
    axes.axis("off")
    axes.set_title(textwrap.shorten(f"{block.title}: {block.summary}", 130), loc="left", color=_INK, fontsize=11)
    for y, row in enumerate(rows):
        for x, (_, step) in enumerate(row):
            if step >= 0:
                # A hair wider than its cell, lest the page shine through between two of one colour.
                fill = _FILLS[step % NUM_COLOURS]
                axes.add_patch(Rectangle((x, y + 0.06), 1.02, 0.88, facecolor=fill, linewidth=0))
        # Character by character: no font is exactly as wide as the grid.
        for x, (character, step) in enumerate(row):
            axes.text(
                x + 0.5,
                y + 0.5,
                character,
                family="monospace",
                fontsize=_FONT_SIZE,
                color=_SOFT if step < 0 else _INK,
                ha="center",
                va="center_baseline",
                parse_math=False,
            )
