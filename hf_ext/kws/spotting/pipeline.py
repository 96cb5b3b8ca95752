"""`pipeline("keyword-spotting")`: which of these typed phrases does a clip hold?"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.pipelines.base import ChunkPipeline

from hf_ext.kws.processing_kws import KwsProcessor
from hf_ext.kws.spotting.clips import read_clip
from hf_ext.kws.training.utterances import undecoded


FUNCTIONS = ("sigmoid", "none")


@dataclass(frozen=True)
class EnrolledPhrases:
    """
    Phrases as a model has them, encoded once for any number of clips.

    Args:
        labels (`list[str]`):
            The phrases.
        owners (`list[int]`):
            For each pronunciation the place of its phrase in `labels`.
        text (`Any`):
            What `get_text_features` of the model returned, a row per pronunciation.
    """

    labels: list[str]
    owners: list[int]
    text: Any


class KeywordSpottingPipeline(ChunkPipeline):
    """
    Text-defined keyword spotting with any model of [`AutoModelForKeywordSpotting`]: `pipeline("keyword-spotting")`.

    Each phrase has a score of its own, the chance that it is in the clip; the scores of several phrases don't add up to 1.
    A phrase with several pronunciations counts by the best of them. Clips longer than `chunk_length_s` are heard in
    overlapping windows, of which the best counts. Audio is decoded by soundfile, at any rate and with any number of channels.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. [`~transformers.pipeline`] takes `slick-small` of this package if none is given.
        processor ([`KwsProcessor`]):
            The model's.
        tokenizer ([`PhonemeTokenizer`], *optional*), feature_extractor ([`KwsFeatureExtractor`], *optional*):
            Instead of the processor's own, such as a tokenizer with pronunciations of names in its `lexicon`.
        candidate_labels, chunk_length_s and the rest:
            Those of a call may be given beforehand, here. Phrases are then encoded once for all calls.
        **kwargs:
            As in [`~transformers.Pipeline`].

    Example:

    ```python
    >>> import hf_ext
    >>> import numpy as np
    >>> from transformers import pipeline

    >>> config = hf_ext.SlickConfig(num_hidden_layers=1)
    >>> spotter = pipeline(
    ...     "keyword-spotting", model=hf_ext.SlickForKeywordSpotting(config), processor=hf_ext.KwsProcessor(), device="cpu"
    ... )
    >>> clip = {"array": np.zeros(16000, dtype=np.float32), "sampling_rate": 16000}
    >>> answers = spotter(clip, candidate_labels=["hey computer", "lights on"])
    >>> sorted(answer["label"] for answer in answers)
    ['hey computer', 'lights on']
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # transformers takes what is given for all that there is.
        given = {name: kwargs.pop(name, None) for name in ("feature_extractor", "tokenizer")}
        if any(given.values()):
            own = kwargs.get("processor")
            kwargs["processor"] = KwsProcessor(
                **{name: half or getattr(own, name, None) for name, half in given.items()}
            )
        super().__init__(*args, **kwargs)
        self.model.eval()

    def __call__(self, audio: Any, candidate_labels: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
        """
        Look for phrases in one clip or several.

        Args:
            audio (`str`, `os.PathLike`, `bytes`, `np.ndarray`, `dict`, or a list, dataset, column or generator of them):
                A path, the bytes of a file, samples (with `sampling_rate`), or a row of a dataset: `{"array" or "raw",
                "sampling_rate"}`, `{"path", "bytes"}`, `{"audio": any of these}` with `start` and `end` in seconds, if
                wanted.
            candidate_labels (`str` or `list[str]`):
                English phrases, with phonemes in braces where wanted (`"{HH EY1} computer"`); in one string, with commas
                between.
            sampling_rate (`int`, *optional*):
                Rate of audio that is given as bare samples.
            channel_axis (`int`, *optional*):
                Axis of the channels of such samples, `-1` as soundfile reads them. They are averaged. `None` for mono.
            chunk_length_s (`float`, *optional*, defaults to `3.0`):
                Seconds of a window. With 0, each clip is one window.
            stride_length_s (`float` or `tuple[float, float]`, *optional*, defaults to `chunk_length_s / 4`):
                Seconds that a window shares with the one before and with the one after it, as in other audio pipelines:
                the next begins `chunk_length_s` less both later. A phrase no longer than both lies whole in some window.
            max_pronunciations (`int`, *optional*, defaults to `8`):
                At most so many of a phrase are looked for.
            function_to_apply (`str`, *optional*, defaults to `"sigmoid"`):
                `"sigmoid"` for chances, `"none"` for log odds.
            batch_size (`int`, *optional*), num_workers (`int`, *optional*):
                As in [`~transformers.Pipeline`]. Windows are what is batched.

        Returns:
            `list[dict]`, or one for each clip: `{"label", "score"}` for each phrase, the highest score first. A dataset or
            generator gives an iterator.

        Raises:
            ValueError: if there are no `candidate_labels`, one can't be pronounced or is too long for the model, the audio
                is empty, can't be decoded or has values that are not finite, its rate is unknown, or a setting is out of
                its range.
            FileNotFoundError: if there is no such file.
            TypeError: if the audio is nothing of the above.
        """
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        elif "phrases" not in self._forward_params:
            raise ValueError(
                "`candidate_labels` is not given: pass the phrases to look for, such as `candidate_labels=['hey computer', "
                "'lights on']`."
            )
        elif "max_pronunciations" in kwargs:
            raise ValueError(
                "`max_pronunciations` says how the phrases are encoded: pass it together with `candidate_labels`."
            )
        return super().__call__(_one_or_many(audio), **kwargs)

    def _sanitize_parameters(self, candidate_labels: Any = None, max_pronunciations: int = 8, **settings: Any) -> Any:
        unknown = set(settings) - {*_PREPROCESSING, "function_to_apply"}
        if unknown:
            raise TypeError(
                f"The pipeline has no settings {sorted(unknown)}; there are {['candidate_labels', 'max_pronunciations', *_PREPROCESSING, 'function_to_apply']}."
            )
        preprocessing = {name: settings[name] for name in _PREPROCESSING if settings.get(name) is not None}
        _check_windows(**{name: preprocessing.get(name) for name in ("chunk_length_s", "stride_length_s")})
        forward, postprocessing = {}, {}
        if candidate_labels is not None:
            phrases = self.enroll(candidate_labels, max_pronunciations)
            forward["phrases"], postprocessing["labels"] = phrases, phrases.labels
        if "function_to_apply" in settings:
            if settings["function_to_apply"] not in FUNCTIONS:
                raise ValueError(
                    f"`function_to_apply` must be one of {list(FUNCTIONS)}, got {settings['function_to_apply']!r}."
                )
            postprocessing["function_to_apply"] = settings["function_to_apply"]
        return preprocessing, forward, postprocessing

    @torch.no_grad()
    def enroll(self, candidate_labels: str | Sequence[str], max_pronunciations: int = 8) -> EnrolledPhrases:
        """
        Encode phrases for any number of clips.

        Args:
            candidate_labels (`str` or `list[str]`), max_pronunciations (`int`, *optional*, defaults to `8`):
                As in a call.

        Returns:
            [`EnrolledPhrases`]
        """
        if not hasattr(self.model, "get_text_features"):
            raise TypeError(
                f"`model` is a {type(self.model).__name__}, which takes no phrases: use one of AutoModelForKeywordSpotting."
            )
        labels = _listed(candidate_labels)
        tokenizer = self.processor.tokenizer
        if hasattr(tokenizer, "pronunciations"):
            spoken = [tokenizer.pronunciations(label, max_pronunciations) for label in labels]
            most = getattr(self.model.config, "longest_phrase", None) or math.inf
            # An alternative may be too long for the model where the usual pronunciation isn't.
            spoken = [[way for way in ways if len(way) <= most] or ways for ways in spoken]
            owners = [place for place, ways in enumerate(spoken) for _ in ways]
            phrases = [f"{{{' '.join(way)}}}" for ways in spoken for way in ways]
        else:
            # A tokenizer of words, for a text encoder.
            owners, phrases = list(range(len(labels))), labels
        batch = self.processor(text=phrases, return_tensors="pt").to(self.device)
        try:
            text = self.model.get_text_features(**batch)
        except ValueError as error:
            longest = labels[owners[int(batch["keyword_attention_mask"].sum(-1).argmax())]]
            raise ValueError(
                f"`candidate_labels` has a phrase that the model does not take, {longest!r}: {error}"
            ) from error
        return EnrolledPhrases(labels, owners, text)

    def preprocess(
        self,
        audio: Any,
        sampling_rate: int | None = None,
        channel_axis: int | None = None,
        chunk_length_s: float = 3.0,
        stride_length_s: float | tuple[float, float] | None = None,
    ) -> Iterator[dict[str, Any]]:
        own_rate = self.feature_extractor.sampling_rate
        samples = read_clip(audio, own_rate, sampling_rate, channel_axis)
        windows = split_into_windows(samples, own_rate, chunk_length_s, stride_length_s)
        for number, window in enumerate(windows, start=1):
            features = self.feature_extractor(window, sampling_rate=own_rate, return_tensors="pt")
            yield {**features, "is_last": number == len(windows)}

    def _forward(self, model_inputs: Any, phrases: EnrolledPhrases) -> dict[str, Any]:
        features = model_inputs["input_features"].to(self.dtype)
        audio = self.model.get_audio_features(features, model_inputs["attention_mask"])
        # The model may have moved, or changed its number format, since they were enrolled.
        text = type(phrases.text)(**BatchFeature(phrases.text._asdict()).to(self.device, self.dtype))
        by_pronunciation = self.model.score(audio, text).float()
        owners = torch.tensor(phrases.owners, device=by_pronunciation.device).expand_as(by_pronunciation)
        logits = by_pronunciation.new_full((len(by_pronunciation), len(phrases.labels)), -math.inf)
        # The first entry has to have a row per window: transformers counts windows by it.
        return {
            "logits": logits.scatter_reduce(1, owners, by_pronunciation, "amax"),
            "is_last": model_inputs["is_last"],
        }

    def postprocess(
        self, model_outputs: list[dict[str, Any]], labels: list[str], function_to_apply: str = "sigmoid"
    ) -> list[dict[str, Any]]:
        logits = torch.cat([window["logits"] for window in model_outputs]).amax(0)
        scores = logits.sigmoid() if function_to_apply == "sigmoid" else logits
        # By log odds: chances that are nearly 1 may round to the same number.
        order = sorted(range(len(labels)), key=lambda place: -float(logits[place]))
        return [{"label": labels[place], "score": float(scores[place])} for place in order]


_PREPROCESSING = ("sampling_rate", "channel_axis", "chunk_length_s", "stride_length_s")


def _one_or_many(audio: Any) -> Any:
    """One clip, or a list or a generator of clips, which transformers tells apart by their types."""
    if isinstance(audio, (list, tuple)):
        if len(audio) == 0:
            raise ValueError("`audio` is empty: there is no clip.")
        return np.asarray(audio) if all(isinstance(sample, Real) for sample in audio) else list(audio)
    if hasattr(audio, "cast_column"):
        if isinstance(audio, Mapping):
            raise TypeError(f"`audio` has the splits {sorted(audio)}: pass one of them.")
        # Rows of a dataset.
        return (row for row in undecoded(audio))
    if isinstance(audio, Sequence) and not isinstance(audio, (str, bytes, bytearray)):
        # A column of a dataset.
        return (clip for clip in audio)
    return audio


def split_into_windows(
    samples: torch.Tensor,
    sampling_rate: int,
    chunk_length_s: float = 3.0,
    stride_length_s: float | tuple[float, float] | None = None,
) -> list[torch.Tensor]:
    """
    Overlapping windows of one length, the last of which ends where the clip does. A clip no longer than one is one.

    Args:
        samples (`torch.Tensor` of shape `(num_samples,)`):
            The clip.
        sampling_rate (`int`):
            In hertz.
        chunk_length_s (`float`, *optional*, defaults to `3.0`), stride_length_s (`float` or `tuple[float, float]`,
        *optional*):
            As in a call of [`KeywordSpottingPipeline`].

    Returns:
        `list[torch.Tensor]`

    Example:

    ```python
    >>> import torch
    >>> from hf_ext.kws.spotting.pipeline import split_into_windows

    >>> [(int(window[0]), len(window)) for window in split_into_windows(torch.arange(80), 10, chunk_length_s=3.0)]
    [(0, 30), (15, 30), (30, 30), (45, 30), (50, 30)]
    ```
    """
    size = round(chunk_length_s * sampling_rate)
    if size == 0 or len(samples) <= size:
        return [samples]
    shared = sum(_both_sides(chunk_length_s, stride_length_s))
    step = max(size - round(shared * sampling_rate), 1)
    starts = [*range(0, len(samples) - size, step), len(samples) - size]
    return [samples[start : start + size] for start in starts]


def _both_sides(chunk_length_s: float, stride_length_s: float | tuple[float, float] | None) -> tuple[float, float]:
    if stride_length_s is None:
        return chunk_length_s / 4, chunk_length_s / 4
    if isinstance(stride_length_s, (int, float)):
        return stride_length_s, stride_length_s
    left, right = stride_length_s
    return left, right


def _check_windows(chunk_length_s: float | None, stride_length_s: float | tuple[float, float] | None) -> None:
    length = 3.0 if chunk_length_s is None else chunk_length_s
    if not isinstance(length, Real) or not (length == 0 or 0.1 <= length < math.inf):
        raise ValueError(f"`chunk_length_s` must be 0, for no windows, or at least 0.1, got {chunk_length_s!r}.")
    try:
        left, right = map(float, _both_sides(length, stride_length_s))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`stride_length_s` must be a number of seconds or two, got {stride_length_s!r}.") from error
    if min(left, right) < 0 or (length and left + right >= length):
        raise ValueError(
            f"`stride_length_s` ({stride_length_s}) must not be negative, and both sides together must be shorter than "
            f"`chunk_length_s` ({length})."
        )


def _listed(candidate_labels: Any) -> list[str]:
    if isinstance(candidate_labels, str):
        labels = [label.strip() for label in candidate_labels.split(",") if label.strip()]
    else:
        listable = isinstance(candidate_labels, Iterable) and not isinstance(candidate_labels, Mapping)
        labels = list(candidate_labels) if listable else [candidate_labels]
    if not all(isinstance(label, str) for label in labels):
        raise TypeError(f"`candidate_labels` must be strings, got {candidate_labels!r}.")
    if not labels:
        raise ValueError(f"`candidate_labels` has no phrase to look for, got {candidate_labels!r}.")
    return labels
