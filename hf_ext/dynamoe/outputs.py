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

    @classmethod
    def from_counts(
        cls, counts: torch.Tensor, widths: list[int], per_neuron: list[int], smallest: float
    ) -> ExpertUsage:
        """
        Args:
            counts (`torch.LongTensor` of shape `(num_layers, num_experts)`):
                Tokens that took each expert.
            widths (`list[int]`):
                Neurons of each expert.
            per_neuron (`list[int]`):
                Parameters of a neuron, for each layer.
            smallest (`float`):
                Parameters of a token that takes the smallest expert everywhere.
        """
        num_tokens = int(counts[0].sum())
        shares = counts / num_tokens
        neurons = (shares * torch.tensor(widths)).sum(-1)
        return cls(
            shares=shares,
            active_fraction=float((neurons / widths[-1]).mean()),
            active_parameters=float(smallest + ((neurons - widths[0]) * torch.tensor(per_neuron)).sum()),
            num_tokens=num_tokens,
        )
