"""Multi-token prediction in `hf-ext demo`, and the table that it shares with `hf-ext mtp bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console

from hf_ext.cli.compare import (
    Method,
    MethodResult,
    Strategy,
    assisted,
    compare,
    describe_machine,
    multi_token,
    plain,
    prompt_lookup,
)
from hf_ext.cli.demo_options import DemoOptions
from hf_ext.cli.loading import load_base, suitable_threads
from hf_ext.cli.pairs import Pair, load_pair
from hf_ext.cli.report import Bars, Block, Figures, Prose, Section, Steps, Table, split_into_steps, token_texts


COLUMNS = ("method", "tokens per step", "seconds", "tokens/s", "speed-up", "identical output", "distinct 4-grams")


def multi_token_section(options: DemoOptions, console: Console) -> tuple[Section, dict[str, str]]:
    """
    Plain decoding, prompt lookup and multi-token decoding of the same prompts, side by side.

    Args:
        options (`DemoOptions`):
            Which model, prompts and lengths.
        console ([`~rich.console.Console`]):
            Where progress is shown.

    Returns:
        `Section` and `dict[str, str]`: the section, and the machine that its times were taken on.
    """
    with console.status("Loading the model"):
        pair = load_pair(options.model, options.adapter, options.device, options.dtype)
        draft = load_base(options.draft_model, options.device, options.dtype)[0] if options.draft_model else None
    k = pair.num_masks if options.k is None else options.k
    if not 1 <= k <= pair.num_masks:
        raise typer.BadParameter(f"--k must be between 1 and {pair.num_masks}, the adapter's masks; got {k}.")
    methods = [plain(), prompt_lookup(), *(multi_token(k, strategy) for strategy in Strategy)]
    if draft is not None:
        methods.insert(2, assisted(draft))
    with suitable_threads(pair.base, options.threads):
        results = _compared(pair, options, methods, console)
        machine = describe_machine(pair.base)
    return _describe(pair, options, results, machine), machine


def _compared(pair: Pair, options: DemoOptions, methods: list[Method], console: Console) -> list[MethodResult]:
    try:
        return compare(
            pair.base,
            pair.adapted,
            pair.tokenizer,
            options.prompts,
            methods,
            max_new_tokens=options.max_new_tokens,
            repeats=options.repeats,
            console=console,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def results_table(results: Sequence[MethodResult], caption: str) -> Table:
    """The table that `demo` and `mtp bench` print; the fastest method is the one emphasised."""
    rows = [
        (
            result.name,
            f"{result.tokens_per_step:.2f}",
            f"{result.seconds:.2f}",
            f"{result.tokens_per_second:.0f}",
            f"{result.speedup:.2f}x",
            f"{result.num_identical} of {result.num_prompts}",
            f"{result.distinct_4grams:.0%}",
        )
        for result in results
    ]
    best = max(range(len(results)), key=lambda i: results[i].speedup)
    return Table(COLUMNS, rows, caption, best)


def verdict(results: Sequence[MethodResult], machine: dict[str, str]) -> list[str]:
    """What the table says and what it does not, in plain sentences."""
    reference, others = results[0], results[1:]
    fastest = max(results, key=lambda result: result.speedup)
    densest = max(results, key=lambda result: result.tokens_per_step)
    different = [result for result in others if result.num_identical < result.num_prompts]
    said = []
    if fastest is reference:
        said.append(f"On this machine no method was faster than {reference.name} decoding.")
    else:
        said.append(f"On this machine {fastest.name} was the fastest: {fastest.speedup:.2f} times {reference.name}.")
    if not different:
        said.append(f"Every method wrote exactly the tokens of {reference.name} decoding on all prompts.")
    else:
        said.extend(
            f"The output of {result.name} differs from that of {reference.name} decoding on "
            f"{result.num_prompts - result.num_identical} of {result.num_prompts} prompts."
            for result in different
        )
        if machine["dtype"] != "float32":
            said.append(
                f"In {machine['dtype']} two tokens can tie within rounding, and passes of different width round "
                "differently; --dtype float32 rules that out."
            )
    if densest is not fastest:
        said.append(f"Most tokens per step come from {densest.name}, but its steps take longer here.")
    if machine["device"] == "cpu":
        said.append(
            "On a CPU the time of a step grows with the number of guesses that it checks, and how much depends on the "
            "machine and on the size of the model: so does the best strategy. `hf-ext mtp bench` measures it."
        )
    if min(result.distinct_4grams for result in results) < 0.5:
        said.append(
            "More than half of the 4-grams are repetitions: looping text is easy to guess, so discount the gain."
        )
    return said


def _describe(pair: Pair, options: DemoOptions, results: list[MethodResult], machine: dict[str, str]) -> Section:
    shown = max(results, key=lambda result: result.tokens_per_step if _steps_known(result) else 0.0)
    prompts = list(options.prompts)
    lead = Prose(
        f"{pair.name} completes {len(prompts)} prompts, greedily, with up to {options.max_new_tokens} new tokens each. "
        "Multi-token decoding lets the model guess its own next tokens through a small adapter and checks all guesses "
        "in one pass; only guesses that equal what the model itself would have written are kept."
    )
    table = results_table(results, f"{len(prompts)} prompts, {results[0].num_tokens} tokens, one prompt at a time")
    said = Prose(" ".join(verdict(results, machine)))
    fastest = max(results[1:], key=lambda result: result.speedup)
    figures = Figures(
        [
            (f"{fastest.speedup:.2f}x", f"speed of {fastest.name} against plain decoding"),
            (f"{shown.tokens_per_step:.2f}", f"tokens per step, {shown.name}"),
            (
                f"{min(result.num_identical for result in results)} of {len(prompts)}",
                "outputs identical, token for token, whatever the method",
            ),
        ]
    )
    charts: list[Block] = [
        Bars("Tokens per step", [(r.name, r.tokens_per_step, f"{r.tokens_per_step:.2f}") for r in results], 1.0),
        Bars("Speed-up over plain", [(r.name, r.speedup, f"{r.speedup:.2f}x") for r in results], 1.0),
    ]
    legend = Prose(
        f"Below, each colour is one step of {shown.name}: the run of tokens that one pass of the model emitted. "
        "Hover over a run for its number and length."
    )
    texts = [_steps(pair.tokenizer, shown, i, prompts[i]) for i in range(len(prompts))]
    for_contrast = [_steps(pair.tokenizer, results[0], 0, prompts[0])] if results[0] is not shown else []
    return Section(
        name="mtp",
        title="Multi-token prediction",
        blocks=[lead, figures, said, table, *charts, legend, *for_contrast, *texts],
        terminal=[table, said, texts[0]],
        data={
            "model": pair.name,
            "prompts": prompts,
            "max_new_tokens": options.max_new_tokens,
            "repeats": options.repeats,
            "methods": [result.to_dict() for result in results],
        },
    )


def _steps_known(result: MethodResult) -> bool:
    return all(run.step_lengths is not None for run in result.runs)


def _steps(tokenizer: Any, result: MethodResult, number: int, prompt: str) -> Steps:
    run = result.runs[number]
    texts = token_texts(tokenizer, run.prompt_ids, run.new_tokens)
    return Steps(f"Prompt {number + 1}, {result.name}", prompt, split_into_steps(texts, run.step_lengths or []))
