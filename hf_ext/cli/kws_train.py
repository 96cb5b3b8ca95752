"""`hf-ext kws train`: a text-defined keyword spotting model from recordings, from a list of words, or from both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoProcessor, TrainerCallback

from hf_ext import (
    AutoModelForKeywordSpotting,
    KwsAugmenter,
    KwsDataCollator,
    KwsFeatureExtractor,
    KwsPairDataset,
    KwsProcessor,
    PhonemeTokenizer,
    load_utterances,
    read_audio,
    synthesize_phrases,
)
from hf_ext.cli.kws_scores import check_clips, clips_with_text, left_out, longest_phrase
from hf_ext.cli.loading import UNLOADABLE, check_checkpoint, chosen_device, refusal, suitable_threads
from hf_ext.cli.options import DeviceOption, ThreadsOption
from hf_ext.cli.report import Table, rich_table
from hf_ext.kws.modeling_auto import MODEL_FOR_KEYWORD_SPOTTING_MAPPING


# So many clips give the mean and the spread of each channel well enough.
_CLIPS_FOR_STATISTICS = 200
_CLIPS_FOR_TABLE = 5_000
# A model that takes words takes no confusable phrases, which are made up of phonemes.
_SHARES_OF_WORDS = {"positive": 0.5, "random": 0.25, "hard": 0.25}
# Below so many phrases, none can be spared for evaluation.
_LEAST_PHRASES = 10


def train(
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A folder with clips and a metadata.csv (file_name, text); may be repeated."),
    ] = None,
    words: Annotated[
        str | None,
        typer.Option(help="Words or phrases to synthesise, with commas between: 'hey computer, lights on'."),
    ] = None,
    words_file: Annotated[
        Path | None,
        typer.Option("--words-file", "--words_file", exists=True, dir_okay=False, help="The same, one a line."),
    ] = None,
    clips_per_word: Annotated[
        int,
        typer.Option(
            "--clips-per-word", "--clips_per_word", min=1, help="Synthesised clips of each, by several voices."
        ),
    ] = 8,
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output-dir", "--output_dir", file_okay=False, help="Where the model goes; synthesised clips go inside."
        ),
    ] = Path("kws"),
    model_type: Annotated[
        str, typer.Option("--model-type", "--model_type", help="slick, ced_kws or dsp_kws.")
    ] = "slick",
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a model to go on from instead.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the model's configuration, as in hidden_size=96; may be repeated."),
    ] = None,
    eval_data: Annotated[
        Path | None,
        typer.Option("--eval-data", "--eval_data", help="A folder to evaluate on; by default clips kept apart."),
    ] = None,
    eval_clips: Annotated[
        int, typer.Option("--eval-clips", "--eval_clips", min=0, help="Clips kept apart, of phrases not trained on.")
    ] = 200,
    noise: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A folder with recordings of background noise.")
    ] = None,
    augment: Annotated[
        bool, typer.Option(help="Change clips in training: speed, silence around, room, noise, line, gain.")
    ] = True,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2000,
    ctc_steps: Annotated[
        int | None,
        typer.Option(
            "--ctc-steps",
            "--ctc_steps",
            min=0,
            help="First steps, for phonemes alone; by default a quarter, for ced_kws a half.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch_size", min=2, help="Pairs per step and device.")
    ] = 32,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--learning_rate", min=0.0, help="Peak learning rate.")
    ] = 1e-3,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load clips.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of data order, pairs and initial values.")] = 42,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Repository to push the model to.")] = None,
) -> None:
    """
    Train a model that finds any typed phrase, from clips with their text, and save it with processor and card.

    Words of a list are spoken by the synthesisers that are installed (espeak-ng, flite, ...). The more different words there
    are, the better for phrases that it never heard. One process on one device; for more, `KwsTrainer` in a script of your own
    under `accelerate launch`.
    """
    from hf_ext import KwsTrainer, KwsTrainingConfig

    console = Console()
    torch.manual_seed(seed)
    if resume:
        check_checkpoint(output_dir)
    try:
        # What takes a moment is looked at before words are spoken, which takes long.
        on_cpu = chosen_device(device) == "cpu"
        if push_to_hub is not None:
            validate_repo_id(push_to_hub)
        spotter, processor = _model(model, model_type, setting or [])
        has_table = hasattr(spotter, "build_phoneme_table")
        if ctc_steps is None:
            ctc_steps = steps // (2 if has_table else 4)
        if has_table and model is None and not 0 < ctc_steps < steps:
            raise ValueError(
                f"--ctc-steps {ctc_steps} of --steps {steps}: a {model_type} model first learns phonemes, then makes its table of "
                "them, and learns phrases in the steps that are left; both need some."
            )
        augmenter = KwsAugmenter(_noises(noise)) if augment else None
        given = clips_with_text(eval_data) if eval_data else None
        rows = _utterances(data or [], words, words_file, clips_per_word, output_dir, seed)
        kept, held_out, apart = _split_off(rows, eval_clips, seed) if given is None else (rows, given, "")
        check_clips([*kept, *held_out])
        processor = processor or KwsProcessor(_normalising_extractor(kept, spotter.config.num_mel_bins))
        vocabulary = sorted({row["text"] for row in kept})
        drawn: dict[str, Any] = {
            "tokenizer": processor.tokenizer,
            "max_phonemes": longest_phrase(spotter),
            "seed": seed,
        }
        if processor.takes_words:
            drawn |= {"tokenizer": None, "shares": _SHARES_OF_WORDS}
        pairs = KwsPairDataset(kept, augmenter=augmenter, **drawn)
        eval_pairs = None
        if held_out:
            eval_pairs = KwsPairDataset(held_out, every_kind=True, vocabulary=vocabulary, **drawn)
        args = KwsTrainingConfig(
            output_dir=str(output_dir),
            max_steps=steps,
            ctc_steps=ctc_steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            learning_rate=learning_rate,
            hide_stripes=augment,
            dataloader_num_workers=workers,
            seed=seed,
            bf16=not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            use_cpu=on_cpu,
            logging_steps=min(20, steps),
            save_total_limit=2,
            hub_model_id=push_to_hub,
            report_to="none",
        )
        trainer = KwsTrainer(
            model=spotter,
            args=args,
            train_dataset=pairs,
            eval_dataset=eval_pairs,
            processing_class=processor,
            callbacks=[_TableOfPhonemes(kept, processor)] if has_table else None,
        )
    except UNLOADABLE as error:
        raise typer.BadParameter(str(error)) from error
    console.print(
        f"{len(pairs):,} clips of {len(vocabulary):,} phrases, {spotter.num_parameters():,} parameters{apart}",
        markup=False,
        highlight=False,
    )
    if missing := left_out(pairs, eval_pairs):
        console.print(missing, markup=False, highlight=False)
    with suitable_threads(spotter, threads or torch.get_num_threads()):
        trainer.train(resume_from_checkpoint=resume or None)
        if not all(weight.isfinite().all() for weight in spotter.parameters()):
            console.print(f"Training diverged: take a --learning-rate below {learning_rate:g}.", style="red")
            raise typer.Exit(1)
        if eval_pairs is not None:
            console.print(rich_table(_training_table(trainer.evaluate(), f"{len(eval_pairs.rows):,} clips")))
    # The card says what the evaluation found.
    trainer.save_model()
    measured_on = eval_data or (data[0] if data else output_dir / "synthesised")
    console.print(
        f"The model is in {output_dir}. Measure it: hf-ext kws eval --model {output_dir} --data {measured_on}",
        markup=False,
        highlight=False,
    )
    if push_to_hub is not None:
        _push(trainer, push_to_hub, console)


def _push(trainer: Any, repository: str, console: Console) -> None:
    try:
        console.print(f"Pushed to {trainer.push_to_hub()}", markup=False)
    except Exception as error:
        # Whatever went wrong there, the training is done and the model is saved.
        console.print(f"can't push the model to {repository}: {error}", style="red", markup=False)
        raise typer.Exit(1) from error


class _TableOfPhonemes(TrainerCallback):
    """Makes the table of a model that has one, once phonemes are learned; from then on its encoder stays as it is."""

    def __init__(self, rows: Sequence[Any], processor: KwsProcessor) -> None:
        self.clips = KwsPairDataset(rows, processor.tokenizer, shares={"positive": 1.0})
        self.processor = processor

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Resumed behind it.
        if 0 < args.ctc_steps <= state.global_step:
            kwargs["model"].freeze_encoder()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != args.ctc_steps:
            return
        tokenizer = self.processor.tokenizer
        symbols = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        batches = DataLoader(
            self.clips, args.per_device_eval_batch_size, shuffle=True, collate_fn=KwsDataCollator(self.processor)
        )
        build = kwargs["model"].build_phoneme_table
        try:
            build(batches, symbols, _CLIPS_FOR_TABLE)
        except ValueError:
            # None of the clips is recognised without an error yet.
            build(batches, symbols, _CLIPS_FOR_TABLE, only_exact=False)


def _utterances(
    folders: Sequence[Path],
    words: str | None,
    words_file: Path | None,
    clips_per_word: int,
    output_dir: Path,
    seed: int,
) -> list[dict[str, Any]]:
    rows = [row for folder in folders for row in clips_with_text(folder)]
    listed = (words or "").split(",") + (words_file.read_text("utf-8").splitlines() if words_file else [])
    phrases = list(dict.fromkeys(word.strip() for word in listed if word.strip()))
    if phrases:
        # Speaking takes long, and says anything.
        tokenizer = PhonemeTokenizer()
        for phrase in phrases:
            tokenizer.tokenize(phrase)
        folder = synthesize_phrases(phrases, output_dir / "synthesised", clips_per_word, seed=seed)
        # The folder may have clips of an earlier list.
        rows += [row for row in load_utterances(folder) if row["text"] in set(phrases)]
    if not rows:
        raise ValueError(
            "there is nothing to train on: name folders of clips with --data, or words to synthesise with --words or "
            "--words-file."
        )
    return rows


def _split_off(rows: list[dict[str, Any]], count: int, seed: int) -> tuple[list[Any], list[Any], str]:
    """About `count` rows apart, at most a third, of phrases that the others don't have; and a word on which they are."""
    draw = Random(seed)
    texts = sorted({row["text"] for row in rows})
    draw.shuffle(texts)
    count = min(count, len(rows) // 3)
    if count == 0:
        return rows, [], ""
    if len(texts) < _LEAST_PHRASES:
        shuffled = draw.sample(rows, len(rows))
        return shuffled[count:], shuffled[:count], f"; {count:,} other clips of the same phrases are kept apart"
    chosen: set[str] = set()
    sizes = {text: 0 for text in texts}
    for row in rows:
        sizes[row["text"]] += 1
    for text in texts[: len(texts) // 3]:
        if sum(sizes[own] for own in chosen) >= count:
            break
        chosen.add(text)
    held_out = [row for row in rows if row["text"] in chosen]
    kept = [row for row in rows if row["text"] not in chosen]
    return kept, held_out, f"; {len(held_out):,} clips of {len(chosen):,} other phrases are kept apart"


def _model(name: str | None, model_type: str, settings: Sequence[str]) -> tuple[Any, KwsProcessor | None]:
    """The model to train, and its processor if it has one already."""
    if name is not None:
        if settings:
            raise ValueError(f"--set {settings[0]} is for a new model, and --model {name} has its configuration.")
        try:
            return AutoModelForKeywordSpotting.from_pretrained(name), AutoProcessor.from_pretrained(name)
        except UNLOADABLE as error:
            raise refusal(f"a keyword spotting model from {name!r}", error) from error
    types = [config.model_type for config in MODEL_FOR_KEYWORD_SPOTTING_MAPPING]
    if model_type not in types:
        raise ValueError(f"--model-type {model_type}: there are {', '.join(types)}.")
    fields = dict(_setting(setting) for setting in settings)
    config = AutoConfig.for_model(model_type)
    unknown = sorted(set(fields) - set(config.to_dict()))
    if unknown:
        raise ValueError(f"--set {unknown[0]}: a {model_type} model has no such field of its configuration.")
    config = AutoConfig.for_model(model_type, **fields)
    return AutoModelForKeywordSpotting.from_config(config), None


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text} must name a field and its value, as in hidden_size=96.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _normalising_extractor(rows: Sequence[Any], channels: int) -> KwsFeatureExtractor:
    """Features with the mean 0 and the spread 1 over some of the clips, channel by channel."""
    step = max(1, len(rows) // _CLIPS_FOR_STATISTICS)
    plain = KwsFeatureExtractor(feature_size=channels)
    return plain.normalized((read_audio(row) for row in rows[::step]), sampling_rate=16000)


def _noises(folder: Path | None) -> list[torch.Tensor] | None:
    if folder is None:
        return None
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".wav", ".flac", ".ogg", ".mp3"))
    if not files:
        raise ValueError(f"--noise {folder} has no audio files (wav, flac, ogg, mp3).")
    return [read_audio({"audio": str(path)}) for path in files]


def _training_table(figures: dict[str, Any], caption: str) -> Table:
    """The trainer's own figures, a kind of negative a row."""
    groups = [name.removeprefix("eval_").removesuffix("auc") for name in figures if name.endswith("auc")]
    rows = [
        [group.removesuffix("_") or "all", f"{figures[f'eval_{group}auc']:.1%}", f"{figures[f'eval_{group}eer']:.1%}"]
        for group in groups
    ]
    return Table(["negatives", "AUC", "EER"], rows, caption)
