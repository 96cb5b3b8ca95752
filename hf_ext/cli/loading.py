"""Models for the command line: from a Hub id, a folder, or the package itself, with errors fit for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import typer
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_ext import shipped_model


# What loading raises where there is no model, another kind of one, or files that are damaged, cut off or of different models.
UNLOADABLE = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)
# Below so many parameters, a second thread gains nothing on a CPU: handing out the work takes longer than the work.
_ONE_THREAD_BELOW = 5_000_000


def load_base(name: str, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """
    A causal language model and its tokenizer.

    Args:
        name (`str`):
            Hub id or folder.
        device (`str`, *optional*):
            Where to; by default the accelerator if there is one.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Number format; `"auto"` is the one that it was saved in.

    Raises:
        typer.BadParameter: where there is no such model, number format or device.
    """
    device = chosen_device(device)
    if dtype != "auto":
        number_format(dtype)
    # The bar of loading weights is of no interest where loading takes a moment, and stands in the way of our own.
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except UNLOADABLE as error:
        raise refusal(f"a causal language model from {name!r}", error) from error
    return model.to(device).eval(), tokenizer


def refusal(what: str, error: Exception) -> typer.BadParameter:
    """The error of a command for something that can't be loaded, of what loading it raised."""
    reason = str(error)
    if "ignore_mismatched_sizes" in reason:
        # An argument that no command has.
        reason = "its weights have other sizes than its config.json gives (see above): put back the one they were saved with."
    return typer.BadParameter(f"can't load {what}: {reason}")


def chosen_device(device: str | None) -> str:
    """
    What was asked for, or else the accelerator if there is one.

    Raises:
        typer.BadParameter: for a device that this machine or this build of PyTorch lacks.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator.type if accelerator is not None else "cpu"
    try:
        torch.empty(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(f"--device {device} can't be used here: {reason}") from error
    return device


def number_format(dtype: str) -> torch.dtype:
    """
    The format of weights that a name stands for.

    Raises:
        typer.BadParameter: for a name of none, or of one that weights can't be in.
    """
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise typer.BadParameter(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    return found


def load_spotter(name: str | None, device: str | None = None) -> Any:
    """
    The pipeline of a text-defined keyword spotting model.

    Args:
        name (`str`, *optional*):
            Hub id or folder. By default the small model that comes with the package.
        device (`str`, *optional*):
            As in [`load_base`].

    Returns:
        [`KeywordSpottingPipeline`]

    Raises:
        typer.BadParameter: where there is no such model, or another kind of one.
    """
    from transformers import AutoProcessor, pipeline

    from hf_ext import AutoModelForKeywordSpotting

    logging.disable_progress_bar()
    try:
        folder = shipped_model("slick-small") if name is None else name
        model = AutoModelForKeywordSpotting.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
    except UNLOADABLE as error:
        raise refusal(f"a keyword spotting model from {name or 'the package'!r}", error) from error
    return pipeline("keyword-spotting", model=model, processor=processor, device=chosen_device(device))


def load_nested(name: str, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """
    A model of nested experts and its tokenizer, as [`load_base`] loads them.

    Raises:
        typer.BadParameter: where there is no such model, or a dense one.
    """
    from hf_ext import DynaMoeForCausalLM

    model, tokenizer = load_base(name, device, dtype)
    if not isinstance(model, DynaMoeForCausalLM):
        raise typer.BadParameter(
            f"{name!r} is a {type(model).__name__} without nested experts: make them first with "
            f"`hf-ext dynamoe convert --model {name} --dataset <dataset id or file> --output-dir moe`."
        )
    return model, tokenizer


@contextmanager
def suitable_threads(model: Any, threads: int | None = None) -> Iterator[None]:
    """
    Within it, PyTorch uses `threads` threads; by default one for a small model on a CPU, else as many as before.

    Threads of a small model mostly wait for one another, and where another process holds a core, they wait for that
    too: decoding then becomes many times slower, and times mean nothing.
    """
    before = torch.get_num_threads()
    if threads is None and model.device.type == "cpu" and model.num_parameters() < _ONE_THREAD_BELOW:
        threads = 1
    torch.set_num_threads(threads if threads is not None else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_checkpoint(folder: Path) -> None:
    """
    Refuses to resume from a folder without a checkpoint.

    Raises:
        typer.BadParameter: where there is none.
    """
    # The trainers' module imports PEFT, which most commands do without.
    from transformers.trainer_utils import get_last_checkpoint

    if not folder.is_dir() or get_last_checkpoint(str(folder)) is None:
        raise typer.BadParameter(f"--resume finds no checkpoint in {folder}: leave it out to start anew.")


def make_folder(path: Path) -> None:
    """
    Makes a folder that is not there yet.

    Raises:
        typer.BadParameter: where none can be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"can't make the folder {path}: {error}") from error


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """
    A folder that is made, and gone again with those that it stands in if the block ends badly and nothing came into it.

    Raises:
        typer.BadParameter: where none can be made.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        make_folder(path)
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise


def short_name(name: str) -> str:
    """Hub ids as they are, folders by their last part: a page that is passed on shows no paths."""
    return Path(name).resolve().name if Path(name).exists() else name
