"""Blocks of a section that show how values run: lines, heat maps, images, and a text whose tokens are shaded by one."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_ext._extras import missing_extra


# From the least to the greatest value of a picture.
SHADES = ("#ffffff", "#f49137")


@dataclass
class Curve:
    """
    Lines through points.

    Args:
        title (`str`), x_label (`str`), y_label (`str`):
            What is measured against what.
        series (`Sequence[tuple[str, Sequence[tuple[float, float, str]]]]`):
            For each line its name and its points: where they are, and what they are in words.
        x_marks (`Sequence[tuple[float, str]]`, *optional*), y_marks (`Sequence[tuple[float, str]]`, *optional*):
            Places on the axes and what is written there, for scales that are not even; by default round numbers. The first
            and the last of them bound the plot.
        dots (`bool`, *optional*, defaults to `True`):
            Whether each point is drawn.
    """

    kind: ClassVar[str] = "curve"
    title: str
    x_label: str
    y_label: str
    series: Sequence[tuple[str, Sequence[tuple[float, float, str]]]]
    x_marks: Sequence[tuple[float, str]] | None = None
    y_marks: Sequence[tuple[float, str]] | None = None
    dots: bool = True

    # Everything below is the geometry of the SVG, in its own units.
    width: ClassVar[int] = 480
    height: ClassVar[int] = 300
    left: ClassVar[int] = 50
    right: ClassVar[int] = 16
    top: ClassVar[int] = 30
    bottom: ClassVar[int] = 44

    @property
    def x_ticks(self) -> list[float]:
        if self.x_marks is not None:
            return [place for place, _ in self.x_marks]
        return ticks([x for _, points in self.series for x, _, _ in points])

    @property
    def y_ticks(self) -> list[float]:
        if self.y_marks is not None:
            return [place for place, _ in self.y_marks]
        return ticks([y for _, points in self.series for _, y, _ in points])

    @property
    def x_names(self) -> list[str]:
        return [f"{tick:g}" for tick in self.x_ticks] if self.x_marks is None else [name for _, name in self.x_marks]

    @property
    def y_names(self) -> list[str]:
        return [f"{tick:g}" for tick in self.y_ticks] if self.y_marks is None else [name for _, name in self.y_marks]

    def x(self, value: float) -> float:
        """Where a value stands between the first and the last tick."""
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return round(self.left + (self.width - self.left - self.right) * (value - low) / (high - low), 1)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(
            self.height - self.bottom - (self.height - self.top - self.bottom) * (value - low) / (high - low), 1
        )

    def path(self, points: Sequence[tuple[float, float, str]]) -> str:
        """The points of a line as SVG has them."""
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y, _ in points)

    @property
    def description(self) -> str:
        """The chart in words, for those who hear the page."""
        lines = (f"{name}: " + ", ".join(text for _, _, text in points) for name, points in self.series)
        return f"{self.title}, {self.y_label} by {self.x_label}. " + "; ".join(lines)


@dataclass
class HeatMap:
    """
    A matrix of shares.

    Args:
        title (`str`), x_label (`str`), y_label (`str`):
            What is shown, and what columns and rows are.
        columns (`Sequence[str]`), rows (`Sequence[str]`):
            Their names.
        values (`Sequence[Sequence[float]]`):
            From 0 to 1, row by row.
    """

    kind: ClassVar[str] = "heat_map"
    title: str
    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        found = [len(row) for row in self.values]
        if found != [len(self.columns)] * len(self.rows):
            raise ValueError(f"Rows of {found} values for {len(self.rows)} rows of {len(self.columns)} columns.")


@dataclass
class Raster:
    """
    A matrix with too many columns for a table, as an image: a spectrogram, or what happens in each frame.

    Args:
        title (`str`), x_label (`str`), y_label (`str`):
            What is shown, and what columns and rows are.
        values (array of shape `(num_rows, num_columns)`):
            Row by row from the top; the least is palest.
        extent (`tuple[float, float]`):
            Where the first column begins and the last one ends, in the unit of `x_label`.
        rows (`Sequence[str]`, *optional*):
            Names of the rows.
        line (`Sequence[tuple[float, float]]`, *optional*):
            A line on top: places along `extent`, and rows counted from 0 at the top.
        bounds (`tuple[float, float]`, *optional*):
            Values that are palest and darkest; by default the least and the greatest.
        description (`str`, *optional*):
            The image in words, for those who hear the page; the title if not given.
    """

    kind: ClassVar[str] = "raster"
    title: str
    x_label: str
    y_label: str
    values: Any
    extent: tuple[float, float]
    rows: Sequence[str] | None = None
    line: Sequence[tuple[float, float]] | None = None
    bounds: tuple[float, float] | None = None
    description: str = ""

    # Everything below is the geometry of the SVG, in its own units.
    width: ClassVar[int] = 480
    height: ClassVar[int] = 240
    right: ClassVar[int] = 12
    top: ClassVar[int] = 22
    bottom: ClassVar[int] = 44

    def __post_init__(self) -> None:
        if self.rows is not None and len(self.rows) != len(self.values):
            raise ValueError(f"{len(self.rows)} names for {len(self.values)} rows.")

    @property
    def left(self) -> int:
        return 12 if self.rows is None else 12 + 7 * max(map(len, self.rows))

    @property
    def x_ticks(self) -> list[float]:
        low, high = self.extent
        return [tick for tick in ticks(self.extent) if low <= tick <= high]

    def x(self, value: float) -> float:
        low, high = self.extent
        return round(self.left + (self.width - self.left - self.right) * (value - low) / ((high - low) or 1.0), 1)

    def y(self, row: float) -> float:
        """The middle of a row."""
        return round(self.top + (self.height - self.top - self.bottom) * (row + 0.5) / len(self.values), 1)

    @property
    def path(self) -> str:
        return " ".join(f"{self.x(x)},{self.y(row)}" for x, row in self.line or ())

    @property
    def image(self) -> str:
        """The matrix as a PNG in a `data:` address, one pixel for each value."""
        try:
            from matplotlib.colors import LinearSegmentedColormap
            from matplotlib.image import imsave
        except ModuleNotFoundError as error:
            raise missing_extra(error, needed_by="a picture") or error from error

        low, high = self.bounds or (None, None)
        file = io.BytesIO()
        colours = LinearSegmentedColormap.from_list("share", SHADES)
        imsave(file, self.values, vmin=low, vmax=high, cmap=colours, format="png")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass
class Shades:
    """
    A text whose tokens are shaded by a value each.

    Args:
        title (`str`):
            Which text.
        tokens (`Sequence[tuple[str, float, str]]`):
            Of each token its text, its value and what is said of it. Joined the texts are the text.
        unit (`str`):
            What the values are shares of.
    """

    kind: ClassVar[str] = "shades"
    title: str
    tokens: Sequence[tuple[str, float, str]]
    unit: str

    @property
    def bounds(self) -> tuple[float, float]:
        values = [value for _, value, _ in self.tokens]
        return (min(values), max(values)) if values else (0.0, 1.0)

    def level(self, value: float) -> float:
        """Where the value lies between the least and the greatest of the text, from 0 to 1."""
        low, high = self.bounds
        return round((value - low) / (high - low), 2) if high > low else 0.0

    @property
    def summary(self) -> str:
        low, high = self.bounds
        mean = sum(value for _, value, _ in self.tokens) / max(len(self.tokens), 1)
        return f"{len(self.tokens)} tokens, from {low:.0%} (palest) to {high:.0%} (darkest) of {self.unit}, {mean:.0%} on average"


def ticks(values: Sequence[float], most: int = 6) -> list[float]:
    """Round numbers at equal distances, at most `most` and at least two, between which all values lie."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20, 25, 50)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            break
    # Of a product, since a sum of steps would drift.
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
