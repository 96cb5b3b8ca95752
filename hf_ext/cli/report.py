"""
What a demonstration shows, once for every place that shows it.

A section is a list of blocks. [`print_section`] puts it on the terminal, [`render_page`] into one HTML file that needs
nothing else, and [`hf_ext.cli.picture.draw`] into a PNG.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

import hf_ext
from hf_ext.cli.charts import Curve, HeatMap, Raster, Shades


# Colours of consecutive steps; the page and the picture have as many.
NUM_COLOURS = 4
_TERMINAL_STYLES = (
    "black on bright_cyan",
    "black on bright_yellow",
    "black on bright_green",
    "black on bright_magenta",
)


@dataclass
class Prose:
    """A paragraph; what stands between backticks is code."""

    kind: ClassVar[str] = "prose"
    text: str

    @property
    def parts(self) -> list[tuple[str, bool]]:
        """Stretches of the text, each with whether it is code."""
        return [(part, bool(i % 2)) for i, part in enumerate(self.text.split("`"))]


@dataclass
class Figures:
    """The few figures to remember: pairs of a value and what it is."""

    kind: ClassVar[str] = "figures"
    items: Sequence[tuple[str, str]]


@dataclass
class Table:
    """A table whose first column names the rows; `best` is the index of the row to emphasise."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    best: int | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"A row of {len(row)} cells under {len(self.columns)} columns: {row}.")


@dataclass
class Bars:
    """
    A horizontal bar chart.

    Args:
        title (`str`):
            What is measured.
        items (`Sequence[tuple[str, float, str]]`):
            Label, value and the value as text, from top to bottom.
        reference (`float`, *optional*):
            Where a dashed line is drawn: the value of doing nothing.
    """

    kind: ClassVar[str] = "bars"
    title: str
    items: Sequence[tuple[str, float, str]]
    reference: float | None = None

    # Everything below is the geometry of the SVG, in its own units.
    row_height: ClassVar[int] = 30
    label_width: ClassVar[int] = 190
    plot_width: ClassVar[int] = 230
    width: ClassVar[int] = 480

    @property
    def height(self) -> int:
        return self.row_height * len(self.items)

    def length(self, value: float) -> float:
        """Length of the bar of `value`: the longest one fills the plot."""
        longest = max([item[1] for item in self.items] + [self.reference or 0.0])
        return round(self.plot_width * value / longest, 1) if longest > 0 else 0.0

    @property
    def description(self) -> str:
        """The chart in words, for those who hear the page."""
        return f"{self.title}: " + ", ".join(f"{label} {text}" for label, _, text in self.items)


@dataclass
class Steps:
    """
    A text in which every step's run of tokens has one colour.

    Args:
        title (`str`):
            Which text.
        prompt (`str`):
            What came before; shown without colour.
        steps (`Sequence[Sequence[str]]`):
            For each step the text of each of its tokens, in order. Joined they are the text.
    """

    kind: ClassVar[str] = "steps"
    title: str
    prompt: str
    steps: Sequence[Sequence[str]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.steps))

    @property
    def summary(self) -> str:
        tokens, steps = self.num_tokens, len(self.steps)
        longest = max(map(len, self.steps), default=0)
        return f"{tokens} tokens in {steps} steps ({tokens / max(steps, 1):.2f} per step, at most {longest} in one)"


Block = Prose | Figures | Table | Bars | Curve | HeatMap | Raster | Steps | Shades


@dataclass
class Section:
    """
    What one family of methods shows.

    Args:
        name (`str`):
            Short and fit for a file name.
        title (`str`):
            The heading.
        blocks (`list[Block]`):
            What the page shows, in order.
        terminal (`list[Block]`):
            What the terminal shows: a page has room for more.
        data (`dict[str, Any]`):
            The figures behind it, ready for JSON.
    """

    name: str
    title: str
    blocks: list[Block]
    terminal: list[Block]
    data: dict[str, Any] = field(default_factory=dict)


def token_texts(tokenizer: Any, prompt_ids: Sequence[int], new_tokens: Sequence[int]) -> list[str]:
    """
    The text that each new token adds; joined they are the text that follows the prompt.

    A token can't be decoded by itself: where it stands decides whether it starts with a space, and a character may
    need several tokens. In the latter case the last of them carries it and the others are empty.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        prompt_ids (`Sequence[int]`), new_tokens (`Sequence[int]`):
            What went in, what came out.

    Returns:
        `list[str]`: as long as `new_tokens`.
    """

    def decoded(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    ids = list(prompt_ids)
    done = decoded(ids)
    texts = []
    for number, token in enumerate(new_tokens, start=1):
        ids.append(token)
        text = decoded(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and number < len(new_tokens):
            texts.append("")
            continue
        texts.append(text[len(done) :])
        done = text
    return texts


def split_into_steps(texts: Sequence[str], step_lengths: Sequence[int]) -> list[list[str]]:
    """
    Hands out the tokens' texts to the steps that emitted them.

    Raises:
        ValueError: if the lengths do not add up to the number of tokens.
    """
    if sum(step_lengths) != len(texts):
        raise ValueError(f"Steps of {sum(step_lengths)} tokens in all for {len(texts)} tokens.")
    steps, start = [], 0
    for length in step_lengths:
        steps.append(list(texts[start : start + length]))
        start += length
    return steps


def render_page(
    title: str, sections: Sequence[Section], machine: Mapping[str, str], command: str = "hf-ext demo"
) -> str:
    """
    One HTML page that needs no other file and no network.

    Args:
        title (`str`):
            The title and first heading.
        sections (`Sequence[Section]`):
            Shown in order.
        machine (`Mapping[str, str]`):
            What the times were taken on, from [`hf_ext.cli.compare.describe_machine`].
        command (`str`, *optional*, defaults to `"hf-ext demo"`):
            What wrote it.

    Returns:
        `str`: the page.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Path(hf_ext.__file__).parent / "assets" / "templates"
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("demo.html").render(
        title=title,
        sections=sections,
        machine=machine,
        command=command,
        num_colours=NUM_COLOURS,
        version=hf_ext.__version__,
    )


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """The figures behind what is shown, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def print_section(section: Section, console: Console) -> None:
    """Puts a section on the terminal."""
    console.rule(f"[bold]{escape(section.title)}")
    for block in section.terminal:
        if isinstance(block, Prose):
            console.print(block.text, markup=False, highlight=False)
        elif isinstance(block, Table):
            console.print(rich_table(block))
        elif isinstance(block, Steps):
            console.print(Panel(_coloured(block, console), title=escape(block.title), subtitle=block.summary))
        elif isinstance(block, Shades):
            console.print(Panel(_shaded(block), title=escape(block.title)))
            console.print(block.summary, style="dim", highlight=False)
        else:
            raise TypeError(f"The terminal does not show {type(block).__name__}.")


def rich_table(table: Table) -> RichTable:
    """The table as the terminal shows it."""
    # The least of lines, so that the columns fit a terminal of 80 characters.
    rich = RichTable(title=escape(table.caption), title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    rich.add_column(escape(table.columns[0]), no_wrap=True)
    for column in table.columns[1:]:
        rich.add_column(escape(column).replace(" ", "\n"), justify="right")
    for i, row in enumerate(table.rows):
        rich.add_row(*map(escape, row), style="bold" if i == table.best else None)
    return rich


def _coloured(block: Steps, console: Console) -> Text:
    text = Text().append(block.prompt, style="dim")
    # Without colours (a pipe, NO_COLOR) the steps are told apart by bars.
    separator = "" if console.color_system else "|"
    for i, step in enumerate(block.steps):
        text.append(separator)
        # A colour behind a line break would fill the rest of the line.
        for part in re.split(r"(\n+)", "".join(step)):
            text.append(part, style=None if part.startswith("\n") else _TERMINAL_STYLES[i % NUM_COLOURS])
    return text


def _shaded(block: Shades) -> Text:
    text = Text()
    for token, value, _ in block.tokens:
        # From white to the orange of the page; a colour behind a line break would fill the rest of the line.
        level = block.level(value)
        style = f"black on rgb({255 - round(11 * level)},{255 - round(110 * level)},{255 - round(200 * level)})"
        for part in re.split(r"(\n+)", token):
            text.append(part, style=None if part.startswith("\n") else style)
    return text
