"""Tables and pictures of keyword spotting. The pictures are made of plain arrays, whatever model they came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_ext.cli.charts import Curve, Raster
from hf_ext.cli.kws_scores import NEGATIVES, Figures, Scored
from hf_ext.cli.report import Table
from hf_ext.metrics import det_points


_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
_NUM_BINS = 30


def figures_table(figures: Sequence[Figures], caption: str) -> Table:
    """A kind of negative a row."""
    rows = [
        [
            own.negatives,
            f"{own.num_positives:,} / {own.num_negatives:,}",
            f"{own.auc:.1%}" + _ends(own.auc_interval),
            f"{own.eer:.1%}" + _ends(own.eer_interval),
            f"{own.miss_rate_at_1_percent_false_alarms:.1%}",
            "-" if own.duration_only_auc is None else f"{own.duration_only_auc:.1%}",
        ]
        for own in figures
    ]
    columns = [
        "negatives",
        "matches / mismatches",
        "AUC (95 %)",
        "EER (95 %)",
        "missed at 1 % false alarms",
        "AUC of duration alone",
    ]
    return Table(columns, rows, caption)


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})"


def mistakes_table(scored: Scored, count: int = 4) -> Table:
    """The mismatches that score highest, and the matches that score lowest."""
    order = np.argsort(scored.scores)
    alarms = [place for place in order[::-1] if scored.labels[place] == 0][:count]
    misses = [place for place in order if scored.labels[place] == 1][:count]
    rows = [
        [
            scored.texts[place] or "-",
            scored.phrases[place],
            str(scored.kinds[place]),
            f"{np.exp(-np.logaddexp(0, -scored.scores[place])):.1%}",
        ]
        for place in [*alarms, *misses]
    ]
    return Table(
        ["said", "looked for", "kind", "score"], rows, "Mismatches that score highest, matches that score lowest"
    )


def verdict(figures: Sequence[Figures], groups: str) -> list[str]:
    """What the table says and what it does not, in plain sentences."""
    said = ["All phrases are pooled under one threshold."]
    if any(own.auc_interval for own in figures):
        said.append(f"The intervals are percentiles of a bootstrap that draws whole {groups}.")
    for own in figures:
        baseline = own.duration_only_auc
        low = own.auc_interval[0] if own.auc_interval else own.auc
        if baseline is not None and low <= max(baseline, 0.5):
            what = f"the duration of the clip alone ({baseline:.1%})" if baseline > 0.5 else "chance"
            said.append(f"Against {own.negatives} negatives the model is not clearly better than {what}.")
    if any(min(own.num_positives, own.num_negatives) < 100 for own in figures):
        said.append("With fewer than 100 trials of a kind, misses at 1 % false alarms say little.")
    return said


def det_curve(scored: Scored, kinds: Sequence[str]) -> Curve:
    """Misses against false alarms, one line for each kind of negative, on the usual scale of normal deviates."""
    series = []
    for kind in kinds:
        chosen = scored.against(kind)
        points = det_points(scored.scores[chosen].tolist(), scored.labels[chosen].tolist())
        series.append((kind, _thinned(points.false_alarm_rates, points.miss_rates)))
    deviates = [(_deviate(rate), f"{100 * rate:g}%") for rate in _RATES]
    return Curve("Misses against false alarms", "false alarms", "misses", series, deviates, deviates, dots=False)


def _thinned(alarms: np.ndarray, misses: np.ndarray) -> list[tuple[float, float, str]]:
    """Points within the scale, as few as show the line."""
    low, high = _RATES[0], _RATES[-1]
    x, y = _deviate(np.clip(alarms, low, high)), _deviate(np.clip(misses, low, high))
    inside = np.flatnonzero((alarms <= high) & (misses <= high))
    kept: list[int] = []
    # A line that lies outside altogether is drawn along the edge.
    for place in inside if len(inside) else range(len(x)):
        if not kept or max(abs(x[place] - x[kept[-1]]), abs(y[place] - y[kept[-1]])) > 0.03:
            kept.append(int(place))
    said = [f"{alarms[i]:.1%} false alarms, {misses[i]:.1%} missed" for i in kept]
    return [(float(x[i]), float(y[i]), words) for i, words in zip(kept, said, strict=True)]


def _deviate(rate: Any) -> Any:
    from scipy.stats import norm

    return norm.ppf(rate)


def score_histograms(scored: Scored) -> Curve:
    """How often which log odds are given, for positives and for each kind of negative."""
    groups = {"positive": scored.labels == 1}
    groups |= {kind: (scored.labels == 0) & (scored.kinds == kind) for kind in NEGATIVES}
    # A few scores far out, or minus infinity for what can't be in so short a clip, would leave no room for the others.
    low, high = np.quantile(scored.scores[np.isfinite(scored.scores)], [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1, _NUM_BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    series = []
    for name, chosen in groups.items():
        if chosen.any():
            counts, _ = np.histogram(np.clip(scored.scores[chosen], edges[0], edges[-1]), edges)
            shares = counts / counts.sum()
            points = [(float(x), float(y), f"{x:.1f}: {y:.1%}") for x, y in zip(middles, shares, strict=True)]
            series.append((name, points))
    return Curve("Scores", "log odds", "share of the trials", series, dots=False)


def spectrogram(title: str, features: Any, seconds: float) -> Raster:
    """
    Frames of a clip, low channels at the bottom.

    Args:
        title (`str`):
            Which clip.
        features (array of shape `(num_frames, num_mel_bins)`):
            Log-mel features.
        seconds (`float`):
            How long the clip is.
    """
    values = np.asarray(features, dtype=float).T[::-1]
    # Silence has no lower bound that would mean anything.
    bounds = (float(np.quantile(values, 0.2)), float(np.quantile(values, 0.998)))
    return Raster(title, "seconds", "mel channels", values, (0.0, seconds), bounds=bounds)


def gate_activity(title: str, gates: Any, extent: tuple[float, float], modules: Sequence[str] | None = None) -> Raster:
    """
    Which modules ran in which frame, or in which window.

    Args:
        title (`str`):
            Which recording.
        gates (array of shape `(num_frames, num_modules)`):
            1 where a module ran, 0 where it was skipped, or the chance of it.
        extent (`tuple[float, float]`):
            Where the first frame begins and the last one ends, in seconds.
        modules (`Sequence[str]`, *optional*):
            Their names.
    """
    values = np.asarray(gates, dtype=float).T
    rows = list(modules) if modules is not None else [str(number + 1) for number in range(len(values))]
    said = f"{title}: {1 - values.mean():.0%} of the modules' frames are skipped"
    return Raster(title, "seconds", "modules that ran", values, extent, rows, None, (0.0, 1.0), said)


def alignment(title: str, similarity: Any, path: Any, units: Sequence[str], seconds: float) -> Raster:
    """
    How alike frames and the units of a phrase are, and which unit each frame was given to.

    Args:
        title (`str`):
            Which clip and phrase.
        similarity (array of shape `(num_frames, num_units)`):
            The more alike, the greater.
        path (array of shape `(num_frames,)`):
            The place of each frame's unit.
        units (`Sequence[str]`):
            Phonemes or words of the phrase.
        seconds (`float`):
            How long the clip is.
    """
    values, places = np.asarray(similarity, dtype=float).T, np.asarray(path)
    step = seconds / max(len(places), 1)
    line = [((frame + edge) * step, float(place)) for frame, place in enumerate(places) for edge in (0.0, 1.0)]
    ends = [(places == unit).sum() * step for unit in range(len(units))]
    said = f"{title}: " + ", ".join(f"{unit} {length:.2f} s" for unit, length in zip(units, ends, strict=True))
    return Raster(title, "seconds", "parts of the phrase", values, (0.0, seconds), list(units), line, None, said)
