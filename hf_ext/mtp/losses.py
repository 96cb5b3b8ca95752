"""The three terms of the training objective (paper, section 2.5), each a function of tensors."""

from __future__ import annotations

import torch
from torch.nn import functional as F


IGNORE_INDEX = -100


def token_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor | None = None,
    soft_target_weight: float = 0.0,
) -> torch.Tensor:
    """
    Cross-entropy of every position, to the label, to a teacher's distribution, or to a mixture of both.

    Args:
        logits (`torch.Tensor` of shape `(..., vocab_size)`):
            Predictions.
        labels (`torch.LongTensor` of shape `(...)`):
            The tokens to predict; [`IGNORE_INDEX`] gives 0.
        teacher_logits (`torch.Tensor` of shape `(..., vocab_size)`, *optional*):
            What the base model says where the same token is to be predicted.
        soft_target_weight (`float`, *optional*, defaults to `0.0`):
            Share of the teacher's distribution in the target; 0 is the paper's loss.

    Returns:
        `torch.FloatTensor` of shape `(...)`.
    """
    logits = _at_least_single(logits)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    loss = loss.view(labels.shape)
    if teacher_logits is not None and soft_target_weight > 0:
        soft = -(_at_least_single(teacher_logits).softmax(-1) * logits.log_softmax(-1)).sum(-1)
        loss = torch.lerp(loss, soft.masked_fill(labels == IGNORE_INDEX, 0.0), soft_target_weight)
    return loss


def latent_consistency(mask_states: torch.Tensor, token_states: torch.Tensor) -> torch.Tensor:
    """
    Squared distance of each mask's state to the state of the ordinary token that predicts the same label, which sees all
    the text in between. The token's state is the fixed point.

    The paper sums over the hidden dimension or averages, it does not say which; the mean keeps the weight of the term
    independent of the width of the model.

    Args:
        mask_states (`torch.Tensor` of shape `(..., hidden_size)`):
            States of masks behind the final norm.
        token_states (`torch.Tensor` of shape `(..., hidden_size)`):
            States of the tokens with the same position, see [`layout.Slots`].

    Returns:
        `torch.FloatTensor` of shape `(...)`.
    """
    return (_at_least_single(mask_states) - _at_least_single(token_states.detach())).square().mean(dim=-1)


def leading_agreement(agrees: torch.Tensor) -> torch.Tensor:
    """
    How many guesses in a row are right from the first on, which is what a step of decoding accepts.

    Args:
        agrees (`torch.BoolTensor` of shape `(..., num_masks)`):
            Whether each guess is what the base model says.

    Returns:
        `torch.LongTensor` of shape `(...)`: from 0 to `num_masks`.

    Example:

    ```python
    >>> leading_agreement(torch.tensor([[True, True, False, True], [False, True, True, True]])).tolist()
    [2, 0]
    ```
    """
    return agrees.long().cumprod(dim=-1).sum(dim=-1)


def _at_least_single(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32, as transformers' own losses: a bf16 log-softmax over a large vocabulary loses the tail."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
