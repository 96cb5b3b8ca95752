"""What a nested model returns beside logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast


@dataclass
class DynaMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """
    What transformers' mixtures return, and where each token went.

    Args:
        aux_loss (`torch.Tensor`, *optional*):
            The routers' loss, a mean over layers and tokens, with `output_router_logits=True` and `labels`.
        router_logits (`tuple[torch.Tensor]`, *optional*):
            One of shape `(batch_size, sequence_length, outputs)` for each layer, with `output_router_logits=True`.
        nearness (`torch.Tensor` of shape `(num_layers, batch_size, sequence_length, num_experts - 1)`, *optional*):
            How near each smaller expert comes to the whole MLP, with `output_nearness=True`.
        expert_index (`torch.LongTensor` of shape `(num_layers, batch_size, sequence_length)`, *optional*):
            The expert that each token took, with `output_router_logits=True`.
        active_parameters (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Number of parameters that each token used, embeddings and routers included, with `output_router_logits=True`.
    """

    nearness: torch.Tensor | None = None
    expert_index: torch.Tensor | None = None
    active_parameters: torch.Tensor | None = None


@dataclass
class ExpertUsage:
    """
    Where the tokens of the last calls went.

    Args:
        shares (`torch.Tensor` of shape `(num_layers, num_experts)`):
            Share of tokens that took each expert; each row sums to 1.
        active_fraction (`float`):
            Mean share of the MLPs' neurons that a token used.
        active_parameters (`float`):
            Mean number of parameters that a token used, embeddings and routers included.
        num_tokens (`int`):
            Number of tokens, padding not counted.
    """

    shares: torch.Tensor
    active_fraction: float
    active_parameters: float
    num_tokens: int
