"""Audio and phrases as the inputs of the keyword spotting models."""

import string
from collections.abc import Iterable
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from hf_ext.kws.feature_extraction_kws import KwsFeatureExtractor
from hf_ext.kws.tokenization_phoneme import PhonemeTokenizer


class KwsProcessor(ProcessorMixin):
    """
    A [`KwsFeatureExtractor`] and a [`PhonemeTokenizer`] in one.

    For a model that takes words, such as [`DspForKeywordSpotting`] with DistilBERT, the tokenizer is that of the model's text
    encoder. It splits words into pieces, and the processor says which pieces are one word.

    Args:
        feature_extractor ([`KwsFeatureExtractor`], *optional*):
            By default one with its default settings, those of SLiCK.
        tokenizer ([`PhonemeTokenizer`] or [`~transformers.PreTrainedTokenizerFast`], *optional*):
            By default a [`PhonemeTokenizer`] with the packaged lexicon alone.

    Raises:
        TypeError: for a tokenizer that can't tell which word its tokens are of.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_ext import KwsProcessor

    >>> processor = KwsProcessor()
    >>> clip = np.zeros(16000, dtype=np.float32)
    >>> inputs = processor(audio=clip, text=["hey computer", "lights on"], sampling_rate=16000, return_tensors="pt")
    >>> {name: tuple(values.shape) for name, values in inputs.items()}
    {'input_features': (1, 98, 80), 'attention_mask': (1, 98), 'keyword_ids': (2, 10), 'keyword_attention_mask': (2, 10)}
    ```
    """

    def __init__(
        self,
        feature_extractor: KwsFeatureExtractor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        tokenizer = PhonemeTokenizer() if tokenizer is None else tokenizer
        if not isinstance(tokenizer, PhonemeTokenizer) and not getattr(tokenizer, "is_fast", False):
            raise TypeError(
                f"`tokenizer` must be a PhonemeTokenizer, or a fast tokenizer of a text encoder, got {type(tokenizer).__name__}."
            )
        super().__init__(feature_extractor or KwsFeatureExtractor(), tokenizer)

    @property
    def takes_words(self) -> bool:
        """Whether phrases become words of a text encoder, and not phonemes."""
        return not isinstance(self.tokenizer, PhonemeTokenizer)

    def __call__(
        self,
        audio: Any = None,
        text: str | list[str] | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **audio_kwargs: Any,
    ) -> BatchFeature:
        """
        Features of clips, phonemes or words of phrases, or both. There may be as many phrases as clips or another number.

        Args:
            audio (`np.ndarray`, `torch.Tensor`, `list[float]` or a list of them, *optional*):
                One clip or several.
            text (`str` or `list[str]`, *optional*):
                One phrase or several, with phonemes in braces where wanted. A text encoder's tokenizer takes none; what it takes
                are words between blanks, without the punctuation around them.
            sampling_rate (`int`, *optional*):
                The rate of the audio; it has to be given with it.
            return_tensors (`str`, *optional*):
                `"pt"` or `"np"`.
            **audio_kwargs:
                Passed to the feature extractor: `channel_axis`, `device`, `padding`, ...

        Returns:
            [`~transformers.BatchFeature`]: `input_features` and `attention_mask` for audio, `keyword_ids` and
            `keyword_attention_mask`, padded to the longest phrase, for text. For words also `keyword_word_ids`: the place of
            each token's word in the phrase, -1 for padding and special tokens.

        Raises:
            ValueError: if there is neither audio nor text, or either of them is refused.
            TypeError: for an argument that the feature extractor doesn't have.
        """
        if audio is None and text is None:
            raise ValueError("There is neither `audio` nor `text` to process.")
        inputs = BatchFeature()
        if audio is not None:
            device = audio_kwargs.get("device", "cpu")
            inputs.update(self.feature_extractor(audio, sampling_rate, return_tensors=return_tensors, **audio_kwargs))
        elif audio_kwargs:
            raise ValueError(f"Without `audio` there is nothing that {sorted(audio_kwargs)} could be for.")
        if text is not None:
            phrases = _listed(text)
            tokens = (
                self._words(phrases, return_tensors) if self.takes_words else self._phonemes(phrases, return_tensors)
            )
            if audio is not None and return_tensors == "pt":
                tokens = tokens.to(device)
            inputs.update({f"keyword_{name.removeprefix('input_')}": values for name, values in tokens.items()})
        return inputs

    def _phonemes(self, phrases: list[str], return_tensors: str | None) -> BatchFeature:
        # On the right, whatever the tokenizer is set to: the models count phonemes from the beginning on.
        tokens = self.tokenizer(phrases, padding=True, padding_side="right", return_tensors=return_tensors)
        return BatchFeature({name: tokens[name] for name in ("input_ids", "attention_mask")})

    def _words(self, phrases: list[str], return_tensors: str | None) -> BatchFeature:
        split = [_split_words(phrase) for phrase in phrases]
        tokens = self.tokenizer(split, is_split_into_words=True, padding=True)
        word_ids = [[-1 if word is None else word for word in tokens.word_ids(row)] for row in range(len(split))]
        for words, found in zip(split, word_ids, strict=True):
            if lost := sorted(set(range(len(words))) - set(found)):
                raise ValueError(f"The tokenizer makes nothing of {[words[i] for i in lost]} in {' '.join(words)!r}.")
        columns = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "word_ids": word_ids}
        return BatchFeature(columns, tensor_type=return_tensors)

    @property
    def model_input_names(self) -> list[str]:
        words = ["keyword_word_ids"] if self.takes_words else []
        return [*self.feature_extractor.model_input_names, "keyword_ids", "keyword_attention_mask", *words]


def _listed(text: Any) -> list[str]:
    phrases = list(text) if isinstance(text, Iterable) and not isinstance(text, str) else [text]
    if not all(isinstance(phrase, str) for phrase in phrases):
        raise ValueError(f"`text` must be a phrase or a list of phrases, got {text!r}.")
    if not phrases:
        raise ValueError("`text` is empty: there is no phrase.")
    return phrases


def _split_words(phrase: str) -> list[str]:
    if "{" in phrase or "}" in phrase:
        raise ValueError(
            f"{phrase!r} has phonemes in braces, and the tokenizer takes words: leave them out, also the kind 'confusable' "
            "from the `shares` of pairs, or take a model of phonemes with a PhonemeTokenizer."
        )
    words = [stripped for word in phrase.split() if (stripped := word.strip(string.punctuation))]
    if not words:
        raise ValueError(f"The text {phrase!r} has no words.")
    return words
