"""The encoder of the keyword spotting models with a CTC head: what they are all warm-started from."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import can_return_tuple

from .configuration_kws_conformer import KwsConformerConfig
from .modeling_kws_base import KwsEncoderPreTrainedModel
from .modeling_kws_conformer import KwsConformerEncoder, check_phoneme_labels, phoneme_ctc_loss


class KwsConformerPreTrainedModel(KwsEncoderPreTrainedModel):
    config: KwsConformerConfig
    base_model_prefix = "kws_conformer"


class KwsConformerForCTC(KwsConformerPreTrainedModel):
    """
    Which phonemes are spoken, by frame.

    The encoder and the head have the names that they have in [`SlickForKeywordSpotting`]: their weights move over as they
    are, where the dimensions are the same.

    Args:
        config ([`KwsConformerConfig`]):
            The dimensions.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext import KwsConformerConfig, KwsConformerForCTC, PhonemeTokenizer, SlickConfig, SlickForKeywordSpotting

    >>> model = KwsConformerForCTC(KwsConformerConfig(num_hidden_layers=2)).eval()
    >>> logits = model(torch.zeros(1, 98, 80), labels=torch.tensor([[20, 31, 9]])).logits
    >>> logits.shape
    torch.Size([1, 23, 74])
    >>> heard = PhonemeTokenizer().batch_decode(logits.argmax(-1), group_tokens=True)  # "HH EY1 K AH0 ..."

    >>> spotter = SlickForKeywordSpotting(SlickConfig(num_hidden_layers=2))
    >>> spotter.encoder.load_state_dict(model.encoder.state_dict())
    <All keys matched successfully>
    ```
    """

    def __init__(self, config: KwsConformerConfig) -> None:
        super().__init__(config)
        self.encoder = KwsConformerEncoder(config)
        self.ctc_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """
        Args:
            input_features (`torch.Tensor` of shape `(batch_size, num_frames, num_mel_bins)`):
                Features of the clips.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for frames that are no padding.
            labels (`torch.Tensor` of shape `(batch_size, num_spoken)`, *optional*):
                The phonemes that were spoken; -100 or 0 behind them.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutput`]: `logits` of shape `(batch_size, frames, vocab_size)`, and with
            labels the CTC `loss`: a mean over clips, each divided by its number of phonemes.

        Raises:
            ValueError: if features have another number of channels, or a label is no symbol of the vocabulary.
        """
        hidden, mask = self.encoder(input_features, attention_mask)
        logits = self.ctc_head(hidden)
        loss = None
        if labels is not None:
            check_phoneme_labels("labels", labels, len(input_features), self.config.vocab_size)
            loss = phoneme_ctc_loss(logits, mask, labels)
        return CausalLMOutput(loss=loss, logits=logits)
