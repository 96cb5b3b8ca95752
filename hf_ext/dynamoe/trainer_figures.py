"""What a training logs of where tokens go."""

from __future__ import annotations

import torch


def routing_figures(
    chosen: torch.Tensor, wanted: torch.Tensor, widths: torch.Tensor, by_layer: bool
) -> dict[str, torch.Tensor]:
    """
    Args:
        chosen (`torch.LongTensor` of shape `(num_layers, batch_size, sequence_length)`), wanted (`torch.LongTensor` of the same shape):
            The experts that routers choose, and those that labels ask for.
        widths (`torch.Tensor` of shape `(num_experts,)`):
            The experts' shares of the MLP.
        by_layer (`bool`):
            Whether each layer has figures of its own beside their means.

    Returns:
        `dict[str, torch.Tensor]`: figures of shape `(batch_size, sequence_length)`.
    """
    right = (chosen == wanted).float()
    figures = {
        "active_fraction": widths[chosen].mean(0),
        "label_fraction": widths[wanted].mean(0),
        "router_accuracy": right.mean(0),
    }
    for layer, experts in enumerate(chosen if by_layer else []):
        figures[f"layer_{layer}_active_fraction"] = widths[experts]
        figures[f"layer_{layer}_router_accuracy"] = right[layer]
        for expert in range(len(widths)):
            figures[f"layer_{layer}_expert_{expert}"] = (experts == expert).float()
    return figures


def confusion_counts(wanted: torch.Tensor, chosen: torch.Tensor, mask: torch.Tensor, num_experts: int) -> torch.Tensor:
    """
    Args:
        wanted (`torch.LongTensor` of shape `(num_layers, batch_size, sequence_length)`), chosen (`torch.LongTensor` of the same shape):
            The experts that labels ask for, and those that routers choose.
        mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            Where there are tokens.
        num_experts (`int`):
            Number of experts.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_layers, num_experts, num_experts)`: tokens by label and choice.
    """
    pairs = (wanted * num_experts + chosen).transpose(0, 1)
    counts = pairs.new_zeros(*pairs.shape[:2], num_experts**2)
    counts.scatter_add_(-1, pairs, mask[:, None].to(counts).expand_as(pairs))
    return counts.unflatten(-1, (num_experts, num_experts))
