"""Rows for training from wherever the command line names them, and the prompts that stand in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer


if TYPE_CHECKING:
    from datasets import Dataset


# Builders of `datasets` by the ending of a file.
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_PROMPT_COLUMNS = ("prompt", "messages", "question", "instruction")


def load_rows(name: str, split: str = "train", config: str | None = None, max_rows: int | None = None) -> Dataset:
    """
    A dataset from the Hub, from a file (JSON lines, CSV, Parquet, or text with one row per line) or from a folder.

    Args:
        name (`str`):
            Hub id, file or folder.
        split (`str`, *optional*, defaults to `"train"`), config (`str`, *optional*):
            Which part of it.
        max_rows (`int`, *optional*):
            Takes the first so many.

    Raises:
        typer.BadParameter: where there is no such dataset, or no row in it.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(name)
    try:
        if path.is_file():
            if path.suffix not in _BUILDERS:
                raise typer.BadParameter(f"{name!r} ends in none of {sorted(_BUILDERS)}.")
            rows = load_dataset(_BUILDERS[path.suffix], data_files=name, split="train")
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            rows = load_from_disk(name)
            rows = rows[split] if isinstance(rows, DatasetDict) else rows
        else:
            rows = load_dataset(name, config, split=split)
    except (DatasetsError, OSError, ValueError, KeyError, RuntimeError) as error:
        # What is wrong with the file itself is said by the cause.
        reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
        raise typer.BadParameter(f"can't load a dataset from {name!r}: {reason}") from error
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    if len(rows) == 0:
        raise typer.BadParameter(f"the dataset {name!r} has no rows.")
    return rows


def split_off(rows: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Keeps `count` rows apart, at most half of them."""
    count = min(count, len(rows) // 2)
    if count == 0:
        return rows, None
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def token_rows(rows: Dataset, tokenizer: Any, max_length: int, max_tokens: int) -> list[list[int]]:
    """
    The tokens of a dataset's rows, whichever of `input_ids`, `text` and `messages` they hold.

    Args:
        rows ([`~datasets.Dataset`]):
            The dataset.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer; conversations need its chat template.
        max_length (`int`), max_tokens (`int`):
            The most tokens of a row, and of all.

    Raises:
        typer.BadParameter: where there is no such column, or no row of two tokens.
    """
    column = next((name for name in ("input_ids", "text", "messages") if name in rows.column_names), None)
    if column is None:
        raise typer.BadParameter(
            f"the dataset has none of `text`, `messages` and `input_ids`, only {rows.column_names}."
        )
    found: list[list[int]] = []
    total = 0
    for value in rows[column]:
        ids = value
        if column == "text":
            ids = tokenizer(value or "")["input_ids"]
        elif column == "messages":
            ids = tokenizer.apply_chat_template(value, tokenize=True, return_dict=False)
        ids = list(ids)[: min(max_length, max_tokens - total)]
        if len(ids) > 1:
            found.append(ids)
            total += len(ids)
        if total >= max_tokens - 1:
            break
    if not found:
        raise typer.BadParameter("the dataset has no row of two tokens or more.")
    return found


def prompts_of(rows: Dataset, tokenizer: Any, column: str | None = None, num_tokens: int = 32) -> list[list[int]]:
    """
    The prompts that stand in a dataset, as token ids.

    Args:
        rows ([`~datasets.Dataset`]):
            The dataset.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer; conversations need its chat template.
        column (`str`, *optional*):
            Where the prompts are: texts, or lists of messages, of which those before the last answer count. By default
            the first of `prompt`, `messages`, `question` and `instruction` that there is; a dataset with none of them
            gives the first `num_tokens` tokens of each `text`.
        num_tokens (`int`, *optional*, defaults to `32`):
            See above.

    Raises:
        typer.BadParameter: where there is no such column, or what stands in it is no prompt.
    """
    if column is None:
        column = next((name for name in _PROMPT_COLUMNS if name in rows.column_names), "text")
        limit = num_tokens if column == "text" else None
    else:
        limit = None
    if column not in rows.column_names:
        raise typer.BadParameter(
            f"the dataset has no column {column!r} to take prompts from, only {rows.column_names}: name one with "
            "--prompts-from."
        )
    values = list(rows[column])
    for number, value in enumerate(values):
        if not isinstance(value, (str, list, type(None))):
            raise typer.BadParameter(
                f"row {number} of the dataset has the prompt {value!r} in its column {column!r}, which is neither text nor "
                "a list of messages."
            )
    prompts = [_token_ids(value, tokenizer)[:limit] for value in values if value]
    prompts = [ids for ids in prompts if ids]
    if not prompts:
        raise typer.BadParameter(f"every row's {column!r} is empty.")
    return prompts


def _token_ids(value: str | list[dict[str, str]], tokenizer: Any) -> list[int]:
    if isinstance(value, str):
        return tokenizer(value)["input_ids"]
    messages = list(value)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        return []
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
