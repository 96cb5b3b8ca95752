"""The audio front end of keyword spotting: one computation for training, whole files and streams."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, window_function

from hf_ext.kws.audio_input import check_sampling_rate, resample, streaming_resampler, to_clips, to_mono_float


# One block of frames is transformed at a time, so that an hour of audio takes no more memory than a minute.
_FRAMES_PER_BLOCK = 4096
# Of logarithms of power; speech has around 4.
_LEAST_DEVIATION = 0.1


@dataclass
class KwsStreamState:
    """
    Where a stream of audio stands, between two calls of [`KwsFeatureExtractor.stream`]. Each stream has its own, and each
    call uses it up: go on with the one that is returned.

    Args:
        sampling_rate (`int`):
            Rate of the audio that comes in.
        channel_axis (`int`, *optional*):
            The axis of the channels in each chunk; `None` for mono.
        num_frames (`int`):
            Frames given out so far.
        finished (`bool`):
            Whether the last chunk was passed.
    """

    sampling_rate: int
    channel_axis: int | None = None
    num_frames: int = 0
    finished: bool = False
    # Samples, at the extractor's own rate, that no frame or only a part of the coming frames has seen.
    pending: torch.Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    resampler: Any = field(default=None, repr=False)


class KwsFeatureExtractor(SequenceFeatureExtractor):
    """
    Turns audio into log-mel frames or Kaldi's filter banks (fbank), in torch. The defaults are those of
    [SLiCK](https://huggingface.co/papers/2409.09067): 80 log-mel channels, windows of 25 ms every 10 ms.

    Frames lie wholly inside the audio and depend on no other frame, so a stream gives the frames of the whole, however it
    is cut. Audio shorter than one window is padded with silence to one frame.

    Args:
        feature_type (`str`, *optional*, defaults to `"log_mel"`):
            `"log_mel"`: torchaudio's `MelSpectrogram` (Hann window, HTK's mel scale, power), as natural logarithm.
            `"fbank"`: torchaudio's `compliance.kaldi.fbank` without dither, of audio at the scale of 16-bit integers.
        feature_size (`int`, *optional*, defaults to `80`):
            Mel channels.
        sampling_rate (`int`, *optional*, defaults to `16000`):
            Rate at which features are computed. Audio of another rate is resampled to it.
        win_length (`int`, *optional*, defaults to `400`):
            Samples per window.
        hop_length (`int`, *optional*, defaults to `160`):
            Samples from one window to the next.
        f_min (`float`, *optional*, defaults to `20.0`):
            Lowest frequency in hertz.
        f_max (`float`, *optional*):
            Highest frequency in hertz; half the sampling rate if not given.
        mel_floor (`float`, *optional*):
            Least power of a channel, before the logarithm; 1e-6 for log-mel and Kaldi's 1.1920929e-07 for fbank if not
            given.
        mean (`list[float]`, *optional*), std (`list[float]`, *optional*):
            What is subtracted from each channel, and what it is divided by then: figures of a training set.
        padding_value (`float`, *optional*, defaults to `0.0`):
            What fills the frames behind a shorter clip of a batch.
        **kwargs:
            Passed to `SequenceFeatureExtractor`.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_ext import KwsFeatureExtractor

    >>> feature_extractor = KwsFeatureExtractor()
    >>> clips = [np.zeros(16000, dtype=np.float32), np.zeros(8000, dtype=np.float32)]
    >>> batch = feature_extractor(clips, sampling_rate=16000, return_tensors="pt")
    >>> batch["input_features"].shape, batch["attention_mask"].sum(-1)
    (torch.Size([2, 98, 80]), tensor([98, 48]))

    >>> state = feature_extractor.start_stream(sampling_rate=16000)
    >>> features, state = feature_extractor.stream(clips[0][:1000], state)
    >>> features.shape
    torch.Size([4, 80])
    ```
    """

    model_input_names = ["input_features", "attention_mask"]

    def __init__(
        self,
        feature_type: Literal["log_mel", "fbank"] = "log_mel",
        feature_size: int = 80,
        sampling_rate: int = 16000,
        win_length: int = 400,
        hop_length: int = 160,
        f_min: float = 20.0,
        f_max: float | None = None,
        mel_floor: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        padding_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        sampling_rate = check_sampling_rate(sampling_rate)
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        if self.padding_side != "right":
            # The models take the frames that the mask counts from the beginning on.
            raise ValueError(
                f"`padding_side` must be 'right', where the models expect padding, got {self.padding_side!r}."
            )
        if feature_type not in ("log_mel", "fbank"):
            raise ValueError(f"`feature_type` must be 'log_mel' or 'fbank', got {feature_type!r}.")
        for name, value in {"win_length": win_length, "hop_length": hop_length, "feature_size": feature_size}.items():
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"`{name}` must be at least 1, and an integer, got {value!r}.")
        if hop_length > win_length:
            raise ValueError(f"`hop_length` ({hop_length}) leaves samples out between windows of {win_length}.")
        if mel_floor is not None and not mel_floor > 0:
            raise ValueError(f"`mel_floor` must be positive, got {mel_floor}.")
        highest = sampling_rate / 2 if f_max is None else f_max
        if not 0 <= f_min < highest <= sampling_rate / 2:
            raise ValueError(
                f"`f_min` ({f_min}) and `f_max` ({f_max}) must be a range within 0 to half the sampling rate, "
                f"{sampling_rate / 2}."
            )
        # Arrays and tensors could not be saved.
        mean, std = (None if figures is None else [float(value) for value in figures] for figures in (mean, std))
        for name, figures in {"mean": mean, "std": std}.items():
            if figures is not None and len(figures) != feature_size:
                raise ValueError(f"`{name}` has {len(figures)} values for {feature_size} channels (`feature_size`).")
            if figures is not None and not all(map(math.isfinite, figures)):
                raise ValueError(
                    f"`{name}` has values that are NaN or infinite: take them from clips, with `normalized`."
                )
        if std is not None and min(std) <= 0:
            raise ValueError(f"`std` must be positive in each channel, got {min(std)}: features are divided by it.")
        self.feature_type = feature_type
        self.win_length = win_length
        self.hop_length = hop_length
        self.f_min = f_min
        self.f_max = f_max
        self.mel_floor = mel_floor
        self.mean = mean
        self.std = std

        kaldi = feature_type == "fbank"
        self.fft_length = 1 << (win_length - 1).bit_length()
        # transformers leaves attributes of these two names out of what it saves.
        self.window = window_function(win_length, "povey" if kaldi else "hann", periodic=not kaldi).astype(np.float32)
        self.mel_filters = mel_filter_bank(
            num_frequency_bins=self.fft_length // 2 + 1,
            num_mel_filters=feature_size,
            min_frequency=f_min,
            max_frequency=highest,
            sampling_rate=sampling_rate,
            mel_scale="kaldi" if kaldi else "htk",
            triangularize_in_mel_space=kaldi,
        ).astype(np.float32)

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        channel_axis: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        device: str | torch.device = "cpu",
    ) -> BatchFeature:
        """
        Features of one clip or a batch of them.

        Args:
            raw_speech (`np.ndarray`, `torch.Tensor`, `list[float]` or a list of them):
                One clip or several. Floats lie within -1 and 1; integers are PCM of 8 bits (unsigned), 16 or 32.
            sampling_rate (`int`):
                The rate of the audio. It has to be given: a wrong one makes wrong features without an error.
            channel_axis (`int`, *optional*):
                The axis of the channels in each clip: `-1` as soundfile reads, `0` as torchaudio has it. They are
                averaged. `None` for mono.
            padding (`bool` or `str`, *optional*, defaults to `True`), max_length (`int`, *optional*), truncation (`bool`,
            *optional*, defaults to `False`), pad_to_multiple_of (`int`, *optional*):
                As everywhere in transformers; lengths are counted in frames.
            return_attention_mask (`bool`, *optional*):
                Whether to return the mask of the frames that are no padding; the extractor's own setting by default.
            return_tensors (`str`, *optional*):
                `"pt"` or `"np"`; a list of arrays if not given and the clips are not padded to one length.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Where the features are computed and, as torch tensors, returned. Resampling runs on the CPU.

        Returns:
            [`~transformers.BatchFeature`]: `input_features` of shape `(batch, frames, feature_size)` and `attention_mask`
            of shape `(batch, frames)`.

        Raises:
            ValueError: if the audio is empty, has values that are not finite or of another scale, its shape leaves open
                what the channels are, or its sampling rate is not given.
        """
        rate = check_sampling_rate(sampling_rate)
        clips = [resample(clip, rate, self.sampling_rate) for clip in to_clips(raw_speech, channel_axis=channel_axis)]
        lengths = [self.num_frames(len(clip)) for clip in clips]
        longest = max(max(map(len, clips)), self.win_length)
        samples = torch.stack([F.pad(clip, (0, longest - len(clip))) for clip in clips]).to(device)
        features = self.extract(samples)
        batch = self.pad(
            {"input_features": [rows[:length].cpu().numpy() for rows, length in zip(features, lengths, strict=True)]},
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )
        return batch.to(device) if return_tensors == "pt" else batch

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip with this many samples, at the extractor's own rate."""
        return 1 + max(num_samples - self.win_length, 0) // self.hop_length

    def extract(self, samples: torch.Tensor) -> torch.Tensor:
        """
        The bare computation: differentiable, and on the device of its input.

        Args:
            samples (`torch.Tensor` of shape `(batch, num_samples)`):
                Floats at the extractor's own sampling rate, at least one window of them.

        Returns:
            `torch.Tensor` of shape `(batch, frames, feature_size)`.
        """
        if samples.dim() != 2 or samples.shape[1] < self.win_length:
            raise ValueError(
                f"`samples` must have the shape (batch, samples) with at least {self.win_length} samples (`win_length`), "
                f"got {tuple(samples.shape)}."
            )
        frames = samples.to(torch.float32).unfold(1, self.win_length, self.hop_length)
        return torch.cat([self._features_of(block) for block in frames.split(_FRAMES_PER_BLOCK, dim=1)], dim=1)

    def normalized(
        self, clips: Iterable[Any], sampling_rate: int, channel_axis: int | None = None
    ) -> "KwsFeatureExtractor":
        """
        The same extractor, with the `mean` and `std` of these clips: their features have mean 0 and deviation 1 then, in each
        channel.

        Args:
            clips (`Iterable`):
                A few hundred clips, such as a model will be trained on, one after the other.
            sampling_rate (`int`), channel_axis (`int`, *optional*):
                As in a call.

        Returns:
            [`KwsFeatureExtractor`]

        Raises:
            ValueError: if there is no clip, or one is refused.
        """
        plain, normalized = copy.deepcopy(self), copy.deepcopy(self)
        plain.mean = plain.std = None
        features = [plain(clip, sampling_rate, channel_axis=channel_axis)["input_features"][0] for clip in clips]
        if not features:
            raise ValueError("`clips` is empty: mean and deviation are taken over some.")
        frames = np.concatenate(features)
        # A channel that is always silent, above the band of all clips, must not be blown up.
        deviation = frames.std(0).clip(_LEAST_DEVIATION)
        normalized.mean, normalized.std = frames.mean(0).round(4).tolist(), deviation.round(4).tolist()
        return normalized

    def start_stream(self, sampling_rate: int, channel_axis: int | None = None) -> KwsStreamState:
        """
        The state that [`~KwsFeatureExtractor.stream`] begins with.

        Args:
            sampling_rate (`int`):
                Rate of the audio that will come in.
            channel_axis (`int`, *optional*):
                The axis of the channels in each chunk; `None` for mono.

        Returns:
            [`KwsStreamState`]
        """
        rate = check_sampling_rate(sampling_rate)
        return KwsStreamState(rate, channel_axis, resampler=streaming_resampler(rate, self.sampling_rate))

    def stream(
        self, chunk: Any, state: KwsStreamState, final: bool = False, device: str | torch.device = "cpu"
    ) -> tuple[torch.Tensor, KwsStreamState]:
        """
        The frames that are complete with this chunk. All chunks together give the frames of the whole.

        Args:
            chunk (`np.ndarray`, `torch.Tensor` or `list[float]`):
                The next samples of one stream, of any number; none is fine.
            state ([`KwsStreamState`]):
                What [`~KwsFeatureExtractor.start_stream`] or the last call returned.
            final (`bool`, *optional*, defaults to `False`):
                Whether the stream ends with this chunk. Resampling holds a few milliseconds back until it does.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Where the features are computed.

        Returns:
            `tuple[torch.Tensor, KwsStreamState]`: Features of shape `(frames, feature_size)`, with as many frames as
            became complete, and the state for the next call.

        Raises:
            ValueError: as for clips, and if the stream has ended.
        """
        if state.finished:
            raise ValueError("This stream has ended (`final=True`): begin another with `start_stream`.")
        samples = to_mono_float(chunk, state.channel_axis, name="chunk", may_be_empty=True)
        if state.resampler is not None:
            samples = torch.from_numpy(state.resampler.resample_chunk(samples.numpy(), last=final))
        pending = torch.cat([state.pending, samples])
        if final and state.num_frames == 0 and len(pending) < self.win_length:
            pending = F.pad(pending, (0, self.win_length - len(pending)))
        num_new = 0 if len(pending) < self.win_length else self.num_frames(len(pending))
        features = torch.zeros(0, self.feature_size, device=device)
        if num_new:
            features = self.extract(pending[None].to(device))[0]
        new_state = KwsStreamState(
            sampling_rate=state.sampling_rate,
            channel_axis=state.channel_axis,
            num_frames=state.num_frames + num_new,
            finished=final,
            pending=pending[num_new * self.hop_length :].clone(),
            resampler=state.resampler,
        )
        return features, new_state

    def _features_of(self, frames: torch.Tensor) -> torch.Tensor:
        """Features of `(batch, frames, win_length)` windows of samples."""
        window = torch.from_numpy(self.window).to(frames.device)
        mel_filters = torch.from_numpy(self.mel_filters).to(frames.device)
        floor = self.mel_floor
        if self.feature_type == "fbank":
            frames = frames * 2**15
            frames = frames - frames.mean(-1, keepdim=True)
            # Pre-emphasis within each frame; its first sample stands in for the one before it.
            frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
            floor = floor or torch.finfo(torch.float32).eps
        power = torch.fft.rfft(frames * window, n=self.fft_length).abs().square()
        features = (power @ mel_filters).clamp(min=floor or 1e-6).log()
        if self.mean is not None:
            features = features - torch.tensor(self.mean, device=features.device)
        if self.std is not None:
            features = features / torch.tensor(self.std, device=features.device)
        return features
