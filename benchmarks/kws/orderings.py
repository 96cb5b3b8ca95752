"""
What the papers' parts are worth: each left out, on the same clips, for the same number of steps.

SLiCK with the losses of phonemes and of prefixes and without them; CED with made-up confusable phrases among its negatives and
without; DSP against equal cuts and against attention. All models have an encoder of the same small size, see half of the
phrases of a folder of synthesised clips, and are measured on clips of the other half and on recordings, whose words are none
of the training. It takes about an hour and a half for each seed on one core, and goes on where it stopped:

    python -m benchmarks.kws.orderings --clips out/slick/clips --recordings speech/speech_commands --seeds 0 1 2
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, set_seed

from benchmarks.mtp.reporting import RESULTS, Table, write
from hf_ext import (
    CedConfig,
    CedForKeywordSpotting,
    DspForKeywordSpotting,
    DspKwsConfig,
    KwsDataCollator,
    KwsFeatureExtractor,
    KwsPairDataset,
    KwsProcessor,
    KwsTrainer,
    KwsTrainingConfig,
    SlickConfig,
    SlickForKeywordSpotting,
    load_utterances,
    read_audio,
)


SIZES = {"num_mel_bins": 40, "hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 96, "hidden_dropout": 0.0}
WITH_CONFUSABLES = {"positive": 0.5, "random": 0.2, "hard": 0.15, "confusable": 0.15}
WITHOUT = {"positive": 0.5, "random": 0.35, "hard": 0.15}
# Name, model, fields of its configuration, and the pairs that it is trained on.
VARIANTS: list[tuple[str, str, dict[str, Any], dict[str, float]]] = [
    ("SLiCK", "slick", {}, WITH_CONFUSABLES),
    ("SLiCK without prefixes", "slick", {"prefix_loss_weight": 0.0}, WITH_CONFUSABLES),
    ("SLiCK without phonemes", "slick", {"ctc_loss_weight": 0.0}, WITH_CONFUSABLES),
    ("SLiCK, utterance loss alone", "slick", {"prefix_loss_weight": 0.0, "ctc_loss_weight": 0.0}, WITH_CONFUSABLES),
    ("CED", "ced", {}, WITH_CONFUSABLES),
    ("CED without confusables", "ced", {}, WITHOUT),
    ("DSP", "dsp", {}, WITHOUT),
    ("DSP, equal cuts", "dsp", {"partitioning": "equal"}, WITHOUT),
    ("DSP, attention", "dsp", {"partitioning": "attention"}, WITHOUT),
]
KINDS = ("random", "hard", "confusable")


@dataclass
class OrderingsArguments:
    clips: str = field(metadata={"help": "A folder of synthesised clips, as `synthesize_phrases` writes it."})
    recordings: list[str] = field(default_factory=list, metadata={"help": "Folders of recordings to measure on too."})
    steps: int = field(default=3_000, metadata={"help": "Steps of each variant, of 64 pairs."})
    num_phrases: int = field(default=4_000, metadata={"help": "Phrases trained on, all of their clips."})
    eval_clips: int = field(
        default=300, metadata={"help": "Clips of other phrases, and of each folder of recordings."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest rate."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of everything drawn."})
    only: list[str] | None = field(default=None, metadata={"help": "Variants to train in this call."})
    results_dir: str | None = field(default=None, metadata={"help": "Where the results go."})


class Trainings:
    """The clips, in memory, and the training of one variant on them."""

    def __init__(self, args: OrderingsArguments) -> None:
        self.args = args
        rows = load_utterances(args.clips)
        texts = sorted({row["text"] for row in rows})
        Random(0).shuffle(texts)
        known, others = set(texts[: args.num_phrases]), set(texts[args.num_phrases : 2 * args.num_phrases])
        self.rows = _loaded([row for row in rows if row["text"] in known])
        held_out = Random(0).sample([row for row in rows if row["text"] in others], args.eval_clips)
        self.tests = {"synthesised": _loaded(held_out)}
        for folder in args.recordings:
            recorded = load_utterances(folder)
            chosen = Random(0).sample(recorded, min(args.eval_clips, len(recorded)))
            self.tests[Path(folder).name] = _loaded(chosen)
        extractor = KwsFeatureExtractor(feature_size=SIZES["num_mel_bins"])
        extractor = extractor.normalized((row["audio"]["array"] for row in self.rows[:300]), sampling_rate=16000)
        self.processor = KwsProcessor(extractor)

    def run(self, kind: str, fields: dict[str, Any], shares: dict[str, float], seed: int) -> dict[str, float]:
        set_seed(seed)
        model = _new_model(kind, fields)
        if kind == "ced":
            # The encoder and the table of phonemes first, in half of the steps.
            said = KwsPairDataset(self.rows, shares={"positive": 1.0}, seed=seed)
            self._train(model, said, seed, self.args.steps // 2, utterance_loss_weight=0.0)
            batches = DataLoader(said, batch_size=64, collate_fn=KwsDataCollator(self.processor))
            tokenizer = self.processor.tokenizer
            symbols = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
            model.build_phoneme_table(batches, symbols=symbols, max_clips=2_000, only_exact=False)
            steps, weights = self.args.steps - self.args.steps // 2, {"ctc_loss_weight": 0.0}
        else:
            steps, weights = self.args.steps, {}
        pairs = KwsPairDataset(self.rows, shares=shares, seed=seed)
        trainer = self._train(model, pairs, seed, steps, **weights)
        figures = {}
        for name, rows in self.tests.items():
            tested = KwsPairDataset(rows, shares=WITH_CONFUSABLES, every_kind=True, seed=0)
            found = trainer.evaluate(tested)
            figures |= {f"{name}, {kind}": 100 * found[f"eval_{kind}_auc"] for kind in KINDS}
        return figures

    def _train(self, model: Any, pairs: Any, seed: int, steps: int, **weights: float) -> KwsTrainer:
        with TemporaryDirectory() as folder:
            settings = KwsTrainingConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=64,
                learning_rate=self.args.learning_rate,
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                logging_steps=100,
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                seed=seed,
                **weights,
            )
            trainer = KwsTrainer(model=model, args=settings, train_dataset=pairs, processing_class=self.processor)
            trainer.train()
        return trainer


def _new_model(kind: str, fields: dict[str, Any]) -> Any:
    if kind == "slick":
        return SlickForKeywordSpotting(SlickConfig(**SIZES, **fields))
    if kind == "ced":
        return CedForKeywordSpotting(CedConfig(**SIZES, verifier_size=64, **fields))
    return DspForKeywordSpotting(DspKwsConfig(**SIZES, projection_size=48, **fields))


def _loaded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"audio": {"array": read_audio(row).numpy(), "sampling_rate": 16000}, "text": row["text"]}
        | {"duration_s": row.get("duration_s")}
        for row in rows
    ]


def tables(results: dict[str, dict[str, dict[str, float]]]) -> list[Table]:
    """For each kind of test a column, with the mean over seeds and, of several, half the range."""
    columns = list(dict.fromkeys(name for runs in results.values() for run in runs.values() for name in run))
    rows = []
    for variant, *_ in VARIANTS:
        runs = list(results.get(variant, {}).values())
        if runs:
            cells = []
            for column in columns:
                values = [run[column] for run in runs]
                spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.1f}{spread}")
            rows.append([variant, len(runs), *cells])
    note = "AUC in %, all pairs of a kind pooled; behind the mean, half of the range over the seeds."
    return [Table("Clips of phrases that no model was trained on", ["variant", "seeds", *columns], rows, note)]


def main(args: OrderingsArguments) -> None:
    torch.set_num_threads(1)
    folder = Path(args.results_dir or RESULTS / "kws")
    path = folder / "orderings.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    trainings, model = Trainings(args), _new_model("slick", {})
    for seed in args.seeds:
        for name, kind, fields, shares in VARIANTS:
            if str(seed) in results.get(name, {}) or (args.only and name not in args.only):
                continue
            results.setdefault(name, {})[str(seed)] = trainings.run(kind, fields, shares, seed)
            write("orderings", "What the parts are worth", tables(results), {"results": results}, model, str(folder))


if __name__ == "__main__":
    main(*HfArgumentParser(OrderingsArguments).parse_args_into_dataclasses())
