"""Rows that a trainer can't read, said before any work is done on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer


if TYPE_CHECKING:
    from datasets import Dataset


# Where TRL looks for what is trained on; beside a prompt, for its completion alone.
_COLUMNS = {"conversations", "input_ids", "messages", "prompt", "text"}
_BESIDE_A_PROMPT = {"completion", "input_ids"}


def check_columns(rows: Dataset) -> None:
    """
    Refuses rows without a column that is trained on.

    Args:
        rows ([`~datasets.Dataset`]):
            The dataset.

    Raises:
        typer.BadParameter: naming the columns that there are.
    """
    if _COLUMNS.isdisjoint(rows.column_names):
        raise typer.BadParameter(
            f"the dataset has none of the columns {', '.join(sorted(_COLUMNS))}, only {rows.column_names}."
        )
    if "prompt" in rows.column_names and _BESIDE_A_PROMPT.isdisjoint(rows.column_names):
        raise typer.BadParameter(
            f"the dataset has a `prompt` and no `completion` that belongs to it, only {rows.column_names}: add one, or leave the "
            "`prompt` out to train on another column."
        )


def check_texts(rows: Dataset) -> None:
    """
    Refuses rows whose `text`, where they have that column, is none.

    Args:
        rows ([`~datasets.Dataset`]):
            The dataset.

    Raises:
        typer.BadParameter: naming the first.
    """
    for number, text in enumerate(rows["text"] if "text" in rows.column_names else []):
        if not isinstance(text, str):
            raise typer.BadParameter(f"row {number} of the dataset has no text, its `text` is {text!r}: leave it out.")


def check_tokens(rows: Dataset, vocab_size: int) -> None:
    """
    Refuses rows whose `input_ids`, where they have that column, the model doesn't know.

    Args:
        rows ([`~datasets.Dataset`]):
            The dataset.
        vocab_size (`int`):
            Number of tokens that the model knows.

    Raises:
        typer.BadParameter: naming the first.
    """
    for number, ids in enumerate(rows["input_ids"] if "input_ids" in rows.column_names else []):
        wrong = [token for token in ids if not 0 <= token < vocab_size]
        if wrong:
            raise typer.BadParameter(
                f"row {number} of the dataset holds the token {wrong[0]}, but the model's vocabulary has {vocab_size}: its "
                "`input_ids` belong to another tokenizer."
            )
