"""Tiny random models and adapters for the tests of multi-token prediction."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_ext import GatedLoraConfig


VOCAB_SIZE = 20
SLIDING_WINDOW = 12

_LLAMA_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Name of each shape: model type and what differs from the settings above.
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-odd-heads": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}),
    "llama-dynamic-rope": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": SLIDING_WINDOW}),
    "phi3": ("phi3", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "granite": ("granite", {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 3}),
    # Calls linear layers with all sequences of a batch one behind the other.
    "opt": ("opt", {"num_attention_heads": 3, "ffn_dim": 40, "word_embed_proj_dim": 24}),
    "gpt2": ("gpt2", {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 128, "n_inner": 40}),
}
_NOT_FOR_GPT2 = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
SHAPES = tuple(_SHAPES)
# Without a kernel for the capping of scores, sdpa leaves it out and another text comes out.
SHAPES_AND_ATTENTION = [
    (shape, attention)
    for shape in SHAPES
    for attention in ("sdpa", "eager")
    if (shape, attention) != ("gemma2", "sdpa")
]


def tiny_model(shape: str = "llama", attention: str = "sdpa", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """
    A model of random weights whose text depends on all that it has read and yet has some order in it: where the output
    embedding is its own, token `t + 1` is likely behind token `t`, so that guesses can come true.
    """
    model_type, differences = _SHAPES[shape]
    settings = {**_LLAMA_LIKE, **differences, **changes}
    if model_type == "gpt2":
        settings = {name: value for name, value in settings.items() if name not in _NOT_FOR_GPT2}
    if model_type == "gpt_neox":
        settings.pop("head_dim")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if outputs is not inputs:
            outputs.copy_(inputs.roll(1, dims=0) + 0.3 * torch.randn_like(inputs) * inputs.std())
            # Else the layers, whose weights are as large, would drown the token itself. Gemma does so by itself.
            inputs *= 1 if model_type.startswith("gemma") else 5
    return model


def gated_config(**changes: Any) -> GatedLoraConfig:
    """A small adapter's configuration."""
    return GatedLoraConfig(**{"r": 2, "lora_alpha": 4, "num_masks": 4, **changes})


def randomise(model: nn.Module, std: float = 0.2, seed: int = 1, adapter: str = "default") -> None:
    """Random values for every tensor of an adapter, those that start at zero included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name and adapter in name.split("."):
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
                parameter.copy_(values)


def add_adapter(
    model: PreTrainedModel, std: float = 0.2, seed: int = 1, adapter: str = "default", **changes: Any
) -> PreTrainedModel:
    """Injects an adapter of random weights into a model, as the `load_adapter` of transformers does, and returns it."""
    model.add_adapter(gated_config(**changes), adapter_name=adapter)
    randomise(model, std, seed, adapter)
    return model


def make_skilled(model: nn.Module, adapter: str = "default") -> None:
    """Makes the sampler of a model of [`tiny_model`] guess that token `t + 1` follows token `t`."""
    head = next(module for module in model.modules() if hasattr(module, "lora_sampler_in"))
    size = head.hidden_size
    with torch.no_grad():
        for container in (head.lora_sampler_in, head.lora_sampler_out):
            weight = container[adapter].weight
            weight.copy_(torch.eye(size, weight.shape[1]) * 3)
            container[adapter].bias.zero_()
        for container in (head.lora_sampler_in_norm, head.lora_sampler_out_norm):
            container[adapter].weight.fill_(1)
            container[adapter].bias.zero_()
    head.residual[adapter] = False


def skilled_model(
    shape: str = "llama", attention: str = "sdpa", seed: int = 0, num_masks: int = 4, **changes: Any
) -> PreTrainedModel:
    """A model with an adapter whose guesses often come true, in whose text the true ones and the others mix."""
    model = add_adapter(tiny_model(shape, attention, seed, **changes), num_masks=num_masks)
    make_skilled(model)
    return model


def random_prompt(length: int, seed: int = 0) -> torch.Tensor:
    """Token ids `(1, length)`."""
    return torch.randint(0, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(seed))


def plain(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """What the base model generates greedily, with the adapter that the model carries out of use."""
    with disabled(model):
        return model.generate(*args, do_sample=False, **kwargs)


@contextlib.contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Within this context the adapters that `load_adapter` or `add_adapter` put into a model are out of use."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def details(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Multi-token generation with all that it tells."""
    return model.generate(*args, return_dict_in_generate=True, **kwargs)


def saved_skilled_model(folder: Path) -> tuple[Path, Path]:
    """A base model and an adapter that guesses right, each in a folder of its own."""
    base, adapter = folder / "base", folder / "adapter"
    tiny_model().save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), gated_config(sampler_residual=False))
    randomise(model)
    make_skilled(model)
    model.save_pretrained(adapter)
    return base, adapter
