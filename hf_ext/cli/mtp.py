"""`hf-ext mtp`: train a multi-token adapter, generate with it, measure it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from huggingface_hub import create_repo
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from transformers import TextStreamer

from hf_ext.cli.compare import (
    MethodResult,
    Strategy,
    assisted,
    compare,
    describe_machine,
    multi_token,
    plain,
    prompt_lookup,
)
from hf_ext.cli.demo_mtp import results_table, verdict
from hf_ext.cli.demo_options import PROMPTS
from hf_ext.cli.loading import check_checkpoint, load_base, made_folder, suitable_threads
from hf_ext.cli.options import (
    DATASET_HELP,
    DatasetConfigOption,
    DeviceOption,
    DtypeOption,
    MaxRowsOption,
    SplitOption,
    ThreadsOption,
)
from hf_ext.cli.pairs import load_pair
from hf_ext.cli.report import Table, rich_table
from hf_ext.cli.training_rows import check_columns, check_texts, check_tokens
from hf_ext.cli.training_text import load_rows, prompts_of, split_off


ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Hub id or folder of the base model, or of an adapter, which names its base itself. "
        "By default the small model that comes with the package."
    ),
]
AdapterOption = Annotated[str | None, typer.Option(help="Hub id or folder of the adapter.")]


def train(
    model: Annotated[str, typer.Option(help="Hub id or folder of the base model; it stays as it is.")],
    dataset: Annotated[str, typer.Option(help=DATASET_HELP)],
    output_dir: Annotated[Path, typer.Option(file_okay=False, help="Where the adapter goes.")] = Path("adapter"),
    dataset_config: DatasetConfigOption = None,
    split: SplitOption = "train",
    max_rows: MaxRowsOption = None,
    on_policy: Annotated[
        bool,
        typer.Option(
            help="Train on the model's own greedy completions of the dataset's prompts, which are written first. "
            "Guesses count when they equal what the model would write, so its own words teach most."
        ),
    ] = True,
    prompts_from: Annotated[
        str | None,
        typer.Option(
            help="Column with the prompts. By default prompt, messages, question or instruction, "
            "else the beginning of each text."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text that serve as its prompt.")] = 32,
    completion_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per completion.")] = 256,
    num_masks: Annotated[int, typer.Option(min=1, help="Most tokens that the adapter can guess ahead.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the gated LoRA.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step and device.")] = 8,
    anchors: Annotated[int, typer.Option(min=1, help="Tokens per sequence with masks behind them.")] = 128,
    learning_rate: Annotated[
        float, typer.Option(min=0.0, help="Peak learning rate; the smaller the model, the higher.")
    ] = 2e-4,
    max_length: Annotated[int, typer.Option(min=2, help="Longer sequences are cut.")] = 1024,
    eval_rows: Annotated[int, typer.Option(min=0, help="Rows kept apart and decoded at the end.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of data order and initial values.")] = 42,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Repository to push the adapter to.")] = None,
) -> None:
    """
    Train an adapter that lets a model guess its own next tokens.

    One process on one device. For more, `accelerate launch` the scripts in `examples/`.
    """
    from hf_ext import GatedLoraConfig, MtpConfig, MtpTrainer, generate_completions

    console = Console()
    if resume:
        check_checkpoint(output_dir)
    rows = load_rows(dataset, split, dataset_config, max_rows)
    if not on_policy:
        check_columns(rows)
        check_texts(rows)
    base, tokenizer = load_base(model, device, dtype)
    if not on_policy:
        check_tokens(rows, base.config.get_text_config().vocab_size)
    with made_folder(output_dir):
        try:
            config = GatedLoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules="all-linear", num_masks=num_masks, task_type="CAUSAL_LM"
            )
            args = MtpConfig(
                output_dir=str(output_dir),
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=batch_size,
                anchors_per_sequence=anchors,
                learning_rate=learning_rate,
                warmup_steps=max(1, steps // 20),
                lr_scheduler_type="cosine",
                max_length=max_length,
                seed=seed,
                bf16=base.device.type == "cuda" and torch.cuda.is_bf16_supported(),
                use_cpu=base.device.type == "cpu",
                logging_steps=min(20, steps),
                save_total_limit=2,
                hub_model_id=push_to_hub,
                report_to="none",
            )
            if push_to_hub is not None:  # what can't be pushed to is said before the work, not behind it
                create_repo(push_to_hub, exist_ok=True)
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
        if on_policy:
            prompts = prompts_of(rows, tokenizer, prompts_from, prompt_tokens)
            rows = generate_completions(
                base,
                tokenizer,
                prompts,
                output_file=output_dir / "completions.jsonl",
                max_new_tokens=completion_tokens,
            )
        train_rows, held_out = split_off(rows, eval_rows, seed)
        try:
            trainer = MtpTrainer(
                model=base,
                args=args,
                train_dataset=train_rows,
                eval_dataset=held_out,
                peft_config=config,
                processing_class=tokenizer,
            )
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    if held_out is not None:
        for name, value in sorted(trainer.evaluate().items()):
            console.print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    console.print(
        f"The adapter is in {output_dir}. Measure it: hf-ext mtp bench --model {model} --adapter {output_dir}"
    )
    if push_to_hub is not None:
        console.print(f"Pushed to {trainer.push_to_hub()}")


def generate(
    prompt: Annotated[str, typer.Option(help="What to continue.")],
    model: ModelOption = None,
    adapter: AdapterOption = None,
    k: Annotated[
        int | None, typer.Option(help="Tokens to guess ahead. By default as many as the adapter can.")
    ] = None,
    strategy: Annotated[
        Strategy, typer.Option(help="Quadratic emits most per step, linear computes least, adaptive is between.")
    ] = (Strategy.quadratic),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 200,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Continue a prompt with multi-token decoding; the text is what plain greedy decoding would write."""
    pair = load_pair(model, adapter, device, dtype)
    inputs = pair.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(pair.adapted.device)
    start = time.perf_counter()
    try:
        with suitable_threads(pair.base, threads):
            output = pair.adapted.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_speculative_tokens=pair.num_masks if k is None else k,
                speculation_strategy=strategy.value,
                streamer=TextStreamer(pair.tokenizer, skip_prompt=False, skip_special_tokens=True),
                return_dict_in_generate=True,
            )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    seconds = time.perf_counter() - start
    tokens, steps = sum(output.step_lengths[0]), int(output.num_steps[0])
    Console(stderr=True).print(
        f"{tokens} tokens in {steps} steps, {float(output.tokens_per_step[0]):.2f} per step, {seconds:.2f} s",
        style="dim",
    )


def bench(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    draft_model: Annotated[
        str | None, typer.Option(help="Also measure assisted decoding by this smaller model.")
    ] = None,
    lookup: Annotated[bool, typer.Option("--prompt-lookup/--no-prompt-lookup", help="Measure it too.")] = True,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file with one prompt per line.")
    ] = None,
    k: Annotated[list[int] | None, typer.Option(help="Tokens to guess ahead; may be repeated.")] = None,
    strategy: Annotated[list[Strategy] | None, typer.Option(help="May be repeated; by default all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write per prompt.")] = 200,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")] = 3,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """
    Measure tokens per step and speed for several numbers of guesses and every strategy.

    What a step costs depends on the machine and on the model, so the fastest setting does too: this finds it.
    """
    console = Console()
    pair = load_pair(model, adapter, device, dtype)
    ks = sorted(set(k)) if k else [count for count in (1, 2, 4, 8, 16) if count <= pair.num_masks]
    if not 1 <= ks[0] <= ks[-1] <= pair.num_masks:
        raise typer.BadParameter(f"--k must be between 1 and {pair.num_masks}, the adapter's masks; got {ks}.")
    strategies = list(dict.fromkeys(strategy)) if strategy else list(Strategy)
    methods = [plain()]
    if lookup:
        methods.append(prompt_lookup())
    if draft_model is not None:
        methods.append(assisted(load_base(draft_model, device, dtype)[0]))
    methods += [multi_token(count, chosen) for chosen in strategies for count in ks]
    prompts = _prompts(prompt, prompts_file)
    with suitable_threads(pair.base, threads):
        try:
            results = compare(
                pair.base,
                pair.adapted,
                pair.tokenizer,
                prompts,
                methods,
                max_new_tokens=max_new_tokens,
                repeats=repeats,
                console=console,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        machine = describe_machine(pair.base)
    caption = f"{pair.name}: {len(prompts)} prompts, {results[0].num_tokens} tokens, one prompt at a time"
    console.print(rich_table(results_table(results, caption)))
    console.print(rich_table(_grid(results, ks, [str(chosen) for chosen in strategies])))
    console.print(" ".join(verdict(results, machine)), markup=False, highlight=False)
    console.print("Measured on: " + ", ".join(f"{key} {value}" for key, value in machine.items()), style="dim")
    if json_file is not None:
        figures = {
            "machine": machine,
            "model": pair.name,
            "prompts": list(prompts),
            "max_new_tokens": max_new_tokens,
            "repeats": repeats,
            "methods": [result.to_dict() for result in results],
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written: {json_file}", markup=False, highlight=False)


def _prompts(prompts: Sequence[str] | None, file: Path | None) -> list[str]:
    chosen = list(prompts or [])
    if file is not None:
        chosen += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not chosen:
            raise typer.BadParameter(f"{file} holds no prompt.")
    return chosen or list(PROMPTS)


def _grid(results: Sequence[MethodResult], ks: Sequence[int], strategies: Sequence[str]) -> Table:
    """Guesses by strategy: tokens per step and, behind it, the speed-up."""
    by_name: dict[str, Any] = {result.name: result for result in results}
    rows = []
    for count in ks:
        cells = [by_name[multi_token(count, strategy).name] for strategy in strategies]
        rows.append([str(count), *(f"{cell.tokens_per_step:.2f} ({cell.speedup:.2f}x)" for cell in cells)])
    return Table(["k", *strategies], rows, "Tokens per step (speed-up)")
