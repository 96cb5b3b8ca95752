"""`hf-ext demo`: every family of methods at work on real input, on the terminal, as a picture and as a page."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_ext.cli.demo_dynamoe import nested_experts_section
from hf_ext.cli.demo_kws import keyword_spotting_section
from hf_ext.cli.demo_mtp import multi_token_section
from hf_ext.cli.demo_options import PROMPTS, DemoOptions
from hf_ext.cli.options import DeviceOption, DtypeOption, ThreadsOption
from hf_ext.cli.report import Section, print_section, render_page


# One function per family of methods. Each returns its section and the machine that its times were taken on, or None where it
# can't show anything of this model.
SECTIONS: dict[str, Callable[[DemoOptions, Console], tuple[Section, dict[str, str]] | None]] = {
    "mtp": multi_token_section,
    "dynamoe": nested_experts_section,
    "kws": keyword_spotting_section,
}


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id or folder of a causal language model, or of a multi-token adapter. "
            "By default the small story model that comes with the package; that needs no network."
        ),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Hub id or folder of the multi-token adapter.")] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="Also compare with assisted decoding by this smaller model.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt of your own; may be repeated.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, max=len(PROMPTS), help="How many of the built-in prompts.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write per prompt.")] = 200,
    k: Annotated[
        int | None, typer.Option(help="Tokens to guess ahead. By default as many as the adapter can.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")] = 3,
    training_steps: Annotated[
        int, typer.Option(min=0, help="Steps that nested experts are trained for; 0 leaves them out.")
    ] = 120,
    speech: Annotated[bool, typer.Option(help="Look for typed phrases in speech.")] = True,
    phrase: Annotated[
        list[str] | None, typer.Option(help="A phrase of your own to look for; may be repeated.")
    ] = None,
    kws_model: Annotated[
        str | None, typer.Option(help="Hub id or folder of a keyword spotting model; by default the shipped one.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    output_dir: Annotated[Path, typer.Option(help="Where the page, the pictures and the figures go.")] = Path("demo"),
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """
    Speed up a language model with its output unchanged, make it spend compute where text is difficult, find typed phrases in
    speech, and write a page to look at.

    Example: `hf-ext demo`, or `hf-ext demo --model my-org/model --adapter my-org/model-mtp --prompt "def main("`
    """
    from hf_ext.cli.picture import draw

    options = DemoOptions(
        model,
        adapter,
        draft_model,
        prompt or PROMPTS[:num_prompts],
        max_new_tokens,
        k,
        repeats,
        device,
        dtype,
        threads,
        training_steps,
        speech,
        phrase or (),
        kws_model,
    )
    run(options, output_dir, open_page, draw, Console())


def run(
    options: DemoOptions,
    output_dir: Path,
    open_page: bool,
    draw: Callable[[Section, Path], None],
    console: Console,
) -> Path:
    """Runs every section and writes `index.html`, `<section>.png` and `results.json`; returns the page's path."""
    output_dir.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    machine: dict[str, str] = {}
    for make in SECTIONS.values():
        made = make(options, console)
        if made is None:
            continue
        section, machine = made
        print_section(section, console)
        draw(section, output_dir / f"{section.name}.png")
        sections.append(section)
    page = output_dir / "index.html"
    page.write_text(render_page("hf_ext: what it does", sections, machine), encoding="utf-8")
    figures = {"machine": machine, **{section.name: section.data for section in sections}}
    (output_dir / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    written = [page, *(output_dir / f"{section.name}.png" for section in sections), output_dir / "results.json"]
    console.print("\nWritten: " + ", ".join(map(str, written)), markup=False, highlight=False)
    if open_page:
        webbrowser.open(page.resolve().as_uri())
    return page
