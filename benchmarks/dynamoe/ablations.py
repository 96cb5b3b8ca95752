"""
What each choice of the method is worth, where the paper leaves it open: how nearness is measured, how neurons are ordered, the
kind of router, what routers learn from, and the number of experts.

    python -m benchmarks.dynamoe.ablations --model path/to/stories260k --steps 150 --seeds 0

Each variant differs from the first, `reference`, in what its name says, and is trained on the same tokens; perplexities are
interpolated at equal shares of the MLPs. It goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import HfArgumentParser

from benchmarks.dynamoe import tradeoff
from benchmarks.mtp.reporting import Table, last_part, write


SHARES = (0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Variant:
    """What a run differs in: the contender, arguments of `tradeoff`, and settings of the trainer."""

    contender: str = "routed"
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "reference": Variant(),
    "no noise on the routers": Variant(arguments={"router_noise": 0.0}),
    "a tenth of the weight on the budget": Variant(arguments={"budget_weight": 1.0}),
    "labels decide in half of the steps": Variant(settings={"label_forcing_ratio": 0.5}),
    "without distillation": Variant(settings={"distillation_weight": 0.0}),
    "2 experts": Variant(arguments={"num_experts": 2}),
    "8 experts": Variant(arguments={"num_experts": 8}),
    "neurons in their order": Variant(arguments={"importance": "none"}),
    "neurons by activation": Variant(arguments={"importance": "activation"}),
    "neurons by Taylor": Variant(arguments={"importance": "taylor"}),
    "routers learn nearness: error": Variant("nearness"),
    "routers learn nearness: projection": Variant("nearness", {"similarity": "projection"}),
    "routers learn nearness: cosine": Variant("nearness", {"similarity": "cosine"}),
    "classifiers of labels": Variant("nearness 0.65", {"router_type": "classifier"}),
    "nearness, for one sensitivity": Variant("nearness 0.65"),
    "for one sensitivity": Variant("routed 0.65"),
}


@dataclass
class Arguments(tradeoff.Arguments):
    steps: int = field(default=150, metadata={"help": "Training steps of each run."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of each variant."})
    only: list[str] | None = field(default=None, metadata={"help": "Variants to run."})


def tables(rows: list[dict[str, Any]], dense_before: float) -> list[Table]:
    lines = []
    for name in VARIANTS:
        curves = [row["points"] for row in rows if row["variant"] == name]
        if not curves:
            continue
        cells: list[Any] = [name, len(curves)]
        for share in SHARES:
            values = [value for points in curves if (value := tradeoff.at_share(points, share)) is not None]
            cells.append(tradeoff.summary(values) if values else None)
        own = [points[0] for points in curves if len(points) == 1]
        cells.append(
            f"{statistics.mean(p['perplexity'] for p in own):.3f} at {statistics.mean(p['share'] for p in own):.3f}"
            if own
            else None
        )
        lines.append(cells)
    note = f"Perplexity of the dense model before: {dense_before:.3f}. Models for one sensitivity have one point of their own."
    columns = ["variant", "seeds", *(f"{share:g}" for share in SHARES), "at its own share"]
    return [Table("Perplexity at equal share of the MLPs", columns, lines, note)]


def main(args: Arguments) -> None:
    folder, dense, _, train_rows, test = tradeoff.prepare(args)
    name = f"ablations_{last_part(args.model)}_{args.steps}_steps"
    dense_before = tradeoff.perplexity(tradeoff.convert(args, train_rows, None), test, sensitivity=1.0)[0]
    path = folder / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for seed in args.seeds:
        for variant in args.only or VARIANTS:
            if any((row["variant"], row["seed"]) == (variant, seed) for row in rows):
                continue
            chosen = VARIANTS[variant]
            changed = replace(args, **chosen.arguments)
            moe = tradeoff.train(changed, chosen.contender, seed, train_rows, **chosen.settings)
            points = tradeoff.measured(moe, chosen.contender, test)
            rows.append({"variant": variant, "seed": seed, "points": points})
            title = f"Nested experts of {last_part(args.model)}: what each choice is worth"
            data = {"dense_before": dense_before, "rows": rows}
            write(name, title, tables(rows, dense_before), data, dense, args.results_dir)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
