"""
What routers learn: how often they say what the label says, whether they spend compute where the dense model is surprised, and
on which tokens.

    python -m benchmarks.dynamoe.routers --model path/to/stories260k --steps 300

Trains what `tradeoff` trains, once with routers that learn from the loss of the routed model (`routed`) and once with those
that learn the measured nearness (`nearness`), and looks at their choices on texts that training never saw.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import HfArgumentParser

from benchmarks.dynamoe import tradeoff
from benchmarks.mtp.reporting import Table, last_part, write


CONTENDERS = ("routed", "nearness")
# Tokens that are seldom seen say little about what the router makes of them.
LEAST_COUNT = 30


@dataclass
class Arguments(tradeoff.Arguments):
    router_sensitivities: list[float] = field(
        default_factory=lambda: [0.5, 0.7, 0.9], metadata={"help": "Where the routers are looked at."}
    )
    num_examples: int = field(default=12, metadata={"help": "Tokens that get least, and most."})


@torch.no_grad()
def choices(moe: Any, dense: Any, rows: list[list[int]], sensitivity: float) -> dict[str, torch.Tensor]:
    """
    Of every token but the last of its text: its id, the share of the MLPs that it got, whether router and label agree (a
    share of the layers), and how surprised the dense model is by the token and by the one that follows.
    """
    widths = torch.tensor(moe.config.expert_widths) / moe.config.expert_widths[-1]
    columns = defaultdict(list)
    moe.eval()
    for row in rows:
        ids = torch.tensor([row])
        out = moe(ids, sensitivity=sensitivity, output_router_logits=True, output_nearness=True)
        surprisal = torch.nn.functional.cross_entropy(dense(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        share, agrees = widths[out.expert_index].mean(0)[0], out.expert_index == moe.labels(out.nearness, sensitivity)
        # The first token has nothing before it that could be surprised.
        columns["token"].append(ids[0, 1:-1])
        columns["share"].append(share[1:-1])
        columns["agrees"].append(agrees.float().mean(0)[0, 1:-1])
        columns["surprisal"].append(surprisal[:-1])
        columns["next_surprisal"].append(surprisal[1:])
    return {name: torch.cat(parts) for name, parts in columns.items()}


def by_quarters(found: dict[str, torch.Tensor]) -> list[float]:
    """The share that tokens got, from the quarter whose next token surprises least to that where it surprises most."""
    order = found["next_surprisal"].argsort()
    return [part.mean().item() for part in found["share"][order].chunk(4)]


def by_token(found: dict[str, torch.Tensor], tokenizer: Any) -> list[tuple[str, float, int]]:
    """Tokens that are frequent enough, with their mean share and count, from least to most."""
    rows = []
    for token in found["token"].unique().tolist():
        shares = found["share"][found["token"] == token]
        if len(shares) >= LEAST_COUNT:
            text = tokenizer.convert_ids_to_tokens(token).replace("|", "\\|").replace("\n", "\\n")
            rows.append((f"`{text}`", shares.mean().item(), len(shares)))
    return sorted(rows, key=lambda row: row[1])


def main(args: Arguments) -> None:
    _, dense, tokenizer, train_rows, test = tradeoff.prepare(args)
    figures, quarters, examples = [], [], []
    for contender in CONTENDERS:
        moe = tradeoff.train(args, contender, args.seeds[0], train_rows)
        for sensitivity in args.router_sensitivities:
            found = choices(moe, dense, test, sensitivity)
            correlations = [float(spearmanr(found["share"], found[n])[0]) for n in ("next_surprisal", "surprisal")]
            share, agrees = (100 * found[name].mean().item() for name in ("share", "agrees"))
            figures.append([contender, sensitivity, share, agrees, *correlations])
            quarters.append([contender, sensitivity, *(100 * value for value in by_quarters(found))])
            if sensitivity == args.router_sensitivities[0]:
                tokens = by_token(found, tokenizer)
                least, most = tokens[: args.num_examples], tokens[: -args.num_examples - 1 : -1]
                for low, high in zip(least, most, strict=True):
                    examples.append([contender, low[0], 100 * low[1], low[2], high[0], 100 * high[1], high[2]])
    first = f"Sensitivity {args.router_sensitivities[0]:g}; tokens seen {LEAST_COUNT} times and more."
    parts = [
        Table(
            "Routers",
            [
                "routers learn from",
                "sensitivity",
                "share of the MLPs, %",
                "as the label says, %",
                "correlation with the next token's surprisal",
                "with the token's own",
            ],
            figures,
            "Spearman's, over tokens, of the share that a token gets on average over layers with its surprisal under the dense "
            "model. `routed`: the loss of the routed model; `nearness`: the measured nearness.",
        ),
        Table(
            "Share of the MLPs, %, by quarters of the next token's surprisal",
            ["routers learn from", "sensitivity", "least surprising", "2nd", "3rd", "most surprising"],
            quarters,
        ),
        Table(
            "Tokens that get least and most",
            ["routers learn from", "least", "share, %", "seen", "most", "share, %", "seen"],
            examples,
            first,
        ),
    ]
    name = f"routers_{last_part(args.model)}_{args.steps}_steps"
    data = {"figures": figures, "quarters": quarters, "examples": examples}
    write(name, f"What the routers of {last_part(args.model)} learn", parts, data, dense, args.results_dir)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
