"""`hf-ext kws`: train models that find typed phrases in speech, and measure them."""

from __future__ import annotations

import typer

from hf_ext.cli.kws_eval import evaluate
from hf_ext.cli.kws_train import train


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Keyword spotting: models that find any typed phrase in speech.",
    epilog="Example: `hf-ext kws train --words-file words.txt --output-dir spotter`",
)

app.command(
    epilog="Example: `hf-ext kws train --data recordings --words-file words.txt --clips-per-word 8 --output-dir spotter`"
)(train)
app.command(
    "eval", epilog="Example: `hf-ext kws eval --model spotter --data recordings --negative random --negative hard`"
)(evaluate)
