"""What a dense model has to be to be converted; asked before anything is read or changed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME
from transformers.utils.hub import cached_file

from .configuration_dynamoe import DynaMoeConfig, equal_widths, mlp_width
from .modeling_dynamoe import DynaMoeForCausalLM
from .nested_mlp import CONVERTIBLE, activation_of, mlp_places, neurons_of, projection_names


def dense_skeleton(name: str | os.PathLike[str]) -> PreTrainedModel:
    """
    A dense model without its weights: what can't be converted is refused before they are read.

    Args:
        name (`str` or `os.PathLike`):
            Its folder or its name on the Hub.

    Returns:
        [`~transformers.PreTrainedModel`] on the device `meta`.

    Raises:
        ValueError: for an adapter, and a configuration of a model that is nested or quantised already, or no causal language
            model.
    """
    if cached_file(name, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is not None:
        raise ValueError(
            f"'{name}' holds an adapter ({ADAPTER_CONFIG_NAME}), whose weights wouldn't follow the neurons: merge it and save the "
            "merged model, or convert the dense model alone and put the adapter onto the result."
        )
    config = AutoConfig.from_pretrained(name)
    if config.model_type == DynaMoeConfig.model_type:
        raise ValueError(f"'{name}' is a DynaMoE model already: convert the dense model that it was made of.")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(_quantised(f"'{name}'"))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"'{name}' is a model of type '{config.model_type}', which is no causal language model. Can be converted: "
            f"{', '.join(CONVERTIBLE)}, and others with such MLPs."
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def nested_config(
    model: PreTrainedModel,
    num_experts: int,
    expert_widths: Iterable[int] | None,
    **settings: Any,
) -> DynaMoeConfig:
    """
    The configuration of a dense model when it will be nested.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The dense model.
        num_experts (`int`), expert_widths (`Iterable[int]`, *optional*):
            See [`convert_to_dynamoe`].
        settings (`Any`):
            Further fields of [`DynaMoeConfig`].

    Raises:
        TypeError: for anything but a model of transformers.
        ValueError: for a model that is nested, quantised, adapted or offloaded, for MLPs that can't be nested, and for
            experts that don't fit them.
    """
    if isinstance(model, DynaMoeForCausalLM):
        raise ValueError("The model is a DynaMoeForCausalLM already: convert the dense model that it was made of.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a PreTrainedModel or its name, got {type(model).__name__}. Merge a PEFT adapter first with "
            "`merge_and_unload()`, or put one onto the converted model."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model carries an adapter, whose weights wouldn't follow the neurons: merge it first, or delete it and put it "
            "onto the converted model."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(_quantised("The model"))
    mlp_places(model, model.config)
    if expert_widths is None:
        expert_widths = equal_widths(mlp_width(model.config), num_experts)
    elif not isinstance(expert_widths, Iterable):
        raise ValueError(f"`expert_widths` must be integers such as (64, 128, 256), got {expert_widths!r}.")
    base_config: PreTrainedConfig = model.config
    return DynaMoeConfig(base_config=base_config, expert_widths=list(expert_widths), dtype=model.dtype, **settings)


@torch.no_grad()
def check_formula(model: PreTrainedModel, mlps: list[Any], ids: torch.Tensor) -> None:
    """
    Refuses MLPs that do something else with their projections than a sum over neurons: their slices would be nonsense.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The dense model.
        mlps (`list[nn.Module]`):
            Its MLPs.
        ids (`torch.LongTensor` of shape `(1, num_tokens)`):
            What to compare on.

    Raises:
        ValueError: with the architectures that can be converted.
    """
    wrong = []

    def compare(mlp: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        *inputs, last = projection_names(mlp)  # type: ignore[misc]
        again = getattr(mlp, last)(neurons_of(mlp, tuple(inputs), activation_of(mlp), args[0]))
        if args[0].dim() != 3 or float((again - output).norm()) > 0.01 * float(output.norm()):
            wrong.append(type(mlp).__name__)

    handles = [mlp.register_forward_hook(compare) for mlp in mlps]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if wrong:
        raise ValueError(
            f"A model of type '{model.config.model_type}' can't be converted: what {wrong[0]} computes for rows of tokens is not "
            f"its output projection of activated neurons. Can be converted: {', '.join(CONVERTIBLE)}, and others with such MLPs."
        )


def beside(kind: Any, name: str | os.PathLike[str], filename: str) -> Any:
    """
    What lies beside a model's weights, such as its tokenizer.

    Args:
        kind (`type`):
            Its class.
        name (`str` or `os.PathLike`):
            The model's folder or its name on the Hub.
        filename (`str`):
            The file without which there is none: some tokenizers would come up empty.

    Returns:
        An instance of the class, or `None`.
    """
    if cached_file(name, filename, _raise_exceptions_for_missing_entries=False) is None:
        return None
    return kind.from_pretrained(name)


def _quantised(subject: str) -> str:
    return (
        f"{subject} is quantised, and its neurons can't be reordered: convert the model as it was before, and quantise the "
        "result, or load it with `dtype=torch.bfloat16` instead."
    )
