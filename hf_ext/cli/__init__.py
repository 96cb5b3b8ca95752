"""The command `hf-ext`. Each command is a thin door to public names, and is imported when it is called."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from hf_ext import __version__
from hf_ext._extras import missing_extra


class _Door(NamedTuple):
    """Where a command lives: a module's function, with what the list of commands says of it."""

    module: str
    attribute: str
    help: str
    epilog: str | None = None


class _Hall(NamedTuple):
    """A group of commands."""

    help: str
    epilog: str
    doors: dict[str, _Door]


_DOORS: dict[str, _Door | _Hall] = {
    "demo": _Door(
        "hf_ext.cli.demo",
        "demo",
        "See it at work: text in fewer steps, compute by difficulty, typed phrases in speech.",
    ),
    "mtp": _Hall(
        "Multi-token prediction: train an adapter, generate with it, measure it.",
        'Example: `hf-ext mtp generate --prompt "Once upon a time"`',
        {
            "train": _Door(
                "hf_ext.cli.mtp",
                "train",
                "Train an adapter that lets a model guess its own next tokens.",
                "Example: `hf-ext mtp train --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset openai/gsm8k "
                "--dataset-config main --output-dir adapter`",
            ),
            "generate": _Door(
                "hf_ext.cli.mtp",
                "generate",
                "Continue a prompt with multi-token decoding; the text is what plain greedy decoding would write.",
                'Example: `hf-ext mtp generate --prompt "Once upon a time" --k 4 --strategy linear`',
            ),
            "bench": _Door(
                "hf_ext.cli.mtp",
                "bench",
                "Measure tokens per step and speed for several numbers of guesses and every strategy.",
                "Example: `hf-ext mtp bench --k 2 --k 4 --strategy linear --json bench.json`",
            ),
        },
    ),
    "dynamoe": _Hall(
        "Nested experts: a dense model whose compute follows the difficulty of each token.",
        "Example: `hf-ext dynamoe convert --model HuggingFaceTB/SmolLM2-135M --dataset texts.txt --output-dir moe`",
        {
            "convert": _Door(
                "hf_ext.cli.dynamoe",
                "convert",
                "Turn a dense model into nested experts with routers, which computes the same until it is trained.",
                "Example: `hf-ext dynamoe convert --model HuggingFaceTB/SmolLM2-135M --dataset texts.txt "
                "--widths 384,768,1536 --output-dir moe`",
            ),
            "train": _Door(
                "hf_ext.cli.dynamoe",
                "train",
                "Train a converted model: its routers, and the weights that now serve in slices.",
                "Example: `hf-ext dynamoe train --model moe --dataset texts.txt --steps 2000 --distillation-weight 1 "
                "--output-dir trained`",
            ),
            "eval": _Door(
                "hf_ext.cli.dynamoe_eval",
                "evaluate",
                "Measure perplexity, active parameters and time for several sensitivities, and draw where tokens go.",
                "Example: `hf-ext dynamoe eval --model moe --dataset held-out.txt -s 0.5 -s 0.7 -s 0.9`",
            ),
            "bench": _Door(
                "hf_ext.cli.dynamoe_bench",
                "bench",
                "Time decoding and prefill against the dense model: with one expert for all tokens, and with routers.",
                "Example: `hf-ext dynamoe bench --shape 2048,8192,8 -s 0.5`",
            ),
        },
    ),
    "kws": _Hall(
        "Keyword spotting: models that find any typed phrase in speech.",
        "Example: `hf-ext kws train --words-file words.txt --output-dir spotter`",
        {
            "train": _Door(
                "hf_ext.cli.kws_train",
                "train",
                "Train a model that finds any typed phrase, from clips with their text, and save it with processor and card.",
                "Example: `hf-ext kws train --data recordings --words-file words.txt --clips-per-word 8 --output-dir spotter`",
            ),
            "eval": _Door(
                "hf_ext.cli.kws_eval",
                "evaluate",
                "Measure AUC and equal error rate, against random and hard negatives apart, and draw trade-off and scores.",
                "Example: `hf-ext kws eval --model spotter --data recordings --negative random --negative hard`",
            ),
        },
    ),
    "env": _Door("hf_ext.cli.env", "env", "Print versions and hardware, to paste into an issue."),
}


class _LazyGroup(TyperGroup):
    """A group that lists its commands from the table above and imports one only when it is called."""

    def __init__(self, doors: Mapping[str, _Door | _Hall] = _DOORS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.doors = doors
        for name, door in doors.items():
            self.commands[name] = TyperCommand(name, help=door.help)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and name in self.doors:
            command = _open(name, self.doors[name])
        return name, command, rest


def _open(name: str, door: _Door | _Hall) -> Any:
    if isinstance(door, _Hall):
        return _LazyGroup(
            door.doors,
            name=name,
            help=door.help,
            epilog=door.epilog,
            no_args_is_help=True,
            rich_markup_mode="markdown",
        )
    target: Callable[..., Any] = getattr(importlib.import_module(door.module), door.attribute)
    single = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    single.command(epilog=door.epilog)(target)
    return typer.main.get_command(single)


app = typer.Typer(
    name="hf-ext",
    cls=_LazyGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    epilog="Example: `hf-ext demo`, then `hf-ext mtp --help`",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Faster, adaptive and voice-aware models on the Hugging Face stack."""


def main() -> None:
    """Run the command line. A missing optional package ends it with the line that installs it, not with a traceback."""
    try:
        app()
    except Exception as error:
        replacement = missing_extra(error, needed_by="this command")
        if replacement is None:
            raise
        typer.echo(f"Error: {replacement.msg}", err=True)
        sys.exit(1)
