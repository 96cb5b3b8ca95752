"""The command `hf-ext`. Each command is a thin door to public names, and is imported when it is called."""

import importlib
import sys
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from hf_ext import __version__
from hf_ext._extras import missing_extra


class _Door(NamedTuple):
    """Where a command lives: a function, or a `typer.Typer` with commands of its own."""

    module: str
    attribute: str
    help: str


_DOORS = {
    "demo": _Door(
        "hf_ext.cli.demo",
        "demo",
        "See it at work: text in fewer steps, compute by difficulty, typed phrases in speech.",
    ),
    "mtp": _Door("hf_ext.cli.mtp", "app", "Multi-token prediction: train an adapter, generate with it, measure it."),
    "dynamoe": _Door("hf_ext.cli.dynamoe", "app", "Nested experts: convert a dense model, train, evaluate, time it."),
    "kws": _Door("hf_ext.cli.kws", "app", "Keyword spotting: models that find any typed phrase in speech."),
    "env": _Door("hf_ext.cli.env", "env", "Print versions and hardware, to paste into an issue."),
}


class _LazyGroup(TyperGroup):
    """A group that lists its commands from the table above and imports one only when it is called."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, door in _DOORS.items():
            self.commands[name] = TyperCommand(name, help=door.help)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in _DOORS:
            command = _open(_DOORS[name])
        return name, command, rest


def _open(door: _Door) -> Any:
    target: typer.Typer | Callable[..., Any] = getattr(importlib.import_module(door.module), door.attribute)
    if isinstance(target, typer.Typer):
        return typer.main.get_group(target)
    single = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    single.command()(target)
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
