"""
Trains a keyword detector whose modules are left out where nobody speaks (https://huggingface.co/papers/2309.00140).

It needs clips of one word each, an `audiofolder` (clips and a `metadata.csv` with `file_name` and `text`) such as Speech
Commands (https://huggingface.co/datasets/google/speech_commands), and recordings of background noise. Words are mixed into
noise at known places; other windows are of noise alone:

    python examples/train_gated_conformer.py --data path/to/speech_commands --noise path/to/noise --output_dir out/gated

Where recordings are few, clips of the same words that `synthesize_phrases(words, folder, clips_per_phrase=30)` spoke can be
trained on too (`--more_data folder`); all figures are of recordings of people.

First every module runs, then the gates are asked, and a loss on the share of modules that run closes those that the task
can spare. Windows without a word can count more in that loss (`--gate_noise_factor`), since training has far fewer of them
than a day has. It hardly moves a gate that is all but open, as those of the first modules soon are for all windows; the
cross-entropy of the gates of noise alone against shut ones (`--shut_loss_weight`) does. Windows with a word at their edge are
speech: gates that had to shut for them would have to know a word's place, and shut for some that are in the middle. At the
end it prints how accurate the model is with and without its gates, how much of the gated work it skips where a word is and
where none is, and the time that a window takes.

The schedule is a guess at one for LibriSpeech or Speech Commands and a GPU, since the paper's is not known. `--small` is a
setting for two CPU cores and some hundred clips, in two calls of some ten minutes. The first trains without gates; the second
goes on from it with gates and stays near to its answers:

    python examples/train_gated_conformer.py --small --data speech_commands --noise noise --output_dir out/ungated
    python examples/train_gated_conformer.py --small --data speech_commands --noise noise --model out/ungated --output_dir out/gated

It is an ordinary training script: `accelerate launch` spreads it over
processes, every training argument can be given, and called again with `--resume_from_checkpoint true` (or the path of a
checkpoint) it goes on where it stopped.
"""

import sys
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import torch
from accelerate import PartialState
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoFeatureExtractor, HfArgumentParser, Trainer, TrainingArguments

from hf_ext import (
    GatedConformerConfig,
    GatedConformerForKeywordDetection,
    KwsAugmenter,
    KwsFeatureExtractor,
    KwsWindowDataCollator,
    KwsWindowDataset,
    decide_windows,
    hold_out,
    load_noises,
    load_utterances,
    spec_augment,
    time_windows,
)


RATE = 16000
# What `--small` changes, in both calls and in each; what is given on the command line goes before it.
SMALL = {
    "hidden_size": 64,
    # The first module runs for all windows, to look; of five blocks that is a twentieth of the work.
    "num_hidden_layers": 5,
    "intermediate_size": 128,
    "augment": False,
    "hide_stripes": False,
    "kept_windows": 16_000,
    "per_device_train_batch_size": 64,
    "gate_ramp_steps": 0,
    "gate_loss_weight": 0.6,
    "shut_loss_weight": 10.0,
    "gate_cost": "macs",
    "gate_noise_factor": 0.0,
    "gate_open_probability": 0.85,
    "warmup_steps": 50,
    "logging_steps": 50,
    "save_steps": 250,
}
SMALL_WITHOUT_GATES = {"max_steps": 2_400, "ungated_steps": 2_400, "learning_rate": 3e-3}
SMALL_WITH_GATES = {"max_steps": 1_500, "ungated_steps": 0, "learning_rate": 1.5e-3}


@dataclass
class RecipeArguments:
    data: list[str] = field(metadata={"help": "Folders of clips of one word each."})
    noise: str = field(metadata={"help": "Folder of recordings of background noise, at 16 kHz."})
    more_data: list[str] = field(
        default_factory=list, metadata={"help": "Folders of clips that are only trained on, such as synthesised ones."}
    )
    held_out_by: Literal["speaker", "audio"] = field(
        default="speaker", metadata={"help": "Evaluate on a tenth of the speakers, or of the clips."}
    )
    num_eval_windows: int = field(default=2_000, metadata={"help": "Windows that are evaluated."})
    num_timed_windows: int = field(default=200, metadata={"help": "Windows whose time is taken, one at a time."})
    model: str | None = field(
        default=None,
        metadata={"help": "A model trained without gates, to go on from and to stay near to; its sizes are taken."},
    )
    hidden_size: int = field(default=96, metadata={"help": "Width of the encoder."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Its conformer blocks."})
    intermediate_size: int = field(default=384, metadata={"help": "Width of its feed-forward layers."})
    num_mel_bins: int = field(default=40, metadata={"help": "Channels of the features."})
    augment: bool = field(default=True, metadata={"help": "Change words in training: speed, room, line, gain."})
    kept_windows: int = field(
        default=0,
        metadata={"help": "Windows that are kept with their features, to be seen again; 0 never repeats one."},
    )
    gate_cost: Literal["equal", "macs"] = field(
        default="equal", metadata={"help": "Whether all modules count alike in the gates' loss, or by their work."}
    )
    gate_noise_factor: float = field(
        default=1.0, metadata={"help": "How many times as much windows without a word count in the gates' loss."}
    )
    gate_open_probability: float = field(default=0.95, metadata={"help": "Of every gate before training."})
    small: bool = field(
        default=False,
        metadata={"help": "A small model and a short training, for two CPU cores; without gates, or from `--model`."},
    )


@dataclass
class GatedTrainingArguments(TrainingArguments):
    output_dir: str = field(default="out/gated-conformer")
    hide_stripes: bool = field(default=True, metadata={"help": "Hide stripes of the features, as SpecAugment does."})
    gate_loss_weight: float = field(default=0.1, metadata={"help": "Weight of the share of modules that run."})
    shut_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy that shuts gates for windows of noise alone."}
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "Weight of staying near the answers of `--model`, where one is given."}
    )
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


def shut_loss(outputs, is_noise: torch.Tensor, macs: tuple[int, ...]) -> torch.Tensor:
    """Cross-entropy against shut gates of windows of noise alone, by the modules' work; a mean over all windows."""
    probabilities = outputs.gate_probabilities[:, 0].float()
    entropy = -torch.log1p(-probabilities.clamp(max=1 - 1e-6))
    shares = entropy.new_tensor(macs) / sum(macs)
    return (entropy @ shares).where(is_noise, 0.0).mean()


def distance_of_answers(outputs, said, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against a teacher's answers: whether there is a keyword, and of windows with one which it is."""
    found = F.binary_cross_entropy_with_logits(
        outputs.detection_logits[:, 0], said.detection_logits[:, 0].sigmoid(), reduction="none"
    )
    named = F.cross_entropy(outputs.class_logits[:, 0], said.class_logits[:, 0].softmax(-1), reduction="none")
    return (found + named.where(labels >= 0, 0.0)).mean()


class GatedTrainer(Trainer):
    """First every module runs; then the gates are asked, and their loss grows to its weight."""

    def __init__(self, *args, teacher=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if model.training and self.args.hide_stripes:
            # Here and not with the batches: a training that goes on where it stopped hides the same stripes.
            inputs["input_features"] = spec_augment(inputs["input_features"])
        gated_steps = self.state.global_step - self.args.ungated_steps
        is_noise = inputs.pop("is_noise")
        outputs = model(**inputs, gated=gated_steps >= 0)
        loss = outputs.loss
        if gated_steps >= 0:
            reached = min(1.0, gated_steps / max(self.args.gate_ramp_steps, 1))
            loss = loss - (1 - reached) * self.args.gate_loss_weight * outputs.gate_loss
            macs = self.accelerator.unwrap_model(model).count_macs().modules
            loss = loss + reached * self.args.shut_loss_weight * shut_loss(outputs, is_noise, macs)
        if self.teacher is not None and model.training:
            said = self.teacher(inputs["input_features"], inputs["attention_mask"], gated=False)
            loss = loss + self.args.distillation_weight * distance_of_answers(outputs, said, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class NoiseCollator(KwsWindowDataCollator):
    """Says beside what the model takes which windows are of noise alone."""

    def __call__(self, windows) -> dict[str, torch.Tensor]:
        return {**super().__call__(windows), "is_noise": torch.tensor([w["kind"] == "noise" for w in windows])}


class KeptWindows(Dataset):
    """Windows with their features, which are computed once: most of the time of a small model's step goes there."""

    def __init__(self, windows: KwsWindowDataset, collator: NoiseCollator):
        self.windows, self.collator, self.kept = windows, collator, {}

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index not in self.kept:
            self.kept[index] = self.collator([self.windows[index]])
        return self.kept[index]


def joined(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of windows that are kept."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def normalising_extractor(windows: KwsWindowDataset, num_mel_bins: int) -> KwsFeatureExtractor:
    """Features of mean 0 and spread 1 in each channel, of windows of 30 ms every 10 ms."""
    plain = KwsFeatureExtractor(feature_size=num_mel_bins, win_length=480)
    return plain.normalized((windows[i]["audio"] for i in range(min(300, len(windows)))), sampling_rate=RATE)


def report(model, windows: list[dict], collator, batch_size: int, num_timed: int) -> None:
    model.eval()
    contenders = {"ungated": (model, {"gated": False}), "gated": (model, {"gated": True})}
    print(f"parameters: {model.num_parameters():,}")
    for name, (_, options) in contenders.items():
        decisions = decide_windows(model, windows, collator, batch_size, **options)
        print(f"{name}: {decisions.figures(*model.count_macs())}")
    print(f"milliseconds of a window: {time_windows(contenders, windows[:num_timed], collator)}")


def main(recipe: RecipeArguments, args: GatedTrainingArguments):
    rows, more = (
        [row for folder in folders for row in load_utterances(folder)] for folders in (recipe.data, recipe.more_data)
    )
    words = sorted({row["text"] for row in rows + more})
    label2id = {word: i for i, word in enumerate(words)}
    train_rows, eval_rows = hold_out(rows, recipe.held_out_by, seed=args.seed)
    train_rows += more
    print(f"{len(words)} words; {len(train_rows):,} clips to train on, {len(eval_rows):,} to evaluate on")

    for some in (train_rows, eval_rows):
        Random(args.seed).shuffle(some)
    train_noises, eval_noises = load_noises(recipe.noise)
    train_windows = KwsWindowDataset(
        train_rows,
        train_noises,
        label2id,
        num_windows=recipe.kept_windows
        or args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        augmenter=KwsAugmenter(max_margin=0.0, noise_probability=0.0) if recipe.augment else None,
        seed=args.seed,
    )
    gate_settings = {
        "gate_loss_weight": args.gate_loss_weight,
        "gate_cost": recipe.gate_cost,
        "gate_noise_factor": recipe.gate_noise_factor,
        "gate_open_probability": recipe.gate_open_probability,
    }
    teacher = None
    if recipe.model is None:
        extractor = normalising_extractor(train_windows, recipe.num_mel_bins)
        model = GatedConformerForKeywordDetection(
            GatedConformerConfig(
                hidden_size=recipe.hidden_size,
                num_hidden_layers=recipe.num_hidden_layers,
                intermediate_size=recipe.intermediate_size,
                num_mel_bins=recipe.num_mel_bins,
                id2label=dict(enumerate(words)),
                label2id=label2id,
                **gate_settings,
            )
        )
    else:
        extractor = AutoFeatureExtractor.from_pretrained(recipe.model)
        teacher = GatedConformerForKeywordDetection.from_pretrained(recipe.model)
        if teacher.config.label2id != label2id:
            raise ValueError(f"`--model` ({recipe.model}) knows other words than the data: {teacher.config.label2id}.")
        model = GatedConformerForKeywordDetection(
            GatedConformerConfig(**{**teacher.config.to_dict(), **gate_settings})
        )
        # Gates that were never asked have learned nothing.
        learned = {name: weight for name, weight in teacher.state_dict().items() if ".gates." not in name}
        model.load_state_dict(learned, strict=False)
    collator = NoiseCollator(extractor)
    trainer = GatedTrainer(
        model=model,
        args=args,
        train_dataset=KeptWindows(train_windows, collator) if recipe.kept_windows else train_windows,
        data_collator=joined if recipe.kept_windows else collator,
        teacher=teacher,
        processing_class=extractor,
    )
    checkpoint = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if checkpoint in ("true", "True") else checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        held_out = KwsWindowDataset(
            eval_rows, eval_noises, label2id, num_windows=recipe.num_eval_windows, seed=args.seed + 1
        )
        report(
            model,
            list(held_out),
            KwsWindowDataCollator(extractor),
            args.per_device_eval_batch_size,
            recipe.num_timed_windows,
        )


def read_arguments(words: list[str]) -> tuple[RecipeArguments, GatedTrainingArguments]:
    if "--small" in words:
        setting = SMALL | (SMALL_WITH_GATES if "--model" in words else SMALL_WITHOUT_GATES)
        # The last of two values counts.
        words = [word for name, value in setting.items() for word in (f"--{name}", str(value))] + words
    return HfArgumentParser((RecipeArguments, GatedTrainingArguments)).parse_args_into_dataclasses(words)


if __name__ == "__main__":
    main(*read_arguments(sys.argv[1:]))
    # A process that ends before the others may be aborted in its connections to them.
    PartialState().destroy_process_group()
