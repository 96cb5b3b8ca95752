"""The loss of each clip of a batch with every phrase of it."""

import torch
from torch.nn import functional as F


def said_phrases(
    keyword_ids: torch.Tensor,
    keyword_attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    phoneme_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Which phrases of the batch each clip holds, as far as the labels tell.

    Args:
        keyword_ids (`torch.Tensor` of shape `(batch_size, num_tokens)`):
            The phrase of each clip.
        keyword_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
            1 for tokens that are no padding.
        labels (`torch.Tensor` of shape `(batch_size,)`):
            1 where the clip holds its phrase, 0 where it doesn't.
        phoneme_labels (`torch.Tensor` of shape `(batch_size, num_spoken)`, *optional*):
            The phonemes that were spoken; -100 or 0 behind them. A clip holds what a clip that says the same holds.

    Returns:
        `torch.Tensor` of shape `(batch_size, batch_size)`: true for the phrases, along the last axis, that the clip holds.
    """
    ids = keyword_ids
    if keyword_attention_mask is not None:
        ids = ids.masked_fill(~keyword_attention_mask.bool(), -1)
    same_phrase = (ids[:, None] == ids).all(-1)
    if phoneme_labels is None:
        same_speech = torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    else:
        spoken = phoneme_labels.clamp(min=0)
        same_speech = (spoken[:, None] == spoken).all(-1)
    known = same_speech & labels.bool()
    return (known.float() @ same_phrase.float()) > 0


def contrastive_loss(scores: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy of each right pair of a clip and a phrase among the wrong phrases for the clip, plus that among the wrong
    clips for the phrase. Other right pairs are left out.

    Args:
        scores (`torch.Tensor` of shape `(num_clips, num_phrases)`):
            Logits of the pairs.
        said (`torch.Tensor` of shape `(num_clips, num_phrases)`):
            True for the right pairs.

    Returns:
        `torch.Tensor` of shape `()`: the mean over right pairs, 0 without any.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext.kws.modeling_kws_contrastive import contrastive_loss

    >>> contrastive_loss(torch.zeros(3, 3), torch.eye(3, dtype=torch.bool)) / 2  # log(3)
    tensor(1.0986)
    ```
    """
    losses = []
    for rows, right in ((scores, said), (scores.T, said.T)):
        wrong = rows.masked_fill(right, torch.finfo(rows.dtype).min).logsumexp(-1, keepdim=True)
        # -log(exp(right) / (exp(right) + sum of exp(wrong)))
        each = F.softplus(wrong - rows).masked_fill(~right, 0.0)
        losses.append(each.sum() / right.sum().clamp(min=1))
    return torch.stack(losses).sum()
