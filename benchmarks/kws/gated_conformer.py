"""
What the gates of the conformer skip, what that costs in accuracy, and whether the clock follows.

Windows of words and of background that training never saw, as `examples/train_gated_conformer.py` holds them out, are put
to a model trained with gates, at several thresholds, and to one trained alike without (as many steps, from the same model,
`--ungated_steps` as many as `--max_steps`). All contenders take turns within one run, one window at a time on one thread;
times are medians, without the features.

    python -m benchmarks.kws.gated_conformer --model out/gated --baseline out/ungated --data speech_commands --noise noise
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, HfArgumentParser

from benchmarks.mtp.reporting import Table, last_part, write
from hf_ext import (
    KwsWindowDataCollator,
    KwsWindowDataset,
    decide_windows,
    hold_out,
    load_noises,
    load_utterances,
    time_windows,
)
from hf_ext.metrics import bootstrap_interval


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of the model with gates."})
    baseline: str = field(metadata={"help": "The model that was trained without."})
    data: list[str] = field(metadata={"help": "The folders of clips that they were trained on."})
    noise: str = field(metadata={"help": "The folder of noise."})
    held_out_by: str = field(default="speaker", metadata={"help": "As in training: speaker or audio."})
    thresholds: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7], metadata={"help": "Of the gates."})
    num_windows: int = field(default=2_000, metadata={"help": "Windows that are evaluated."})
    num_timed_windows: int = field(default=200, metadata={"help": "Windows whose time is taken."})
    seed: int = field(default=42, metadata={"help": "The seed of the training."})
    note: str = field(default="", metadata={"help": "How the models came about, for the table's note."})
    name: str = field(default="gated_conformer", metadata={"help": "Name of the results."})
    results_dir: str | None = field(default=None, metadata={"help": "Where the results go."})


def aims_missed(found: dict, seconds: dict, base: dict, base_seconds: dict) -> str:
    """What gates are for: the paper's claims, less on speech than it says of noise."""
    aims = {
        "at most 0.5 points less right": found["accuracy"] >= base["accuracy"] - 0.005,
        "at least 30 % of the gated work skipped on words": found["skipped, keyword"] >= 0.3,
        "at least 90 % on noise": found["skipped, noise"] >= 0.9,
        "less time on words": seconds["keyword"] < base_seconds["keyword"],
        "less time on noise": seconds["noise"] < base_seconds["noise"],
    }
    missed = [aim for aim, is_met in aims.items() if not is_met]
    return f"Aims: {', '.join(aims)}. " + (f"Missed: {', '.join(missed)}." if missed else "All are met.")


def main(args: Arguments) -> None:
    torch.set_num_threads(1)
    model, baseline = (
        AutoModelForAudioClassification.from_pretrained(name).eval() for name in (args.model, args.baseline)
    )
    collator = KwsWindowDataCollator(AutoFeatureExtractor.from_pretrained(args.model))
    rows = [row for folder in args.data for row in load_utterances(folder)]
    _, rows = hold_out(rows, args.held_out_by, seed=args.seed)
    Random(args.seed).shuffle(rows)
    _, noises = load_noises(args.noise)
    windows = list(
        KwsWindowDataset(rows, noises, model.config.label2id, num_windows=args.num_windows, seed=args.seed + 1)
    )
    contenders = {
        "trained without gates": (baseline, {"gated": False}),
        "gates not asked": (model, {"gated": False}),
        **{f"threshold {value}": (model, {"gate_threshold": value}) for value in args.thresholds},
    }
    decisions = {
        name: decide_windows(one, windows, collator, **options) for name, (one, options) in contenders.items()
    }
    results = {name: made.figures(*model.count_macs()) for name, made in decisions.items()}
    times = time_windows(contenders, windows[: args.num_timed_windows], collator)
    reference = decisions["trained without gates"].right.astype(int)
    # Windows of one clip are no independent evidence.
    clips = [index % len(rows) for index in range(len(windows))]
    for name, made in decisions.items():
        low, high = bootstrap_interval(
            lambda a, b: a.mean() - b.mean(), made.right.astype(int), reference, groups=clips
        )
        results[name]["accuracy against baseline"] = [float(low), float(high)]

    def row(name: str) -> list:
        found, seconds = results[name], times[name]
        low, high = (100 * value for value in found["accuracy against baseline"])
        shares = ("accuracy", "accuracy, keyword", "accuracy, noise", "skipped, keyword", "skipped, noise")
        shares += ("skipped of all, keyword", "skipped of all, noise")
        return [
            name,
            *(100 * found[share] for share in shares),
            f"{low:+.1f} to {high:+.1f}",
            found["IoU of words"],
            seconds["keyword"],
            seconds["noise"],
        ]

    columns = ["", "right, %", "of words", "of noise", "gated work skipped on words, %", "on noise"]
    columns += ["all work skipped on words, %", "on noise", "right, against trained without gates", "IoU of words"]
    columns += ["ms a window of words", "of noise"]
    # The thresholds' middle stands for the model: it is what its configuration has.
    chosen = f"threshold {model.config.gate_threshold}"
    lead = ""
    if chosen in results:
        found, base = results[chosen], results["trained without gates"]
        lead = (
            f"**The gates skip {100 * found['skipped, keyword']:.0f} % of the gated work on words and "
            f"{100 * found['skipped, noise']:.0f} % on noise; {100 * found['accuracy']:.1f} % of the windows are right "
            f"against {100 * base['accuracy']:.1f} % without gates. A window takes "
            f"{times[chosen]['keyword'] / times['trained without gates']['keyword']:.2f} of the time on words and "
            f"{times[chosen]['noise'] / times['trained without gates']['noise']:.2f} on noise.**"
        )
    kinds = [window["kind"] for window in windows]
    note = (
        f"{model.num_parameters():,} weights, {model.config.num_labels} words; {len(rows)} clips of "
        f"{', '.join(str(last_part(folder)) for folder in args.data)} held out by {args.held_out_by}. "
        + ", ".join(f"{kinds.count(kind)} windows: {kind}" for kind in sorted(set(kinds)))
        + ". A window with a word is right if it is found and is the right one, others if nothing is found in them. The "
        "interval is of the paired difference in points, 95 %, over clips."
    )
    if chosen in results:
        note += " " + aims_missed(results[chosen], times[chosen], base, times["trained without gates"])
    note = f"{note} {args.note}".strip()
    tables = [Table("Against no gates", columns, [row(name) for name in contenders], note)]
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    data = {"figures": results, "milliseconds": times, "windows": counts}
    write(args.name, "Gates of the conformer", tables, data, model, args.results_dir, lead)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
