"""What the text-defined keyword spotting models pass around and return."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput


class KwsAudioFeatures(NamedTuple):
    """
    Encoded clips.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, frames, hidden_size)`):
            States of the encoder.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, frames)`):
            True for frames that are no padding.
    """

    last_hidden_state: torch.Tensor
    attention_mask: torch.Tensor


class KwsTextFeatures(NamedTuple):
    """
    Enrolled phrases.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(num_phrases, phonemes, hidden_size)`):
            Vectors of the phonemes.
        attention_mask (`torch.BoolTensor` of shape `(num_phrases, phonemes)`):
            True for phonemes that are no padding.
        keyword_ids (`torch.LongTensor` of shape `(num_phrases, phonemes)`, *optional*):
            The phonemes, for models that need them to score.
    """

    last_hidden_state: torch.Tensor
    attention_mask: torch.Tensor
    keyword_ids: torch.Tensor | None = None


@dataclass
class KeywordSpottingOutput(ModelOutput):
    """
    Output of the text-defined keyword spotting models.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Weighted sum of the losses below, where there are labels.
        logits (`torch.FloatTensor` of shape `(batch_size,)`, *optional*):
            Log odds that the clip holds the phrase.
        prefix_logits (`torch.FloatTensor` of shape `(batch_size, max_phonemes)`, *optional*):
            The same for the first phoneme of the phrase, the first two, and so on; where there are phoneme labels.
        ctc_logits (`torch.FloatTensor` of shape `(batch_size, frames, vocab_size)`, *optional*):
            Phonemes by frame; where there are phoneme labels.
        utterance_loss, prefix_loss, ctc_loss, contrastive_loss (`torch.FloatTensor` of shape `()`, *optional*):
            The losses that the model has, unweighted.
        audio_features ([`KwsAudioFeatures`], *optional*):
            The encoded clips.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    prefix_logits: torch.Tensor | None = None
    ctc_logits: torch.Tensor | None = None
    utterance_loss: torch.Tensor | None = None
    prefix_loss: torch.Tensor | None = None
    ctc_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    audio_features: KwsAudioFeatures | None = None
