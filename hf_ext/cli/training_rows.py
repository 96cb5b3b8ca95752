"""Rows that a trainer can't read, said before any work is done on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer


if TYPE_CHECKING:
    from datasets import Dataset


# Where TRL looks for what is trained on; beside a prompt, for its completion alone.
_COLUMNS = {"conversations", "input_ids", "messages", "prompt", "text"}
_BESIDE_A_PROMPT = {"completion", "input_ids"}
# Those that may be plain strings.
_TEXTS = ("text", "prompt", "completion")


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
    Refuses rows whose text or conversation, in the column that is read, is none.

    Args:
        rows ([`~datasets.Dataset`]):
            The dataset.

    Raises:
        typer.BadParameter: naming the first.
    """
    for name in _read(rows.column_names):
        for number, value in enumerate(rows[name]):
            is_conversation = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
            if not (isinstance(value, str) and name in _TEXTS) and not (is_conversation and name != "text"):
                raise typer.BadParameter(
                    f"row {number} of the dataset has no {'text' if name in _TEXTS else 'conversation'}, its `{name}` is "
                    f"{value!r}: leave it out."
                )


def _read(columns: list[str]) -> tuple[str, ...]:
    """The columns that TRL reads, by its order of preference; tokens need no reading."""
    if "input_ids" in columns:
        return ()
    if "prompt" in columns:
        return ("prompt", "completion")
    return next(((name,) for name in ("conversations", "messages", "text") if name in columns), ())


def check_tokens(rows: Dataset, vocab_size: int) -> None:
    """
    Refuses rows whose `input_ids`, where they have that column, are no tokens or none that the model knows.

    Args:
        rows ([`~datasets.Dataset`]):
            The dataset.
        vocab_size (`int`):
            Number of tokens that the model knows.

    Raises:
        typer.BadParameter: naming the first.
    """
    for number, ids in enumerate(rows["input_ids"] if "input_ids" in rows.column_names else []):
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise typer.BadParameter(
                f"row {number} of the dataset has `input_ids` that are no list of tokens: {ids!r}. Leave it out."
            )
        wrong = [token for token in ids if not 0 <= token < vocab_size]
        if wrong:
            raise typer.BadParameter(
                f"row {number} of the dataset holds the token {wrong[0]}, but the model's vocabulary has {vocab_size}: its "
                "`input_ids` belong to another tokenizer."
            )
