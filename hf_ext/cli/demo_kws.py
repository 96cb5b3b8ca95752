"""Keyword spotting in `hf-ext demo`: typed phrases in clips that people recorded and that a synthesiser speaks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import hf_ext
from hf_ext import KwsFeatureExtractor, KwsTrialDataset, load_utterances, synthesize_phrases
from hf_ext._extras import missing_extra
from hf_ext.cli.charts import HeatMap
from hf_ext.cli.compare import describe_machine, progress_bar
from hf_ext.cli.demo_options import DemoOptions
from hf_ext.cli.kws_views import spectrogram
from hf_ext.cli.loading import load_spotter, short_name, suitable_threads
from hf_ext.cli.report import Bars, Block, Figures, Prose, Section, Table


_CLIPS = Path(hf_ext.__file__).parent / "assets" / "demo-clips"
_SPOKEN = ("lights on", "volume up")
# Looked for beside what is said: nobody says them, and some sound like what is said.
_NOT_SAID = ("commuter", "lights off", "review class", "good morning")
_NUM_PICTURES = 3


def keyword_spotting_section(options: DemoOptions, console: Console) -> tuple[Section, dict[str, str]] | None:
    """
    Typed phrases, looked for in recorded clips, and in synthesised ones where espeak-ng is installed.

    Args:
        options (`DemoOptions`):
            Which phrases, and which model.
        console ([`~rich.console.Console`]):
            Where progress is shown.

    Returns:
        `Section` and `dict[str, str]`: the section, and the machine that its times were taken on. `None` if it is not wanted,
        and, with a note on the console, where there is no package that reads audio.
    """
    if not options.speech:
        return None
    try:
        with console.status("Loading the model"), tempfile.TemporaryDirectory() as folder:
            spotter = load_spotter(options.kws_model, options.device)
            clips = _clips(Path(folder))
    except ModuleNotFoundError as error:
        replacement = missing_extra(error, needed_by="Reading audio")
        if replacement is None:
            raise
        _leave_out(str(replacement), console)
        return None
    phrases = list(dict.fromkeys([*options.phrases, *(clip["text"] for clip in clips), *_NOT_SAID]))
    with suitable_threads(spotter.model, options.threads):
        scores, seconds = _scored(spotter, clips, phrases, console)
        machine = describe_machine(spotter.model)
    name = "slick-small (shipped)" if options.kws_model is None else short_name(options.kws_model)
    return _describe(name, spotter, clips, phrases, scores, seconds), machine


def _leave_out(reason: str, console: Console) -> None:
    console.print(f"Keyword spotting is left out: {reason}", style="dim", markup=False, highlight=False)


def _clips(folder: Path) -> list[dict[str, Any]]:
    """What people recorded and what a synthesiser speaks, read; each with a name of its own."""
    rows = [{**row, "by": "a person"} for row in load_utterances(_CLIPS)]
    try:
        spoken = synthesize_phrases(
            _SPOKEN, folder, 1, engines=["espeak-ng"], speeds=(0.9, 0.9), pitches=(1.0, 1.0), disable_tqdm=True
        )
        rows += [{**row, "by": "espeak-ng"} for row in load_utterances(spoken)]
    except FileNotFoundError:
        # Not installed: the recorded clips are enough.
        pass
    trials = KwsTrialDataset([{**row, "phrase": "", "label": 0, "kind": "random"} for row in rows])
    return [{**row, "array": trials[i]["audio"], "sampling_rate": 16000} for i, row in enumerate(rows)]


def _scored(
    spotter: Any, clips: Sequence[dict[str, Any]], phrases: list[str], console: Console
) -> tuple[list[dict[str, float]], float]:
    """For each clip the chance of each phrase; and how long it took."""
    audio = [{"array": clip["array"], "sampling_rate": clip["sampling_rate"]} for clip in clips]
    with progress_bar(console) as progress:
        # The first call of a process is slower than any other.
        spotter(audio[0], candidate_labels=phrases)
        start = time.perf_counter()
        answers = list(progress.track(spotter((clip for clip in audio), candidate_labels=phrases), total=len(audio)))
        seconds = time.perf_counter() - start
    return [{answer["label"]: answer["score"] for answer in own} for own in answers], seconds


def _describe(
    name: str,
    spotter: Any,
    clips: Sequence[dict[str, Any]],
    phrases: Sequence[str],
    scores: Sequence[dict[str, float]],
    seconds: float,
) -> Section:
    right = [max(own, key=own.__getitem__) == clip["text"] for clip, own in zip(clips, scores, strict=True)]
    length = sum(len(clip["array"]) / clip["sampling_rate"] for clip in clips)
    lead = Prose(
        f"{name} ({spotter.model.num_parameters():,} parameters) looks for {len(phrases)} typed phrases in {len(clips)} short "
        "clips. They are only typed, and any other can be, with `--phrase`. Each has a chance of its own to be in a clip, so a row "
        "does not add up to 100 %."
    )
    figures = Figures(
        [
            (f"{sum(right)} of {len(right)}", "clips in which what was said scores highest"),
            (f"{len(phrases)}", "phrases looked for in each, all typed"),
            (f"{1000 * seconds / length:.0f} ms", "per second of audio, for all phrases together"),
        ]
    )
    rows = []
    for clip, own in zip(clips, scores, strict=True):
        (first, score), (second, other) = sorted(own.items(), key=lambda pair: -pair[1])[:2]
        rows.append(
            [clip["text"], clip["by"], f"{own[clip['text']]:.0%}", f"{first} {score:.0%}", f"{second} {other:.0%}"]
        )
    table = Table(
        ["said", "by", "its own score", "highest", "next"], rows, f"{len(phrases)} typed phrases in {len(clips)} clips"
    )
    matrix = HeatMap(
        "Chance of each phrase in each clip",
        "looked for",
        "said",
        list(phrases),
        [clip["text"] for clip in clips],
        [[own[phrase] for phrase in phrases] for own in scores],
    )
    pictures: list[Block] = []
    for clip, own in list(zip(clips, scores, strict=True))[:_NUM_PICTURES]:
        pictures += [_picture(clip), _bars(clip, own)]
    return Section(
        name="kws",
        title="Typed phrases in speech",
        # The matrix comes last, where it has a row of the picture for itself.
        blocks=[lead, figures, table, *pictures, matrix],
        terminal=[lead, table],
        data={
            "model": name,
            "phrases": list(phrases),
            "clips": [
                {"said": clip["text"], "by": clip["by"], "licence": clip.get("licence"), "scores": own}
                for clip, own in zip(clips, scores, strict=True)
            ],
            "seconds": seconds,
            "seconds_of_audio": length,
        },
    )


def _picture(clip: dict[str, Any]) -> Block:
    seconds = len(clip["array"]) / clip["sampling_rate"]
    frames = KwsFeatureExtractor()(clip["array"], sampling_rate=clip["sampling_rate"])["input_features"][0]
    return spectrogram(f"“{clip['text']}”, said by {clip['by']}", frames, seconds)


def _bars(clip: dict[str, Any], scores: dict[str, float]) -> Bars:
    best = sorted(scores.items(), key=lambda pair: -pair[1])[:6]
    return Bars(f"Highest scores in “{clip['text']}”", [(label, score, f"{score:.1%}") for label, score in best])
