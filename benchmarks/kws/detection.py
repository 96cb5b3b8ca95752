"""
How well typed phrases are told from others, in recordings of words that a model never heard.

Every clip of every folder is scored against what was said and against what was not: the other texts of the folder, those of
them that people said and that are two phonemes away or nearer, frequent words and runs of words of a text drawn at random, and
dictionary words one and two phonemes away (those that nobody could hear apart are left out). Recordings with times of their words
(a folder `alignments` beside them) are cut into runs of words, by LibriPhrase's rule. All pairs of a kind are pooled under one threshold. Beside the score stand its two parts, the matcher
alone and the reading of the CTC layer alone, and what the length of a clip tells by itself. Clips go through the pipeline, as
users' do: untrimmed, long ones in windows.

    python -m benchmarks.kws.detection --model slick-small --folders speech/speech_commands speech/wake_words --text_files text/*.txt
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import HfArgumentParser, pipeline

from benchmarks.mtp.reporting import Table, last_part, write
from hf_ext import (
    PhoneticIndex,
    load_utterances,
    phonetic_distance,
    phrases_of_words,
    read_alignment,
    read_audio,
    shipped_model,
)
from hf_ext.metrics import bootstrap_interval, equal_error_rate, roc_auc


@dataclass
class DetectionArguments:
    model: str = field(default="slick-small", metadata={"help": "A shipped model, a folder or a Hub id."})
    folders: list[str] = field(default_factory=list, metadata={"help": "Folders of clips with a metadata.csv."})
    text_files: list[str] = field(default_factory=list, metadata={"help": "Texts whose words are the negatives."})
    max_clips: int = field(default=500, metadata={"help": "Clips drawn of each folder."})
    num_negatives: int = field(default=10, metadata={"help": "Phrases of each kind that a clip is scored against."})
    num_resamples: int = field(default=200, metadata={"help": "Draws for the intervals, of whole clips."})
    seed: int = field(default=0, metadata={"help": "Seed of what is drawn."})
    results_dir: str | None = field(default=None, metadata={"help": "Where the results go."})
    name: str = field(default="detection", metadata={"help": "Name of the results."})


def vocabulary_of(files: list[str], tokenizer: Any) -> list[str]:
    """Words that a text has at least twice and the lexicon knows."""
    text = " ".join(Path(file).read_text("utf-8") for file in files).lower()
    counts = Counter(re.findall(r"[a-z]+(?:'[a-z]+)?", text))
    return [word for word, count in counts.most_common() if count > 1 and len(word) > 1 and tokenizer.in_lexicon(word)]


def negatives_of(
    said: list[str], others: list[str], words: list[str], near: Any, count: int, draw: Random
) -> dict[str, list[str]]:
    """Phrases that were not said, by kind."""
    # "milk" may be heard in "some milk", and what is listed is not all that was said.
    heard = {word for phrase in said for word in phrase.split()}
    apart = [other for other in others if not heard & set(other.split())]
    length = max(len(phrase.split()) for phrase in said)
    random = [" ".join(draw.choices(words, k=max(min(length, 2), draw.choice([1, 1, 2])))) for _ in range(count)]
    found = {"other texts": draw.sample(apart, min(3 * count, len(apart))), "random phrases": random}
    found["texts that sound near"] = [
        other for other in apart if any(sounds_near(other, phrase, near.tokenizer) for phrase in said)
    ]
    if len(said) == 1:
        ring = near.nearest(said[0], 60, max_distance=2.0)
        for distance, name in ((1.0, "one phoneme away"), (2.0, "two phonemes away")):
            at = [neighbour.phrase for neighbour in ring if neighbour.distance == distance]
            found[name] = draw.sample(at, min(count, len(at)))
    return found


def sounds_near(phrase: str, other: str, tokenizer: Any) -> bool:
    """Whether two phonemes at most tell two phrases apart that share some."""
    spoken, spoken_other = tokenizer.tokenize(phrase), tokenizer.tokenize(other)
    distance = phonetic_distance(spoken, spoken_other, weighted=False)
    return distance <= 2 and distance < max(len(spoken), len(spoken_other))


def scores_of(spotter: Any, clips: list[torch.Tensor], phrases: list[list[str]]) -> list[np.ndarray]:
    """For each clip and each of its phrases the matcher's score, that of the reading, and the model's own."""
    config = spotter.model.config
    apart = {"matcher_score_floor": None, "matcher_max_surplus": None, "score_bias": 0.0}
    matcher = {**apart, "matcher_score_weight": 1.0, "ctc_score_weight": 0.0}
    reading = {**apart, "matcher_score_weight": 0.0, "ctc_score_weight": 1.0}
    own = {name: getattr(config, name) for name in matcher}
    found = []
    for clip, asked in zip(tqdm(clips, desc="Scoring"), phrases, strict=True):
        columns = []
        for weights in (matcher, reading, own):
            config.update(weights)
            answers = spotter(
                clip.numpy(),
                sampling_rate=16000,
                candidate_labels=list(dict.fromkeys(asked)),
                function_to_apply="none",
            )
            by_label = {answer["label"]: answer["score"] for answer in answers}
            columns.append([by_label[phrase] for phrase in asked])
        found.append(np.array(columns).T)
    return found


def of_length(clips: list[torch.Tensor], phrases: list[list[str]], tokenizer: Any) -> list[np.ndarray]:
    """How near the length of a clip is to what its phrase would take, by a line through the phrases that were said."""
    seconds = np.array([len(clip) / 16000 for clip in clips])
    sizes = [np.array([len(tokenizer.tokenize(phrase)) for phrase in asked]) for asked in phrases]
    line = np.polyfit([size[0] for size in sizes], seconds, 1) if len({size[0] for size in sizes}) > 1 else [0, 1]
    return [-np.abs(length - np.polyval(line, size)) for length, size in zip(seconds, sizes, strict=True)]


def clips_of(folder: str) -> list[dict[str, Any]]:
    """Clips with the list of what is said in them: runs of words, their text, or phrases that are heard among other words."""
    if (times := Path(folder) / "alignments").is_dir():
        files = [path for path in sorted(times.glob("*.json")) if not path.name.endswith(".phone.json")]
        runs = [phrases_of_words(read_alignment(path), str(Path(folder) / f"{path.stem}.ogg")) for path in files]
        return [{**row, "said": [row["text"]]} for run in runs for row in run]
    rows = [{**row, "said": [row["text"]]} for row in load_utterances(folder)]
    if rows:
        return rows
    with (Path(folder) / "metadata.csv").open(newline="", encoding="utf-8") as file:
        listed = [row for row in csv.DictReader(file) if row.get("phrases")]
    return [{"audio": str(Path(folder) / row["file_name"]), "said": row["phrases"].split("|")} for row in listed]


def measured(folder: str, spotter: Any, words: list[str], near: Any, args: DetectionArguments) -> list[Any]:
    draw = Random(args.seed)
    rows = clips_of(folder)
    rows = draw.sample(rows, min(args.max_clips, len(rows)))
    others = sorted({phrase for row in rows for phrase in row["said"]})
    asked, kinds = [], []
    for row in rows:
        negatives = negatives_of(row["said"], others, words, near, args.num_negatives, draw)
        asked.append([*row["said"], *(phrase for found in negatives.values() for phrase in found)])
        kinds.append([*[""] * len(row["said"]), *(kind for kind, found in negatives.items() for _ in found)])
    clips = [read_audio(row) for row in rows]
    scores = scores_of(spotter, clips, asked)
    lengths = of_length(clips, asked, spotter.processor.tokenizer)
    flat, length = np.concatenate(scores), np.concatenate(lengths)
    kind = np.array([name for row in kinds for name in row])
    clip = np.concatenate([np.full(len(row), i) for i, row in enumerate(kinds)])
    found = []
    for name in dict.fromkeys(kind[kind != ""]):
        # Clips without such a negative have no part in the figure.
        chosen = ((kind == "") | (kind == name)) & np.isin(clip, clip[kind == name])
        labels = (kind[chosen] == "").astype(int)
        own = flat[chosen, 2]
        low, high = bootstrap_interval(
            roc_auc, own, labels, groups=clip[chosen].tolist(), num_resamples=args.num_resamples
        )
        found.append(
            {
                "folder": Path(folder).name,
                "negatives": name,
                "clips": len(rows),
                "pairs": int(chosen.sum()),
                "auc": 100 * roc_auc(own, labels),
                "interval": [100 * low, 100 * high],
                "eer": 100 * equal_error_rate(own, labels),
                "matcher_auc": 100 * roc_auc(flat[chosen, 0], labels),
                "reading_auc": 100 * roc_auc(flat[chosen, 1], labels),
                "length_auc": 100 * roc_auc(length[chosen], labels),
            }
        )
    return found


def main(args: DetectionArguments) -> None:
    place = args.model if Path(args.model).exists() or "/" in args.model else shipped_model(args.model)
    torch.set_num_threads(1)
    spotter = pipeline("keyword-spotting", model=place, device="cpu")
    model, tokenizer = spotter.model, spotter.processor.tokenizer
    words = vocabulary_of(args.text_files, tokenizer)
    near = PhoneticIndex(words, tokenizer, weighted=False)
    found = [row for folder in args.folders for row in measured(folder, spotter, words, near, args)]
    columns = ["folder", "negatives", "clips", "pairs", "AUC %", "95 %", "EER %", "matcher", "reading", "length"]
    cells = [
        [
            row["folder"],
            row["negatives"],
            f"{row['clips']:,}",
            f"{row['pairs']:,}",
            row["auc"],
            f"{row['interval'][0]:.1f} to {row['interval'][1]:.1f}",
            *(row[name] for name in ("eer", "matcher_auc", "reading_auc", "length_auc")),
        ]
        for row in found
    ]
    note = "The last three columns are the AUC of the matcher alone, of the CTC layer's reading alone, and of the clip's length."
    table = Table(f"Clips of words never trained on, {last_part(str(place))}", columns, cells, note)
    data = {"model": last_part(str(place)), "parameters": model.num_parameters(), "rows": found}
    write(args.name, "Typed phrases in recordings", [table], data, model, args.results_dir)


if __name__ == "__main__":
    main(*HfArgumentParser(DetectionArguments).parse_args_into_dataclasses())
