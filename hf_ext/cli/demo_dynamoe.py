"""Nested experts in `hf-ext demo`: a small model is converted and trained on the spot, on text that it writes itself."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console

from hf_ext.cli.compare import describe_machine, progress_bar
from hf_ext.cli.demo_options import DemoOptions
from hf_ext.cli.dynamoe_bench import Timing, measure_times, random_model, random_tokens
from hf_ext.cli.dynamoe_budgets import Budget, batches_of, measure, shaded_text
from hf_ext.cli.dynamoe_views import (
    budgets_table,
    cheapest,
    experts_map,
    routed,
    routers_charts,
    trade_off,
    verdict,
)
from hf_ext.cli.loading import suitable_threads
from hf_ext.cli.pairs import load_pair
from hf_ext.cli.report import Bars, Block, Figures, Prose, Section


# Beyond it, training takes longer than anyone watches.
_MOST_PARAMETERS = 5_000_000
_NUM_EXPERTS, _NUM_CUTS = 4, 32
_BATCH_SIZE, _LENGTH, _NUM_TRAIN, _NUM_TEST = 16, 128, 512, 48
_SENSITIVITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
# Where MLPs are wide enough for the clock to follow them, and small enough for a demonstration.
_WIDE = (1024, 4096, 2)


def nested_experts_section(options: DemoOptions, console: Console) -> tuple[Section, dict[str, str]] | None:
    """
    A dense model becomes nested experts, whose routers are trained for a moment; quality at several budgets.

    Args:
        options (`DemoOptions`):
            Which model, and how many steps of training.
        console ([`~rich.console.Console`]):
            Where progress is shown.

    Returns:
        `Section` and `dict[str, str]`: the section, and the machine that its times were taken on. `None`, and a note on the
        console, where the model is too large or can't be converted.
    """
    if options.training_steps == 0:
        return None
    with console.status("Loading the model"):
        pair = load_pair(options.model, options.adapter, options.device, options.dtype)
        # The adapter beside it has frozen the weights that they share.
        base = pair.base.float().requires_grad_(True)
    if base.num_parameters() > _MOST_PARAMETERS:
        _leave_out(f"{pair.name} is too large to be trained in a minute: see `hf-ext dynamoe --help`.", console)
        return None
    num_train = min(_NUM_TRAIN, options.training_steps * _BATCH_SIZE)
    with suitable_threads(base, options.threads):
        rows = sampled_rows(base, pair.tokenizer, num_train + _NUM_TEST, options.prompts, console)
        test, train = rows[:_NUM_TEST], rows[_NUM_TEST:]
        try:
            uncut = copy.deepcopy(base)
            moe, cuts = _converted(base, train, _NUM_EXPERTS), _converted(uncut, train, _NUM_CUTS)
        except ValueError as error:
            _leave_out(str(error), console)
            return None
        start = time.perf_counter()
        _train(moe, pair.tokenizer, train, options.training_steps, console)
        seconds = time.perf_counter() - start
        batches = batches_of(test, _BATCH_SIZE, moe.device)
        budgets = measure(
            moe, batches, _SENSITIVITIES, experts=range(_NUM_EXPERTS - 1), repeats=options.repeats, console=console
        )
        untrained = _untrained(cuts, batches, budgets, console)
        shown = cheapest(budgets)
        coloured = shaded_text(moe, pair.tokenizer, test[0], shown.sensitivity or 1.0, f"A story, {shown.name}")
        with console.status("Making a wide model"):
            wide = random_model(_WIDE, _NUM_EXPERTS, options.device, "float32")
        machine = describe_machine(moe)
    prompt = random_tokens(wide, 1, 64)
    timings = measure_times(wide, (0.5,), prompt=prompt, new_tokens=8, repeats=options.repeats, console=console)
    lead = Prose(
        f"{pair.name} becomes {_NUM_EXPERTS} nested experts per layer: slices of its own MLPs, smallest first, of which a "
        f"router gives each token as much as it needs. Routers and model were trained for {seconds:.0f} seconds "
        f"({options.training_steps} steps) on text that the model wrote itself; all figures are on {_NUM_TEST} other texts of "
        "its own. The sensitivity θ is chosen afterwards: one model for every budget."
    )
    return _describe(lead, budgets, untrained, timings, coloured, moe.config.expert_widths), machine


def _leave_out(reason: str, console: Console) -> None:
    console.print(f"Nested experts are left out: {reason}", style="dim", markup=False, highlight=False)


@torch.no_grad()
def sampled_rows(
    model: Any, tokenizer: Any, count: int, prompts: Sequence[str], console: Console | None = None
) -> list[list[int]]:
    """Texts that a model writes when nothing holds it back, from its first token on, or from those of the prompts."""
    config = model.config.get_text_config()
    start = model.generation_config.bos_token_id
    starts = [start] if isinstance(start, int) else [tokenizer(prompt)["input_ids"][0] for prompt in prompts]
    length = min(_LENGTH, getattr(config, "max_position_embeddings", None) or _LENGTH)
    rows: list[list[int]] = []
    torch.manual_seed(0)
    with progress_bar(console) as progress:
        task = progress.add_task("writing texts to learn from", total=count)
        while len(rows) < count:
            size = min(64, count - len(rows))
            first = torch.tensor([[starts[i % len(starts)]] for i in range(size)], device=model.device)
            written = model.generate(
                input_ids=first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                top_k=0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                pad_token_id=tokenizer.pad_token_id or 0,
                use_cache=True,
            )
            rows += written.tolist()
            progress.update(task, completed=len(rows))
    return rows


def _converted(model: Any, rows: Sequence[Sequence[int]], num_experts: int) -> Any:
    from hf_ext import convert_to_dynamoe

    width = getattr(model.config.get_text_config(), "intermediate_size", None) or num_experts
    return convert_to_dynamoe(
        model,
        # Of any MLP, also one whose width is no multiple.
        expert_widths=sorted({max(1, round(width * (e + 1) / num_experts)) for e in range(num_experts)}),
        calibration_dataset=[{"input_ids": row} for row in rows[:128]],
        router_hidden_size=32,
        disable_tqdm=True,
    )


def _train(moe: Any, tokenizer: Any, rows: list[list[int]], steps: int, console: Console) -> None:
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from hf_ext import DynaMoeTrainer, DynaMoeTrainingConfig

    with progress_bar(console) as progress, tempfile.TemporaryDirectory() as folder, _quiet_datasets():
        task = progress.add_task("training routers", total=steps)

        class Show(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                alone = state.global_step < args.router_steps
                progress.update(
                    task, advance=1, description="training " + ("routers" if alone else "routers and model")
                )

        args = DynaMoeTrainingConfig(
            output_dir=folder,
            max_steps=steps,
            router_steps=steps // 4,
            per_device_train_batch_size=_BATCH_SIZE,
            max_length=_LENGTH,
            # A tiny model takes, and needs, far higher rates than a large one.
            learning_rate=1e-3,
            router_learning_rate=1e-2,
            distillation_weight=1.0,
            warmup_steps=max(1, steps // 20),
            lr_scheduler_type="cosine",
            bf16=False,
            use_cpu=moe.device.type == "cpu",
            seed=0,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        data = Dataset.from_dict({"input_ids": rows})
        trainer = DynaMoeTrainer(
            model=moe, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Show()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without the bars of preparing a few hundred rows."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def _untrained(cuts: Any, batches: Any, budgets: Sequence[Budget], console: Console) -> list[Budget]:
    """For each budget the dense model as it was, cut to the same width for all tokens: at least what the budget uses."""
    widths, whole = cuts.config.expert_widths, cuts.config.expert_widths[-1]
    least = [next(e for e, w in enumerate(widths) if w >= b.active_fraction * whole - 0.01) for b in budgets]
    experts = sorted(set(least))
    found = dict(zip(experts, measure(cuts, batches, (), experts=experts, repeats=0, console=console), strict=True))
    return [found[expert] for expert in least]


def _describe(
    lead: Prose,
    budgets: Sequence[Budget],
    untrained: Sequence[Budget],
    timings: Sequence[Timing],
    coloured: Block,
    widths: Sequence[int],
) -> Section:
    dense, shown = routed(budgets)[-1], cheapest(budgets)
    cut, before = untrained[budgets.index(shown)], untrained[budgets.index(dense)].perplexity
    said = verdict(budgets)
    if shown is not dense:
        said.insert(
            1, f"The model as it was, cut to the same width for all tokens and not trained, has {cut.perplexity:.3f}."
        )
    said.append(
        f"The whole model had {before:.3f} before it learned to serve in slices, and has {dense.perplexity:.3f} since."
    )
    half = next(timing for timing in timings if timing.decode_fraction == 0.5)
    table = budgets_table(
        budgets, f"Perplexity on {_NUM_TEST} texts", one_width_untrained=[f"{own.perplexity:.3f}" for own in untrained]
    )
    said.append(
        f"In a model with wide MLPs ({_WIDE[0]} by {_WIDE[1]}, random weights), half of them decode {half.decode_speedup:.2f} "
        "times as fast as the whole."
    )
    figures = Figures(
        [
            (f"{shown.active_fraction:.0%}", f"of the MLPs per token, at {shown.name}"),
            (f"{shown.perplexity / before - 1:+.1%}", "perplexity against the whole model before training"),
            (f"{cut.perplexity / before - 1:+.1%}", "where every token gets the same share, untrained"),
        ]
    )
    speeds = Bars(
        f"Speed of decoding, wide MLPs ({_WIDE[0]} by {_WIDE[1]})",
        [(f"{t.name} ({t.decode_fraction:.0%})", t.decode_speedup, f"{t.decode_speedup:.2f}x") for t in timings],
        1.0,
    )
    others = sorted({own.active_fraction: own for own in untrained}.values(), key=lambda own: own.active_fraction)
    legend = Prose(
        "Below, each token of a text is shaded by the mean width of the experts that it took while the model read it. Hover "
        "over one for its widths layer by layer."
    )
    prose = Prose(" ".join(said))
    charts = [
        *trade_off(budgets, [("one for all, untrained", others)]),
        experts_map(shown, widths),
        *routers_charts(shown, widths),
        speeds,
    ]
    return Section(
        name="dynamoe",
        title="Compute that follows difficulty",
        blocks=[lead, figures, prose, table, *charts, legend, coloured],
        terminal=[lead, table, prose, coloured],
        data={
            "budgets": [budget.to_dict() for budget in budgets],
            "untrained": [budget.to_dict() for budget in untrained],
            "wide": [timing.to_dict() for timing in timings],
        },
    )
