"""Text that neurons are ranked on, as padded batches of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IMPORTANCES = ("activation_norm", "activation", "taylor", "none")


def check_calibration(importance: str, dataset: Any, num_tokens: int, batch_size: int, max_length: int) -> None:
    """
    Refuses settings that neurons can't be ranked with.

    Args:
        importance (`str`), dataset (`Any`), num_tokens (`int`), batch_size (`int`), max_length (`int`):
            See [`convert_to_dynamoe`].

    Raises:
        ValueError: naming the setting.
    """
    if importance not in IMPORTANCES:
        raise ValueError(f"`importance` must be one of {', '.join(map(repr, IMPORTANCES))}, got {importance!r}.")
    if importance != "none" and dataset is None:
        raise ValueError(
            f"`importance={importance!r}` ranks neurons on text: give `calibration_dataset`, a few hundred texts like those "
            "that the model will see, or keep the order with `importance='none'`."
        )
    for name, value, least in (
        ("calibration_tokens", num_tokens, 2),
        ("batch_size", batch_size, 1),
        ("max_length", max_length, 2),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")


def calibration_batches(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    num_tokens: int,
    batch_size: int,
    max_length: int,
    config: Any,
) -> list[dict[str, torch.Tensor]]:
    """
    Args:
        dataset ([`~datasets.Dataset`] or `Iterable`):
            Rows with `text`, `messages` or `input_ids`, or plain strings.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Needed unless rows hold `input_ids`.
        num_tokens (`int`):
            The most tokens in all.
        batch_size (`int`), max_length (`int`):
            Rows per batch, and tokens per row.
        config ([`~transformers.PreTrainedConfig`]):
            The dense model's, which knows how many positions and tokens there are.

    Returns:
        `list[dict[str, torch.Tensor]]`: `input_ids` and `attention_mask`, padded on the right.

    Raises:
        ValueError: if there is no text in it, or tokens that the model doesn't have.
    """
    max_length = min(max_length, getattr(config, "max_position_embeddings", None) or max_length)
    rows: list[list[int]] = []
    total = 0
    for number, row in enumerate(_rows(dataset)):
        ids = _token_ids(row, number, tokenizer)[: min(max_length, num_tokens - total)]
        if len(ids) > 1:
            rows.append(ids)
            total += len(ids)
        if total >= num_tokens - 1:
            break
    if not rows:
        raise ValueError("`calibration_dataset` has no text of two tokens or more: neurons can't be ranked on it.")
    largest = max(map(max, rows))
    if largest >= config.vocab_size:
        raise ValueError(
            f"`calibration_dataset` holds the token {largest}, but the model's vocabulary has {config.vocab_size}: "
            "`processing_class` or the `input_ids` belong to another model."
        )
    # Rows of like length together; the order doesn't matter to a mean.
    rows.sort(key=len)
    return [_padded(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _rows(dataset: Any) -> Iterable[Any]:
    if isinstance(dataset, str) or not isinstance(dataset, Iterable):
        raise ValueError(
            f"`calibration_dataset` must be a Dataset or a list of texts, got {type(dataset).__name__}: load it first, for "
            "example with `datasets.load_dataset(..., split='train')`."
        )
    if isinstance(dataset, dict):
        raise ValueError(f"`calibration_dataset` holds the splits {sorted(dataset)}: give one of them.")
    return dataset


def _token_ids(row: Any, number: int, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if isinstance(row, dict) and "input_ids" in row:
        ids = list(row["input_ids"])
        if any(isinstance(token, (list, float, str)) or token < 0 for token in ids):
            raise ValueError(
                f"`input_ids` of row {number} of `calibration_dataset` must be the tokens of one text, got {ids[:3]}..."
            )
        return [int(token) for token in ids]
    text = row.get("text") if isinstance(row, dict) else row
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(text, str) and messages is None:
        found = type(row).__name__
        if isinstance(row, dict):
            found = ", ".join(f"`{name}` ({type(value).__name__})" for name, value in row.items()) or "nothing"
        raise ValueError(
            f"Row {number} of `calibration_dataset` has no text: a string, or a column `text`, `messages` or `input_ids` is "
            f"looked for, found {found}."
        )
    if tokenizer is None:
        raise ValueError("`calibration_dataset` is text: give its tokenizer as `processing_class`.")
    if not callable(tokenizer):
        raise ValueError(
            f"`processing_class` must be a tokenizer, got {tokenizer!r}: load it with `AutoTokenizer.from_pretrained`."
        )
    if messages is not None:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    return list(tokenizer(text)["input_ids"])


def _padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
