"""Single changes of recordings: noise, rooms, speed, microphones and lines; batched torch, every draw from a given generator."""

from typing import Any

import torch


def check_range(name: str, limits: Any) -> None:
    """Raises a `ValueError` for what is no pair of a least and a greatest value."""
    if not isinstance(limits, (tuple, list)) or len(limits) != 2 or not limits[0] <= limits[1]:
        raise ValueError(f"`{name}` must be a range from least to most, got {limits}.")


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
    inside = inside_mask(waveforms, lengths)
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


def equalize(waveforms: torch.Tensor, gains_db: torch.Tensor, sampling_rate: int = 16000) -> torch.Tensor:
    """
    Other microphones and distances: louder and softer by frequency, smoothly.

    Args:
        waveforms (`torch.Tensor` of shape `(batch, num_samples)`):
            Speech.
        gains_db (`torch.Tensor` of shape `(batch, num_points)`):
            Decibels at frequencies that are spaced as by ears, from 100 Hz to half the sampling rate; straight lines between.
        sampling_rate (`int`, *optional*, defaults to `16000`):
            In hertz.

    Returns:
        `torch.Tensor` of shape `(batch, num_samples)`.
    """
    size = _fast_length(waveforms.shape[1])
    hertz = torch.fft.rfftfreq(size, 1 / sampling_rate, device=waveforms.device).clamp(min=100)
    place = (hertz / 100).log() / torch.tensor(sampling_rate / 200).log() * (gains_db.shape[1] - 1)
    below = place.floor().long().clamp(max=gains_db.shape[1] - 2)
    gains = gains_db[:, below] + (place - below) * (gains_db[:, below + 1] - gains_db[:, below])
    spectrum = torch.fft.rfft(waveforms, n=size) * 10 ** (gains / 20)
    return torch.fft.irfft(spectrum, n=size)[:, : waveforms.shape[1]]


def _fast_length(num_samples: int) -> int:
    """A length, not shorter, that a Fourier transform is quick at; lengths with large prime factors take many times longer."""
    return -(-num_samples // 1024) * 1024


def inside_mask(waveforms: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    if lengths is None:
        return torch.ones_like(waveforms)
    return (torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]).to(waveforms.dtype)


def _power(waveforms: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    return waveforms.square().sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)
