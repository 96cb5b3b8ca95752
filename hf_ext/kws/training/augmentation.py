"""Recordings as other microphones, rooms and lines would have them: batched torch, every draw from a given generator."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F


def coloured_noise(
    num_samples: int, exponents: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Noise whose power falls with frequency: white (exponent 0), pink (1), brown (2) and between.

    Args:
        num_samples (`int`):
            Length of each row.
        exponents (`torch.Tensor` of shape `(batch,)`):
            One per row.
        generator (`torch.Generator`, *optional*):
            What is drawn from, on the CPU.

    Returns:
        `torch.Tensor` of shape `(batch, num_samples)`: with a mean power of 1.
    """
    size = _fast_length(num_samples)
    white = torch.randn(len(exponents), size, generator=generator).to(exponents.device)
    bins = torch.arange(size // 2 + 1, device=exponents.device).clamp(min=1)
    shaped = torch.fft.irfft(torch.fft.rfft(white) * bins ** (-exponents[:, None] / 2), n=size)[:, :num_samples]
    return shaped / shaped.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-8)


def add_noise(
    waveforms: torch.Tensor, noise: torch.Tensor, snr_db: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Noise at a given distance below the speech.

    Args:
        waveforms (`torch.Tensor` of shape `(batch, num_samples)`), noise (`torch.Tensor` of the same shape):
            Speech and what is added.
        snr_db (`torch.Tensor` of shape `(batch,)`):
            Signal-to-noise ratio in decibels, of the mean powers within `lengths`.
        lengths (`torch.Tensor` of shape `(batch,)`, *optional*):
            Samples of each row that are no padding; the padding stays silent.

    Returns:
        `torch.Tensor` of shape `(batch, num_samples)`. A silent row stays as it is: there is no level to go by.
    """
    if noise.shape != waveforms.shape:
        raise ValueError(f"`noise` has the shape {tuple(noise.shape)} and `waveforms` {tuple(waveforms.shape)}.")
    inside = _inside(waveforms, lengths)
    speech, noise = waveforms * inside, noise * inside
    ratio = _power(speech, inside) / _power(noise, inside).clamp(min=1e-12)
    return waveforms + noise * (ratio * 10 ** (-snr_db[:, None] / 10)).sqrt()


def room_responses(
    rt60: torch.Tensor,
    direct_to_reverberant_db: torch.Tensor,
    sampling_rate: int = 16000,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Impulse responses of rooms: the direct sound, and from 2 ms on noise that dies away.

    Args:
        rt60 (`torch.Tensor` of shape `(batch,)`):
            Seconds until the tail has lost 60 dB.
        direct_to_reverberant_db (`torch.Tensor` of shape `(batch,)`):
            Energy of the direct sound over that of the tail, in decibels.
        sampling_rate (`int`, *optional*, defaults to `16000`):
            In hertz.
        generator (`torch.Generator`, *optional*):
            What is drawn from, on the CPU.

    Returns:
        `torch.Tensor` of shape `(batch, samples of the longest rt60)`: of unit energy.
    """
    if not bool((rt60 > 0).all()):
        raise ValueError(f"`rt60` must be positive, got {rt60.tolist()}.")
    length = max(int(rt60.max() * sampling_rate), 2)
    seconds = torch.arange(length, device=rt60.device) / sampling_rate
    # 60 dB are a factor of 1,000 in amplitude.
    tail = torch.randn(len(rt60), length, generator=generator).to(rt60.device)
    tail = tail * torch.exp(-6.908 * seconds / rt60[:, None]) * (seconds > 0.002)
    tail = tail / tail.norm(dim=-1, keepdim=True).clamp(min=1e-8) * 10 ** (-direct_to_reverberant_db[:, None] / 20)
    responses = torch.cat([torch.ones_like(tail[:, :1]), tail[:, 1:]], dim=1)
    return responses / responses.norm(dim=-1, keepdim=True)


def reverberate(waveforms: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """
    Speech in a room. Nothing is shifted: the direct sound stays where it was, and what rings on behind the end is cut.

    Args:
        waveforms (`torch.Tensor` of shape `(batch, num_samples)`):
            Speech.
        responses (`torch.Tensor` of shape `(batch, response_samples)`):
            What [`room_responses`] gives.

    Returns:
        `torch.Tensor` of shape `(batch, num_samples)`.
    """
    size = _fast_length(waveforms.shape[1] + responses.shape[1] - 1)
    spectrum = torch.fft.rfft(waveforms, n=size) * torch.fft.rfft(responses, n=size)
    return torch.fft.irfft(spectrum, n=size)[:, : waveforms.shape[1]]


def change_speed(
    waveforms: torch.Tensor, factors: torch.Tensor, lengths: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Faster and higher, or slower and lower, as a tape. It is the one change of length.

    Args:
        waveforms (`torch.Tensor` of shape `(batch, num_samples)`):
            Speech.
        factors (`torch.Tensor` of shape `(batch,)`):
            Above 1 is faster.
        lengths (`torch.Tensor` of shape `(batch,)`, *optional*):
            Samples of each row that are no padding.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Waveforms of shape `(batch, longest)` and their lengths.
    """
    if not bool((factors > 0).all()):
        raise ValueError(f"`factors` must be positive, got {factors.tolist()}.")
    old = [waveforms.shape[1]] * len(waveforms) if lengths is None else lengths.tolist()
    rows = []
    for row, length, factor in zip(waveforms, old, factors.tolist(), strict=True):
        new = max(round(length / factor), 1)
        # The spectrum, cut or filled with silence, at another length: nothing is mirrored into the band.
        rows.append(torch.fft.irfft(torch.fft.rfft(row[:length]), n=new) * (new / length))
    new_lengths = torch.tensor([len(row) for row in rows], device=waveforms.device)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), new_lengths


def clip_peaks(waveforms: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Cuts each row at this share, of shape `(batch,)`, of its highest peak, as an overdriven input does."""
    bound = waveforms.abs().amax(-1, keepdim=True) * level[:, None]
    return torch.minimum(torch.maximum(waveforms, -bound), bound)


def mu_law(waveforms: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """The rounding of a telephone line: G.711's companding to so many levels and back, within -1 and 1."""
    mu = levels - 1
    companded = (
        waveforms.sign() * torch.log1p(mu * waveforms.abs().clamp(max=1)) / torch.log1p(torch.tensor(float(mu)))
    )
    rounded = ((companded + 1) / 2 * mu).round() / mu * 2 - 1
    # Silence stays silence, which an even number of levels would not have.
    rounded = rounded.where(waveforms != 0, 0.0)
    return rounded.sign() * torch.expm1(rounded.abs() * torch.log1p(torch.tensor(float(mu)))) / mu


def band_limit(
    waveforms: torch.Tensor, low: torch.Tensor, high: torch.Tensor, sampling_rate: int = 16000
) -> torch.Tensor:
    """Leaves out what is below `low` and above `high`, in hertz, of shape `(batch,)`: telephones have 300 to 3,400."""
    size = waveforms.shape[1]
    hertz = torch.fft.rfftfreq(size, 1 / sampling_rate, device=waveforms.device)
    kept = (hertz >= low[:, None]) & (hertz <= high[:, None])
    return torch.fft.irfft(torch.fft.rfft(waveforms) * kept, n=size)


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
    A chain of changes, each drawn for each clip: speed, silence around, room, noise, band and line, gain, clipping.

    Args:
        noises (`Sequence[torch.Tensor]`, *optional*):
            Recordings of background, of shape `(num_samples,)` each at `sampling_rate`. Without them noise is made.
        sampling_rate (`int`, *optional*, defaults to `16000`):
            In hertz.
        speed_probability, room_probability, noise_probability, band_probability, mu_law_probability,
        clipping_probability (`float`, *optional*, default to `0.3`, `0.3`, `0.6`, `0.15`, `0.05` and `0.05`):
            Share of clips that are changed.
        speeds (`tuple[float, float]`, *optional*, defaults to `(0.9, 1.1)`):
            Range of factors.
        max_margin (`float`, *optional*, defaults to `0.5`):
            Most seconds of silence put before and behind, in every clip: models that never heard any lose most of their
            accuracy in untrimmed clips.
        rt60 (`tuple[float, float]`, *optional*, defaults to `(0.1, 0.6)`):
            Seconds.
        direct_to_reverberant_db (`tuple[float, float]`, *optional*, defaults to `(0.0, 15.0)`):
            Near and far speakers.
        snr_db (`tuple[float, float]`, *optional*, defaults to `(5.0, 25.0)`):
            Range in decibels.
        gain_db (`tuple[float, float]`, *optional*, defaults to `(-12.0, 6.0)`):
            Range in decibels, for every clip.

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
    room_probability: float = 0.3
    noise_probability: float = 0.6
    band_probability: float = 0.15
    mu_law_probability: float = 0.05
    clipping_probability: float = 0.05
    speeds: tuple[float, float] = (0.9, 1.1)
    max_margin: float = 0.5
    rt60: tuple[float, float] = (0.1, 0.6)
    direct_to_reverberant_db: tuple[float, float] = (0.0, 15.0)
    snr_db: tuple[float, float] = (5.0, 25.0)
    gain_db: tuple[float, float] = (-12.0, 6.0)

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be from 0 to 1, got {value}.")
            if isinstance(value, tuple) and name != "noises" and not value[0] <= value[1]:
                raise ValueError(f"`{name}` must be a range from least to most, got {value}.")
        if self.max_margin < 0:
            raise ValueError(f"`max_margin` must not be negative, got {self.max_margin}.")
        if self.noises is not None and any(noise.dim() != 1 or len(noise) == 0 for noise in self.noises):
            raise ValueError("`noises` must be recordings of shape (num_samples,), each with a sample.")

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
        return (waveforms * _inside(waveforms, lengths)).clamp(-1, 1), lengths

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


def _fast_length(num_samples: int) -> int:
    """A length, not shorter, that a Fourier transform is quick at; lengths with large prime factors take many times longer."""
    return -(-num_samples // 1024) * 1024


def _inside(waveforms: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    if lengths is None:
        return torch.ones_like(waveforms)
    return (torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]).to(waveforms.dtype)


def _power(waveforms: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    return waveforms.square().sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)


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
