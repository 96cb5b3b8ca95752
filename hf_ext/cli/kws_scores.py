"""Trials of keyword spotting: where they come from, how a model scores them, and what the scores are worth."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console

from hf_ext import KwsPairDataset, KwsTrialDataset, load_utterances, read_audio
from hf_ext.cli.compare import progress_bar
from hf_ext.metrics import bootstrap_interval, det_points, equal_error_rate, roc_auc


NEGATIVES = ("random", "hard", "confusable")
# Of the papers' longest phrases, where a model takes any.
USUAL_PHONEMES = 25
_COLUMNS = ("audio", "phrase", "label")
# Enough to see that there are samples.
_SECONDS_READ = 0.01


@dataclass
class Scored:
    """
    Trials with their scores, in arrays of one length.

    Args:
        scores (`np.ndarray`):
            Log odds.
        labels (`np.ndarray`):
            1 where the clip holds the phrase.
        kinds (`np.ndarray`):
            Positive, random, hard or confusable.
        seconds (`np.ndarray`), num_phonemes (`np.ndarray`):
            Length of the clip and of the phrase.
        groups (`list[str]`):
            What is drawn together for intervals: the speaker, or else the clip.
        texts (`list[str]`), phrases (`list[str]`):
            What was said, as far as it is known, and what was asked for.
        unit (`str`, *optional*, defaults to `"clips"`):
            What the groups are: speakers or clips.
    """

    scores: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray
    seconds: np.ndarray
    num_phonemes: np.ndarray
    groups: list[str]
    texts: list[str]
    phrases: list[str]
    unit: str = "clips"

    def against(self, kind: str) -> np.ndarray:
        """Which trials tell positives from one kind of negative, or from `"all"`."""
        return (self.labels == 1) | ((self.labels == 0) & ((kind == "all") | (self.kinds == kind)))


@dataclass
class Figures:
    """What a model reaches against one kind of negative; intervals are of 95 %."""

    negatives: str
    num_positives: int
    num_negatives: int
    auc: float
    auc_interval: tuple[float, float] | None
    eer: float
    eer_interval: tuple[float, float] | None
    miss_rate_at_1_percent_false_alarms: float
    duration_only_auc: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_trials(
    data: Path,
    tokenizer: Any,
    kinds: Sequence[str],
    max_clips: int | None = None,
    seed: int = 0,
    max_phonemes: int = USUAL_PHONEMES,
) -> KwsTrialDataset:
    """
    Trials from a CSV file, or made from an audiofolder: each clip with its text and with one phrase of each kind.

    Args:
        data (`Path`):
            A CSV file with the columns `audio` (a path, from the file's own folder on), `phrase` and `label`, and, if there
            are, `text`, `kind`, `speaker`, `start` and `end`; or a folder with a `metadata.csv`.
        tokenizer ([`PhonemeTokenizer`]):
            The model's.
        kinds (`Sequence[str]`):
            Kinds of negatives that are made from a folder.
        max_clips (`int`, *optional*):
            So many clips, drawn at random.
        seed (`int`, *optional*, defaults to `0`):
            Of the draws.
        max_phonemes (`int`, *optional*, defaults to `25`):
            Clips of a folder whose text has more are left out.

    Raises:
        typer.BadParameter: where there is no such file or folder, or a column or class is missing.
    """
    try:
        if data.is_file():
            rows = _read_csv(data)
            check_clips(rows)
            return KwsTrialDataset(rows)
        shares = dict.fromkeys(("positive", *kinds), 1.0)
        utterances = drawn(clips_with_text(data), max_clips, seed)
        check_clips(utterances)
        # Phrases that sound alike are found by their phonemes, also for a model that takes words.
        sounds = tokenizer if hasattr(tokenizer, "pronunciations") else None
        return KwsPairDataset(utterances, sounds, shares=shares, every_kind=True, max_phonemes=max_phonemes, seed=seed)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"can't make trials from {str(data)!r}: {error}") from error


def clips_with_text(folder: Path) -> list[dict[str, Any]]:
    """The rows of an audiofolder; raises a `ValueError` where none has a text, which they are chosen by."""
    rows = load_utterances(folder)
    if not rows:
        raise ValueError(f"none of the clips in {folder} has a text: its metadata.csv says what is said, in `text`.")
    return rows


def longest_phrase(model: Any) -> int:
    """Phonemes of the longest phrase that a model is trained on and tried with."""
    return getattr(model.config, "longest_phrase", None) or USUAL_PHONEMES


def left_out(*pairs: KwsTrialDataset | None) -> str:
    """A sentence on the clips that were given and are none of the pairs; empty without any."""
    drawn_from = [own for own in pairs if isinstance(own, KwsPairDataset)]
    count = sum(own.num_left_out for own in drawn_from)
    if not count:
        return ""
    return (
        f"{count:,} of {sum(len(own.trials) for own in drawn_from):,} clips are left out: their texts have more than "
        f"{drawn_from[0].max_phonemes} phonemes. Cut sentences into phrases, with the columns `start` and `end` in seconds."
    )


def drawn(rows: Sequence[Any], count: int | None, seed: int) -> list[Any]:
    """At most `count` of the rows, drawn at random, in their order."""
    if count is None or count >= len(rows):
        return list(rows)
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return [rows[place] for place in sorted(chosen)]


def check_clips(rows: Sequence[Any]) -> None:
    """
    Opens each clip of rows of files once: one that is missing or damaged is told before the others are worked on.

    Raises:
        ValueError: for the first that is no audio or has none.
    """
    for clip in dict.fromkeys(row["audio"] for row in rows):
        read_audio({"audio": clip, "end": _SECONDS_READ})


def _read_csv(path: Path) -> list[dict[str, Any]]:
    # Spreadsheets put a mark before the first column.
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    missing = sorted(set(_COLUMNS) - set(rows[0] if rows else ()))
    if missing:
        raise ValueError(f"it has no rows or lacks the columns {missing}.")
    trials = []
    for number, row in enumerate(rows, start=2):
        if row["label"] not in ("0", "1"):
            raise ValueError(f"`label` is {row['label']!r} in line {number}; it must be 0 or 1.")
        if not row["audio"]:
            raise ValueError(f"`audio` is empty in line {number}; it must be the path of a clip.")
        label = int(row["label"])
        kind = row.get("kind") or ("positive" if label else "random")
        if (kind == "positive") != bool(label) or kind not in ("positive", *NEGATIVES):
            raise ValueError(
                f"`kind` is {kind!r} in line {number}, with the label {label}: it must be 'positive' for 1, and one of "
                f"{list(NEGATIVES)} for 0."
            )
        trials.append({**row, "audio": str(path.parent / row["audio"]), "label": label, "kind": kind})
        trials[-1].setdefault("text", "")
    return trials


def score_trials(
    spotter: Any,
    trials: KwsTrialDataset,
    chunk_length_s: float,
    max_pronunciations: int,
    console: Console | None = None,
) -> Scored:
    """
    Scores each clip once, against all phrases that it is tried with, as the pipeline does it.

    Args:
        spotter ([`KeywordSpottingPipeline`]):
            The model.
        trials ([`KwsTrialDataset`]):
            From [`load_trials`].
        chunk_length_s (`float`), max_pronunciations (`int`):
            As in a call of the pipeline.
        console ([`~rich.console.Console`], *optional*):
            Where progress is shown.

    Returns:
        `Scored`

    Raises:
        typer.BadParameter: if a clip can't be read, the model doesn't take a phrase, or gives scores that are no numbers.
    """
    scored: dict[str, list[Any]] = {name: [] for name in Scored.__dataclass_fields__ if name != "unit"}
    clips = _by_clip(trials)
    with progress_bar(console) as progress:
        for source, places in progress.track(clips, description="scoring clips"):
            try:
                items = [trials[place] for place in places]
                clip = {"array": items[0]["audio"], "sampling_rate": items[0]["sampling_rate"]}
                answers = spotter(
                    clip,
                    candidate_labels=list(dict.fromkeys(item["phrase"] for item in items)),
                    chunk_length_s=chunk_length_s,
                    max_pronunciations=max_pronunciations,
                    function_to_apply="none",
                )
            except (OSError, ValueError) as error:
                raise typer.BadParameter(f"the clip {source['audio']}: {error}") from error
            found = {answer["label"]: answer["score"] for answer in answers}
            for item in items:
                scored["scores"].append(found[item["phrase"]])
                scored["labels"].append(item["label"])
                scored["kinds"].append(item["kind"])
                scored["seconds"].append(len(item["audio"]) / item["sampling_rate"])
                scored["num_phonemes"].append(len(spotter.tokenizer.tokenize(item["phrase"])))
                scored["groups"].append(source.get("speaker") or str(source["audio"]))
                scored["texts"].append(item["text"])
                scored["phrases"].append(item["phrase"])
    arrays: dict[str, Any] = {
        name: np.array(values) if name not in ("groups", "texts", "phrases") else values
        for name, values in scored.items()
    }
    if np.isnan(arrays["scores"]).any():
        raise typer.BadParameter(
            f"the model gives scores that are no numbers, to {int(np.isnan(arrays['scores']).sum())} of {len(arrays['scores'])} "
            "trials: its weights are damaged, or its training diverged."
        )
    result = Scored(**arrays, unit=unit_of([row for row, _ in clips]))
    if not 0 < result.labels.sum() < len(result.labels):
        raise typer.BadParameter("the trials have one class only: both matches (1) and mismatches (0) are needed.")
    return result


def unit_of(rows: Sequence[Any]) -> str:
    """What intervals are drawn over: speakers where they are known."""
    return "speakers" if any(row.get("speaker") for row in rows) else "clips"


def _by_clip(trials: KwsTrialDataset) -> list[tuple[Any, list[int]]]:
    """The row of each clip, and the places of its trials."""
    if isinstance(trials, KwsPairDataset):
        size = len(trials.kinds)
        rows = [trials.trials[row] for row in trials.rows]
        return [(row, list(range(i * size, (i + 1) * size))) for i, row in enumerate(rows)]
    places: dict[Any, list[int]] = {}
    for place, row in enumerate(trials.trials):
        places.setdefault((row["audio"], row.get("start"), row.get("end")), []).append(place)
    return [(trials.trials[own[0]], own) for own in places.values()]


def figures_of(scored: Scored, resamples: int, seed: int = 0) -> list[Figures]:
    """
    AUC, equal error rate and misses at 1 % false alarms, pooled over all phrases, against all negatives and each kind.

    Args:
        scored (`Scored`):
            The trials.
        resamples (`int`):
            Draws for the intervals; 0 leaves them out. Whole speakers, or else clips, are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Of the draws.

    Returns:
        `list[Figures]`
    """
    kinds = [kind for kind in NEGATIVES if (scored.kinds[scored.labels == 0] == kind).any()]
    duration = duration_only_scores(scored)
    found = []
    for kind in ["all", *kinds] if len(kinds) > 1 else kinds:
        chosen = scored.against(kind)
        scores, labels = scored.scores[chosen].tolist(), scored.labels[chosen].tolist()
        groups = [group for group, own in zip(scored.groups, chosen, strict=True) if own]
        points = det_points(scores, labels)
        found.append(
            Figures(
                kind,
                sum(labels),
                len(labels) - sum(labels),
                roc_auc(scores, labels),
                _interval(roc_auc, scores, labels, groups, resamples, seed),
                equal_error_rate(scores, labels),
                _interval(equal_error_rate, scores, labels, groups, resamples, seed),
                float(points.miss_rates[points.false_alarm_rates <= 0.01].min()),
                None if duration is None else roc_auc(duration[chosen].tolist(), labels),
            )
        )
    return found


def duration_only_scores(scored: Scored) -> np.ndarray | None:
    """
    Scores of a listener that hears nothing but how long a clip is: how near that is to the usual length of such a phrase.

    What is usual is a line of seconds by phonemes, fitted to the positives of the very set: the listener has the advantage.
    `None` where there are too few of them.
    """
    positives = scored.labels == 1
    if positives.sum() < 2:
        return None
    # With phrases of one length the line is flat.
    degree = min(1, len(np.unique(scored.num_phonemes[positives])) - 1)
    line = np.polyfit(scored.num_phonemes[positives], scored.seconds[positives], degree)
    expected = np.clip(np.polyval(line, scored.num_phonemes), 0.05, None)
    return -np.abs(np.log(scored.seconds / expected))


def _interval(
    metric: Callable[..., float],
    scores: list[float],
    labels: list[int],
    groups: list[str],
    resamples: int,
    seed: int,
) -> tuple[float, float] | None:
    if resamples == 0:
        return None
    # One speaker, or one clip, says nothing about others.
    if len(set(groups)) < 2:
        return None
    try:
        return bootstrap_interval(metric, scores, labels, groups, num_resamples=resamples, seed=seed)
    except ValueError:
        return bootstrap_interval(metric, scores, labels, num_resamples=resamples, seed=seed)
