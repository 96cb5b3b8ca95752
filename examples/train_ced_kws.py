"""
Trains a common embedding based detector (https://huggingface.co/papers/2308.06472) on clips with their text, in three stages.

A folder of clips is an `audiofolder`: clips and a `metadata.csv` with `file_name` and `text`, as `hf_ext.synthesize_phrases`
writes it. The paper's are the utterances of LibriSpeech (https://www.openslr.org/12) and phrases cut out of them
(`hf_ext.build_libriphrase`):

    python examples/train_ced_kws.py --sentences path/to/librispeech --data path/to/libriphrase --output_dir out/ced

1. The encoder learns to recognise phonemes: of `--sentences` if there are any (`out/ced/sentences`), then of the phrases
   (`out/ced/encoder`). The arguments of training, `--max_steps`, `--learning_rate` and so on, are those of this stage.
2. A vector for each phoneme is made of the states of the encoder (`out/ced/table`).
3. The encoder stays as it is, and a verifier learns which phrases were said and which sound nearly so (`out/ced/verifier`). What
   its training has of its own begins with `--verifier_`. Phrases of the evaluation are none of the training.

A stage that is finished, which its `stage.json` says, is skipped when the script is called again, and one that was interrupted
goes on from its last checkpoint. Delete the folder of a stage, and those of the stages behind it, to have it done anew.
`accelerate launch` spreads the training over processes. `--small` is a setting for two CPU cores.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCTC, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from hf_ext import (
    CedConfig,
    CedForKeywordSpotting,
    KwsAugmenter,
    KwsDataCollator,
    KwsFeatureExtractor,
    KwsPairDataset,
    KwsProcessor,
    KwsTrainer,
    KwsTrainingConfig,
    hold_out,
    load_utterances,
    read_audio,
)


# The paper's three groups of pairs, and what its made-up phrases differ in.
SHARES = {"positive": 1 / 3, "random": 1 / 3, "confusable": 1 / 3}
CONFUSABLE_KINDS = ("substitute", "insert")
# What `--small` changes; what is given on the command line goes before it.
SMALL = {
    "hidden_size": 72,
    "num_hidden_layers": 4,
    "intermediate_size": 144,
    "num_mel_bins": 40,
    "verifier_size": 96,
    "per_device_train_batch_size": 32,
    "max_steps": 2_000,
    "warmup_steps": 200,
    "logging_steps": 50,
    "eval_steps": 500,
    "save_steps": 500,
    # So little training leaves few clips without an error.
    "only_exact": False,
    "verifier_batch_size": 64,
    "verifier_steps": 1_000,
    "verifier_warmup_steps": 100,
}


@dataclass
class RecipeArguments:
    data: list[str] = field(metadata={"help": "Folders of clips of phrases to train on."})
    sentences: list[str] = field(
        default_factory=list, metadata={"help": "Folders of clips of sentences that the encoder is trained on first."}
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Folders to evaluate on; by default clips of a tenth of the phrases."}
    )
    max_eval_clips: int = field(
        default=500, metadata={"help": "Clips that are evaluated, each with every kind of phrase."}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "A trained KwsConformerForCTC of the same dimensions to start from."}
    )
    hidden_size: int = field(default=144, metadata={"help": "Width of the encoder."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Its conformer blocks."})
    intermediate_size: int = field(default=576, metadata={"help": "Width of its feed-forward layers."})
    num_mel_bins: int = field(default=80, metadata={"help": "Channels of the features."})
    verifier_size: int = field(default=192, metadata={"help": "Width of the verifier."})
    table_clips: int = field(default=50_000, metadata={"help": "Most clips that the vectors of phonemes are made of."})
    only_exact: bool = field(
        default=True, metadata={"help": "Make them of clips that are recognised without an error alone."}
    )
    # The paper's batch: 32 keywords, each with 11 clips of it, 11 of others, and the first 11 with made-up phrases.
    verifier_batch_size: int = field(default=1_056, metadata={"help": "Pairs on each device in a step."})
    verifier_steps: int = field(default=40_000, metadata={"help": "Steps; the paper doesn't say."})
    verifier_warmup_steps: int = field(default=2_500, metadata={"help": "Steps of warm-up; the paper doesn't say."})
    verifier_learning_rate: float = field(default=1e-3, metadata={"help": "Highest rate; the paper doesn't say."})
    augment: bool = field(default=True, metadata={"help": "Change clips in training: speed, room, noise, line, gain."})
    max_margin: float = field(default=0.0, metadata={"help": "Most seconds of silence that are put around clips."})
    small: bool = field(default=False, metadata={"help": "A small model and a short training, for two CPU cores."})


@dataclass
class CedTrainingArguments(KwsTrainingConfig):
    output_dir: str = field(default="out/ced-kws")
    # Of the encoder the paper gives the epochs, the schedule and its warm-up.
    num_train_epochs: float = field(default=150)
    lr_scheduler_type: str = field(default="inverse_sqrt")
    warmup_steps: float = field(default=5_000)
    per_device_train_batch_size: int = field(default=64)
    per_device_eval_batch_size: int = field(default=64)
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


def new_model(recipe: RecipeArguments) -> CedForKeywordSpotting:
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_mel_bins", "verifier_size")
    model = CedForKeywordSpotting(CedConfig(**{name: getattr(recipe, name) for name in sizes}))
    if recipe.encoder is not None:
        recogniser = AutoModelForCTC.from_pretrained(recipe.encoder)
        model.encoder.load_state_dict(recogniser.encoder.state_dict())
        model.ctc_head.load_state_dict(recogniser.ctc_head.state_dict())
    return model


def is_finished(folder: Path) -> bool:
    return (folder / "stage.json").exists()


def finish(folder: Path, figures: dict[str, Any]) -> None:
    (folder / "stage.json").write_text(json.dumps(figures, indent=2))
    print(f"{folder}: {figures}")


def train_stage(
    folder: Path, model: CedForKeywordSpotting, args: CedTrainingArguments, **trainer_arguments: Any
) -> None:
    trainer = KwsTrainer(model=model, args=replace(args, output_dir=str(folder)), **trainer_arguments)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    figures = {name: round(value, 4) for name, value in trainer.evaluate().items() if "_per_" not in name}
    trainer.save_model()
    if trainer.is_world_process_zero():
        finish(folder, figures)
    trainer.accelerator.wait_for_everyone()


def build_table(
    folder: Path,
    model: CedForKeywordSpotting,
    args: CedTrainingArguments,
    recipe: RecipeArguments,
    clips: KwsPairDataset,
    processor: KwsProcessor,
) -> None:
    batches = DataLoader(
        clips,
        batch_size=args.per_device_eval_batch_size,
        shuffle=True,
        collate_fn=KwsDataCollator(processor),
        num_workers=args.dataloader_num_workers,
    )
    tokenizer = processor.tokenizer
    heard = model.to(args.device).build_phoneme_table(
        tqdm(batches, desc="table of phonemes"),
        symbols=tokenizer.convert_ids_to_tokens(range(len(tokenizer))),
        max_clips=recipe.table_clips,
        only_exact=recipe.only_exact,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    symbols = tokenizer.convert_ids_to_tokens(heard.nonzero().flatten().tolist())
    finish(folder, dict(zip(symbols, heard[heard > 0].tolist(), strict=True)))


def main(recipe: RecipeArguments, args: CedTrainingArguments):
    folder = Path(args.output_dir)
    rows = [row for place in recipe.data for row in load_utterances(place)]
    sentences = [row for place in recipe.sentences for row in load_utterances(place)]
    if recipe.eval_data is None:
        rows, eval_rows = hold_out(rows, by="text", at_least=2, seed=args.seed)
    else:
        eval_rows = [row for place in recipe.eval_data for row in load_utterances(place)]
    eval_rows = Random(args.seed).sample(eval_rows, min(recipe.max_eval_clips, len(eval_rows)))
    print(f"{len(rows):,} clips and {len(sentences):,} sentences to train on, {len(eval_rows):,} clips to evaluate on")

    processor = KwsProcessor(normalising_extractor(rows, recipe.num_mel_bins))
    augmenter = KwsAugmenter(max_margin=recipe.max_margin) if recipe.augment else None
    # Where phonemes are recognised the phrase is what was said.
    said = {"shares": {"positive": 1.0}, "seed": args.seed}

    model = new_model(recipe)
    for name, clips in (("sentences", sentences), ("encoder", rows)):
        if clips and not is_finished(folder / name):
            train_stage(
                folder / name,
                model,
                replace(args, utterance_loss_weight=0.0),
                train_dataset=KwsPairDataset(clips, augmenter=augmenter, max_phonemes=1_000, **said),
                eval_dataset=KwsPairDataset(eval_rows, **said),
                processing_class=processor,
            )
        if clips:
            model = CedForKeywordSpotting.from_pretrained(folder / name)

    with args.main_process_first(desc="table of phonemes"):
        if not is_finished(folder / "table"):
            build_table(folder / "table", model, args, recipe, KwsPairDataset(rows, **said), processor)

    if not is_finished(folder / "verifier"):
        train_stage(
            folder / "verifier",
            CedForKeywordSpotting.from_pretrained(folder / "table"),
            replace(
                args,
                ctc_loss_weight=0.0,
                per_device_train_batch_size=recipe.verifier_batch_size,
                max_steps=recipe.verifier_steps,
                warmup_steps=recipe.verifier_warmup_steps,
                learning_rate=recipe.verifier_learning_rate,
            ),
            train_dataset=KwsPairDataset(
                rows, shares=SHARES, confusable_kinds=CONFUSABLE_KINDS, augmenter=augmenter, seed=args.seed
            ),
            eval_dataset=KwsPairDataset(eval_rows, every_kind=True, seed=args.seed),
            processing_class=processor,
        )


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--small" in arguments:
        # The last of two values counts.
        arguments = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))] + arguments
    main(*HfArgumentParser((RecipeArguments, CedTrainingArguments)).parse_args_into_dataclasses(arguments))
    # A process that ends before the others may be aborted in its connections to them.
    PartialState().destroy_process_group()
