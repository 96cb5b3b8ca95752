"""Audio and phrases as the inputs of the keyword spotting models."""

from typing import Any

from transformers import BatchFeature, ProcessorMixin

from hf_ext.kws.feature_extraction_kws import KwsFeatureExtractor
from hf_ext.kws.tokenization_phoneme import PhonemeTokenizer


class KwsProcessor(ProcessorMixin):
    """
    A [`KwsFeatureExtractor`] and a [`PhonemeTokenizer`] in one.

    Args:
        feature_extractor ([`KwsFeatureExtractor`], *optional*):
            By default one with its default settings, those of SLiCK.
        tokenizer ([`PhonemeTokenizer`], *optional*):
            By default one with the packaged lexicon alone.

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
        self, feature_extractor: KwsFeatureExtractor | None = None, tokenizer: PhonemeTokenizer | None = None
    ) -> None:
        super().__init__(feature_extractor or KwsFeatureExtractor(), tokenizer or PhonemeTokenizer())

    def __call__(
        self,
        audio: Any = None,
        text: str | list[str] | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **audio_kwargs: Any,
    ) -> BatchFeature:
        """
        Features of clips, phonemes of phrases, or both. There may be as many phrases as clips or another number.

        Args:
            audio (`np.ndarray`, `torch.Tensor`, `list[float]` or a list of them, *optional*):
                One clip or several.
            text (`str` or `list[str]`, *optional*):
                One phrase or several, with phonemes in braces where wanted.
            sampling_rate (`int`, *optional*):
                The rate of the audio; it has to be given with it.
            return_tensors (`str`, *optional*):
                `"pt"` or `"np"`.
            **audio_kwargs:
                Passed to the feature extractor: `channel_axis`, `device`, `padding`, ...

        Returns:
            [`~transformers.BatchFeature`]: `input_features` and `attention_mask` for audio, `keyword_ids` and
            `keyword_attention_mask`, padded to the longest phrase, for text.

        Raises:
            ValueError: if there is neither audio nor text, or either of them is refused.
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
            phrases = [text] if isinstance(text, str) else list(text)
            tokens = self.tokenizer(phrases, padding=True, return_tensors=return_tensors)
            if audio is not None and return_tensors == "pt":
                tokens = tokens.to(device)
            inputs["keyword_ids"] = tokens["input_ids"]
            inputs["keyword_attention_mask"] = tokens["attention_mask"]
        return inputs

    @property
    def model_input_names(self) -> list[str]:
        return [*self.feature_extractor.model_input_names, "keyword_ids", "keyword_attention_mask"]
