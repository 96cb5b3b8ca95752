"""
The two prompt sets of a story model, and how much of them stands in an adapter's training text.

`samples`: 48 samples of 64 tokens at temperature 1, the headline. `short`: 64 samples of 12 to 20 tokens, which flatter,
since a small model's greedy continuations of a few words repeat what it wrote for training. Both are written by the model
itself, with a seed that no recipe uses.

    python benchmarks/mtp/prompts.py --model path/to/stories260k --training_text out/stories260k-mtp

`--training_text` is the output folder of `examples/train_mtp_on_policy.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from reporting import Table, last_part, load_base, set_threads, write
from transformers import HfArgumentParser

from hf_ext import generate_completions
from hf_ext.metrics import distinct_ngrams, ngram_overlap


SEED = 20261124
SAMPLES, SAMPLE_LENGTH = 48, 64
SHORT, SHORT_LENGTHS = 64, (12, 20)
NEW_TOKENS = 200


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of the base model."})
    training_text: str | None = field(default=None, metadata={"help": "Output folder of the adapter's recipe."})
    results_dir: str | None = field(
        default=None, metadata={"help": "Where to write; by default benchmarks/results/mtp."}
    )
    device: str = field(default="cpu", metadata={"help": "Where to run."})
    threads: int | None = field(default=None, metadata={"help": "Threads; by default one for a small model."})


def prompt_sets(
    model: Any, tokenizer: Any, num_samples: int = SAMPLES, num_short: int = SHORT
) -> dict[str, list[list[int]]]:
    """Both sets as token ids, each prompt behind the token that starts a text, which is not counted in its length."""
    lengths = torch.randint(
        SHORT_LENGTHS[0], SHORT_LENGTHS[1] + 1, (num_short,), generator=torch.Generator().manual_seed(SEED)
    )
    short = _samples(model, tokenizer, num_short, SHORT_LENGTHS[1], SEED + 1)
    return {
        "samples": _samples(model, tokenizer, num_samples, SAMPLE_LENGTH, SEED),
        "short": [ids[: 1 + length] for ids, length in zip(short, lengths.tolist(), strict=True)],
    }


def _samples(model: Any, tokenizer: Any, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` samples of full length: twice as many are drawn, since some end before."""
    if count == 0:
        return []
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = generate_completions(
        model,
        tokenizer,
        [[start or 0]] * (2 * count),
        batch_size=2 * count,
        seed=seed,
        disable_tqdm=True,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=length,
    )["input_ids"]
    whole = [row for row in rows if len(row) == length + 1]
    if len(whole) < count:
        raise ValueError(f"Only {len(whole)} of {2 * count} samples reach {length} tokens: {count} are needed.")
    return whole[:count]


def training_rows(folder: str | Path, model: Any, tokenizer: Any) -> list[dict[str, list[int]]]:
    """
    The rows that a recipe trained on, as `generate_completions` made them: its own journal gives openings and
    continuations back without generating anything. Without openings, the continuations alone.
    """
    openings, completions = Path(folder) / "openings.jsonl", Path(folder) / "completions.jsonl"
    if not openings.exists():
        lines = completions.read_text().splitlines()[1:]
        found = [row for line in lines for row in json.loads(line)["completions"]]
        return [{"input_ids": row, "completion_mask": [1] * len(row)} for row in found]
    header, *lines = openings.read_text().splitlines()
    settings = json.loads(header)
    count = sum(len(json.loads(line)["completions"]) for line in lines)
    settings.pop("prompts")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    texts = generate_completions(
        model, tokenizer, [[start]] * count, output_file=openings, disable_tqdm=True, **settings
    )["input_ids"]
    # As the recipe cuts them: every second opening to a length of its own.
    longest, generator = settings["max_new_tokens"], torch.Generator().manual_seed(settings["seed"])
    cuts = torch.randint(4, longest + 1, (count,), generator=generator).tolist()
    prompts = [text if i % 2 else text[:cut] for i, (text, cut) in enumerate(zip(texts, cuts, strict=True))]
    settings = json.loads(completions.read_text().partition("\n")[0])
    settings.pop("prompts")
    return list(
        generate_completions(model, tokenizer, prompts, output_file=completions, disable_tqdm=True, **settings)
    )


def references(model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """The model's own greedy continuations, through its end token if one comes; in batches, for statistics only."""
    rows = generate_completions(model, tokenizer, prompts, disable_tqdm=True, max_new_tokens=new_tokens)["input_ids"]
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def overlaps(
    sets: dict[str, list[list[int]]], continuations: dict[str, list[list[int]]], corpus: list[list[int]]
) -> dict[str, dict[str, float]]:
    """Shares of windows that stand in the training text, for the prompts and for what the model says behind them."""
    found = {}
    for name, prompts in sets.items():
        # The windows of a prompt are as long as the shortest prompt without its start token.
        texts = [ids[1:] for ids in prompts]
        width = min(map(len, texts))
        found[name] = {
            "prompt_window": width,
            "prompt_overlap": ngram_overlap(texts, corpus, n=width),
            "reference_window": 64,
            "reference_overlap": ngram_overlap(continuations[name], corpus, n=64),
        }
    return found


def main(args: Arguments) -> None:
    model, tokenizer = load_base(args.model, device=args.device)
    set_threads(model, args.threads)
    sets = prompt_sets(model, tokenizer)
    continuations = {name: references(model, tokenizer, prompts) for name, prompts in sets.items()}
    found: dict[str, dict[str, float]] = {}
    if args.training_text is not None:
        corpus = [row["input_ids"] for row in training_rows(args.training_text, model, tokenizer)]
        found = overlaps(sets, continuations, corpus)
    rows = []
    for name, prompts in sets.items():
        lengths = sorted(len(ids) - 1 for ids in prompts)
        own = found.get(name)
        rows.append(
            (
                name,
                len(prompts),
                f"{lengths[0]} to {lengths[-1]}" if lengths[0] != lengths[-1] else lengths[0],
                f"{own['prompt_overlap']:.1%} (windows of {own['prompt_window']})" if own else "not asked",
                f"{own['reference_overlap']:.1%} (windows of 64)" if own else "not asked",
                f"{distinct_ngrams(continuations[name], n=4):.1%}",
            )
        )
    columns = ("set", "prompts", "tokens", "of the prompts in training text", "of the references", "distinct 4-grams")
    note = f"References are greedy continuations of up to {NEW_TOKENS} tokens. Seed {SEED}, temperature 1."
    data = {
        "model": last_part(args.model),
        "seed": SEED,
        "sets": {
            name: {
                "input_ids": ids,
                "text": tokenizer.batch_decode(ids, skip_special_tokens=True),
                **found.get(name, {}),
            }
            for name, ids in sets.items()
        },
    }
    tables = [Table(f"Prompt sets of {last_part(args.model)}", columns, rows, note)]
    write("prompts", "Prompts", tables, data, model, args.results_dir)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
