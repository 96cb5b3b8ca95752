"""`hf-ext dynamoe eval`: quality against compute, and where tokens go, as table, pictures and page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_ext.cli.compare import describe_machine
from hf_ext.cli.dynamoe_budgets import Budget, batches_of, measure, served_sensitivities, shaded_text
from hf_ext.cli.dynamoe_views import (
    budgets_table,
    cheapest,
    experts_map,
    fixed,
    routed,
    routers_charts,
    trade_off,
    verdict,
)
from hf_ext.cli.loading import load_nested, make_folder, short_name, suitable_threads
from hf_ext.cli.options import (
    DATASET_HELP,
    DatasetConfigOption,
    DeviceOption,
    DtypeOption,
    MaxRowsOption,
    NestedOption,
    SensitivityOption,
    SplitOption,
    ThreadsOption,
)
from hf_ext.cli.report import Block, Prose, Section, print_section, render_page, write_json
from hf_ext.cli.training_rows import check_tokens
from hf_ext.cli.training_text import load_rows, token_rows


def evaluate(
    model: NestedOption,
    dataset: Annotated[str, typer.Option(help=f"Text that was not trained on. {DATASET_HELP}")],
    output_dir: Annotated[Path, typer.Option(file_okay=False, help="Where pictures, page and figures go.")] = Path(
        "dynamoe-eval"
    ),
    dataset_config: DatasetConfigOption = None,
    split: SplitOption = "train",
    max_rows: MaxRowsOption = None,
    sensitivity: SensitivityOption = None,
    text: Annotated[
        str | None, typer.Option(help="A text to colour by the experts of its tokens; by default a row.")
    ] = None,
    show: Annotated[
        float | None,
        typer.Option(help="The sensitivity that heat maps and the coloured text show; by default a good one."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens that are read.")] = 20_000,
    max_length: Annotated[int, typer.Option(min=2, help="Longer rows are cut.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed readings; the median counts.")] = 3,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """
    Measure perplexity, active parameters and time for several sensitivities, and draw where tokens go.
    """
    from hf_ext.cli.picture import draw

    console = Console()
    with console.status("Loading the model"):
        moe, tokenizer = load_nested(model, device, dtype)
    rows = load_rows(dataset, split, dataset_config, max_rows)
    check_tokens(rows, moe.config.get_text_config().vocab_size)
    limit = getattr(moe.config.get_text_config(), "max_position_embeddings", None) or max_length
    try:
        found = token_rows(rows, tokenizer, min(max_length, limit), max_tokens)
    except (TypeError, ValueError) as error:  # a tokenizer without a chat template, text that is none
        raise typer.BadParameter(f"can't read the dataset {dataset!r}: {error}") from error
    wanted = served_sensitivities(moe.config, sensitivity, (0.3, 0.5, 0.7, 0.8, 0.9))
    if show is not None and show not in wanted:
        raise typer.BadParameter(f"--show {show:g} is none of the sensitivities that are measured: {wanted}.")
    ids = found[0] if text is None else tokenizer(text)["input_ids"][:limit]
    if not ids:
        raise typer.BadParameter(f"--text {text!r} has no token.")
    make_folder(output_dir)
    with suitable_threads(moe, threads):
        try:
            budgets = measure(
                moe,
                batches_of(found, batch_size, moe.device),
                wanted,
                experts=range(moe.config.num_experts - 1),
                repeats=repeats,
                console=console,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        machine = describe_machine(moe)
    shown = next((b for b in routed(budgets) if b.sensitivity == show), cheapest(budgets))
    coloured = shaded_text(moe, tokenizer, ids, shown.sensitivity or 0.0, f"A text, {shown.name}")
    caption = f"{short_name(model)}: {sum(map(len, found)):,} tokens in {len(found)} rows"
    sections = _sections(budgets, shown, moe.config.expert_widths, caption, coloured)
    print_section(sections[0], console)
    for section in sections:
        draw(section, output_dir / f"{section.name}.png")
    page = output_dir / "index.html"
    page.write_text(
        render_page(f"{short_name(model)}: nested experts", sections, machine, "hf-ext dynamoe eval"), "utf-8"
    )
    figures = {"machine": machine, "model": short_name(model), "budgets": [budget.to_dict() for budget in budgets]}
    write_json(output_dir / "results.json", figures)
    pictures = [output_dir / f"{section.name}.png" for section in sections]
    written = [page, *pictures, output_dir / "results.json"]
    console.print("Written: " + ", ".join(map(str, written)), markup=False, highlight=False)


def _sections(
    budgets: list[Budget], shown: Budget, widths: Sequence[int], caption: str, coloured: Block
) -> list[Section]:
    table = budgets_table([*routed(budgets), *fixed(budgets)], caption)
    said = Prose(" ".join(verdict(budgets)))
    legend = Prose(
        "Each token is shaded by the mean width of the experts that it took while the model read it. Hover over one for "
        "its widths layer by layer."
    )
    sections = [
        Section("trade_off", "Quality for compute", [said, table, *trade_off(budgets)], [table, said]),
        Section("experts", "Who takes which expert", [experts_map(shown, widths)], []),
        Section("routers", "How well routers choose", routers_charts(shown, widths), []),
        Section("text", "Where compute goes", [legend, coloured], []),
    ]
    return [section for section in sections if section.blocks]
