"""
Tokens per step of a multi-token adapter, in the shape of the paper's table 1 and figure 7.

Every number of guesses by every strategy, with and without sampler, on both prompt sets (see `prompts.py`), greedy, 200 new
tokens each; one run gives the figures to the limit and to the model's own end token. Every output is compared with plain
`generate` of the base model, in fp32 and, at the most guesses, in float64.

    python benchmarks/mtp/acceptance.py --model path/to/stories260k --adapter out/stories260k-mtp \
        --training_text out/stories260k-mtp
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from prompts import overlaps, prompt_sets, training_rows
from reporting import Table, last_part, load_adapted, set_threads, write
from tqdm import tqdm
from transformers import HfArgumentParser

from hf_ext.metrics import distinct_ngrams, first_difference, tokens_per_step


STRATEGIES = ("linear", "adaptive", "quadratic")
# The paper's own figures: table 1, average of 13 benchmarks; figure 7, read off, cumulative from left to right.
TABLE_1 = {1: 1.67, 2: 2.14, 3: 2.48, 4: 2.69, 5: 2.88, 6: 2.99, 7: 3.10, 8: 3.17}
FIGURE_7 = {
    1: (1.54, 1.65, 1.67, 1.71),
    2: (1.82, 2.04, 2.13, 2.23),
    3: (2.00, 2.30, 2.46, 2.60),
    4: (2.06, 2.45, 2.63, 2.84),
    5: (2.16, 2.58, 2.81, 3.07),
    6: (2.16, 2.66, 2.91, 3.18),
    7: (2.20, 2.72, 3.01, 3.30),
    8: (2.21, 2.75, 3.05, 3.38),
}


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of the base model."})
    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    training_text: str | None = field(default=None, metadata={"help": "Output folder of the adapter's recipe."})
    prompts: str | None = field(default=None, metadata={"help": "A prompts.json to take the sets from."})
    num_samples: int = field(default=48, metadata={"help": "Prompts of the set `samples`."})
    num_short: int = field(default=64, metadata={"help": "Prompts of the set `short`."})
    ks: list[int] | None = field(default=None, metadata={"help": "Numbers of guesses; by default all."})
    max_new_tokens: int = field(default=200, metadata={"help": "New tokens per prompt."})
    float64: bool = field(default=True, metadata={"help": "Repeat the most guesses of each strategy in float64."})
    dtype: str = field(default="float32", metadata={"help": "Number format of the main runs."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})
    threads: int | None = field(default=None, metadata={"help": "Threads; by default one for a small model."})
    results_dir: str | None = field(
        default=None, metadata={"help": "Where to write; by default benchmarks/results/mtp."}
    )


@dataclass
class Result:
    """One configuration on one prompt set. The figures `to_end` stop at the model's own end token."""

    prompt_set: str
    dtype: str
    k: int
    strategy: str
    sampler: bool
    tokens_per_step: float
    tokens_per_step_to_end: float
    num_tokens: int
    num_steps: int
    num_identical: int
    num_prompts: int
    distinct_4grams: float


def greedy(model: Any, prompt: list[int], max_new_tokens: int, **options: Any) -> tuple[list[int], list[int]]:
    """New tokens up to the limit, whatever they are, and the tokens that each step emitted (none for a plain model)."""
    input_ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        **options,
    )
    lengths = getattr(output, "step_lengths", None)
    return output.sequences[0, len(prompt) :].tolist(), lengths[0] if lengths else []


def cut_at_end(tokens: Sequence[int], step_lengths: Sequence[int], ends: set[int]) -> tuple[list[int], list[int]]:
    """What the same run emits when it stops at an end token: later tokens and steps fall away."""
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    kept, seen = [], 0
    for length in step_lengths:
        if seen >= stop:
            break
        kept.append(min(length, stop - seen))
        seen += length
    return list(tokens[:stop]), kept


def end_tokens(model: Any) -> set[int]:
    """What ends a text: the end token, and the start token, with which a model of texts in a row goes on to the next."""
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return {token for token in (*ends, config.bos_token_id) if token is not None}


def measure(
    base: Any,
    adapted: Any,
    sets: dict[str, list[list[int]]],
    configurations: Sequence[tuple[int, str, bool]],
    max_new_tokens: int,
    ends: set[int],
    dtype: str,
) -> list[Result]:
    """Every configuration on every set, against plain `generate` in the same number format."""
    results = []
    total = sum(len(prompts) for prompts in sets.values()) * (len(configurations) + 1)
    with torch.no_grad(), tqdm(total=total, desc=dtype, unit="prompt") as progress:
        for name, prompts in sets.items():
            expected = []
            for prompt in prompts:
                expected.append(greedy(base, prompt, max_new_tokens)[0])
                progress.update()
            for k, strategy, sampler in configurations:
                options = {"num_speculative_tokens": k, "speculation_strategy": strategy, "use_sampler": sampler}
                outputs, lengths, cut_lengths, identical = [], [], [], 0
                for prompt, reference in zip(prompts, expected, strict=True):
                    tokens, steps = greedy(adapted, prompt, max_new_tokens, **options)
                    identical += first_difference(reference, tokens) is None
                    outputs.append(tokens)
                    lengths.append(steps)
                    cut_lengths.append(cut_at_end(tokens, steps, ends)[1])
                    progress.update()
                results.append(
                    Result(
                        prompt_set=name,
                        dtype=dtype,
                        k=k,
                        strategy=strategy,
                        sampler=sampler,
                        tokens_per_step=tokens_per_step(lengths),
                        tokens_per_step_to_end=tokens_per_step(cut_lengths),
                        num_tokens=sum(map(len, outputs)),
                        num_steps=sum(map(len, lengths)),
                        num_identical=identical,
                        num_prompts=len(prompts),
                        distinct_4grams=distinct_ngrams(outputs, n=4),
                    )
                )
    return results


def tables(results: list[Result], found: dict[str, dict[str, float]]) -> list[Table]:
    main_runs = [r for r in results if r.dtype != "float64"]
    found_at = {(r.prompt_set, r.k, r.strategy, r.sampler): r for r in main_runs}
    sets = list(dict.fromkeys(r.prompt_set for r in main_runs))
    ks = sorted({r.k for r in main_runs})

    def row(name: str, attribute: str) -> list[Any]:
        return [getattr(found_at[name, k, "quadratic", True], attribute) for k in ks]

    shape_1 = [[f"{name}, to the limit", *row(name, "tokens_per_step")] for name in sets]
    shape_1 += [[f"{name}, to the end token", *row(name, "tokens_per_step_to_end")] for name in sets]
    shape_1 += [
        ["*paper, 8B model, GSM8k*", *(_of_paper(k, (1.84, 2.58, 3.21, 3.75, 4.20, 4.60, 4.95, 5.22)) for k in ks)],
        ["*paper, 8B model, average of 13 benchmarks*", *(TABLE_1.get(k) for k in ks)],
    ]
    said = [
        Table(
            "Tokens per step, quadratic with sampler (the paper's table 1)",
            ["prompts", *(f"k={k}" for k in ks)],
            shape_1,
        )
    ]
    columns = [f"{strategy}, {'sampler' if s else 'no sampler'}" for strategy in STRATEGIES for s in (False, True)]
    columns += [f"*paper: {name}*" for name in ("linear, no sampler", "+ quadratic", "+ sampler", "+ consistency")]
    for name in sets:
        rows = []
        for k in ks:
            own = [found_at[name, k, strategy, s].tokens_per_step for strategy in STRATEGIES for s in (False, True)]
            rows.append([k, *own, *FIGURE_7.get(k, (None,) * 4)])
        note = (
            "The adapter was trained once, with sampler and consistency loss; the paper trained each of its columns."
        )
        said.append(Table(f"Tokens per step by strategy, {name} (the paper's figure 7)", ["k", *columns], rows, note))
    rows = []
    for name in sets:
        for dtype in dict.fromkeys(r.dtype for r in results):
            own = [r for r in results if r.prompt_set == name and r.dtype == dtype]
            if own:
                identical, runs = sum(r.num_identical for r in own), sum(r.num_prompts for r in own)
                rows.append([name, dtype, len(own), own[0].num_prompts, f"{identical} of {runs}"])
    said.append(
        Table(
            "Outputs identical to plain `generate`",
            ["prompts", "format", "configurations", "prompts", "identical"],
            rows,
        )
    )
    rows = []
    for name in sets:
        own = found.get(name, {})
        rows.append(
            [
                name,
                f"{max(r.distinct_4grams for r in main_runs if r.prompt_set == name):.1%}",
                f"{own['prompt_overlap']:.1%} (windows of {own['prompt_window']})" if own else "not asked",
                f"{own['reference_overlap']:.1%} (windows of 64)" if own else "not asked",
            ]
        )
    columns = [
        "prompts",
        "distinct 4-grams of the output",
        "prompts in the training text",
        "output in the training text",
    ]
    said.append(Table("What flatters: loops, and text seen in training", columns, rows))
    return said


def _of_paper(k: int, values: Sequence[float]) -> float | None:
    return values[k - 1] if k <= len(values) else None


def verdict(results: list[Result]) -> str:
    """The claims that the tables support or don't, in sentences."""
    main_runs = {(r.prompt_set, r.k, r.strategy, r.sampler): r for r in results if r.dtype != "float64"}
    ks = sorted({key[1] for key in main_runs})
    said = []
    for name in dict.fromkeys(key[0] for key in main_runs):
        best = main_runs[name, ks[-1], "quadratic", True].tokens_per_step
        linear = main_runs[name, ks[-1], "linear", True].tokens_per_step
        bare = main_runs[name, ks[-1], "quadratic", False].tokens_per_step
        curve = [main_runs[name, k, "quadratic", True].tokens_per_step for k in ks]
        monotone = "monotone" if curve == sorted(curve) else "not monotone"
        said.append(
            f"**{name}: {best:.2f} tokens per step** (k={ks[-1]}, quadratic, sampler); linear {linear:.2f}, without sampler "
            f"{bare:.2f}; {monotone} in k."
        )
    return " ".join(said)


def main(args: Arguments) -> None:
    base, adapted, tokenizer = load_adapted(args.model, args.adapter, args.dtype, args.device)
    set_threads(base, args.threads)
    if args.prompts is not None:
        stored = json.loads(Path(args.prompts).read_text())["sets"]
        sets = {name: own["input_ids"] for name, own in stored.items()}
    else:
        sets = prompt_sets(base, tokenizer, args.num_samples, args.num_short)
    sets = {name: prompts for name, prompts in sets.items() if prompts}
    ends = end_tokens(base)
    for model in (base, adapted.base_model.model):
        model.generation_config.eos_token_id = None
    num_masks = adapted.active_peft_config.num_masks
    ks = sorted(args.ks or range(1, num_masks + 1))
    grid = [(k, strategy, sampler) for k in ks for strategy in STRATEGIES for sampler in (False, True)]
    results = measure(base, adapted, sets, grid, args.max_new_tokens, ends, args.dtype)
    found: dict[str, dict[str, float]] = {}
    if args.training_text is not None:
        corpus = [row["input_ids"] for row in training_rows(args.training_text, base, tokenizer)]
        outputs = {
            name: [greedy(base, prompt, args.max_new_tokens)[0] for prompt in prompts]
            for name, prompts in sets.items()
        }
        found = overlaps(sets, outputs, corpus)
    if args.float64:
        exact = [(ks[-1], strategy, True) for strategy in STRATEGIES]
        results += measure(base.double(), adapted.double(), sets, exact, args.max_new_tokens, ends, "float64")
        base.to(getattr(torch, args.dtype))
    data = {
        "model": last_part(args.model),
        "adapter": last_part(args.adapter),
        "max_new_tokens": args.max_new_tokens,
        "overlap": found,
        "results": [asdict(result) for result in results],
    }
    title = f"Tokens per step of {last_part(args.model)}"
    write("acceptance", title, tables(results, found), data, base, args.results_dir, verdict(results))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
