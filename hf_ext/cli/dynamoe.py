"""`hf-ext dynamoe`: make nested experts of a dense model, train their routers, evaluate and time the result."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from hf_ext.cli.loading import check_checkpoint, chosen_device, load_base, load_nested, made_folder, short_name
from hf_ext.cli.options import (
    DATASET_HELP,
    DatasetConfigOption,
    DeviceOption,
    DtypeOption,
    MaxRowsOption,
    NestedOption,
    SplitOption,
    integers,
)
from hf_ext.cli.report import Table, rich_table
from hf_ext.cli.training_rows import check_columns, check_texts, check_tokens
from hf_ext.cli.training_text import load_rows, split_off


class Importance(StrEnum):
    """How neurons are ranked."""

    activation_norm = "activation_norm"
    activation = "activation"
    taylor = "taylor"
    none = "none"


class RouterType(StrEnum):
    """What routers predict: nearness, for every sensitivity, or the label of one sensitivity."""

    ordinal = "ordinal"
    classifier = "classifier"


class Similarity(StrEnum):
    """What nearness is."""

    projection = "projection"
    cosine = "cosine"
    error = "error"


def convert(
    model: Annotated[str, typer.Option(help="Hub id or folder of the dense model; it stays as it is.")],
    dataset: Annotated[
        str | None, typer.Option(help=f"Text to rank neurons on, like what the model will read. {DATASET_HELP}")
    ] = None,
    output_dir: Annotated[Path, typer.Option(file_okay=False, help="Where the converted model goes.")] = Path("moe"),
    dataset_config: DatasetConfigOption = None,
    split: SplitOption = "train",
    max_rows: MaxRowsOption = None,
    num_experts: Annotated[int, typer.Option(help="Number of experts, in equal steps of width.")] = 4,
    widths: Annotated[
        str | None, typer.Option(help="Their widths instead, ascending to the whole MLP, as in 384,768,1536.")
    ] = None,
    importance: Annotated[
        Importance, typer.Option(help="How neurons are ranked; none keeps their order and needs no text.")
    ] = Importance.activation_norm,
    calibration_tokens: Annotated[int, typer.Option(min=2, help="Most tokens that are looked at.")] = 500_000,
    router_type: Annotated[
        RouterType,
        typer.Option(help="Ordinal routers serve every sensitivity, classifiers the one they are trained for."),
    ] = RouterType.ordinal,
    router_hidden_size: Annotated[int, typer.Option(min=1, help="Width of the routers' hidden layer.")] = 256,
    similarity: Annotated[Similarity, typer.Option(help="What nearness to the whole MLP is.")] = Similarity.error,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Longer rows are cut.")] = 1024,
    by_shards: Annotated[
        bool,
        typer.Option(
            "--by-shards", help="From files to files, with one in memory at a time: for a model larger than it."
        ),
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """
    Turn a dense model into nested experts with routers, which computes the same until it is trained.
    """
    from hf_ext import convert_checkpoint_to_dynamoe, convert_to_dynamoe
    from hf_ext.dynamoe.shards import appearing

    console = Console()
    if output_dir.exists() and Path(model).exists() and output_dir.resolve() == Path(model).resolve():
        raise typer.BadParameter(f"--output-dir {output_dir} is the dense model's own folder: take another.")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise typer.BadParameter(f"--output-dir {output_dir} is not empty: take another, or remove what is there.")
    if dataset is None and importance is not Importance.none:
        raise typer.BadParameter(
            f"--importance {importance} ranks neurons on text: name some with --dataset, or keep their order with "
            "--importance none."
        )
    if by_shards and dtype != "auto":
        raise typer.BadParameter("--by-shards keeps the number format of the files: leave out --dtype.")
    settings: dict[str, Any] = {
        "expert_widths": None if widths is None else integers("--widths", widths),
        "calibration_dataset": None if dataset is None else load_rows(dataset, split, dataset_config, max_rows),
        "importance": importance.value,
        "calibration_tokens": calibration_tokens,
        "batch_size": batch_size,
        "max_length": max_length,
        "router_type": router_type.value,
        "router_hidden_size": router_hidden_size,
        "similarity": similarity.value,
    }
    try:
        with made_folder(output_dir.parent):
            if by_shards:
                where = "auto" if device is None else chosen_device(device)
                receipt = convert_checkpoint_to_dynamoe(model, output_dir, num_experts, device_map=where, **settings)
            else:
                with console.status("Loading the model"):
                    dense, tokenizer = load_base(model, device, dtype)
                with appearing(output_dir) as folder:
                    moe = convert_to_dynamoe(dense, num_experts, processing_class=tokenizer, **settings)
                    receipt = moe.conversion_receipt
                    for part in (moe, tokenizer):
                        part.save_pretrained(folder)
    except (OSError, TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    console.print(rich_table(receipt_table(receipt, short_name(model))))
    console.print(
        f"The model is in {output_dir} and computes what the dense one does. Train its routers: "
        f"hf-ext dynamoe train --model {output_dir} --dataset <dataset id or file>",
        markup=False,
        highlight=False,
    )


def receipt_table(receipt: Any, name: str) -> Table:
    """What a conversion did, expert by expert."""
    ranked = receipt.importance != "none"
    rows = []
    for expert, width in enumerate(receipt.expert_widths):
        shares = [layer[expert] for layer in receipt.importance_shares] if ranked else []
        span = f"{min(shares):.0%} to {max(shares):.0%}" if shares else "-"
        rows.append([f"{expert + 1}", f"{width}", f"{width / receipt.expert_widths[-1]:.0%}", span])
    order = f"by {receipt.importance} on {receipt.calibration_tokens:,} tokens" if ranked else "as they were"
    caption = (
        f"{name}: neurons {order}, routers of {receipt.router_parameters:,} parameters, largest difference of a logit "
        f"{receipt.largest_logit_difference:.1e}"
    )
    return Table(["expert", "neurons", "share of the MLP", "importance by layer"], rows, caption)


def train(
    model: NestedOption,
    dataset: Annotated[str, typer.Option(help=DATASET_HELP)],
    output_dir: Annotated[Path, typer.Option(file_okay=False, help="Where the trained model goes.")] = Path("dynamoe"),
    dataset_config: DatasetConfigOption = None,
    split: SplitOption = "train",
    max_rows: MaxRowsOption = None,
    sensitivity: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Train for this one; by default for all. Classifiers need one."),
    ] = None,
    min_sensitivity: Annotated[float, typer.Option(min=0.0, max=1.0, help="The least that is trained for.")] = 0.3,
    active_fraction: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Share of the MLPs to use at --sensitivity; by default what its labels use."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    router_steps: Annotated[
        int,
        typer.Option(
            min=0, help="First steps, which train the routers alone; as many as --steps leaves the model as it was."
        ),
    ] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step and device.")] = 8,
    learning_rate: Annotated[
        float, typer.Option(min=0.0, help="Peak learning rate of the model; the smaller it is, the higher.")
    ] = 1e-5,
    router_learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate of the routers.")] = 1e-3,
    distillation_weight: Annotated[
        float, typer.Option(min=0.0, help="Weight of staying near the dense model's own distribution.")
    ] = 0.0,
    max_length: Annotated[int, typer.Option(min=2, help="Longer sequences are cut.")] = 1024,
    eval_rows: Annotated[int, typer.Option(min=0, help="Rows kept apart and evaluated at the end.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of data order and of sensitivities.")] = 42,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="Number format of the weights that are trained.")] = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Repository to push the model to.")] = None,
) -> None:
    """
    Train a converted model: its routers, and the weights that now serve in slices.

    One process on one device. For more, `DynaMoeTrainer` in a script of your own under `accelerate launch`.
    """
    from hf_ext import DynaMoeTrainer, DynaMoeTrainingConfig

    console = Console()
    if resume:
        check_checkpoint(output_dir)
    rows = load_rows(dataset, split, dataset_config, max_rows)
    check_columns(rows)
    check_texts(rows)
    moe, tokenizer = load_nested(model, device, dtype)
    check_tokens(rows, moe.config.get_text_config().vocab_size)
    train_rows, held_out = split_off(rows, eval_rows, seed)
    try:
        with made_folder(output_dir):
            args = DynaMoeTrainingConfig(
                output_dir=str(output_dir),
                max_steps=steps,
                router_steps=router_steps,
                sensitivity=sensitivity,
                min_sensitivity=min_sensitivity,
                active_fraction=active_fraction,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=batch_size,
                learning_rate=learning_rate,
                router_learning_rate=router_learning_rate,
                distillation_weight=distillation_weight,
                warmup_steps=max(1, steps // 20),
                lr_scheduler_type="cosine",
                max_length=max_length,
                seed=seed,
                bf16=moe.device.type == "cuda" and torch.cuda.is_bf16_supported(),
                use_cpu=moe.device.type == "cpu",
                logging_steps=min(20, steps),
                save_total_limit=2,
                hub_model_id=push_to_hub,
                report_to="none",
            )
            trainer = DynaMoeTrainer(
                model=moe, args=args, train_dataset=train_rows, eval_dataset=held_out, processing_class=tokenizer
            )
            if push_to_hub is not None:  # what can't be pushed to is said before the training, not behind it
                trainer.init_hf_repo()
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    trainer.train(resume_from_checkpoint=resume or None)
    if not all(weight.isfinite().all() for weight in moe.parameters()):
        rates = f"--learning-rate below {learning_rate:g} or a --router-learning-rate below {router_learning_rate:g}"
        console.print(f"Training diverged: take a {rates}.", style="red")
        raise typer.Exit(1)
    trainer.save_model()
    if held_out is not None:
        figures = trainer.evaluate()
        console.print(rich_table(_training_table(figures, f"{len(held_out)} rows that were kept apart")))
    trainer.create_model_card(dataset_name=None if Path(dataset).exists() else dataset)
    console.print(
        f"The model is in {output_dir}. Measure it: hf-ext dynamoe eval --model {output_dir} --dataset {dataset}",
        markup=False,
        highlight=False,
    )
    if push_to_hub is not None:
        console.print(f"Pushed to {trainer.push_to_hub()}")


def _training_table(figures: dict[str, Any], caption: str) -> Table:
    """The trainer's own figures, a sensitivity a row."""
    ending = "_active_fraction"
    names = [name.removesuffix(ending) for name in figures if name.endswith(ending)]
    rows = [
        [
            f"θ = {name.removeprefix('eval_')}",
            f"{figures[name + ending]:.0%}",
            f"{math.exp(min(figures[name + '_lm_loss'], 700)):.3f}",
            f"{figures[name + '_router_accuracy']:.0%}",
        ]
        for name in sorted(names, key=lambda name: float(name.removeprefix("eval_")))
    ]
    return Table(["budget", "active MLP", "perplexity", "router accuracy"], rows, caption)
