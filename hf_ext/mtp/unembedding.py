"""What a model makes of hidden states that are its own or an adapter's, without a pass of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unembedding(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The output embedding, and what some architectures do with its logits: multiply them (Cohere, Granite) and bound them
    (Gemma 2). Neither changes which token is most likely, but how likely it is.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model.

    Returns:
        `Callable`: from states of shape `(..., hidden_size)` to the model's logits, of shape `(..., vocab_size)`.
    """
    embedding, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    scale, cap = _scale(config), getattr(config, "final_logit_softcapping", None)
    if scale == 1.0 and cap is None:
        return embedding

    def logits_of(states: torch.Tensor) -> torch.Tensor:
        logits = embedding(states) * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return logits_of


def _scale(config: Any) -> float:
    """What logits are multiplied by; the architectures have names of their own for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:
        # Granite and MiniCPM divide by it.
        return config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    return 1.0
