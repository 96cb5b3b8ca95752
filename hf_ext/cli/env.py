"""`hf-ext env`."""

import importlib.metadata
import os
import platform

import typer

from hf_ext import __version__


# Distribution names, in the order in which they are printed.
_DISTRIBUTIONS = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "evaluate",
    "soundfile",
    "onnxruntime",
)


def env() -> None:
    """
    Print the versions and the hardware that a bug report needs.

    Example: `hf-ext env`
    """
    for key, value in environment().items():
        typer.echo(f"- {key}: {value}")


def environment() -> dict[str, str]:
    """What `hf-ext env` prints, as a dictionary."""
    from hf_ext.assets import shipped_models

    facts = {"hf_ext": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in _DISTRIBUTIONS:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts["device"] = _device()
    facts["cpu count"] = str(os.cpu_count())
    facts["shipped models"] = ", ".join(shipped_models()) or "none"
    return facts


def _device() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return f"cpu ({torch.get_num_threads()} threads)"
    if accelerator.type == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"cuda ({', '.join(names)})"
    return accelerator.type
