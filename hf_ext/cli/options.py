"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, ... By default the accelerator, if any.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default 1 for a tiny model.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, ... By default as the model was saved.")]
DatasetConfigOption = Annotated[str | None, typer.Option(help="Configuration of the dataset.")]
SplitOption = Annotated[str, typer.Option(help="Split of the dataset.")]
MaxRowsOption = Annotated[int | None, typer.Option(min=1, help="Take the first so many rows.")]
NestedOption = Annotated[str, typer.Option(help="Hub id or folder of the converted model.")]
SensitivityOption = Annotated[
    list[float] | None,
    typer.Option("--sensitivity", "-s", min=0.0, max=1.0, help="From 0 to 1; may be repeated."),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", dir_okay=False, help="Also write the figures to this file.")
]

DATASET_HELP = "Hub id, folder, or file: JSON lines, CSV, Parquet, or text with one row per line."


def integers(option: str, value: str) -> list[int]:
    """
    The numbers of an option such as `--widths 64,128,256`.

    Raises:
        typer.BadParameter: for anything else.
    """
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"{option} must be integers with commas between, as in 64,128,256; got {value!r}."
        ) from error
