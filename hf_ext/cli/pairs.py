"""A model beside itself with a multi-token adapter, for the command line. Apart from `loading`, since few commands need PEFT."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import typer
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError

from hf_ext import shipped_model
from hf_ext.cli.compare import share_weights
from hf_ext.cli.loading import load_base, short_name


@dataclass
class Pair:
    """
    A model with a multi-token adapter, and the same model without.

    Args:
        name (`str`):
            What was loaded, in words.
        base ([`~transformers.PreTrainedModel`]):
            Free of adapters; shares the weights of `adapted`.
        adapted ([`~peft.PeftModel`]):
            With the adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
    """

    name: str
    base: Any
    adapted: Any
    tokenizer: Any

    @property
    def num_masks(self) -> int:
        return self.adapted.active_peft_config.num_masks


def load_pair(model: str | None, adapter: str | None, device: str | None = None, dtype: str = "auto") -> Pair:
    """
    A model with its multi-token adapter.

    Args:
        model (`str`, *optional*):
            Hub id or folder of the base model, or of an adapter, which names its base itself. By default the small
            story model that comes with the package.
        adapter (`str`, *optional*):
            Hub id or folder of the adapter.
        device (`str`, *optional*), dtype (`str`, *optional*, defaults to `"auto"`):
            As in [`load_base`].

    Raises:
        typer.BadParameter: where a model or an adapter can't be found or does not fit.
    """
    if model is None and adapter is None:
        model, adapter, name = str(shipped_model("tiny-lm")), str(shipped_model("tiny-lm-mtp")), "tiny-lm (shipped)"
    elif adapter is None:
        model, adapter, name = _base_of(model, no_adapter=True), model, short_name(str(model))
    elif model is None:
        model, name = _base_of(adapter, no_adapter=False), short_name(adapter)
    else:
        name = f"{short_name(model)} with {short_name(adapter)}"
    base, tokenizer = load_base(str(model), device, dtype)
    untouched = share_weights(base)
    try:
        with warnings.catch_warnings():
            # PEFT's own use of a property that transformers renamed; nothing that a user could act on.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise typer.BadParameter(f"can't load the adapter {adapter!r}: {error}") from error
    if not hasattr(adapted.active_peft_config, "num_masks"):
        raise typer.BadParameter(
            f"{adapter!r} is a {adapted.active_peft_config.peft_type.value} adapter, not a multi-token one: train one with `hf-ext mtp train`."
        )
    return Pair(name, untouched, adapted, tokenizer)


def _base_of(name: str | None, no_adapter: bool) -> str:
    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    except (OSError, ValueError) as error:
        hint = f"can't load an adapter from {name!r}: {error.__cause__ or error}"
        if no_adapter:
            hint += (
                ". If it is a base model, pass its adapter with --adapter, or train one first: "
                f"hf-ext mtp train --model {name} --dataset <dataset id or file> --output-dir adapter"
            )
        raise typer.BadParameter(hint) from error
    if not base:
        raise typer.BadParameter(f"The adapter {name!r} does not name its base model: pass it with --model.")
    return base
