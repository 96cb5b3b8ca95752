"""Blocks of a section that show how values run: lines, heat maps, and a text whose tokens are shaded by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass
class Curve:
    """
    Lines through points.

    Args:
        title (`str`), x_label (`str`), y_label (`str`):
            What is measured against what.
        series (`Sequence[tuple[str, Sequence[tuple[float, float, str]]]]`):
            For each line its name and its points: where they are, and what they are in words.
    """

    kind: ClassVar[str] = "curve"
    title: str
    x_label: str
    y_label: str
    series: Sequence[tuple[str, Sequence[tuple[float, float, str]]]]

    # Everything below is the geometry of the SVG, in its own units.
    width: ClassVar[int] = 480
    height: ClassVar[int] = 300
    left: ClassVar[int] = 50
    right: ClassVar[int] = 16
    top: ClassVar[int] = 30
    bottom: ClassVar[int] = 44

    @property
    def x_ticks(self) -> list[float]:
        return ticks([x for _, points in self.series for x, _, _ in points])

    @property
    def y_ticks(self) -> list[float]:
        return ticks([y for _, points in self.series for _, y, _ in points])

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
