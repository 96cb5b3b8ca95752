"""
Quality against compute: routing by token difficulty against one expert for all tokens, random routing, and the dense model
fine-tuned, all trained on the same tokens with the same losses.

    python -m benchmarks.dynamoe.tradeoff --model path/to/stories260k --steps 300 --seeds 0 1 2

The text is the model's own (temperature 0.8), made once beside the results and not committed. `routed` is one fine-tune for
all sensitivities; `routed 0.65` is one for that sensitivity alone, as in the paper's table, and `budget 0.5` one for that share
of the MLPs. Their routers learn from the loss of the routed model, those of `nearness` from the measured nearness alone, as in the
paper. `fixed 0.5` is an MLP cut to half its neurons, and `elastic` one fine-tune for all widths without routers; `random` sends
tokens to experts without regard to them, at all shares. Every run is a row that is written as it ends; a second call does only
what is missing, and runs of different `--seeds` may go side by side.
"""

from __future__ import annotations

import bisect
import fcntl
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import HfArgumentParser

from benchmarks.dynamoe.contenders import ChosenOtherwiseTrainer, perplexity
from benchmarks.mtp.reporting import RESULTS, Table, last_part, load_base, set_threads, write
from hf_ext import DynaMoeTrainer, DynaMoeTrainingConfig, convert_to_dynamoe, generate_completions


SENSITIVITIES = (0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
# Whose tokens go through routers.
ROUTED = ("routed", "budget", "nearness")
SHARES = (0.4, 0.5, 0.6, 0.75, 0.9)
# Mean share of the MLPs that the paper's figures imply at these sensitivities.
IMPLIED = {0.9: 0.78, 0.8: 0.62, 0.7: 0.53}
# What routers that are trained for a share are asked with.
BUDGET_SENSITIVITY = 0.7
# Two-sided 95 % of Student's t for two to five seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of the dense model."})
    steps: int = field(default=300, metadata={"help": "Training steps of each run."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of each contender."})
    only: list[str] | None = field(default=None, metadata={"help": "Contenders to run, such as 'fixed 0.5'."})
    sensitivities: list[float] = field(
        default_factory=lambda: [0.35, 0.6, 0.72, 0.83, 0.95],
        metadata={"help": "Trained for alone, beside the one for all."},
    )
    fixed_shares: list[float] = field(
        default_factory=lambda: list(SHARES), metadata={"help": "Shares of the MLP that fixed experts have."}
    )
    similarity: str = field(default="error", metadata={"help": "See DynaMoeConfig."})
    importance: str = field(default="activation_norm", metadata={"help": "See convert_to_dynamoe."})
    router_type: str = field(default="ordinal", metadata={"help": "See DynaMoeConfig."})
    router_hidden_size: int = field(default=64, metadata={"help": "Width of the routers' hidden layer."})
    num_experts: int = field(default=4, metadata={"help": "Experts, in equal steps."})
    batch_size: int = field(default=24, metadata={"help": "Texts per step."})
    length: int = field(default=256, metadata={"help": "Tokens per text."})
    num_texts: int = field(default=8192, metadata={"help": "Texts to train on."})
    num_test_texts: int = field(default=128, metadata={"help": "Texts to measure on."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Of all contenders."})
    router_learning_rate: float = field(default=1e-2, metadata={"help": "Of the routers."})
    budget_weight: float = field(default=10.0, metadata={"help": "See DynaMoeTrainingConfig."})
    router_noise: float = field(default=1.0, metadata={"help": "See DynaMoeTrainingConfig."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16; what is measured is in float32."})
    threads: int | None = field(default=None, metadata={"help": "Threads; by default one for a small model."})
    results_dir: str | None = field(default=None, metadata={"help": "Where to write."})


def texts(args: Arguments, folder: Path, model: Any, tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Texts of the model's own from its first token on, made once."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = generate_completions(
        model,
        tokenizer,
        [[start]] * count,
        output_file=folder / f"texts_{last_part(args.model)}_{count}_{args.length}_{seed}.jsonl",
        batch_size=128,
        seed=seed,
        do_sample=True,
        temperature=0.8,
        top_k=0,
        max_new_tokens=args.length - 1,
    )["input_ids"]
    return [row for row in rows if len(row) > 8]


def convert(args: Arguments, rows: list[list[int]], share: float | None) -> Any:
    """The dense model nested; for a fixed expert with two widths only."""
    dense, _ = load_base(args.model)
    width = dense.config.intermediate_size
    widths = (
        [round(width * e / args.num_experts) for e in range(1, args.num_experts + 1)]
        if share is None
        else [round(share * width), width]
    )
    return convert_to_dynamoe(
        dense,
        expert_widths=widths,
        calibration_dataset=[{"input_ids": row} for row in rows[:400]],
        similarity=args.similarity,
        importance=args.importance,
        router_type=args.router_type,
        router_hidden_size=args.router_hidden_size,
        disable_tqdm=True,
    )


def train(args: Arguments, contender: str, seed: int, rows: list[list[int]], **changes: Any) -> Any:
    """The trained model; `changes` are of the trainer's settings."""
    kind, _, value = contender.partition(" ")
    moe = convert(args, rows, float(value) if kind == "fixed" else None)
    routed = kind in ROUTED
    sensitivity = BUDGET_SENSITIVITY if kind == "budget" else float(value) if routed and value else None
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "max_steps": args.steps,
            "per_device_train_batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "router_learning_rate": args.router_learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "weight_decay": 0.0,
            "adam_beta2": 0.95,
            "distillation_weight": 1.0,
            "sensitivity": sensitivity,
            "active_fraction": float(value) if kind == "budget" else None,
            "min_sensitivity": 0.4,
            "router_steps": 20 if routed else 0,
            # Routers that learn nearness have to be good before they decide.
            "label_forcing_ratio": 0.5 if kind == "nearness" else 0.1,
            "label_forcing": 0.1 if kind == "nearness" else 0.0,
            "straight_through": kind in ("routed", "budget"),
            "budget_weight": args.budget_weight,
            "router_noise": args.router_noise,
            "max_length": args.length,
            "logging_steps": 50,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": args.bf16,
            "use_cpu": not torch.cuda.is_available(),
            "seed": seed,
        }
        trainer = (DynaMoeTrainer if routed else ChosenOtherwiseTrainer)(
            model=moe,
            args=DynaMoeTrainingConfig(**{**settings, **changes}),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=load_base(args.model)[1],
        )
        if not routed:
            trainer.choice = kind
        trainer.train()
    return moe


def measured(moe: Any, contender: str, test: list[list[int]]) -> list[dict[str, float]]:
    """Points of a contender's curve: setting, share of the MLPs, perplexity."""
    kind, _, value = contender.partition(" ")
    if kind == "budget":
        points = [(BUDGET_SENSITIVITY, perplexity(moe, test, sensitivity=BUDGET_SENSITIVITY))]
    elif kind in ROUTED and value:
        points = [(float(value), perplexity(moe, test, sensitivity=float(value)))]
    elif kind in ROUTED:
        points = [(s, perplexity(moe, test, sensitivity=s)) for s in SENSITIVITIES]
    elif kind == "random":
        points = [(s, perplexity(moe, test, random_share=s)) for s in (*SHARES, 1.0)]
    elif kind == "elastic":
        widths = moe.config.expert_widths
        points = [(w / widths[-1], perplexity(moe, test, expert_index=e)) for e, w in enumerate(widths)]
    elif kind == "fixed":
        points = [(float(value), perplexity(moe, test, expert_index=0))]
    else:
        points = [(1.0, perplexity(moe, test, sensitivity=1.0))]
    return [{"setting": s, "share": share, "perplexity": value} for s, (value, share) in points]


def at_share(points: list[dict[str, float]], share: float) -> float | None:
    """Perplexity at a share, on straight lines between the points; None outside."""
    points = sorted(points, key=lambda p: p["share"])
    shares = [p["share"] for p in points]
    if not shares[0] - 0.005 <= share <= shares[-1] + 0.005:
        return None
    index = min(max(bisect.bisect_left(shares, share), 1), len(shares) - 1)
    if len(points) == 1:
        return points[0]["perplexity"]
    low, high = points[index - 1], points[index]
    part = (share - low["share"]) / max(high["share"] - low["share"], 1e-9)
    return low["perplexity"] + min(max(part, 0.0), 1.0) * (high["perplexity"] - low["perplexity"])


def summary(values: list[float]) -> str:
    """Mean and 95 % interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = STUDENT.get(len(values), 1.96) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def tables(rows: list[dict[str, Any]], dense_before: float) -> tuple[list[Table], str]:
    """The comparison at equal shares, the knob, and a sentence."""
    contenders = sorted({row["contender"] for row in rows})
    curves: dict[str, dict[int, list[dict[str, float]]]] = {}
    for name in contenders:
        # Those of one budget are points of one curve.
        kind, _, value = name.partition(" ")
        curve = f"{kind}, one model each" if value else kind
        for row in (r for r in rows if r["contender"] == name):
            curves.setdefault(curve, {}).setdefault(row["seed"], []).extend(row["points"])
    comparison = []
    for name, by_seed in curves.items():
        cells: list[Any] = [name, len(by_seed)]
        for share in (*SHARES, 1.0):
            values = [v for points in by_seed.values() if (v := at_share(points, share)) is not None]
            cells.append(summary(values) if values else None)
        comparison.append(cells)
    own = []
    for name in (n for n in contenders if n.partition(" ")[2]):
        points = [row["points"][0] for row in rows if row["contender"] == name]
        own.append([name, len(points), *(summary([p[key] for p in points]) for key in ("share", "perplexity"))])
    knob = []
    for sensitivity in SENSITIVITIES:
        points = [
            p for row in rows if row["contender"] == "routed" for p in row["points"] if p["setting"] == sensitivity
        ]
        if points:
            share, value = (statistics.mean(p[key] for p in points) for key in ("share", "perplexity"))
            knob.append(
                [sensitivity, share, IMPLIED.get(sensitivity), value, f"{100 * (value / dense_before - 1):+.1f} %"]
            )
    lead = f"Perplexity of the dense model before: {dense_before:.3f}."
    half = {name: [at_share(points, 0.5) for points in by_seed.values()] for name, by_seed in curves.items()}
    means = {n: statistics.mean(v) for n, values in half.items() if (v := [x for x in values if x is not None])}
    routed = {n: m for n, m in means.items() if n.startswith(("routed", "budget"))}
    others = {n: m for n, m in means.items() if n not in routed}
    if routed and others:
        best = min(routed, key=routed.__getitem__)
        against = ", ".join(f"{100 * (1 - routed[best] / m):+.1f} % against {n}" for n, m in others.items())
        lead = f"**At half of the MLPs `{best}` is better by {against}; {100 * (routed[best] / dense_before - 1):.1f} % above dense.** {lead}"
    found = [
        Table(
            "Perplexity at equal share of the MLPs",
            ["contender", "seeds", *(f"{share:g}" for share in SHARES), "1"],
            comparison,
            "Mean and 95 % interval over seeds, interpolated between measured shares of the MLPs' neurons. All are trained on the same "
            "tokens with next-token loss and distillation from the dense model.",
        ),
        Table("One model each: what they use", ["contender", "seeds", "share of the MLPs", "perplexity"], own),
        Table(
            "The knob: `routed`, one fine-tune for all sensitivities",
            [
                "sensitivity",
                "share of the MLPs",
                "implied by the paper (7B)",
                "perplexity",
                "against dense",
            ],
            knob,
        ),
    ]
    return [table for table in found if table.rows], lead


def prepare(args: Arguments) -> tuple[Path, Any, Any, list[list[int]], list[list[int]]]:
    """The folder of the results, the dense model and its tokenizer, and texts to train on and to measure on."""
    dense, tokenizer = load_base(args.model)
    set_threads(dense, args.threads)
    folder = RESULTS / "dynamoe" if args.results_dir is None else Path(args.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        texts(args, folder, dense, tokenizer, count, seed)
        for count, seed in ((args.num_texts, 12), (args.num_test_texts, 11))
    ]
    return folder, dense, tokenizer, rows[0], rows[1]


def main(args: Arguments) -> None:
    folder, dense, _, train_rows, test = prepare(args)
    name = f"tradeoff_{last_part(args.model)}_{args.steps}_steps"
    dense_before = perplexity(convert(args, train_rows, None), test, sensitivity=1.0)[0]

    contenders = ["routed", *(f"routed {s:g}" for s in args.sensitivities), "nearness", "elastic", "random"]
    contenders += [*(f"fixed {share:g}" for share in args.fixed_shares), "dense"]
    for seed in args.seeds:
        for contender in contenders if args.only is None else args.only:
            if any((r["contender"], r["seed"]) == (contender, seed) for r in _rows(folder / f"{name}.json")):
                continue
            start = time.perf_counter()
            moe = train(args, contender, seed, train_rows)
            seconds = time.perf_counter() - start
            row = {"contender": contender, "seed": seed, "seconds": seconds, "points": measured(moe, contender, test)}
            with open(folder / f".{name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another call may have written meanwhile
                report(args, name, [*_rows(folder / f"{name}.json"), row], dense_before, dense)
    report(args, name, _rows(folder / f"{name}.json"), dense_before, dense)


def report(args: Arguments, name: str, rows: list[dict[str, Any]], dense_before: float, dense: Any) -> None:
    """Writes all figures and the tables."""
    parts, lead = tables(rows, dense_before)
    title = f"Nested experts of {last_part(args.model)}: quality against compute"
    write(name, title, parts, {"dense_before": dense_before, "rows": rows}, dense, args.results_dir, lead)


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
