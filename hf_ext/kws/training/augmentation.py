"""Recordings as other microphones, rooms and lines would have them: batched torch, every draw from a given generator."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from hf_ext.kws.audio_input import check_sampling_rate
from hf_ext.kws.training.effects import (
    add_noise,
    band_limit,
    change_speed,
    check_range,
    clip_peaks,
    coloured_noise,
    equalize,
    inside_mask,
    mu_law,
    reverberate,
    room_responses,
)


_RANGES = ("speeds", "equalizer_db", "rt60", "direct_to_reverberant_db", "snr_db", "gain_db")


def spec_augment(
    features: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    num_time_masks: int = 2,
    max_time_share: float = 0.1,
    num_channel_masks: int = 2,
    max_channels: int = 10,
) -> torch.Tensor:
    """
    Hides stripes of frames and of channels behind the row's mean ([SpecAugment](https://huggingface.co/papers/1904.08779)).

    Args:
        features (`torch.Tensor` of shape `(batch, frames, channels)`):
            Log-mel features.
        attention_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*):
            1 for frames that are no padding.
        generator (`torch.Generator`, *optional*):
            What is drawn from, on the CPU.
        num_time_masks (`int`, *optional*, defaults to `2`), max_time_share (`float`, *optional*, defaults to `0.1`):
            Stripes of frames, and the largest share of a clip that each hides.
        num_channel_masks (`int`, *optional*, defaults to `2`), max_channels (`int`, *optional*, defaults to `10`):
            Stripes of channels, and their largest width.

    Returns:
        `torch.Tensor` of shape `(batch, frames, channels)`.
    """
    batch, frames, channels = features.shape
    mask = features.new_ones(batch, frames) if attention_mask is None else attention_mask.to(features.dtype)
    lengths = mask.sum(-1)
    hidden = torch.zeros_like(features, dtype=torch.bool)

    def stripes(size: int, extent: torch.Tensor, widest: torch.Tensor) -> torch.Tensor:
        width, start = torch.rand(2, batch, generator=generator).to(features.device)
        width = (width * (widest + 1)).floor()
        start = (start * (extent - width + 1)).floor()
        place = torch.arange(size, device=features.device)
        return (place >= start[:, None]) & (place < (start + width)[:, None])

    for _ in range(num_time_masks):
        hidden |= stripes(frames, lengths, (lengths * max_time_share).floor())[:, :, None]
    for _ in range(num_channel_masks):
        width = torch.full_like(lengths, float(min(max_channels, channels)))
        hidden |= stripes(channels, torch.full_like(lengths, float(channels)), width)[:, None, :]
    seen = mask[..., None]
    mean = (features * seen).sum((1, 2), keepdim=True) / (lengths * channels).clamp(min=1)[:, None, None]
    return features.where(~(hidden & seen.bool()), mean)


@dataclass
class KwsAugmenter:
    """
    A chain of changes, each drawn for each clip: speed, silence around, microphone, room, noise, band and line, gain, clipping.

    Args:
        noises (`Sequence[torch.Tensor]`, *optional*):
            Recordings of background, of shape `(num_samples,)` each at `sampling_rate`. Without them noise is made.
        sampling_rate (`int`, *optional*, defaults to `16000`):
            In hertz.
        speed_probability, equalizer_probability, room_probability, noise_probability, band_probability,
        mu_law_probability, clipping_probability (`float`, *optional*, default to `0.3`, `0.3`, `0.3`, `0.6`, `0.15`, `0.05` and
        `0.05`):
            Share of clips that are changed.
        speeds (`tuple[float, float]`, *optional*, defaults to `(0.9, 1.1)`):
            Range of factors.
        equalizer_db (`tuple[float, float]`, *optional*, defaults to `(-9.0, 9.0)`):
            Range of gains, at each of six frequencies.
        max_margin (`float`, *optional*, defaults to `0.5`):
            Most seconds of silence put before and behind, in every clip: models that never heard any lose most of their
            accuracy in untrimmed clips.
        rt60 (`tuple[float, float]`, *optional*, defaults to `(0.1, 0.6)`):
            Seconds.
        direct_to_reverberant_db (`tuple[float, float]`, *optional*, defaults to `(0.0, 15.0)`):
            Near and far speakers.
        snr_db (`tuple[float, float]`, *optional*, defaults to `(5.0, 25.0)`):
            Range in decibels.
        gain_db (`tuple[float, float]`, *optional*, defaults to `(-36.0, 6.0)`):
            Range in decibels, for every clip. Recordings are often far softer than what synthesisers write.

    Raises:
        ValueError: for probabilities outside 0 to 1 and ranges that are the wrong way round.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext import KwsAugmenter

    >>> augment = KwsAugmenter(max_margin=0.0, speed_probability=0.0)
    >>> clips = torch.randn(2, 16000)
    >>> changed, lengths = augment(clips, torch.tensor([16000, 12000]), torch.Generator().manual_seed(0))
    >>> changed.shape, lengths
    (torch.Size([2, 16000]), tensor([16000, 12000]))
    ```
    """

    noises: Sequence[torch.Tensor] | None = None
    sampling_rate: int = 16000
    speed_probability: float = 0.3
    equalizer_probability: float = 0.3
    room_probability: float = 0.3
    noise_probability: float = 0.6
    band_probability: float = 0.15
    mu_law_probability: float = 0.05
    clipping_probability: float = 0.05
    speeds: tuple[float, float] = (0.9, 1.1)
    equalizer_db: tuple[float, float] = (-9.0, 9.0)
    max_margin: float = 0.5
    rt60: tuple[float, float] = (0.1, 0.6)
    direct_to_reverberant_db: tuple[float, float] = (0.0, 15.0)
    snr_db: tuple[float, float] = (5.0, 25.0)
    gain_db: tuple[float, float] = (-36.0, 6.0)

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be from 0 to 1, got {value}.")
        for name in _RANGES:
            check_range(name, getattr(self, name))
        check_sampling_rate(self.sampling_rate)
        for name in ("speeds", "rt60"):
            if not getattr(self, name)[0] > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not 0 <= self.max_margin < math.inf:
            raise ValueError(f"`max_margin` must not be negative, got {self.max_margin}.")
        if any(not torch.is_tensor(noise) or noise.dim() != 1 or len(noise) == 0 for noise in self.noises or ()):
            raise ValueError("`noises` must be recordings of shape (num_samples,): tensors with a sample each.")

    def __call__(
        self,
        waveforms: torch.Tensor,
        lengths: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            waveforms (`torch.Tensor` of shape `(batch, num_samples)`):
                Floats within -1 and 1.
            lengths (`torch.Tensor` of shape `(batch,)`, *optional*):
                Samples of each row that are no padding.
            generator (`torch.Generator`, *optional*):
                What is drawn from, on the CPU.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Waveforms of shape `(batch, longest)` and their lengths, which change by
            speed and margins alone.
        """
        if waveforms.dim() != 2:
            raise ValueError(f"`waveforms` must have the shape (batch, samples), got {tuple(waveforms.shape)}.")
        batch = len(waveforms)
        if lengths is None:
            lengths = torch.full((batch,), waveforms.shape[1], device=waveforms.device)

        def drawn(limits: tuple[float, float]) -> torch.Tensor:
            uniform = torch.rand(batch, generator=generator).to(waveforms.device)
            return limits[0] + (limits[1] - limits[0]) * uniform

        def chosen(probability: float) -> torch.Tensor:
            rows = (torch.rand(batch, generator=generator) < probability).nonzero()[:, 0]
            return rows.to(waveforms.device)

        factors, rows = drawn(self.speeds), chosen(self.speed_probability)
        if len(rows):
            factors = torch.ones_like(factors).index_copy(0, rows, factors[rows])
            waveforms, lengths = change_speed(waveforms, factors, lengths)
        margins = [(drawn((0.0, self.max_margin)) * self.sampling_rate).long() for _ in range(2)]
        waveforms, lengths = _with_margins(waveforms, lengths, *margins)
        # What is not chosen is not computed: a room takes longer than the features of a clip.
        gains, rows = torch.stack([drawn(self.equalizer_db) for _ in range(6)], -1), chosen(self.equalizer_probability)
        if len(rows):
            equalized = equalize(waveforms[rows], gains[rows], self.sampling_rate)
            waveforms = waveforms.index_copy(0, rows, equalized)
        rt60, distance, rows = drawn(self.rt60), drawn(self.direct_to_reverberant_db), chosen(self.room_probability)
        if len(rows):
            responses = room_responses(rt60[rows], distance[rows], self.sampling_rate, generator)
            waveforms = waveforms.index_copy(0, rows, reverberate(waveforms[rows], responses))
        snr_db, rows = drawn(self.snr_db), chosen(self.noise_probability)
        if len(rows):
            noise = self._noise(waveforms[rows], generator)
            waveforms = waveforms.index_copy(0, rows, add_noise(waveforms[rows], noise, snr_db[rows], lengths[rows]))
        # Telephones and cheap microphones.
        low, high, rows = drawn((50.0, 300.0)), drawn((3000.0, 6000.0)), chosen(self.band_probability)
        if len(rows):
            limited = band_limit(waveforms[rows], low[rows], high[rows], self.sampling_rate)
            waveforms = waveforms.index_copy(0, rows, limited)
        waveforms = waveforms * 10 ** (drawn(self.gain_db)[:, None] / 20)
        level, rows = drawn((0.2, 0.8)), chosen(self.clipping_probability)
        waveforms = waveforms.index_copy(0, rows, clip_peaks(waveforms[rows], level[rows]))
        rows = chosen(self.mu_law_probability)
        waveforms = waveforms.index_copy(0, rows, mu_law(waveforms[rows]))
        return (waveforms * inside_mask(waveforms, lengths)).clamp(-1, 1), lengths

    def _noise(self, waveforms: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        batch, size = waveforms.shape
        uniform = torch.rand(2, batch, generator=generator)
        if not self.noises:
            return coloured_noise(size, (2 * uniform[0]).to(waveforms.device), generator)
        rows = []
        for which, where in uniform.T.tolist():
            noise = self.noises[int(which * len(self.noises))]
            # A recording that is too short goes round.
            rows.append(noise.roll(-int(where * len(noise))).repeat(-(-size // len(noise)))[:size])
        return torch.stack(rows).to(waveforms)


def _with_margins(
    waveforms: torch.Tensor, lengths: torch.Tensor, before: torch.Tensor, behind: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [
        F.pad(row[:length], (front, back))
        for row, length, front, back in zip(waveforms, lengths.tolist(), before.tolist(), behind.tolist(), strict=True)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    # Rows that only became shorter than the batch was keep its width.
    return F.pad(padded, (0, max(waveforms.shape[1] - padded.shape[1], 0))), lengths + before + behind
