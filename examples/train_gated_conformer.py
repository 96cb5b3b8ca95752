"""
Trains a keyword detector whose modules are left out where nobody speaks (https://huggingface.co/papers/2309.00140).

It needs clips of one word each, an `audiofolder` (clips and a `metadata.csv` with `file_name` and `text`) such as Speech
Commands (https://huggingface.co/datasets/google/speech_commands), and recordings of background noise. Words are mixed into
noise at known places; other windows are of noise alone:

    python examples/train_gated_conformer.py --data path/to/speech_commands --noise path/to/noise --output_dir out/gated

First every module runs, then the gates are asked, and a loss on the share of modules that run closes those that the task
can spare. At the end it prints how accurate the model is with and without its gates, how much of the gated work it skips
where a word is and where none is, and the time that a window takes.

The schedule is a guess at one for LibriSpeech or Speech Commands and a GPU, since the paper's is not known; `--small` is a
setting for two CPU cores and some hundred clips. It is an ordinary training script: `accelerate launch` spreads it over
processes, every training argument can be given, and called again with `--resume_from_checkpoint true` (or the path of a
checkpoint) it goes on where it stopped.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import soundfile
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_ext import (
    GatedConformerConfig,
    GatedConformerForKeywordDetection,
    KwsAugmenter,
    KwsFeatureExtractor,
    KwsWindowDataCollator,
    KwsWindowDataset,
    load_utterances,
)
from hf_ext.metrics import interval_iou, share_of_macs_skipped


RATE = 16000
# What `--small` changes; what is given on the command line goes before it.
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "per_device_train_batch_size": 32,
    "max_steps": 3_000,
    "ungated_steps": 700,
    "gate_ramp_steps": 200,
    "gate_loss_weight": 0.7,
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "logging_steps": 50,
    "save_steps": 250,
}


@dataclass
class RecipeArguments:
    data: list[str] = field(metadata={"help": "Folders of clips of one word each."})
    noise: str = field(metadata={"help": "Folder of recordings of background noise, at 16 kHz."})
    held_out_by: Literal["speaker", "clip"] = field(
        default="speaker", metadata={"help": "Evaluate on a tenth of the speakers, or of the clips."}
    )
    num_eval_windows: int = field(default=2_000, metadata={"help": "Windows that are evaluated."})
    num_timed_windows: int = field(default=200, metadata={"help": "Windows whose time is taken, one at a time."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the encoder."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Its conformer blocks."})
    intermediate_size: int = field(default=384, metadata={"help": "Width of its feed-forward layers."})
    num_mel_bins: int = field(default=40, metadata={"help": "Channels of the features."})
    augment: bool = field(default=True, metadata={"help": "Change words in training: speed, room, line, gain."})
    small: bool = field(default=False, metadata={"help": "A small model and a short training, for two CPU cores."})


@dataclass
class GatedTrainingArguments(TrainingArguments):
    output_dir: str = field(default="out/gated-conformer")
    gate_loss_weight: float = field(default=0.1, metadata={"help": "Weight of the share of modules that run."})
    ungated_steps: int = field(default=50_000, metadata={"help": "First steps, in which every module runs."})
    gate_ramp_steps: int = field(
        default=10_000, metadata={"help": "Steps in which the gates' loss grows to its weight."}
    )
    per_device_train_batch_size: int = field(default=256)
    per_device_eval_batch_size: int = field(default=64)
    max_steps: int = field(default=200_000)
    learning_rate: float = field(default=1e-3)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=10_000)
    logging_steps: float = field(default=100)
    save_steps: float = field(default=5_000)
    save_total_limit: int | None = field(default=2)
    remove_unused_columns: bool = field(default=False)
    report_to: str = field(default="none")


class GatedTrainer(Trainer):
    """First every module runs; then the gates are asked, and their loss grows to its weight."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        gated_steps = self.state.global_step - self.args.ungated_steps
        outputs = model(**inputs, gated=gated_steps >= 0)
        loss = outputs.loss
        if gated_steps >= 0:
            missing = 1 - min(1.0, gated_steps / max(self.args.gate_ramp_steps, 1))
            loss = loss - missing * self.args.gate_loss_weight * outputs.gate_loss
        return (loss, outputs) if return_outputs else loss


def split_clips(rows: list[dict], held_out_by: str, seed: int) -> tuple[list[dict], list[dict]]:
    """Nine tenths of the speakers or clips, and the others."""
    key = "speaker" if held_out_by == "speaker" else "audio"
    names = sorted({row[key] for row in rows})
    held_out = set(Random(seed).sample(names, max(1, len(names) // 10)))
    return [row for row in rows if row[key] not in held_out], [row for row in rows if row[key] in held_out]


def load_noises(folder: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The first four fifths of each recording, and the rest."""
    first, rest = [], []
    for path in sorted(path for path in Path(folder).iterdir() if path.suffix in (".wav", ".flac", ".ogg")):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        if rate != RATE:
            raise ValueError(f"{path} is at {rate} Hz: resample it to {RATE}.")
        noise = torch.from_numpy(samples.mean(1))
        cut = len(noise) * 4 // 5
        first.append(noise[:cut])
        rest.append(noise[cut:])
    return first, rest


def normalising_extractor(windows: KwsWindowDataset, num_mel_bins: int) -> KwsFeatureExtractor:
    """Features of mean 0 and spread 1 in each channel, of windows of 30 ms every 10 ms."""
    plain = KwsFeatureExtractor(feature_size=num_mel_bins, win_length=480)
    audio = [windows[i]["audio"] for i in range(min(300, len(windows)))]
    frames = plain(audio, sampling_rate=RATE, return_tensors="pt")["input_features"].flatten(0, 1)
    return KwsFeatureExtractor(
        feature_size=num_mel_bins,
        win_length=480,
        mean=frames.mean(0).tolist(),
        std=frames.std(0).clamp(min=0.1).tolist(),
    )


@dataclass
class Decisions:
    """What a model made of windows, one after the other."""

    right: np.ndarray
    iou: np.ndarray
    gates: np.ndarray


@torch.no_grad()
def decide(model, windows: list[dict], collator, batch_size: int, **options) -> Decisions:
    """Which windows the model is right about, how well it places their words, and which modules ran for them."""
    decisions = Decisions(*([] for _ in range(3)))
    for start in range(0, len(windows), batch_size):
        batch = collator(windows[start : start + batch_size])
        output = model(**{name: values.to(model.device) for name, values in batch.items()}, **options)
        found = output.detection_logits[:, 0] > 0
        label = output.logits.argmax(-1).where(found, -100).cpu()
        decisions.right.append(label == batch["labels"])
        decisions.iou.append(overlap(output.locations[:, 0].cpu(), batch["location_targets"]))
        decisions.gates.append(output.gates[:, 0].cpu())
    return Decisions(*(torch.cat(values).numpy() for values in vars(decisions).values()))


def overlap(places: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Intersection over union of intervals that are given by centre and length; not a number where there is none."""
    ious = torch.full((len(places),), torch.nan)
    for row in targets[:, 1].nonzero()[:, 0].tolist():
        ends = ((o - max(w, 0.01) / 2, o + max(w, 0.01) / 2) for o, w in (places[row].tolist(), targets[row].tolist()))
        ious[row] = interval_iou(*ends)
    return ious


def figures(model, decisions: Decisions, windows: list[dict]) -> dict[str, float]:
    """How often the model is right, and how much of its work it skips, by what a window holds."""
    kinds, macs = np.array([window["kind"] for window in windows]), model.count_macs()
    result = {"accuracy": decisions.right.mean()}
    for kind in sorted(set(kinds)):
        chosen = kinds == kind
        result[f"accuracy, {kind}"] = decisions.right[chosen].mean()
        result[f"skipped, {kind}"] = share_of_macs_skipped(decisions.gates[chosen], macs.modules)
        result[f"skipped of all, {kind}"] = share_of_macs_skipped(decisions.gates[chosen], *macs)
    if "keyword" in kinds:
        result["IoU of words"] = np.nanmean(decisions.iou)
    return {name: round(float(value), 4) for name, value in result.items()}


@torch.no_grad()
def milliseconds(contenders: dict, windows: list[dict], collator) -> dict[str, dict[str, float]]:
    """Median time of one window of each kind; contenders, by name a model and what its calls are given, take turns."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    for number, window in enumerate([windows[0], *windows]):
        features = collator([window])["input_features"]
        for name, (model, options) in contenders.items():
            on_device = features.to(model.device)
            start = time.perf_counter()
            model(on_device, **options).logits.cpu()
            if number:  # the first warms up
                times[name].setdefault(window["kind"], []).append(1e3 * (time.perf_counter() - start))
    return {
        name: {kind: round(float(np.median(values)), 3) for kind, values in sorted(by_kind.items())}
        for name, by_kind in times.items()
    }


def report(model, windows: list[dict], collator, batch_size: int, num_timed: int) -> None:
    model.eval()
    contenders = {"ungated": (model, {"gated": False}), "gated": (model, {"gated": True})}
    print(f"parameters: {model.num_parameters():,}")
    for name, (_, options) in contenders.items():
        print(f"{name}: {figures(model, decide(model, windows, collator, batch_size, **options), windows)}")
    print(f"milliseconds of a window: {milliseconds(contenders, windows[:num_timed], collator)}")


def held_out_windows(
    data: list[str], noise: str, label2id: dict[str, int], held_out_by: str, num_windows: int, seed: int
) -> KwsWindowDataset:
    """Windows of clips and of pieces of noise that training never saw."""
    _, rows = split_clips([row for folder in data for row in load_utterances(folder)], held_out_by, seed)
    Random(seed).shuffle(rows)
    return KwsWindowDataset(rows, load_noises(noise)[1], label2id, num_windows=num_windows, seed=seed + 1)


def main(recipe: RecipeArguments, args: GatedTrainingArguments):
    rows = [row for folder in recipe.data for row in load_utterances(folder)]
    words = sorted({row["text"] for row in rows})
    label2id = {word: i for i, word in enumerate(words)}
    train_rows, eval_rows = split_clips(rows, recipe.held_out_by, args.seed)
    print(f"{len(words)} words; {len(train_rows):,} clips to train on, {len(eval_rows):,} to evaluate on")

    Random(args.seed).shuffle(train_rows)
    train_windows = KwsWindowDataset(
        train_rows,
        load_noises(recipe.noise)[0],
        label2id,
        # A step never sees a window again.
        num_windows=args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        augmenter=KwsAugmenter(max_margin=0.0, noise_probability=0.0) if recipe.augment else None,
        seed=args.seed,
    )
    extractor = normalising_extractor(train_windows, recipe.num_mel_bins)
    collator = KwsWindowDataCollator(extractor)
    model = GatedConformerForKeywordDetection(
        GatedConformerConfig(
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.num_hidden_layers,
            intermediate_size=recipe.intermediate_size,
            num_mel_bins=recipe.num_mel_bins,
            gate_loss_weight=args.gate_loss_weight,
            id2label=dict(enumerate(words)),
            label2id=label2id,
        )
    )
    trainer = GatedTrainer(
        model=model, args=args, train_dataset=train_windows, data_collator=collator, processing_class=extractor
    )
    checkpoint = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if checkpoint in ("true", "True") else checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        held_out = (recipe.held_out_by, recipe.num_eval_windows, args.seed)
        windows = list(held_out_windows(recipe.data, recipe.noise, label2id, *held_out))
        report(model, windows, collator, args.per_device_eval_batch_size, recipe.num_timed_windows)


def read_arguments(words: list[str]) -> tuple[RecipeArguments, GatedTrainingArguments]:
    if "--small" in words:
        # The last of two values counts.
        words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))] + words
    return HfArgumentParser((RecipeArguments, GatedTrainingArguments)).parse_args_into_dataclasses(words)


if __name__ == "__main__":
    main(*read_arguments(sys.argv[1:]))
