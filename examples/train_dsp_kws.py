"""
Trains a keyword spotter by dynamic sequence partitioning (https://huggingface.co/papers/2306.05245) on clips with their text.

A folder of clips is an `audiofolder`: clips and a `metadata.csv` with `file_name` and `text`, as `hf_ext.synthesize_phrases`
writes it. Phrases of the evaluation are none of the training. For phrases of LibriSpeech (https://www.openslr.org/12, cut by
`hf_ext.build_libriphrase`), with words through a frozen DistilBERT as in the paper:

    python examples/train_dsp_kws.py --data path/to/libriphrase --units words --output_dir out/dsp-words

With phonemes as units any phrase is known, and made-up confusable phrases are among the negatives:

    python examples/train_dsp_kws.py --data path/to/clips --units phonemes --output_dir out/dsp-phonemes

`--small` is a setting for two CPU cores. `--partitioning equal` and `--partitioning attention` are there to compare with. Sizes
are those of the paper; its schedule is not known, and the defaults are a guess at one for LibriPhrase and a GPU.

It is an ordinary training script: `accelerate launch` spreads it over processes, every training argument can be given, and
called again with `--resume_from_checkpoint true` (or the path of a checkpoint) it goes on where it stopped. Clips should begin and end with the speech: every
frame belongs to a word or phoneme, silence too.
"""

import sys
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from accelerate import PartialState
from transformers import AutoModelForCTC, AutoTokenizer, HfArgumentParser

from hf_ext import (
    DspForKeywordSpotting,
    DspKwsConfig,
    KwsAugmenter,
    KwsFeatureExtractor,
    KwsPairDataset,
    KwsProcessor,
    KwsTrainer,
    KwsTrainingConfig,
    hold_out,
    load_utterances,
    read_audio,
)


# A word tokenizer takes no phonemes, which made-up confusables are written in.
SHARES = {
    "phonemes": {"positive": 0.5, "random": 0.2, "hard": 0.15, "confusable": 0.15},
    "words": {"positive": 0.5, "random": 0.25, "hard": 0.25},
}
# What `--small` changes; what is given on the command line goes before it.
SMALL = {
    "hidden_size": 72,
    "num_hidden_layers": 4,
    "intermediate_size": 144,
    "projection_size": 64,
    "num_mel_bins": 40,
    "per_device_train_batch_size": 32,
    "max_steps": 2_000,
    "ctc_steps": 500,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "logging_steps": 50,
    "eval_steps": 500,
    "save_steps": 500,
}


@dataclass
class RecipeArguments:
    data: list[str] = field(metadata={"help": "Folders of clips to train on."})
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Folders to evaluate on; by default clips of a tenth of the phrases."}
    )
    max_eval_clips: int = field(
        default=500, metadata={"help": "Clips that are evaluated, each with every kind of phrase."}
    )
    units: Literal["words", "phonemes"] = field(default="words", metadata={"help": "What phrases are made of."})
    text_model: str = field(
        default="distilbert/distilbert-base-uncased",
        metadata={"help": "Text encoder for words, a folder or a Hub id."},
    )
    encoder: str | None = field(
        default=None, metadata={"help": "A trained KwsConformerForCTC of the same dimensions to start from."}
    )
    partitioning: str = field(default="dynamic", metadata={"help": "dynamic, dynamic_mean, equal or attention."})
    hidden_size: int = field(default=144, metadata={"help": "Width of the audio encoder."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Its conformer blocks."})
    intermediate_size: int = field(default=576, metadata={"help": "Width of its feed-forward layers."})
    projection_size: int = field(default=128, metadata={"help": "Width of the space that is compared in."})
    num_mel_bins: int = field(default=80, metadata={"help": "Channels of the features."})
    augment: bool = field(default=True, metadata={"help": "Change clips in training: speed, room, noise, line, gain."})
    max_margin: float = field(default=0.0, metadata={"help": "Most seconds of silence that are put around clips."})
    small: bool = field(default=False, metadata={"help": "A small model and a short training, for two CPU cores."})


@dataclass
class DspTrainingArguments(KwsTrainingConfig):
    output_dir: str = field(default="out/dsp-kws")
    # Every clip is compared with the phrases of its whole batch: the larger, the better.
    per_device_train_batch_size: int = field(default=256)
    per_device_eval_batch_size: int = field(default=64)
    max_steps: int = field(default=100_000)
    # The encoder learns to recognise speech first.
    ctc_steps: int = field(default=20_000)
    lr_scheduler_type: str = field(default="inverse_sqrt")
    warmup_steps: float = field(default=5_000)
    logging_steps: float = field(default=100)
    eval_strategy: str = field(default="steps")
    eval_steps: float = field(default=5_000)
    save_steps: float = field(default=5_000)
    save_total_limit: int | None = field(default=2)
    report_to: str = field(default="none")


def normalising_extractor(rows: list[dict], num_mel_bins: int, num_clips: int = 200) -> KwsFeatureExtractor:
    """Features of mean 0 and spread 1 in each channel."""
    chosen = Random(0).sample(rows, min(num_clips, len(rows)))
    plain = KwsFeatureExtractor(feature_size=num_mel_bins)
    return plain.normalized((read_audio(row) for row in chosen), sampling_rate=16000)


def make_model(recipe: RecipeArguments) -> DspForKeywordSpotting:
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "projection_size", "num_mel_bins")
    settings = {name: getattr(recipe, name) for name in (*sizes, "partitioning")}
    if recipe.units == "words":
        model = DspForKeywordSpotting.from_text_pretrained(recipe.text_model, **settings)
    else:
        model = DspForKeywordSpotting(DspKwsConfig(**settings))
    if recipe.encoder is not None:
        recogniser = AutoModelForCTC.from_pretrained(recipe.encoder)
        model.encoder.load_state_dict(recogniser.encoder.state_dict())
        model.ctc_head.load_state_dict(recogniser.ctc_head.state_dict())
    return model


def load_clips(folders: list[str], units: str) -> list[dict]:
    rows = [row for folder in folders for row in load_utterances(folder)]
    # Pseudo-words, written in phonemes between braces, are no words.
    return [row for row in rows if units == "phonemes" or "{" not in row["text"]]


def main(recipe: RecipeArguments, args: DspTrainingArguments):
    rows = load_clips(recipe.data, recipe.units)
    if recipe.eval_data is None:
        rows, eval_rows = hold_out(rows, by="text", at_least=2, seed=args.seed)
    else:
        eval_rows = load_clips(recipe.eval_data, recipe.units)
    eval_rows = Random(args.seed).sample(eval_rows, min(recipe.max_eval_clips, len(eval_rows)))
    print(f"{len(rows):,} clips to train on, {len(eval_rows):,} to evaluate on")

    tokenizer = AutoTokenizer.from_pretrained(recipe.text_model) if recipe.units == "words" else None
    shares = SHARES[recipe.units]
    trainer = KwsTrainer(
        model=make_model(recipe),
        args=args,
        train_dataset=KwsPairDataset(
            rows,
            shares=shares,
            augmenter=KwsAugmenter(max_margin=recipe.max_margin) if recipe.augment else None,
            seed=args.seed,
        ),
        eval_dataset=KwsPairDataset(eval_rows, shares=shares, every_kind=True, seed=args.seed),
        processing_class=KwsProcessor(normalising_extractor(rows, recipe.num_mel_bins), tokenizer),
    )
    checkpoint = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if checkpoint in ("true", "True") else checkpoint)
    trainer.save_model()
    print({name: round(value, 4) for name, value in trainer.evaluate().items() if name.endswith(("auc", "eer"))})


def read_arguments(words: list[str]) -> tuple[RecipeArguments, DspTrainingArguments]:
    if "--small" in words:
        # The last of two values counts.
        words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))] + words
    return HfArgumentParser((RecipeArguments, DspTrainingArguments)).parse_args_into_dataclasses(words)


if __name__ == "__main__":
    main(*read_arguments(sys.argv[1:]))
    # A process that ends before the others may be aborted in its connections to them.
    PartialState().destroy_process_group()
