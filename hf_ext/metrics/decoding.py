"""Figures about decoding. Every function takes plain token ids or step lengths, never a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def tokens_per_step(step_lengths: Sequence[int] | Sequence[Sequence[int]]) -> float:
    """
    Mean number of tokens that one step of decoding emits.

    Args:
        step_lengths (`Sequence[int]` or `Sequence[Sequence[int]]`):
            Tokens emitted by each step, of one sequence or of several. Several are pooled: all tokens over all steps,
            so that a long sequence weighs more than a short one.

    Returns:
        `float`: 1.0 for plain decoding.

    Raises:
        ValueError: if there is no step, or a step that emitted nothing (each emits at least the token that plain
            decoding would have).

    Example:

    ```python
    >>> from hf_ext.metrics import tokens_per_step

    >>> tokens_per_step([1, 4, 3])
    2.6666666666666665
    >>> tokens_per_step([[1, 4, 3], [1, 1]])
    2.0
    ```
    """
    lengths = [length for row in _rows(step_lengths) for length in row]
    if not lengths:
        raise ValueError("`step_lengths` holds no step.")
    if min(lengths) < 1:
        raise ValueError(f"`step_lengths` holds a step of {min(lengths)} tokens: every step emits at least one.")
    return sum(lengths) / len(lengths)


def distinct_ngrams(token_ids: Sequence[int] | Sequence[Sequence[int]], n: int = 4) -> float:
    """
    Share of n-grams that are distinct, a guard against loops: text that repeats itself is easy to guess, so it
    inflates the tokens per step.

    Args:
        token_ids (`Sequence[int]` or `Sequence[Sequence[int]]`):
            One sequence or several. Repetition is looked for within each sequence, not across them: several prompts
            that begin alike are no loop.
        n (`int`, *optional*, defaults to `4`):
            Length of the n-grams.

    Returns:
        `float`: between 0 (a loop) and 1 (nothing repeats; also where no sequence is as long as `n`).

    Example:

    ```python
    >>> from hf_ext.metrics import distinct_ngrams

    >>> distinct_ngrams([1, 2, 3, 4, 5, 6])
    1.0
    >>> distinct_ngrams([7, 7, 7, 7, 7, 7, 7, 7])
    0.2
    ```
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    total = distinct = 0
    for row in _rows(token_ids):
        ngrams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        total += len(ngrams)
        distinct += len(set(ngrams))
    return distinct / total if total else 1.0


def ngram_overlap(
    sequences: Sequence[int] | Sequence[Sequence[int]], corpus: Iterable[Sequence[int]], n: int = 64
) -> float:
    """
    Share of the n-token windows of `sequences` that stand, as they are, in `corpus`.

    Reported next to results on "unseen" prompts: a small model repeats its training text, and what was trained on is
    easier to guess.

    Args:
        sequences (`Sequence[int]` or `Sequence[Sequence[int]]`):
            One sequence or several: prompts, or the references that the model completes them to.
        corpus (`Iterable[Sequence[int]]`):
            The training text, sequence by sequence; it is read once and not held, so a generator will do. No window
            reaches across two of its sequences.
        n (`int`, *optional*, defaults to `64`):
            Tokens per window.

    Returns:
        `float`: between 0 and 1; 0 where no sequence is as long as `n`.

    Example:

    ```python
    >>> from hf_ext.metrics import ngram_overlap

    >>> ngram_overlap([1, 2, 3, 9], corpus=[[0, 1, 2, 3, 4]], n=3)
    0.5
    ```
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    windows = [tuple(row[i : i + n]) for row in _rows(sequences) for i in range(len(row) - n + 1)]
    if not windows:
        return 0.0
    wanted = set(windows)
    # A corpus of millions of tokens is scanned by a hash of each of its windows; only windows whose hash is wanted are
    # compared token by token, so a collision costs time and not correctness.
    hashes = np.unique(np.concatenate([_window_hashes(np.array(window), n) for window in wanted]))
    found: set[tuple[int, ...]] = set()
    for document in corpus:
        tokens = np.asarray(document, dtype=np.int64)
        for start in np.flatnonzero(np.isin(_window_hashes(tokens, n), hashes)):
            window = tuple(tokens[start : start + n].tolist())
            if window in wanted:
                found.add(window)
        if len(found) == len(wanted):
            break
    return sum(window in found for window in windows) / len(windows)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """
    Index of the first token in which two sequences differ, `None` where they are equal.

    Where one is the beginning of the other, it is the length of the shorter one.

    Example:

    ```python
    >>> from hf_ext.metrics import first_difference

    >>> first_difference([5, 6, 7], [5, 6, 8])
    2
    >>> first_difference([5, 6], [5, 6, 7])
    2
    >>> first_difference([5, 6], [5, 6]) is None
    True
    ```
    """
    first, second = _plain(a), _plain(b)
    for i, (x, y) in enumerate(zip(first, second, strict=False)):
        if x != y:
            return i
    return None if len(first) == len(second) else min(len(first), len(second))


def _plain(values: Any) -> list[Any]:
    """Tensors and arrays as lists: their elements are neither hashed nor compared by value."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _rows(values: Any) -> list[list[int]]:
    """One sequence or several, as several."""
    values = _plain(values)
    if not values or not hasattr(values[0], "__len__"):
        return [[int(value) for value in values]]
    return [_plain(row) for row in values]


def _window_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """Polynomial hash (modulo 2**64) of every window of `n` tokens."""
    if len(tokens) < n:
        return np.empty(0, dtype=np.uint64)
    values = tokens.astype(np.uint64)
    hashes = np.zeros(len(tokens) - n + 1, dtype=np.uint64)
    for offset in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + len(hashes)]
    return hashes
