"""
Trains SLiCK on synthesised speech: words and phrases of a text, and words that don't exist, spoken by many voices.

First the encoder learns phonemes of clean clips (`encoder` in the output folder), then all of the model the three tasks of the
paper on clips in rooms, noise and silence. Changed clips from the start would take several times as many steps.

The synthesisers are Debian's: `apt-get install -y espeak-ng flite mbrola libttspico-utils rhvoice rhvoice-english mbrola-us1
mbrola-us2 mbrola-us3 mbrola-en1`, some of them in its non-free part. The shipped model heard English with the accents of further
voices too: `mbrola-{af1,de1,de2,de3,de4,de5,de6,fr1,fr4,gr2,hu1,nl2,pl1,ro1,sw1,sw2}`. `--small` is the paper's size, about three
quarters of an hour on two cores; `--shipped` the model that comes with the package, three times as large, an hour and a half on
two cores that multiply in bfloat16 (one thread, since the other core prepares the batches):

    OMP_NUM_THREADS=1 python examples/train_slick.py --shipped --bf16 true --use_cpu true --output_dir out/slick \
        --text_files text/*.txt --noise noise --eval_folders speech_commands wake_words spoken_digits coffee_orders

Without either the settings are those of the paper's re-implementation (50,000 steps of 1,024 pairs), for a GPU and much more
speech, such as LibriPhrase (`build_libriphrase`):

    python examples/train_slick.py --text_files text/*.txt --noise noise --eval_folders speech_commands wake_words

Words that are said in the evaluation folders are never spoken for training. It is an ordinary training script: `accelerate
launch` spreads it over processes, every training argument can be given, and called again with `--resume_from_checkpoint true` it
goes on where it stopped; clips that are there are not made again.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch
from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from hf_ext import (
    KwsAugmenter,
    KwsFeatureExtractor,
    KwsPairDataset,
    KwsProcessor,
    KwsTrainer,
    KwsTrainingConfig,
    PhonemeTokenizer,
    SlickConfig,
    SlickForKeywordSpotting,
    coloured_noise,
    confusable_phonemes,
    load_noises,
    load_utterances,
    synthesize_phrases,
)


# What two cores train in half an hour.
SMALL = {
    "encoder_steps": 1_200,
    "max_steps": 3_200,
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-3,
    "hidden_dropout": 0.0,
    "hide_stripes": False,
    "dataloader_num_workers": 1,
    # Chosen on recordings: the matcher knows synthesised voices better than people's, and phrases by themselves better than
    # parts of sentences. The last columns of benchmarks/results/kws/detection.md have matcher and reading each alone.
    "matcher_score_floor": -2.5,
    "matcher_max_surplus": 8,
    "ctc_score_weight": 2.0,
    "score_bias": 3.5,
    "cohort_size": 128,
}
# What is shipped: a wider model that hears more for longer, and fits four megabytes in 16 bits.
SHIPPED = {
    **SMALL,
    "seed": 0,
    "hidden_size": 128,
    "intermediate_size": 256,
    "conv_kernel_size": 9,
    "half_weights": True,
    "num_phrases": 20_000,
    "num_pseudo_words": 7_000,
    "encoder_steps": 1_500,
    "max_steps": 10_000,
    "learning_rate": 1.5e-3,
    "warmup_steps": 200,
}
# Words this frequent in every text don't tell a set from another.
_COMMON = frozenset({"a", "the", "of", "and", "to", "in", "it", "is", "bit", "some", "little", "lot", "lots"})


@dataclass
class RecipeArguments:
    text_files: list[str] = field(
        default_factory=list, metadata={"help": "Texts that words and phrases are taken from."}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "A trained model to go on from, in place of a new one and its encoder's stage."},
    )
    speech_folders: list[str] = field(
        default_factory=list, metadata={"help": "Further folders of clips with a metadata.csv to train on."}
    )
    speech_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of all clips that those folders have in equal parts, by repetition; 0 takes each clip once."
        },
    )
    eval_folders: list[str] = field(
        default_factory=list, metadata={"help": "Folders to evaluate on; their words are not spoken for training."}
    )
    noise: str | None = field(default=None, metadata={"help": "Folder with recordings of background noise."})
    synthesis_dir: str | None = field(
        default=None, metadata={"help": "Where the clips go; by default beside the model."}
    )
    num_words: int = field(default=16_000, metadata={"help": "Most frequent words of the texts."})
    num_phrases: int = field(default=14_000, metadata={"help": "Runs of two to four words of the texts."})
    num_pseudo_words: int = field(default=5_000, metadata={"help": "Words with some phonemes changed."})
    clips_per_phrase: int = field(default=2, metadata={"help": "Voices that speak each."})
    engines: list[str] | None = field(
        default_factory=lambda: ["mbrola", "espeak-ng", "pico", "rhvoice", "flite"],
        metadata={"help": "Synthesisers."},
    )
    encoder_steps: int = field(default=10_000, metadata={"help": "Steps of the encoder alone, on clean clips."})
    num_proc: int = field(default=2, metadata={"help": "Synthesisers that run at a time."})
    hidden_size: int = field(default=72, metadata={"help": "Width of the model."})
    intermediate_size: int = field(default=144, metadata={"help": "Width of its feed-forward layers."})
    conv_kernel_size: int = field(default=3, metadata={"help": "Frames that its convolutions see."})
    hidden_dropout: float = field(default=0.1, metadata={"help": "Dropout of the model."})
    head_type: str = field(default="flatten", metadata={"help": "flatten, as in the paper, or shared."})
    matcher_score_weight: float = field(default=1.0, metadata={"help": "What the matcher counts in the score."})
    matcher_score_floor: float | None = field(
        default=None, metadata={"help": "The least that the matcher's log odds count."}
    )
    matcher_max_surplus: int | None = field(
        default=None, metadata={"help": "Phonemes in a clip beyond the phrase's own, up to which the matcher counts."}
    )
    ctc_score_weight: float = field(default=0.0, metadata={"help": "What the reading of the phrase counts in it."})
    score_bias: float = field(
        default=0.0, metadata={"help": "What is added, so that half of a chance is a fair threshold."}
    )
    cohort_size: int = field(default=0, metadata={"help": "Words that the reading is compared with."})
    half_weights: bool = field(
        default=False, metadata={"help": "Store matrices in 16 bits. The model that is loaded has 32."}
    )
    small: bool = field(default=False, metadata={"help": "The setting for two cores."})
    shipped: bool = field(default=False, metadata={"help": "The setting of the model that comes with the package."})


@dataclass
class SlickTrainingArguments(KwsTrainingConfig):
    output_dir: str = field(default="out/slick")
    max_steps: int = field(default=50_000)
    per_device_train_batch_size: int = field(default=1_024)
    per_device_eval_batch_size: int = field(default=64)
    train_sampling_strategy: str = field(default="group_by_length")
    hide_stripes: bool = field(default=True)
    adam_beta2: float = field(default=0.98)
    max_grad_norm: float = field(default=1.0)
    logging_steps: float = field(default=100)
    save_steps: float = field(default=500)
    save_total_limit: int | None = field(default=1)
    report_to: str = field(default="none")


def words_of(folders: list[str]) -> set[str]:
    """What is said in folders of clips, apart from words that every text has."""
    said = set()
    for folder in folders:
        for row in load_utterances(folder):
            said |= set(f"{row['text']} {row.get('phrases') or ''}".lower().replace("|", " ").split())
    return said - _COMMON


def phrases_to_speak(recipe: RecipeArguments, tokenizer: PhonemeTokenizer, seed: int) -> list[str]:
    """Frequent words, runs of words, and words that don't exist; all of words in the lexicon, and none that is excluded."""
    excluded = words_of(recipe.eval_folders)
    text = " ".join(Path(file).read_text("utf-8") for file in recipe.text_files).lower()
    runs = [re.findall(r"[a-z]+(?:'[a-z]+)?", part) for part in re.split(r"[^a-z' ]+", text)]
    counts = Counter(word for run in runs for word in run)
    known = {word for word in counts if word not in excluded and tokenizer.in_lexicon(word)}
    words = [word for word, _ in counts.most_common() if word in known and len(word) > 1][: recipe.num_words]
    draw = Random(seed)
    windows = [
        " ".join(run[start : start + length])
        for run in runs
        for length in (2, 3, 4)
        for start in range(len(run) - length + 1)
        if known.issuperset(run[start : start + length])
    ]
    phrases = draw.sample(sorted(set(windows)), min(recipe.num_phrases, len(set(windows))))
    pseudo = [
        "{" + " ".join(confusable_phonemes(tokenizer.tokenize(word), draw, ("substitute", "insert", "delete"))) + "}"
        for word in draw.choices(words, k=recipe.num_pseudo_words)
    ]
    return [phrase for phrase in [*words, *phrases, *pseudo] if len(tokenizer.tokenize(phrase)) <= 25]


def repeated(folders: list[list[dict]], spoken: list[dict], share: float) -> list[dict]:
    """Rows of several folders so often that together they are this share beside those that were synthesised."""
    if not share:
        return [row for rows in folders for row in rows]
    wanted = share / (1 - share) * len(spoken) / len(folders)
    return [rows[i % len(rows)] for rows in folders for i in range(max(round(wanted), len(rows)))]


def background(folder: str | None, seed: int) -> list[torch.Tensor]:
    """Recorded noise, and as many recordings again of made-up noise, from white to brown."""
    if folder is None:
        return []
    recorded, _ = load_noises(folder, train_share=1.0)
    exponents = torch.linspace(0, 2, len(recorded))
    return [*recorded, *coloured_noise(160_000, exponents, torch.Generator().manual_seed(seed))]


def statistics(pairs: KwsPairDataset, num_clips: int = 300) -> KwsFeatureExtractor:
    """Features with mean 0 and deviation 1 in each channel, over clips as the model will hear them in training."""
    places = Random(0).sample(range(len(pairs)), min(num_clips, len(pairs)))
    return KwsFeatureExtractor().normalized((pairs[place]["audio"] for place in places), sampling_rate=16000)


def train_encoder(model: SlickForKeywordSpotting, rows: list[dict], processor: KwsProcessor, recipe, args) -> None:
    folder = Path(args.output_dir) / "encoder"
    args = replace(
        args,
        output_dir=str(folder),
        max_steps=recipe.encoder_steps,
        lr_scheduler_type="constant_with_warmup",
        utterance_loss_weight=0.0,
        prefix_loss_weight=0.0,
        hide_stripes=False,
    )
    pairs = KwsPairDataset(rows, processor.tokenizer, shares={"positive": 1.0}, seed=args.seed)
    trainer = KwsTrainer(model=model, args=args, train_dataset=pairs, processing_class=processor)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    trainer.save_model()


def set_score(
    model: SlickForKeywordSpotting, rows: list[dict], tokenizer: PhonemeTokenizer, recipe, seed: int
) -> None:
    """How the trained model's parts count: settings of the model, which change none of its weights."""
    words = sorted({row["text"] for row in rows if row["text"].isalpha()})
    fitting = [word for word in words if 3 <= len(tokenizer.tokenize(word)) <= 6]
    if recipe.cohort_size and fitting:
        chosen = Random(seed).sample(fitting, min(recipe.cohort_size, len(fitting)))
        model.set_cohort(tokenizer(chosen, padding=True, return_tensors="pt")["input_ids"])
    for name in (
        "matcher_score_weight",
        "matcher_score_floor",
        "matcher_max_surplus",
        "ctc_score_weight",
        "score_bias",
    ):
        setattr(model.config, name, getattr(recipe, name))


def save_in_half(model: SlickForKeywordSpotting, folder: str) -> None:
    """The weights of what is there again, half as large: its config keeps the type that they are loaded in."""
    weights = model.state_dict()
    halved = {
        name: weight.half() for name, weight in weights.items() if weight.is_floating_point() and weight.dim() > 1
    }
    model.save_pretrained(folder, state_dict={**weights, **halved})


def main(recipe: RecipeArguments, args: SlickTrainingArguments):
    tokenizer = PhonemeTokenizer()
    rows: list[dict] = []
    folder = recipe.synthesis_dir or str(Path(args.output_dir) / "clips")
    with args.main_process_first(desc="speaking"):
        if recipe.text_files:
            phrases = phrases_to_speak(recipe, tokenizer, args.seed)
            synthesize_phrases(
                phrases, folder, recipe.clips_per_phrase, recipe.engines, seed=args.seed, num_proc=recipe.num_proc
            )
            spoken = set(phrases)
            rows += [row for row in load_utterances(folder) if row["text"] in spoken]
    if recipe.speech_folders:
        rows += repeated([load_utterances(folder) for folder in recipe.speech_folders], rows, recipe.speech_share)
    pairs = KwsPairDataset(
        rows,
        tokenizer,
        # A phrase inside of a longer one is heard in it, and no example of what is not.
        contained_is_negative=False,
        augmenter=KwsAugmenter(
            noises=background(recipe.noise, args.seed),
            max_margin=0.8,
            # Voices of few speakers have to stand for all.
            speed_probability=0.5,
            speeds=(0.85, 1.18),
            equalizer_probability=0.5,
            band_probability=0.25,
        ),
        seed=args.seed,
    )
    torch.manual_seed(args.seed)
    if recipe.model is None:
        processor = KwsProcessor(statistics(pairs), tokenizer)
        dimensions = ("hidden_size", "intermediate_size", "conv_kernel_size", "hidden_dropout", "head_type")
        model = SlickForKeywordSpotting(SlickConfig(**{name: getattr(recipe, name) for name in dimensions}))
    else:
        processor = KwsProcessor.from_pretrained(recipe.model)
        model = SlickForKeywordSpotting.from_pretrained(recipe.model)
    # The two convolutions are most of the work, which a CPU does a fifth faster in this order.
    model.encoder.subsampling.to(memory_format=torch.channels_last)
    if recipe.model is None:
        train_encoder(model, rows, processor, recipe, args)
    trainer = KwsTrainer(model=model, args=args, train_dataset=pairs, processing_class=processor)
    checkpoint = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if checkpoint in ("true", "True") else checkpoint)
    set_score(model, rows, tokenizer, recipe, args.seed)
    trainer.save_model()
    if recipe.half_weights and args.should_save:
        save_in_half(model, args.output_dir)
    for folder in recipe.eval_folders:
        utterances = load_utterances(folder)
        if utterances:
            figures = trainer.evaluate(KwsPairDataset(utterances, tokenizer, every_kind=True, seed=args.seed))
            print(json.dumps({"folder": folder, **{k: v for k, v in figures.items() if k.endswith(("auc", "eer"))}}))


if __name__ == "__main__":
    parser = HfArgumentParser((RecipeArguments, SlickTrainingArguments))
    for flag, setting in (("--small", SMALL), ("--shipped", SHIPPED)):
        if flag in sys.argv:
            parser.set_defaults(**setting)
    main(*parser.parse_args_into_dataclasses())
    # A process that ends before the others may be aborted in its connections to them.
    PartialState().destroy_process_group()
