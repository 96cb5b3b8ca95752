"""
[CED](https://huggingface.co/papers/2308.06472), the common embedding based detector: phrases are written in the language of
the encoder of the audio.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_ced import CedConfig
from .modeling_ced_table import NUM_SPECIAL, CedPhonemeTable, are_recognised, mean_states_of_runs
from .modeling_kws_base import TextDefinedKwsPreTrainedModel
from .modeling_kws_conformer import KwsConformerEncoder, phoneme_ctc_loss
from .modeling_kws_outputs import KeywordSpottingOutput, KwsAudioFeatures, KwsTextFeatures
from .modeling_kws_partition import dynamic_partition


# Log odds of a phrase with more phonemes than the clip has states, which can't have been said in it.
_REJECTED = -20.0


class CedVerifier(nn.Module):
    """Reads, phoneme by phoneme, how well the states agree with the phrase."""

    def __init__(self, config: CedConfig) -> None:
        super().__init__()
        size = config.verifier_size
        self.gru = nn.GRU(config.hidden_size, size, batch_first=True)
        self.hidden = nn.Linear(size, size)
        self.score = nn.Linear(size, 1)

    def forward(self, agreement: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            agreement (`torch.Tensor` of shape `(batch_size, num_phrases, num_phonemes, hidden_size)`):
                Weighted states of each phoneme.
            mask (`torch.Tensor` of shape `(batch_size or 1, num_phrases, num_phonemes)`):
                True for phonemes that are no padding.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_phrases)`.
        """
        pairs = agreement.shape[:2]
        states, _ = self.gru(agreement.flatten(0, 1))
        last = (mask.sum(-1) - 1).clamp(min=0).expand(pairs).flatten()
        state = states[torch.arange(len(states), device=states.device), last]
        return self.score(F.relu(self.hidden(state))).unflatten(0, pairs).squeeze(-1)


class CedPreTrainedModel(TextDefinedKwsPreTrainedModel):
    config: CedConfig
    base_model_prefix = "ced"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.GRU):
            for name, weight in module.named_parameters():
                fill = init.zeros_ if "bias" in name else init.xavier_uniform_
                fill(weight)
        elif isinstance(module, CedPhonemeTable):
            init.normal_(module.vectors)
        else:
            super()._init_weights(module)


class CedForKeywordSpotting(CedPreTrainedModel):
    """
    Text-defined keyword spotting in one space: a phoneme of the phrase is the mean of the states that the encoder itself has
    where it hears this phoneme.

    It is trained in three stages, as `examples/train_ced_kws.py` does it. The encoder learns to recognise phonemes
    (`ctc_loss`). [`~CedForKeywordSpotting.build_phoneme_table`] makes a vector of each phoneme out of its states; until then
    they are random. And while the encoder stays as it is, a verifier learns whether a clip holds a phrase (`utterance_loss`):
    the frames are shared out among the phonemes in order, so that their cosines have the greatest sum, and a GRU reads what
    each phoneme got.

    A phrase with more phonemes than the clip has states, one for every four frames, is rejected with log odds of -20, and
    counts nothing in the loss where the label says otherwise.

    Args:
        config ([`CedConfig`]):
            The dimensions and the weights of the losses.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_ext import CedConfig, CedForKeywordSpotting, KwsProcessor

    >>> processor, model = KwsProcessor(), CedForKeywordSpotting(CedConfig()).eval()
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

    def __init__(self, config: CedConfig) -> None:
        super().__init__(config)
        self.encoder = KwsConformerEncoder(config)
        self.ctc_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.phoneme_table = CedPhonemeTable(config)
        self.verifier = CedVerifier(config)
        self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True) -> "CedForKeywordSpotting":
        """As of any module; what is frozen stays in evaluation, so that the table stays right."""
        super().train(mode)
        if self.config.freeze_encoder:
            for module in (self.encoder, self.ctc_head):
                # Loading makes new parameters, which want gradients again; `from_pretrained` comes through here at its end.
                module.eval().requires_grad_(False)
        return self

    def freeze_encoder(self) -> None:
        """Leaves encoder and CTC head as they are from now on, also in whatever is loaded from this model's folder."""
        self.config.freeze_encoder = True
        self.train(self.training)

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
        """
        if keyword_ids.dim() != 2:
            raise ValueError(
                f"`keyword_ids` must have the shape (num_phrases, num_phonemes), got {tuple(keyword_ids.shape)}."
            )
        mask = keyword_ids.ne(0) if keyword_attention_mask is None else keyword_attention_mask.bool()
        return KwsTextFeatures(last_hidden_state=self.phoneme_table(keyword_ids), attention_mask=mask)

    def score(self, audio: KwsAudioFeatures, text: KwsTextFeatures) -> torch.Tensor:
        """
        Log odds of each phrase in each clip.

        Args:
            audio ([`KwsAudioFeatures`]):
                What [`~CedForKeywordSpotting.get_audio_features`] returned.
            text ([`KwsTextFeatures`]):
                What [`~CedForKeywordSpotting.get_text_features`] returned.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_phrases)`.
        """
        logits, _ = self._verify(audio, text.last_hidden_state[None], text.attention_mask[None])
        return logits

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
                The phonemes that were spoken, whatever the phrase is; -100 or padding behind them. They give the CTC loss.

        Returns:
            [`KeywordSpottingOutput`]

        Raises:
            ValueError: if there are `labels` without `keyword_ids`, or the sizes of the batch differ.
        """
        audio = self.get_audio_features(input_features, attention_mask)
        logits = ctc_logits = None
        losses: dict[str, torch.Tensor] = {}
        self._check_pairs(input_features, keyword_ids, labels, phoneme_labels)
        if keyword_ids is not None:
            text = self.get_text_features(keyword_ids, keyword_attention_mask)
            pairs = self._verify(audio, text.last_hidden_state[:, None], text.attention_mask[:, None])
            logits, possible = (part[:, 0] for part in pairs)
            if labels is not None:
                each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
                losses["utterance_loss"] = each.where(possible, 0.0).mean()
        if phoneme_labels is not None:
            ctc_logits = self.ctc_head(audio.last_hidden_state)
            losses["ctc_loss"] = phoneme_ctc_loss(ctc_logits, audio.attention_mask, phoneme_labels)
        return self._output(losses, logits=logits, ctc_logits=ctc_logits, audio_features=audio)

    def _verify(
        self, audio: KwsAudioFeatures, phonemes: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log odds of phrases, one row of them for each clip or for all, and whether they are short enough for the clips."""
        frames, frame_mask = audio.last_hidden_state, audio.attention_mask
        directions = F.normalize(frames, dim=-1)[:, None]
        # In single precision: the zeros of a phoneme that was never heard would not be numbers in half of it.
        similarity = directions @ F.normalize(phonemes.float(), dim=-1).transpose(-1, -2).to(directions.dtype)
        # The best partition is taken for granted: gradients go through the cosines and states along it.
        path = dynamic_partition(similarity, frame_mask[:, None], mask)
        owners = F.one_hot(path + 1, mask.shape[-1] + 1)[..., 1:].to(similarity.dtype)
        agreement = (similarity * owners).transpose(-1, -2) @ frames[:, None]
        if self.config.agreement == "mean":
            agreement = agreement / owners.sum(-2).clamp(min=1)[..., None]
        possible = path[..., 0] >= 0
        return self.verifier(agreement, mask).masked_fill(~possible, _REJECTED), possible

    @torch.no_grad()
    def build_phoneme_table(
        self,
        batches: Iterable[Mapping[str, Any]],
        symbols: Sequence[str] | None = None,
        max_clips: int | None = 50_000,
        only_exact: bool = True,
        freeze_encoder: bool = True,
    ) -> torch.Tensor:
        """
        Makes the vector of each phoneme: the mean, over all of its occurrences, of the mean state of the frames where the CTC
        head hears it.

        Args:
            batches (`Iterable[Mapping]`):
                With `input_features`, `attention_mask` and `phoneme_labels`, as [`KwsDataCollator`] makes them; what else they
                have is ignored. It is read until there are enough clips, so shuffle it; a progress bar goes around it.
            symbols (`Sequence[str]`, *optional*):
                Names of the phonemes, by their numbers: `tokenizer.convert_ids_to_tokens(range(74))`. With them a vowel that
                was not heard gets the mean of its other stresses.
            max_clips (`int`, *optional*, defaults to `50_000`):
                Clips to use, about as many as the paper's; `None` for all.
            only_exact (`bool`, *optional*, defaults to `True`):
                Whether to use those clips alone whose phonemes are recognised without an error, as in the paper. An encoder
                that is not yet good has few of them.
            freeze_encoder (`bool`, *optional*, defaults to `True`):
                Whether to call [`~CedForKeywordSpotting.freeze_encoder`] in the end: the table is right for this encoder alone.
                Who trains the encoder on has to build the table again from time to time.

        Returns:
            `torch.Tensor` of shape `(vocab_size,)`: how often each phoneme was heard. The vectors of those that never were are
            zeros, which match nothing.

        Raises:
            ValueError: if no clip could be used, what was spoken is missing, or the numbers of symbols differ.
        """
        if symbols is not None and len(symbols) != self.config.vocab_size:
            raise ValueError(f"There are {len(symbols)} `symbols` for a `vocab_size` of {self.config.vocab_size}.")
        was_training = self.training
        self.eval()
        try:
            counts = self._fill_table(batches, symbols, max_clips, only_exact)
        finally:
            self.train(was_training)
        if freeze_encoder:
            self.freeze_encoder()
        return counts

    def _fill_table(
        self,
        batches: Iterable[Mapping[str, Any]],
        symbols: Sequence[str] | None,
        max_clips: int | None,
        only_exact: bool,
    ) -> torch.Tensor:
        # Means of many: they are added up in double precision, which not every device has.
        sums = torch.zeros(self.phoneme_table.vectors.shape, dtype=torch.float64)
        counts = torch.zeros(len(sums), dtype=torch.long)
        num_clips = num_used = 0
        for batch in batches:
            if only_exact and batch.get("phoneme_labels") is None:
                raise ValueError("`batches` have no `phoneme_labels`: `only_exact` compares with them.")
            features, mask = batch["input_features"].to(self.device, self.dtype), batch["attention_mask"]
            audio = self.get_audio_features(features, mask.to(self.device))
            states, mask = audio.last_hidden_state, audio.attention_mask
            labels = self.ctc_head(states).argmax(-1).masked_fill(~mask, 0)
            used = torch.ones_like(mask[:, 0])
            if only_exact:
                used &= are_recognised(labels, batch["phoneme_labels"].to(self.device))
            if max_clips is not None:
                used &= used.cumsum(0) <= max_clips - num_used
            phonemes, means = (part.cpu() for part in mean_states_of_runs(states[used].float(), labels[used]))
            sums.index_add_(0, phonemes, means.double())
            counts += phonemes.bincount(minlength=len(counts))
            num_clips, num_used = num_clips + len(used), num_used + int(used.sum())
            if num_used == max_clips:
                break
        counts[:NUM_SPECIAL] = 0
        if not counts.any():
            raise ValueError(
                f"None of the {num_clips} clips in `batches` could be used{' with `only_exact`' if only_exact else ''}: train "
                "the encoder on with the CTC loss, or take clips that are recognised in part with `only_exact=False`."
            )
        self.phoneme_table.fill(sums, counts, symbols)
        return counts
