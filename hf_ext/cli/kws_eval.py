"""`hf-ext kws eval`: how well a model finds typed phrases, against which negatives, as table, pictures and page."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from hf_ext.cli.compare import describe_machine
from hf_ext.cli.kws_gates import gates_section, load_detector, score_keywords
from hf_ext.cli.kws_scores import (
    NEGATIVES,
    Figures,
    Scored,
    figures_of,
    left_out,
    load_trials,
    longest_phrase,
    score_trials,
)
from hf_ext.cli.kws_views import (
    alignment,
    det_curve,
    figures_table,
    mistakes_table,
    score_histograms,
    spectrogram,
    verdict,
)
from hf_ext.cli.loading import load_spotter, make_folder, short_name, suitable_threads
from hf_ext.cli.options import DeviceOption, JsonOption, ThreadsOption
from hf_ext.cli.report import Block, Prose, Section, print_section, render_page, write_json


class Negative(StrEnum):
    """Phrases that were not said."""

    random = "random"
    hard = "hard"
    confusable = "confusable"


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            help="A folder with clips and a metadata.csv (file_name, text), or a CSV file of trials (audio, phrase, label)."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder; by default the small model that comes with the package.")
    ] = None,
    output_dir: Annotated[
        Path,
        typer.Option("--output-dir", "--output_dir", file_okay=False, help="Where pictures, page and figures go."),
    ] = Path("kws-eval"),
    negative: Annotated[
        list[Negative] | None,
        typer.Option(
            help="Kind of phrase to try each clip of a folder with, beside its own; may be repeated. Random ones are any of "
            "the folder's, hard ones its nearest by sound, confusable ones are made up from the phonemes."
        ),
    ] = None,
    max_clips: Annotated[
        int | None, typer.Option("--max-clips", "--max_clips", min=2, help="So many clips of a folder, at random.")
    ] = None,
    chunk_length: Annotated[
        float, typer.Option(min=0.0, help="Seconds of the windows of a longer clip; 0 hears each clip as one.")
    ] = 3.0,
    max_pronunciations: Annotated[
        int, typer.Option(min=1, help="Pronunciations of a phrase; the best of them counts.")
    ] = 8,
    resamples: Annotated[int, typer.Option(min=0, help="Draws for the intervals; 0 leaves them out.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    json_file: JsonOption = None,
) -> None:
    """
    Measure AUC and equal error rate, against random and hard negatives apart, and draw trade-off and scores.
    """
    from hf_ext.cli.picture import draw

    console = Console()
    with console.status("Loading the model"):
        detector = load_detector(model, device)
        spotter: Any = None if detector else load_spotter(model, device)
    kinds = [str(kind) for kind in negative or (Negative.random, Negative.hard)]
    if spotter is not None and Negative.confusable in kinds and spotter.processor.takes_words:
        raise typer.BadParameter(
            f"--negative {Negative.confusable} is of phonemes, and {model!r} takes words: leave it out."
        )
    # Before the scoring, which takes long, and not behind it.
    make_folder(output_dir)
    measured = detector[0] if detector else spotter.model
    missing = ""
    with suitable_threads(measured, threads):
        if detector:
            scored, clips = score_keywords(*detector, data, max_clips, seed, console)
            inside = [gates_section(*detector, clips)]
        else:
            trials = load_trials(data, spotter.tokenizer, kinds, max_clips, seed, longest_phrase(spotter.model))
            missing = left_out(trials)
            scored = score_trials(spotter, trials, chunk_length, max_pronunciations, console)
            surest = int(np.where(scored.labels == 1, scored.scores, -np.inf).argmax())
            inside = [Section("inside", "What happens inside", [_LEGEND, *shown_inside(spotter, trials[surest])], [])]
        machine = describe_machine(measured)
    with console.status("Drawing intervals"):
        figures = figures_of(scored, resamples, seed)
    name = short_name(model) if model is not None else "slick-small (shipped)"
    caption = (
        f"{name} on {short_name(str(data))}: {len(scored.scores):,} trials of {len(set(scored.phrases)):,} phrases"
    )
    sections = [_detection(scored, figures, caption, missing), *inside]
    for section in sections:
        if section.terminal:
            print_section(section, console)
        draw(section, output_dir / f"{section.name}.png")
    page = output_dir / "index.html"
    page.write_text(render_page(f"{name}: typed phrases in speech", sections, machine, "hf-ext kws eval"), "utf-8")
    results = {
        "machine": machine,
        "model": name,
        "data": short_name(str(data)),
        "settings": {
            "chunk_length_s": chunk_length,
            "max_pronunciations": max_pronunciations,
            "resamples": resamples,
            "seed": seed,
        },
        "figures": [own.to_dict() for own in figures],
    }
    files = [output_dir / "results.json", *([json_file] if json_file is not None else [])]
    for file in files:
        write_json(file, results)
    written = [page, *(output_dir / f"{section.name}.png" for section in sections), *files]
    console.print("Written: " + ", ".join(map(str, written)), markup=False, highlight=False)


def _detection(scored: Scored, figures: Sequence[Figures], caption: str, missing: str) -> Section:
    kinds = [kind for kind in NEGATIVES if kind in {own.negatives for own in figures}]
    table, said = figures_table(figures, caption), Prose(" ".join([*verdict(figures, scored.unit), missing]).strip())
    mistakes = mistakes_table(scored)
    charts: list[Block] = [det_curve(scored, kinds), score_histograms(scored)]
    return Section("detection", "Which phrases it finds", [said, table, *charts, mistakes], [table, mistakes, said])


_LEGEND = Prose(
    "A clip in which the model is sure of its phrase: what it hears, and, where the model offers it, which frames it gives to "
    "which part of the phrase."
)


@torch.no_grad()
def shown_inside(spotter: Any, trial: Any) -> list[Block]:
    """
    The clip of a trial as the model hears it, with its alignment where it has one.

    Args:
        spotter ([`KeywordSpottingPipeline`]):
            The model.
        trial (`Mapping`):
            An item of a [`KwsTrialDataset`].
    """
    model, seconds = spotter.model, len(trial["audio"]) / trial["sampling_rate"]
    inputs = spotter.processor(
        audio=trial["audio"], text=trial["phrase"], sampling_rate=trial["sampling_rate"], return_tensors="pt"
    ).to(model.device)
    features = inputs.pop("input_features").to(model.dtype)
    shown: list[Block] = [spectrogram(f"A clip with “{trial['phrase']}”", features[0].float().cpu(), seconds)]
    mask = inputs.pop("attention_mask")
    audio = model.get_audio_features(features, mask)
    if hasattr(model, "partition") and getattr(model.config, "partitioning", None) != "attention":
        text = model.get_text_features(**inputs)
        path = model.partition(audio, text)[0, 0].cpu()
        similarity = (audio.last_hidden_state[0] @ text.last_hidden_state[0].transpose(0, 1)).float().cpu()
        units = _units(spotter.tokenizer, trial["phrase"])
        if len(units) == int(text.attention_mask[0].sum()) and int(path.max()) >= 0:
            shown.append(
                alignment(f"Frames of “{trial['phrase']}”", similarity[:, : len(units)], path, units, seconds)
            )
    return shown


def _units(tokenizer: Any, phrase: str) -> list[str]:
    """Phonemes of a phrase, or its words where the model takes those."""
    return tokenizer.tokenize(phrase) if hasattr(tokenizer, "pronunciations") else phrase.split()
