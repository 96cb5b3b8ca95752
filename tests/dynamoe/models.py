"""Tiny random models for the tests of nested experts, and the plainest forms of what they must equal."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_ext import DynaMoeForCausalLM, convert_to_dynamoe


VOCAB_SIZE = 40
WIDTH = 24
WIDTHS = [5, 12, 24]

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Name of each shape: model type and what differs from the settings above.
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "olmo": ("olmo", {}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
}
SHAPES = tuple(_SHAPES)


def tiny_model(shape: str = "llama", attention: str = "sdpa", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A dense model of random weights, biases included."""
    model_type, differences = _SHAPES[shape]
    dtype = changes.pop("dtype", torch.float32)
    settings = {**_COMMON, **differences, **changes}
    if model_type == "gpt_neox":
        settings = {name: value for name, value in settings.items() if name not in ("head_dim", "num_key_value_heads")}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings)
    # Not `.to(dtype)`, which would round the buffers of rope as well.
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids."""
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def calibration_rows(num_rows: int = 4, length: int = 20) -> list[dict[str, list[int]]]:
    return [{"input_ids": row} for row in random_ids(num_rows, length, seed=7).tolist()]


def tiny_moe(shape: str = "llama", attention: str = "sdpa", seed: int = 0, **changes: Any) -> DynaMoeForCausalLM:
    """A converted model whose routers send tokens everywhere."""
    options = {"expert_widths": WIDTHS, "router_hidden_size": 16, "disable_tqdm": True}
    options |= {name: changes.pop(name) for name in ("router_type", "similarity", "expert_widths") if name in changes}
    moe = convert_to_dynamoe(
        tiny_model(shape, attention, seed, **changes), calibration_dataset=calibration_rows(), **options
    )
    spread_routers(moe)
    return moe


def spread_routers(moe: DynaMoeForCausalLM, seed: int = 0) -> None:
    """Random routers in place of those that start at the full expert."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mlp in moe.nested_mlps():
            mlp.router.out.weight.copy_(torch.randn(mlp.router.out.weight.shape, generator=generator) * 2)
            mlp.router.out.bias.zero_()


def unnested(moe: DynaMoeForCausalLM) -> PreTrainedModel:
    """The dense model of transformers' own classes alone, with the neurons in their new order."""
    dense = copy.deepcopy(moe.model)
    for parent in list(dense.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "router"):
                setattr(parent, name, child.dense)
    return dense


def cut(moe: DynaMoeForCausalLM, expert: int) -> PreTrainedModel:
    """The dense model of transformers' own classes whose MLPs are only as wide as an expert."""
    width = moe.config.expert_widths[expert]
    small = unnested(moe)
    for parent in list(small.modules()):
        for name in ("gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h"):
            if isinstance(layer := getattr(parent, name, None), nn.Linear):
                parts = layer.weight.shape[0] // WIDTH
                rows = torch.cat([torch.arange(width) + part * WIDTH for part in range(parts)])
                layer.weight = nn.Parameter(layer.weight.detach()[rows].clone())
                if layer.bias is not None:
                    layer.bias = nn.Parameter(layer.bias.detach()[rows].clone())
        for name in ("down_proj", "dense_4h_to_h"):
            if isinstance(layer := getattr(parent, name, None), nn.Linear):
                layer.weight = nn.Parameter(layer.weight.detach()[:, :width].clone())
    return small
