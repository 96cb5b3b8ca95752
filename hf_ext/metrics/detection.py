"""Figures about detection. Every function takes scores and labels, or intervals of time, never a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_ext._extras import missing_extra


class OperatingPoint(NamedTuple):
    """Where a detector stands at one threshold: detections are what scores at least `threshold`."""

    false_rejection_rate: float
    false_alarms_per_hour: float
    threshold: float


class DetPoints(NamedTuple):
    """Points of a detection error trade-off, from the highest threshold down: arrays of one length."""

    false_alarm_rates: np.ndarray
    miss_rates: np.ndarray
    thresholds: np.ndarray


def roc_auc(scores: Sequence[float], labels: Sequence[int]) -> float:
    """
    Area under the ROC curve of all trials pooled: the chance that a match scores higher than a mismatch.

    Args:
        scores (`Sequence[float]`):
            One score per trial; the higher, the more it is a match. Minus infinity is what was never detected.
        labels (`Sequence[int]`):
            1 for a match and 0 for a mismatch.

    Returns:
        `float`: between 0 and 1; 0.5 is chance.

    Raises:
        ValueError: if lengths differ, a score is NaN, or labels are others than 0 and 1 or all the same.

    Example:

    ```python
    >>> from hf_ext.metrics import roc_auc

    >>> roc_auc([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0])
    0.75
    ```
    """
    ranks, targets, _ = _ranked(scores, labels)
    return float(_sklearn_metrics().roc_auc_score(targets, ranks))


def equal_error_rate(scores: Sequence[float], labels: Sequence[int]) -> float:
    """
    The rate at which misses and false alarms are equally frequent, with one threshold for all trials.

    Between two thresholds the rates are interpolated.

    Args:
        scores (`Sequence[float]`):
            One score per trial; the higher, the more it is a match.
        labels (`Sequence[int]`):
            1 for a match and 0 for a mismatch.

    Returns:
        `float`: between 0 and 1.

    Raises:
        ValueError: as in [`roc_auc`].

    Example:

    ```python
    >>> from hf_ext.metrics import equal_error_rate

    >>> equal_error_rate([0.9, 0.8, 0.7, 0.3, 0.6, 0.2, 0.1, 0.0], [1, 1, 1, 1, 0, 0, 0, 0])
    0.25
    ```
    """
    ranks, targets, _ = _ranked(scores, labels)
    false_alarms, hits, _ = _sklearn_metrics().roc_curve(targets, ranks, drop_intermediate=False)
    gap = (1 - hits) - false_alarms
    # The curve begins with everything missed, where the gap is 1, and ends with everything accepted, where it is -1.
    after = int(np.argmax(gap <= 0))
    before = after - 1
    share = gap[before] / (gap[before] - gap[after])
    return float(false_alarms[before] + share * (false_alarms[after] - false_alarms[before]))


def det_points(scores: Sequence[float], labels: Sequence[int]) -> DetPoints:
    """
    Points of the detection error trade-off: the rates of false alarms and of misses at every threshold, those of the scores.

    Args:
        scores (`Sequence[float]`):
            One score per trial; the higher, the more it is a match.
        labels (`Sequence[int]`):
            1 for a match and 0 for a mismatch.

    Returns:
        [`DetPoints`]: The first threshold is infinite: nothing is detected.

    Raises:
        ValueError: as in [`roc_auc`].

    Example:

    ```python
    >>> from hf_ext.metrics import det_points

    >>> points = det_points([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0])
    >>> points.false_alarm_rates.tolist(), points.miss_rates.tolist()
    ([0.0, 0.0, 0.5, 0.5, 1.0], [1.0, 0.5, 0.5, 0.0, 0.0])
    ```
    """
    ranks, targets, values = _ranked(scores, labels)
    # What scikit-learn drops by default lies on a straight line, and is a threshold that one may want all the same.
    false_alarms, hits, thresholds = _sklearn_metrics().roc_curve(targets, ranks, drop_intermediate=False)
    return DetPoints(false_alarms, 1 - hits, np.array([np.inf, *values[thresholds[1:].astype(int)]]))


def frr_at_false_alarms_per_hour(
    scores: Sequence[float], labels: Sequence[int], hours: float, false_alarms_per_hour: float = 0.5
) -> OperatingPoint:
    """
    Share of keywords that are missed where the false alarms per hour are held to a bound.

    Args:
        scores (`Sequence[float]`):
            For each keyword that was spoken the score of its detection, minus infinity where there was none; and the
            score of each detection where nothing was spoken, however low.
        labels (`Sequence[int]`):
            1 for the former and 0 for the latter.
        hours (`float`):
            How long the audio without keywords is.
        false_alarms_per_hour (`float`, *optional*, defaults to `0.5`):
            The bound.

    Returns:
        [`OperatingPoint`]: at the lowest threshold that keeps to the bound.

    Raises:
        ValueError: if there is no keyword, `hours` is not positive or the bound is negative, one of them is not finite, more
            detections than the bound allows score infinity, or scores and labels are at fault as in [`roc_auc`]. No detection
            where nothing was spoken is fine.

    Example:

    ```python
    >>> from hf_ext.metrics import frr_at_false_alarms_per_hour

    >>> frr_at_false_alarms_per_hour([0.9, 0.5, 0.7, 0.6], [1, 1, 0, 0], hours=2.0).false_rejection_rate
    0.5
    ```
    """
    values, targets = _checked(scores, labels)
    if not targets.any():
        raise ValueError("`labels` has no 1: there is no keyword that could be missed.")
    if not 0 < hours < np.inf:
        raise ValueError(f"`hours` must be positive and finite, got {hours}.")
    if not 0 <= false_alarms_per_hour < np.inf:
        raise ValueError(f"`false_alarms_per_hour` must be finite and not negative, got {false_alarms_per_hour}.")
    alarms = np.sort(values[~targets])[::-1]
    # The rounding is for bounds such as 0.1 per hour over 30 hours, which is a little below 3.
    allowed = int(min(round(false_alarms_per_hour * hours, 9), len(alarms)))
    if allowed < len(alarms) and alarms[allowed] == np.inf:
        raise ValueError(
            f"`scores` are infinite for {int(np.isposinf(alarms).sum())} detections where nothing was spoken: no threshold holds "
            f"those to {false_alarms_per_hour} per hour."
        )
    # The first alarm that is one too many has to fall below the threshold, and with it those that score the same.
    threshold = np.nextafter(alarms[allowed], np.inf) if allowed < len(alarms) else np.nextafter(-np.inf, 0)
    return OperatingPoint(
        false_rejection_rate=float(np.mean(values[targets] < threshold)),
        false_alarms_per_hour=float(np.sum(alarms >= threshold) / hours),
        threshold=float(threshold),
    )


def bootstrap_interval(
    metric: Callable[[np.ndarray, np.ndarray], float],
    scores: Sequence[float],
    labels: Sequence[int],
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Percentile bootstrap interval of a figure.

    Args:
        metric (`Callable[[np.ndarray, np.ndarray], float]`):
            A function of scores and labels, such as [`roc_auc`].
        scores (`Sequence[float]`), labels (`Sequence[int]`):
            The trials.
        groups (`Sequence[Hashable]`, *optional*):
            What trials have in common, their speaker or clip: whole groups are drawn then, since trials of one group are
            no independent evidence. Otherwise matches and mismatches are drawn apart, each as often as there are.
        confidence (`float`, *optional*, defaults to `0.95`):
            Share of the resamples that lie within the interval.
        num_resamples (`int`, *optional*, defaults to `1000`):
            How often trials are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Of the draws.

    Returns:
        `tuple[float, float]`: The two ends.

    Raises:
        ValueError: if the arguments are out of range, or groups are so few that many draws have one class only.

    Example:

    ```python
    >>> from hf_ext.metrics import bootstrap_interval, roc_auc

    >>> low, high = bootstrap_interval(roc_auc, [0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0], num_resamples=100)
    >>> low < 0.75 < high
    True
    ```
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie between 0 and 1, got {confidence}.")
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be at least 1, got {num_resamples}.")
    values, targets = _checked(scores, labels, both_classes=True)
    if groups is None:
        strata = [[np.array([i]) for i in np.flatnonzero(targets == target)] for target in (True, False)]
    else:
        if len(groups) != len(values):
            raise ValueError(f"`groups` has {len(groups)} entries for {len(values)} scores.")
        rows_of: dict[Hashable, list[int]] = {}
        for row, group in enumerate(groups):
            rows_of.setdefault(group, []).append(row)
        strata = [[np.array(rows) for rows in rows_of.values()]]
    random = np.random.default_rng(seed)
    figures = []
    for _ in range(num_resamples):
        rows = np.concatenate(
            [units[i] for units in strata for i in random.integers(len(units), size=len(units))],
        )
        if 0 < targets[rows].sum() < len(rows):
            figures.append(metric(values[rows], targets[rows].astype(int)))
    if len(figures) < 0.9 * num_resamples:
        raise ValueError(
            f"`groups` are too few: {num_resamples - len(figures)} of {num_resamples} draws had one class only."
        )
    low, high = np.quantile(figures, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def share_of_macs_skipped(
    gates: Any, macs_per_module: Sequence[float], always_on: float = 0.0, mask: Any | None = None
) -> float:
    """
    Share of the multiply-accumulates that gates saved.

    Args:
        gates (array of shape `(..., num_modules)`):
            For each frame, 1 where a module ran and 0 where it was skipped.
        macs_per_module (`Sequence[float]` of length `num_modules`):
            Multiply-accumulates of each module, per frame.
        always_on (`float`, *optional*, defaults to `0.0`):
            Multiply-accumulates per frame that no gate can save. 0 gives the share of the gated work.
        mask (array of shape `(...)`, *optional*):
            1 for frames that count, 0 for padding.

    Returns:
        `float`: between 0 (everything ran) and 1.

    Raises:
        ValueError: if a gate is neither 0 nor 1, the shapes don't fit, or there is no frame or no work.

    Example:

    ```python
    >>> from hf_ext.metrics import share_of_macs_skipped

    >>> share_of_macs_skipped([[1, 0], [1, 1]], macs_per_module=[100, 300])
    0.375
    ```
    """
    ran, macs = _array(gates, np.float64), _array(macs_per_module, np.float64)
    if ran.ndim == 0 or macs.ndim != 1 or ran.shape[-1] != len(macs):
        raise ValueError(f"`gates` of shape {ran.shape} don't fit `macs_per_module` of shape {macs.shape}.")
    if not np.isin(ran, (0, 1)).all():
        raise ValueError("`gates` has values other than 0 and 1: a gate that is not closed saves nothing.")
    if not (np.isfinite(macs).all() and np.isfinite(always_on) and (macs >= 0).all() and always_on >= 0):
        raise ValueError("`macs_per_module` and `always_on` must not be negative and must be finite.")
    if mask is not None:
        kept = _array(mask).astype(bool)
        if kept.shape != ran.shape[:-1]:
            raise ValueError(f"`mask` has the shape {kept.shape} and the frames of `gates` have {ran.shape[:-1]}.")
        ran = ran[kept]
    frames = ran.reshape(-1, len(macs))
    total = len(frames) * (macs.sum() + always_on)
    if total == 0:
        raise ValueError("There is no frame, or no work in any: nothing could be skipped.")
    return float(((1 - frames) @ macs).sum() / total)


def _array(values: Any, dtype: Any = None) -> np.ndarray:
    # A tensor may be on another device, of a format that NumPy lacks, or want gradients.
    return np.asarray(values.tolist() if hasattr(values, "detach") else values, dtype=dtype)


def _checked(scores: Any, labels: Any, both_classes: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Scores as floats, and labels as booleans."""
    values, targets = _array(scores, np.float64), _array(labels)
    if values.ndim != 1 or values.shape != targets.shape:
        raise ValueError(
            f"`scores` and `labels` must be sequences of one length, got the shapes {values.shape} and {targets.shape}."
        )
    if np.isnan(values).any():
        raise ValueError(f"`scores` has {int(np.isnan(values).sum())} values that are NaN.")
    if not np.isin(targets, (0, 1)).all():
        raise ValueError(f"`labels` must be 0 or 1, got {sorted(set(targets.tolist()) - {0, 1})[:5]}.")
    targets = targets.astype(bool)
    if both_classes and (targets.all() or not targets.any()):
        raise ValueError("`labels` are all the same: both matches and mismatches are needed.")
    return values, targets


def _ranked(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks in place of scores, which may be infinite; labels; and the score of each rank."""
    values, targets = _checked(scores, labels, both_classes=True)
    unique, ranks = np.unique(values, return_inverse=True)
    return ranks, targets, unique


def _sklearn_metrics() -> Any:
    try:
        import sklearn.metrics
    except ModuleNotFoundError as error:
        raise missing_extra(error, needed_by="This metric") or error from error
    return sklearn.metrics
