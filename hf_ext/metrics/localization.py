"""Figures about where in time something was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_ext._extras import missing_extra


class LocalizationScores(NamedTuple):
    """How well intervals were found. `mean_iou` is that of the matched ones, 0 where there is none."""

    precision: float
    recall: float
    f1: float
    mean_iou: float


def interval_iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    """
    Intersection over union of two intervals of time.

    Args:
        a (`tuple[float, float]`), b (`tuple[float, float]`):
            Start and end.

    Returns:
        `float`: between 0 (they don't meet) and 1 (they are equal).

    Raises:
        ValueError: if an interval ends before it starts, has no length or is not finite.

    Example:

    ```python
    >>> from hf_ext.metrics import interval_iou

    >>> interval_iou((0.0, 2.0), (1.0, 3.0))
    0.3333333333333333
    ```
    """
    (a_start, a_end), (b_start, b_end) = _interval(a), _interval(b)
    intersection = max(0.0, min(a_end, b_end) - max(a_start, b_start))
    return intersection / ((a_end - a_start) + (b_end - b_start) - intersection)


def localization_scores(
    predictions: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]], min_iou: float = 0.5
) -> LocalizationScores:
    """
    Precision, recall, F1 and mean IoU of intervals that were found in clips.

    Each interval is matched with at most one other of its clip and label, so that the matches are as many as can be and
    overlap as much as can be.

    Args:
        predictions (`Sequence[Sequence[tuple]]`):
            For each clip the intervals that were found: `(start, end)`, or `(start, end, label)`.
        references (`Sequence[Sequence[tuple]]`):
            For each clip the intervals that there are.
        min_iou (`float`, *optional*, defaults to `0.5`):
            Least intersection over union of a match.

    Returns:
        [`LocalizationScores`]: over all clips. Without any interval on either side, precision, recall and F1 are 1.

    Raises:
        ValueError: if there are not as many clips in both, or an interval is none.

    Example:

    ```python
    >>> from hf_ext.metrics import localization_scores

    >>> localization_scores([[(0.0, 1.0), (3.0, 4.0)]], [[(0.0, 0.8)]])
    LocalizationScores(precision=0.5, recall=1.0, f1=0.6666666666666666, mean_iou=0.8)
    ```
    """
    if len(predictions) != len(references):
        raise ValueError(f"`predictions` has {len(predictions)} clips and `references` has {len(references)}.")
    if not 0 < min_iou <= 1:
        raise ValueError(f"`min_iou` must be positive and at most 1, got {min_iou}.")
    overlaps: list[float] = []
    for found, actual in zip(predictions, references, strict=True):
        overlaps += _matches(list(found), list(actual), min_iou)
    num_found, num_actual = sum(map(len, predictions)), sum(map(len, references))
    if num_found == num_actual == 0:
        return LocalizationScores(1.0, 1.0, 1.0, 0.0)
    return LocalizationScores(
        precision=len(overlaps) / num_found if num_found else 0.0,
        recall=len(overlaps) / num_actual if num_actual else 0.0,
        f1=2 * len(overlaps) / (num_found + num_actual),
        mean_iou=float(np.mean(overlaps)) if overlaps else 0.0,
    )


def _matches(found: list[Any], actual: list[Any], min_iou: float) -> list[float]:
    """The intersections over union of the matched intervals."""
    found, actual = ([_with_label(interval) for interval in side] for side in (found, actual))
    if not found or not actual:
        return []
    ious = np.array([[interval_iou(a[:2], b[:2]) if a[2] == b[2] else 0.0 for b in actual] for a in found])
    may_match = ious >= min_iou
    # One more match weighs more than any overlap of the others.
    weights = np.where(may_match, min(ious.shape) + ious, 0.0)
    rows, columns = _scipy_optimize().linear_sum_assignment(weights, maximize=True)
    return [float(ious[i, j]) for i, j in zip(rows, columns, strict=True) if may_match[i, j]]


def _with_label(interval: Any) -> tuple[float, float, Any]:
    """Start, end and label, `None` without one. Intervals come as tuples, from JSON as lists, and as rows of arrays."""
    parts = list(interval) if hasattr(interval, "__len__") and not isinstance(interval, (str, Mapping)) else []
    if len(parts) not in (2, 3):
        raise ValueError(
            f"{interval!r} is no interval: those of a clip are a list of (start, end) or (start, end, label)."
        )
    return (*_interval(parts), parts[2] if len(parts) == 3 else None)


def _interval(interval: Any) -> tuple[float, float]:
    start, end = float(interval[0]), float(interval[1])
    if not (np.isfinite(start) and np.isfinite(end) and start < end):
        raise ValueError(f"The interval ({start}, {end}) must end after it starts.")
    return start, end


def _scipy_optimize() -> Any:
    try:
        import scipy.optimize
    except ModuleNotFoundError as error:
        raise missing_extra(error, needed_by="Matching intervals") or error from error
    return scipy.optimize
