"""[SLiCK](https://huggingface.co/papers/2409.09067): is this typed phrase in this clip?"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_slick import SlickConfig
from .modeling_kws_base import TextDefinedKwsPreTrainedModel
from .modeling_kws_conformer import KwsConformerEncoder, phoneme_ctc_loss, sinusoids
from .modeling_kws_ctc_score import ctc_phrase_scores, ctc_symbols_heard
from .modeling_kws_outputs import KeywordSpottingOutput, KwsAudioFeatures, KwsTextFeatures


# Below what any phrase costs in a clip that is long enough for it.
_LEAST_READING = -10.0


class SlickMatcher(nn.Module):
    """Attention of phonemes over frames."""

    def __init__(self, config: SlickConfig) -> None:
        super().__init__()
        size, self.num_heads = config.hidden_size, config.num_matcher_heads
        self.positions = config.matcher_positions
        # What usually follows the attention, a projection of its output, the layers of the heads would repeat.
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(size, size) for _ in range(3))

    def forward(self, phonemes: torch.Tensor, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            phonemes (`torch.Tensor` of shape `(batch_size or 1, num_phrases, num_phonemes, hidden_size)`):
                Vectors of the phonemes.
            frames (`torch.Tensor` of shape `(batch_size, num_frames, hidden_size)`):
                States of the encoder.
            mask (`torch.Tensor` of shape `(batch_size, num_frames)`):
                True for frames that are no padding.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_phrases, num_phonemes, hidden_size)`.
        """
        places = phonemes.shape[1:3]
        if self.positions:
            # Of the phonemes alone: where in a clip the phrase begins means nothing.
            steps = torch.arange(phonemes.shape[-2], device=phonemes.device)
            phonemes = phonemes + sinusoids(steps, phonemes.shape[-1]).to(phonemes.dtype)
        queries = self.q_proj(phonemes).flatten(1, 2).expand(len(frames), -1, -1)
        query, key, value = map(self._heads, (queries, self.k_proj(frames), self.v_proj(frames)))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return attended.transpose(1, 2).flatten(2).unflatten(1, places)

    def _heads(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SlickFlattenHead(nn.Module):
    """A layer of its own for the whole phrase, and one for each of its prefixes."""

    def __init__(self, config: SlickConfig) -> None:
        super().__init__()
        self.num_phonemes = length = config.max_phonemes
        self.utterance = nn.Linear(length * config.hidden_size, 2)
        # Row after row of the triangle: the prefix of t phonemes has t vectors of weights.
        self.prefix_weight = nn.Parameter(torch.empty(length * (length + 1) // 2, config.hidden_size))
        self.prefix_bias = nn.Parameter(torch.zeros(length))

    def forward(self, matched: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mismatch, match = self.utterance(matched.flatten(-2)).unbind(-1)
        return match - mismatch

    def prefixes(self, matched: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.tril_indices(self.num_phonemes, self.num_phonemes, device=matched.device)
        weight = self.prefix_weight.new_zeros(self.num_phonemes, self.num_phonemes, matched.shape[-1])
        weight = weight.index_put((rows, columns), self.prefix_weight)
        return torch.einsum("...sd,tsd->...t", matched, weight) + self.prefix_bias


class SlickSharedHead(nn.Module):
    """The mean of one score per phoneme, over the phrase or over a prefix of it."""

    def __init__(self, config: SlickConfig) -> None:
        super().__init__()
        self.score = nn.Linear(config.hidden_size, 1)

    def forward(self, matched: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.prefixes(matched, mask)[..., -1]

    def prefixes(self, matched: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = self.score(matched).squeeze(-1).masked_fill(~mask, 0.0)
        return scores.cumsum(-1) / mask.cumsum(-1).clamp(min=1)


class SlickPreTrainedModel(TextDefinedKwsPreTrainedModel):
    config: SlickConfig
    base_model_prefix = "slick"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)
            # The vector of the padding is trained with the others, and begins as nothing.
            init.zeros_(module.weight[0])
        elif isinstance(module, SlickFlattenHead):
            init.normal_(module.prefix_weight, std=(self.config.hidden_size * self.config.max_phonemes) ** -0.5)
            init.zeros_(module.prefix_bias)
        else:
            super()._init_weights(module)


class SlickForKeywordSpotting(SlickPreTrainedModel):
    """
    Text-defined keyword spotting by attention of 25 phonemes over the states of a small conformer.

    The loss joins three: whether the clip holds the phrase, whether it holds each prefix of the phrase, and which phonemes
    were spoken (CTC). The layers of the last two are not used at inference, unless `ctc_score_weight` says that what the CTC
    layer hears counts too.

    Args:
        config ([`SlickConfig`]):
            The dimensions and the weights of the losses.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_ext import KwsProcessor, SlickConfig, SlickForKeywordSpotting

    >>> processor, model = KwsProcessor(), SlickForKeywordSpotting(SlickConfig()).eval()
    >>> clips = [np.zeros(16000, dtype=np.float32), np.zeros(12000, dtype=np.float32)]
    >>> inputs = processor(audio=clips, text=["hey computer", "lights on"], sampling_rate=16000, return_tensors="pt")
    >>> model(**inputs).logits.shape
    torch.Size([2])

    >>> audio = model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
    >>> phrases = model.get_text_features(inputs["keyword_ids"], inputs["keyword_attention_mask"])
    >>> model.score(audio, phrases).shape  # each clip with each phrase
    torch.Size([2, 2])
    ```
    """

    def __init__(self, config: SlickConfig) -> None:
        super().__init__(config)
        self.encoder = KwsConformerEncoder(config)
        self.phoneme_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.matcher = SlickMatcher(config)
        self.head = SlickFlattenHead(config) if config.head_type == "flatten" else SlickSharedHead(config)
        self.ctc_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.register_buffer("cohort", torch.zeros(config.cohort_size, config.max_phonemes, dtype=torch.long))
        self.post_init()

    def set_cohort(self, keyword_ids: torch.Tensor) -> None:
        """
        Phrases that nobody asks for, to compare the reading of a phrase with (`cohort_score_weight`). They are saved with the
        model.

        Args:
            keyword_ids (`torch.Tensor` of shape `(num_phrases, num_phonemes)`):
                Their phonemes, padded on the right. A hundred common words of three to six phonemes do.

        Raises:
            ValueError: if one has more phonemes than `max_phonemes`, also with `head_type="shared"`.
        """
        ids, mask = self._padded_phrases(keyword_ids, None)
        most = self.config.max_phonemes
        if mask[:, most:].any():
            # The buffer of a model that is loaded has this width.
            raise ValueError(
                f"`keyword_ids` has a phrase of {int(mask.sum(-1).max())} phonemes, and those of a cohort have at most {most} "
                "(`max_phonemes`): leave it out."
            )
        self.cohort = ids[:, :most].to(self.ctc_head.weight.device)
        self.config.cohort_size = len(ids)

    def get_text_features(
        self, keyword_ids: torch.Tensor, keyword_attention_mask: torch.Tensor | None = None
    ) -> KwsTextFeatures:
        """
        Phrases, enrolled once for any number of clips.

        Args:
            keyword_ids (`torch.Tensor` of shape `(num_phrases, num_phonemes)`):
                Phonemes of the phrases, padded on the right.
            keyword_attention_mask (`torch.Tensor` of shape `(num_phrases, num_phonemes)`, *optional*):
                1 for phonemes that are no padding. By default what is not the padding symbol.

        Returns:
            [`KwsTextFeatures`]

        Raises:
            ValueError: if a phrase has more phonemes than the model takes.
        """
        ids, mask = self._padded_phrases(keyword_ids, keyword_attention_mask)
        return KwsTextFeatures(last_hidden_state=self.phoneme_embedding(ids), attention_mask=mask, keyword_ids=ids)

    def score(self, audio: KwsAudioFeatures, text: KwsTextFeatures) -> torch.Tensor:
        """
        Log odds of each phrase in each clip.

        Args:
            audio ([`KwsAudioFeatures`]):
                What [`~SlickForKeywordSpotting.get_audio_features`] returned.
            text ([`KwsTextFeatures`]):
                What [`~SlickForKeywordSpotting.get_text_features`] returned.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_phrases)`.
        """
        matched = self.matcher(text.last_hidden_state[None], audio.last_hidden_state, audio.attention_mask)
        matches = self.head(matched, text.attention_mask[None])
        return self._log_odds(matches, audio, text.keyword_ids, text.attention_mask)

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        keyword_ids: torch.Tensor | None = None,
        keyword_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        phoneme_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> KeywordSpottingOutput:
        """
        One phrase for each clip.

        Args:
            input_features (`torch.Tensor` of shape `(batch_size, num_frames, num_mel_bins)`):
                Features of the clips.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for frames that are no padding.
            keyword_ids (`torch.Tensor` of shape `(batch_size, num_phonemes)`, *optional*):
                Phonemes of the phrases. Without them only phonemes are recognised.
            keyword_attention_mask (`torch.Tensor` of shape `(batch_size, num_phonemes)`, *optional*):
                1 for phonemes that are no padding.
            labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                1 where the clip holds the phrase, 0 where it doesn't.
            phoneme_labels (`torch.Tensor` of shape `(batch_size, num_spoken)`, *optional*):
                The phonemes that were spoken, whatever the phrase is; -100 or padding behind them. They give the prefix
                and CTC losses.

        Returns:
            [`KeywordSpottingOutput`]

        Raises:
            ValueError: if a phrase is too long, there are `labels` without `keyword_ids`, or the sizes of the batch differ.
        """
        audio = self.get_audio_features(input_features, attention_mask)
        frames, frame_mask = audio
        logits = prefix_logits = ctc_logits = None
        losses: dict[str, torch.Tensor] = {}
        self._check_pairs(input_features, keyword_ids, labels, phoneme_labels)
        if keyword_ids is not None:
            ids, mask = self._padded_phrases(keyword_ids, keyword_attention_mask)
            matched = self.matcher(self.phoneme_embedding(ids)[:, None], frames, frame_mask)[:, 0]
            matches = self.head(matched, mask)
            logits = self._log_odds(matches[:, None], audio, ids[:, None], mask[:, None])[:, 0]
            if labels is not None:
                losses["utterance_loss"] = F.binary_cross_entropy_with_logits(matches, labels.to(matches.dtype))
            if phoneme_labels is not None:
                prefix_logits = self.head.prefixes(matched, mask)
                agree = _prefixes_agree(ids, phoneme_labels).to(prefix_logits.dtype)
                losses["prefix_loss"] = F.binary_cross_entropy_with_logits(prefix_logits, agree)
        if phoneme_labels is not None:
            ctc_logits = self.ctc_head(frames)
            losses["ctc_loss"] = phoneme_ctc_loss(ctc_logits, frame_mask, phoneme_labels)
        return self._output(
            losses, logits=logits, prefix_logits=prefix_logits, ctc_logits=ctc_logits, audio_features=audio
        )

    def _log_odds(
        self, matches: torch.Tensor, audio: KwsAudioFeatures, ids: torch.Tensor | None, mask: torch.Tensor
    ) -> torch.Tensor:
        """The matcher's log odds, of shape `(batch_size, num_phrases)`, and what the CTC layer says beside it."""
        config = self.config
        if config.matcher_score_floor is not None:
            matches = matches.clamp(min=config.matcher_score_floor)
        reading: torch.Tensor | float = 0.0
        if config.ctc_score_weight or config.matcher_max_surplus is not None:
            if ids is None:
                raise ValueError(
                    "`text` has no `keyword_ids`, which the CTC layer needs: take what `get_text_features` returned."
                )
            log_probs = self.ctc_head(audio.last_hidden_state).float().log_softmax(-1)
            if config.matcher_max_surplus is not None:
                surplus = ctc_symbols_heard(log_probs, audio.attention_mask)[:, None] - mask.sum(-1)
                matches = matches.masked_fill(surplus > config.matcher_max_surplus, 0.0)
            if config.ctc_score_weight:
                reading = self._reading(log_probs, audio.attention_mask, ids, mask)
        return config.matcher_score_weight * matches + config.ctc_score_weight * reading + config.score_bias

    def _reading(
        self, log_probs: torch.Tensor, frame_mask: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """What it costs to read each phrase in each clip, less what some of it costs to read the cohort."""
        if not self.config.cohort_size:
            return ctc_phrase_scores(log_probs, frame_mask, ids, mask)
        ids, mask = (x.expand(len(log_probs), *x.shape[-2:]) for x in (ids, mask))
        others = self.cohort.expand(len(log_probs), -1, -1)
        # In one pass over the frames, which takes hardly longer for more phrases.
        scores = ctc_phrase_scores(
            log_probs, frame_mask, torch.cat([ids, others], dim=1), torch.cat([mask, others > 0], dim=1)
        )
        reading, theirs = scores.split([ids.shape[1], others.shape[1]], dim=1)
        best = theirs.topk(-(-self.config.cohort_size // 4)).values.mean(-1, keepdim=True)
        # A clip too short for any of them says nothing.
        return reading - self.config.cohort_score_weight * best.clamp(min=_LEAST_READING)

    def _padded_phrases(self, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if ids.dim() != 2:
            raise ValueError(f"`keyword_ids` must have the shape (num_phrases, num_phonemes), got {tuple(ids.shape)}.")
        kept = ids.ne(0) if mask is None else mask.bool()
        most = self.config.max_phonemes
        if self.config.longest_phrase is not None and ids.shape[1] > most:
            longest = int(kept.sum(-1).max())
            if longest > most:
                raise ValueError(
                    f"`keyword_ids` has a phrase of {longest} phonemes and the model takes {most} (`max_phonemes`): "
                    "shorten the phrase, or use a model with `head_type='shared'`."
                )
            ids, kept = ids[:, :most], kept[:, :most]
        missing = max(most - ids.shape[1], 0)
        return F.pad(ids.masked_fill(~kept, 0), (0, missing)), F.pad(kept, (0, missing))


def _prefixes_agree(phrase: torch.Tensor, spoken: torch.Tensor) -> torch.Tensor:
    """Whether phrase and speech begin alike, for each number of phonemes; the padding is a phoneme like any other."""
    spoken = spoken.clamp(min=0)
    length = phrase.shape[1]
    spoken = F.pad(spoken[:, :length], (0, max(length - spoken.shape[1], 0)))
    return (phrase == spoken).cumprod(-1)
