"""[Dynamic sequence partitioning](https://huggingface.co/papers/2306.05245): is this typed phrase in this clip?"""

import math
import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_dsp_kws import DspKwsConfig
from .modeling_kws_base import TextDefinedKwsPreTrainedModel
from .modeling_kws_conformer import KwsConformerEncoder, KwsConformerLayer, phoneme_ctc_loss
from .modeling_kws_contrastive import contrastive_loss, said_phrases
from .modeling_kws_outputs import KeywordSpottingOutput, KwsAudioFeatures, KwsTextFeatures
from .modeling_kws_partition import dynamic_mean_partition, dynamic_partition, equal_partition


# Where the log odds of a phrase begin, as a multiple of its score; chosen here.
_INITIAL_SCALE = 10.0


class DspPhonemeEncoder(nn.Module):
    """Phonemes with their neighbours in mind."""

    def __init__(self, config: DspKwsConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([KwsConformerLayer(config) for _ in range(config.num_text_layers)])

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden


class DspKwsPreTrainedModel(TextDefinedKwsPreTrainedModel):
    config: DspKwsConfig
    base_model_prefix = "dsp_kws"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, DspForKeywordSpotting):
            init.constant_(module.log_scale, math.log(_INITIAL_SCALE))
            init.zeros_(module.bias)
            init.constant_(module.log_temperature, math.log(self.config.initial_temperature))
        else:
            super()._init_weights(module)


class DspForKeywordSpotting(DspKwsPreTrainedModel):
    """
    Text-defined keyword spotting by partition: the frames of a clip are cut into as many consecutive parts as the phrase has
    units, each part becomes one vector, and the phrase's score is the mean cosine of parts and units.

    Units are words with a text encoder such as DistilBERT, as in the paper, or phonemes. The cuts are those that fit best
    (`partitioning="dynamic"`); gradients reach the frames and units through the parts, as if the cuts were given. The log odds
    are the score times a trained factor plus a trained offset.

    A phrase of more units than the clip has frames, 25 a second, can't be in it and has the lowest score, -1.

    The loss joins three: whether the clip holds the phrase, which of all phrases of the batch it holds and in which of all
    clips a phrase is (contrastive), and which phonemes were spoken (CTC).

    Args:
        config ([`DspKwsConfig`]):
            The dimensions, the kind of units and of partition, and the weights of the losses.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_ext import DspForKeywordSpotting, DspKwsConfig, KwsProcessor

    >>> processor, model = KwsProcessor(), DspForKeywordSpotting(DspKwsConfig(num_hidden_layers=1)).eval()
    >>> clips = [np.zeros(16000, dtype=np.float32), np.zeros(12000, dtype=np.float32)]
    >>> inputs = processor(audio=clips, text=["hey computer", "lights on"], sampling_rate=16000, return_tensors="pt")
    >>> model(**inputs).logits.shape
    torch.Size([2])

    >>> audio = model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
    >>> phrases = model.get_text_features(inputs["keyword_ids"], inputs["keyword_attention_mask"])
    >>> model.score(audio, phrases).shape  # each clip with each phrase
    torch.Size([2, 2])
    >>> model.partition(audio, phrases).shape  # and which phoneme each of the frames belongs to
    torch.Size([2, 2, 23])
    ```
    """

    def __init__(self, config: DspKwsConfig) -> None:
        super().__init__(config)
        self.encoder = KwsConformerEncoder(config)
        if config.text_config is None:
            self.text_encoder, text_size = DspPhonemeEncoder(config), config.hidden_size
        else:
            self.text_encoder, text_size = AutoModel.from_config(config.text_config), config.text_config.hidden_size
        self.audio_proj = nn.Linear(config.hidden_size, config.projection_size)
        self.text_proj = nn.Linear(text_size, config.projection_size)
        self.ctc_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.log_scale, self.bias, self.log_temperature = (nn.Parameter(torch.zeros(())) for _ in range(3))
        self.post_init()
        self._freeze()

    @classmethod
    def from_text_pretrained(cls, text_model: str | os.PathLike[str], **settings: Any) -> "DspForKeywordSpotting":
        """
        A new model whose text encoder is pretrained and whose other weights are random.

        Args:
            text_model (`str` or `os.PathLike`):
                Folder or Hub id of the text encoder, in the paper DistilBERT (`"distilbert/distilbert-base-uncased"`).
            **settings:
                Of [`DspKwsConfig`].

        Returns:
            [`DspForKeywordSpotting`]
        """
        encoder = AutoModel.from_pretrained(text_model, dtype=torch.float32)
        model = cls(DspKwsConfig(text_config=encoder.config, **settings))
        model.text_encoder = encoder
        model._freeze()
        return model

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
            [`KwsAudioFeatures`]: of `projection_size` channels and length 1.
        """
        hidden, mask = self.encoder(input_features, attention_mask)
        return KwsAudioFeatures(last_hidden_state=self._project_audio(hidden), attention_mask=mask)

    def get_text_features(
        self,
        keyword_ids: torch.Tensor,
        keyword_attention_mask: torch.Tensor | None = None,
        keyword_word_ids: torch.Tensor | None = None,
    ) -> KwsTextFeatures:
        """
        Phrases, enrolled once for any number of clips.

        Args:
            keyword_ids (`torch.Tensor` of shape `(num_phrases, num_tokens)`):
                Phonemes of the phrases, padded on the right, or tokens of the text encoder.
            keyword_attention_mask (`torch.Tensor` of shape `(num_phrases, num_tokens)`, *optional*):
                1 for tokens that are no padding. By default what is not the padding symbol.
            keyword_word_ids (`torch.Tensor` of shape `(num_phrases, num_tokens)`, *optional*):
                Which word of its phrase each token belongs to, -1 for padding and special tokens, as [`KwsProcessor`] gives
                it. Needed with a text encoder of words; a word's vector is the mean of its tokens'.

        Returns:
            [`KwsTextFeatures`]: of `projection_size` channels and length 1, for each phoneme or word.

        Raises:
            ValueError: if the words are missing or not counted from 0 on, or a shape is wrong.
        """
        _check_phrases(self.config, keyword_ids, keyword_word_ids)
        pad = 0 if self.config.text_config is None else self.config.text_config.pad_token_id
        if keyword_attention_mask is None:
            mask = torch.ones_like(keyword_ids, dtype=torch.bool) if pad is None else keyword_ids.ne(pad)
        else:
            mask = keyword_attention_mask.bool()
        if keyword_word_ids is None:
            units = self.text_encoder(keyword_ids.masked_fill(~mask, 0), mask)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_text_encoder):
                hidden = self.text_encoder(input_ids=keyword_ids, attention_mask=mask.long()).last_hidden_state
            units, mask = _means_of_words(hidden, keyword_word_ids)
        return KwsTextFeatures(
            last_hidden_state=F.normalize(self.text_proj(units.to(self.text_proj.weight.dtype)), dim=-1),
            attention_mask=mask,
        )

    def partition(self, audio: KwsAudioFeatures, text: KwsTextFeatures) -> torch.Tensor:
        """
        Which frames belong to which unit, of each phrase in each clip.

        Args:
            audio ([`KwsAudioFeatures`]):
                What [`~DspForKeywordSpotting.get_audio_features`] returned.
            text ([`KwsTextFeatures`]):
                What [`~DspForKeywordSpotting.get_text_features`] returned.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_phrases, frames)`: the place of each frame's unit in the phrase. -1 for
            padding, and for all frames of a clip that has fewer than there are units.

        Raises:
            ValueError: if the model's `partitioning` is `"attention"`, where every frame belongs to every unit.
        """
        if self.config.partitioning == "attention":
            raise ValueError(
                "With `partitioning='attention'` every frame belongs to every unit: a model with 'dynamic', 'dynamic_mean' "
                "or 'equal' has partitions."
            )
        return self._partition(audio, text.last_hidden_state[None], text.attention_mask[None])

    def score(self, audio: KwsAudioFeatures, text: KwsTextFeatures) -> torch.Tensor:
        """
        Log odds of each phrase in each clip.

        Args:
            audio ([`KwsAudioFeatures`]):
                What [`~DspForKeywordSpotting.get_audio_features`] returned.
            text ([`KwsTextFeatures`]):
                What [`~DspForKeywordSpotting.get_text_features`] returned.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_phrases)`.
        """
        return self._log_odds(self._cosines(audio, text.last_hidden_state[None], text.attention_mask[None]))

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        keyword_ids: torch.Tensor | None = None,
        keyword_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        phoneme_labels: torch.Tensor | None = None,
        keyword_word_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> KeywordSpottingOutput:
        """
        One phrase for each clip.

        Args:
            input_features (`torch.Tensor` of shape `(batch_size, num_frames, num_mel_bins)`):
                Features of the clips.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for frames that are no padding.
            keyword_ids (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                Phonemes or tokens of the phrases. Without them only phonemes are recognised.
            keyword_attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                1 for tokens that are no padding.
            labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                1 where the clip holds the phrase, 0 where it doesn't. Clips with 1 are compared with the phrases of the others
                too.
            phoneme_labels (`torch.Tensor` of shape `(batch_size, num_spoken)`, *optional*):
                The phonemes that were spoken, whatever the phrase is; -100 or padding behind them. They give the CTC loss, and
                tell the contrastive loss which clips say the same. Without them a clip is taken to hold no other phrase than
                its own.
            keyword_word_ids (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                Which word each token belongs to, see [`~DspForKeywordSpotting.get_text_features`].

        Returns:
            [`KeywordSpottingOutput`]

        Raises:
            ValueError: if there are `labels` without `keyword_ids`, the sizes of the batch differ, or words are missing.
        """
        hidden, frame_mask = self.encoder(input_features, attention_mask)
        audio = KwsAudioFeatures(last_hidden_state=self._project_audio(hidden), attention_mask=frame_mask)
        logits = ctc_logits = None
        losses: dict[str, torch.Tensor] = {}
        self._check_pairs(input_features, keyword_ids, labels, phoneme_labels)
        if keyword_ids is not None:
            text = self.get_text_features(keyword_ids, keyword_attention_mask, keyword_word_ids)
            units, unit_mask = text.last_hidden_state, text.attention_mask
            if labels is None:
                logits = self._log_odds(self._cosines(audio, units[:, None], unit_mask[:, None])[:, 0])
            else:
                cosines = self._cosines(audio, units[None], unit_mask[None])
                logits = self._log_odds(cosines.diagonal())
                losses["utterance_loss"] = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
                said = said_phrases(keyword_ids, keyword_attention_mask, labels, phoneme_labels)
                losses["contrastive_loss"] = contrastive_loss(cosines / self.log_temperature.exp(), said)
        if phoneme_labels is not None:
            ctc_logits = self.ctc_head(hidden)
            losses["ctc_loss"] = phoneme_ctc_loss(ctc_logits, frame_mask, phoneme_labels)
        return self._output(losses, logits=logits, ctc_logits=ctc_logits, audio_features=audio)

    def train(self, mode: bool = True) -> "DspForKeywordSpotting":
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        """Neither the weights nor the dropout of a text encoder that is to stay as it is."""
        if self.config.text_config is not None and self.config.freeze_text_encoder:
            self.text_encoder.requires_grad_(False).eval()

    def _project_audio(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.audio_proj(hidden), dim=-1)

    def _log_odds(self, cosines: torch.Tensor) -> torch.Tensor:
        return self.log_scale.exp() * cosines + self.bias

    def _partition(self, audio: KwsAudioFeatures, units: torch.Tensor, unit_mask: torch.Tensor) -> torch.Tensor:
        frames, frame_mask = audio.last_hidden_state[:, None], audio.attention_mask[:, None]
        if self.config.partitioning == "equal":
            return equal_partition(frame_mask, unit_mask)
        if self.config.partitioning == "dynamic_mean":
            return dynamic_mean_partition(frames, units, frame_mask, unit_mask)
        return dynamic_partition(frames @ units.transpose(-1, -2), frame_mask, unit_mask)

    def _cosines(self, audio: KwsAudioFeatures, units: torch.Tensor, unit_mask: torch.Tensor) -> torch.Tensor:
        """
        Mean cosine of units and their parts, of shape `(batch_size, num_phrases)`, for units of shape `(batch_size or 1,
        num_phrases, num_units, projection_size)`.
        """
        frames = audio.last_hidden_state[:, None]
        if self.config.partitioning == "attention":
            similarity = frames @ units.transpose(-1, -2) / self.config.attention_temperature
            outside = ~audio.attention_mask[:, None, :, None]
            shares = similarity.masked_fill(outside, torch.finfo(similarity.dtype).min).softmax(-2)
            possible = unit_mask.any(-1)
        else:
            path = self._partition(audio, units, unit_mask)
            # A sum has the cosine of its mean.
            shares = (path[..., None] == torch.arange(units.shape[-2], device=path.device)).to(frames.dtype)
            possible = path[..., 0] >= 0
        parts = shares.transpose(-1, -2) @ frames
        cosines = F.cosine_similarity(parts, units, dim=-1).masked_fill(~unit_mask, 0.0)
        return (cosines.sum(-1) / unit_mask.sum(-1).clamp(min=1)).masked_fill(~possible, -1.0)


def _check_phrases(config: DspKwsConfig, ids: torch.Tensor, word_ids: torch.Tensor | None) -> None:
    if ids.dim() != 2:
        raise ValueError(f"`keyword_ids` must have the shape (num_phrases, num_tokens), got {tuple(ids.shape)}.")
    if config.text_config is None:
        if word_ids is not None:
            raise ValueError(
                "`keyword_word_ids` are for a text encoder of words, and this model takes phonemes: use a KwsProcessor with a "
                "PhonemeTokenizer."
            )
    elif word_ids is None:
        raise ValueError(
            "`keyword_word_ids` are missing: this model takes words, and has to know which tokens are one. A KwsProcessor "
            "with the tokenizer of its text encoder gives them."
        )
    elif word_ids.shape != ids.shape:
        raise ValueError(
            f"`keyword_word_ids` of shape {tuple(word_ids.shape)} must have that of `keyword_ids`, {tuple(ids.shape)}."
        )


def _means_of_words(hidden: torch.Tensor, word_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    words = torch.arange(int(word_ids.max()) + 1, device=hidden.device)
    belongs = word_ids[:, None] == words[:, None]
    counts = belongs.sum(-1)
    mask = counts > 0
    if not (mask[:, 1:] <= mask[:, :-1]).all():
        raise ValueError("`keyword_word_ids` leave a word out: the words of a phrase are counted from 0 on.")
    return belongs.to(hidden.dtype) @ hidden / counts.clamp(min=1)[..., None], mask
