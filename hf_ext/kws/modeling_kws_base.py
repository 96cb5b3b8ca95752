"""What the keyword spotting models have in common: how weights begin, and the convention of those that take any phrase."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .modeling_kws_conformer import KwsConformerAttention, check_phoneme_labels
from .modeling_kws_outputs import KeywordSpottingOutput, KwsAudioFeatures


class KwsPreTrainedModel(PreTrainedModel):
    main_input_name = "input_features"
    input_modalities: tuple[str, ...] = ("audio",)
    supports_gradient_checkpointing = True
    # The loss is a mean over the batch: the Trainer divides it among the steps that it accumulates.
    accepts_loss_kwargs = False
    _no_split_modules = ["KwsConformerLayer"]
    # What all of their attention runs by.
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        # The usual 0.02 of language models would leave layers this narrow nearly silent.
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, KwsConformerAttention):
            init.zeros_(module.content_bias)
            init.zeros_(module.position_bias)
        else:
            super()._init_weights(module)


class KwsEncoderPreTrainedModel(KwsPreTrainedModel):
    """With a [`KwsConformerEncoder`] named `encoder`."""

    def get_audio_features(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> KwsAudioFeatures:
        """
        Clips, encoded once for any number of phrases.

        Args:
            input_features (`torch.Tensor` of shape `(batch_size, num_frames, num_mel_bins)`):
                Features of the clips.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for frames that are no padding.

        Returns:
            [`KwsAudioFeatures`]
        """
        hidden, mask = self.encoder(input_features, attention_mask)
        return KwsAudioFeatures(last_hidden_state=hidden, attention_mask=mask)


class TextDefinedKwsPreTrainedModel(KwsEncoderPreTrainedModel):
    input_modalities = ("audio", "text")

    def _check_pairs(
        self,
        input_features: torch.Tensor,
        keyword_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        phoneme_labels: torch.Tensor | None,
    ) -> None:
        """Whether there are as many phrases as clips, and labels as labels are."""
        if phoneme_labels is not None:
            check_phoneme_labels("phoneme_labels", phoneme_labels, len(input_features), self.config.vocab_size)
        if keyword_ids is None and labels is not None:
            raise ValueError("`labels` say whether a clip holds a phrase: `keyword_ids` are missing.")
        if keyword_ids is not None and len(keyword_ids) != len(input_features):
            raise ValueError(
                f"There are {len(keyword_ids)} phrases in `keyword_ids` for {len(input_features)} clips. To match each "
                "clip with each phrase, use `score`."
            )
        if labels is not None and labels.shape != (len(input_features),):
            raise ValueError(
                f"`labels` must have the shape ({len(input_features)},), one for each clip, got {tuple(labels.shape)}."
            )
        if labels is not None and not bool(((labels >= 0) & (labels <= 1)).all()):
            raise ValueError(
                f"`labels` must be 1 where a clip holds its phrase and 0 where it doesn't, got {labels.tolist()[:8]}."
            )

    def _output(self, losses: dict[str, torch.Tensor], **parts: Any) -> KeywordSpottingOutput:
        """The losses, weighted and summed if there are any, beside what else there is."""
        weighted = [getattr(self.config, f"{name}_weight") * loss for name, loss in losses.items()]
        parts |= losses
        return KeywordSpottingOutput(loss=torch.stack(weighted).sum() if weighted else None, **parts)
