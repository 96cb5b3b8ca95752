"""`hf-ext kws eval` for models of a closed set of keywords, whose modules run where their gates are open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import AutoConfig, AutoFeatureExtractor

from hf_ext import GatedConformerConfig, GatedConformerForKeywordDetection, KwsTrialDataset
from hf_ext.cli.charts import Curve
from hf_ext.cli.compare import progress_bar
from hf_ext.cli.kws_scores import Scored, check_clips, clips_with_text, drawn, unit_of
from hf_ext.cli.kws_views import gate_activity
from hf_ext.cli.loading import UNLOADABLE, chosen_device, refusal
from hf_ext.cli.report import Block, Prose, Section
from hf_ext.metrics import share_of_macs_skipped


_MODULES = ("feed-forward", "attention", "convolution", "feed-forward")
# So many clips one after the other are a recording to look at.
_CLIPS_SHOWN = 6


def load_detector(name: str | None, device: str | None = None) -> tuple[Any, Any] | None:
    """
    A model of a closed set of keywords and its front end; `None` if the name is of another model, or of none.

    Args:
        name (`str`, *optional*), device (`str`, *optional*):
            As in [`~hf_ext.cli.loading.load_spotter`].

    Raises:
        typer.BadParameter: where it can't be loaded.
    """
    try:
        if name is None or not isinstance(AutoConfig.from_pretrained(name), GatedConformerConfig):
            return None
    except UNLOADABLE:
        # `load_spotter` says why.
        return None
    try:
        model = GatedConformerForKeywordDetection.from_pretrained(name)
        extractor = AutoFeatureExtractor.from_pretrained(name)
    except UNLOADABLE as error:
        raise refusal(f"the keyword model {name!r}", error) from error
    return model.to(chosen_device(device)).eval(), extractor


def score_keywords(
    model: Any, extractor: Any, data: Path, max_clips: int | None, seed: int, console: Console
) -> tuple[Scored, list[np.ndarray]]:
    """
    Scores each clip of an audiofolder for each keyword of the model: the most that any of its windows gives.

    Args:
        model ([`GatedConformerForKeywordDetection`]), extractor ([`KwsFeatureExtractor`]):
            The model and its front end.
        data (`Path`):
            A folder with a `metadata.csv`, whose texts are the names of the keywords, or anything else.
        max_clips (`int`, *optional*), seed (`int`), console ([`~rich.console.Console`]):
            So many clips, drawn at random; where progress is shown.

    Returns:
        `Scored` and `list[np.ndarray]`: trials, with log odds as scores, and the samples of each clip.

    Raises:
        typer.BadParameter: where there is no such folder or no clip of a keyword, or a clip can't be read.
    """
    keywords = {label.lower(): place for place, label in sorted(model.config.id2label.items())}
    try:
        rows = drawn(clips_with_text(data), max_clips, seed)
        check_clips(rows)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"can't make trials from {str(data)!r}: {error}") from error
    texts = [row["text"].strip().lower() for row in rows]
    if len(keywords) < 2 or not set(texts) & set(keywords):
        raise typer.BadParameter(
            f"no clip of {str(data)!r} has one of the model's keywords as its text; they are {', '.join(keywords)}."
        )
    trials = KwsTrialDataset(
        [{**row, "phrase": "", "label": 0, "kind": "random"} for row in rows], extractor.sampling_rate
    )
    scores, clips = [], []
    with progress_bar(console) as progress:
        for place in progress.track(range(len(rows)), description="scoring clips"):
            try:
                clips.append(trials[place]["audio"])
            except (OSError, ValueError) as error:
                raise typer.BadParameter(f"the clip {rows[place]['audio']}: {error}") from error
            output = heard(model, extractor, clips[-1])
            chances = output.detection_logits[0].float().sigmoid()[:, None] * output.class_logits[0].float().softmax(
                -1
            )
            scores.append(chances.amax(0).logit(1e-6).cpu().numpy())
    labels = np.array([[int(text == keyword) for keyword in keywords] for text in texts]).ravel()
    return Scored(
        scores=np.stack(scores)[:, list(keywords.values())].ravel(),
        labels=labels,
        kinds=np.where(labels == 1, "positive", "random"),
        seconds=np.repeat([len(clip) / extractor.sampling_rate for clip in clips], len(keywords)),
        num_phonemes=np.array([len(keyword) for _ in texts for keyword in keywords]),
        groups=[row.get("speaker") or str(row["audio"]) for row in rows for _ in keywords],
        texts=[text for text in texts for _ in keywords],
        phrases=[keyword for _ in texts for keyword in keywords],
        unit=unit_of(rows),
    ), clips


@torch.no_grad()
def heard(model: Any, extractor: Any, samples: np.ndarray) -> Any:
    """What the model puts out for one clip."""
    inputs = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt").to(model.device)
    return model(inputs["input_features"].to(model.dtype), inputs["attention_mask"])


def gates_section(model: Any, extractor: Any, clips: Sequence[np.ndarray]) -> Section:
    """Which modules ran while the model heard some clips one after the other, what it found there, and what that saved."""
    recording = np.concatenate(clips[:_CLIPS_SHOWN])
    output = heard(model, extractor, recording)
    gates = output.gates[0].float().cpu().numpy()
    macs = model.count_macs()
    skipped = share_of_macs_skipped(gates, macs.modules, macs.always_on)
    step, hop = extractor.hop_length / extractor.sampling_rate, model.config.hop_frames
    middles = (output.window_starts.cpu().numpy() + model.config.window_frames / 2) * step
    extent = (float(middles[0] - hop * step / 2), float(middles[-1] + hop * step / 2))
    chances = output.detection_logits[0].float().sigmoid().tolist()
    names = [f"{layer + 1} {name}" for layer in range(model.config.num_hidden_layers) for name in _MODULES]
    said = Prose(
        f"{len(gates)} windows of a recording of {len(recording) / extractor.sampling_rate:.0f} s, made of clips one after the "
        f"other: {gates.mean():.0%} of the modules ran, and {skipped:.0%} of the multiply-accumulates of a model without gates were "
        "skipped. A window is drawn where its middle is."
    )
    points = [(float(x), float(y), f"{x:.2f} s: {y:.0%}") for x, y in zip(middles, chances, strict=True)]
    charts: list[Block] = [
        gate_activity("Modules that ran, window by window", gates, extent, names),
        Curve("Chance that a window holds a keyword", "seconds", "chance", [("any keyword", points)], dots=False),
    ]
    return Section("gates", "Where modules run", [said, *charts], [said])
