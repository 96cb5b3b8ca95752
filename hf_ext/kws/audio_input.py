"""Audio as users have it, checked and brought to mono floats at one rate."""

from numbers import Real
from typing import Any

import numpy as np
import torch

from hf_ext._extras import missing_extra


# Clipped or amplified speech leaves -1 to 1 by a little; integers taken for floats leave it by thousands.
_LARGEST_FLOAT = 16.0
MOST_CHANNELS = 64


def check_sampling_rate(sampling_rate: Any) -> int:
    """The rate as an integer; raises a `ValueError` if it is none."""
    if sampling_rate is None:
        raise ValueError(
            "`sampling_rate` is not given: pass the rate of the audio in hertz, such as `sampling_rate=16000`."
        )
    whole = (
        isinstance(sampling_rate, Real) and not isinstance(sampling_rate, bool) and sampling_rate == sampling_rate // 1
    )
    if not whole or sampling_rate <= 0:
        raise ValueError(f"`sampling_rate` must be a positive number of hertz, got {sampling_rate!r}.")
    return int(sampling_rate)


def to_clips(raw_speech: Any, channel_axis: int | None) -> list[torch.Tensor]:
    """
    One clip or a batch of them as a list of mono clips.

    Args:
        raw_speech (`Any`):
            A clip, an array of clips, or a list of clips.
        channel_axis (`int`, *optional*):
            The axis of the channels in each clip; `None` for mono.

    Returns:
        `list[torch.Tensor]`: of shape `(num_samples,)` each, float32 on the CPU.
    """
    dimensions = 1 if channel_axis is None else 2
    if isinstance(raw_speech, (list, tuple)) and len(raw_speech) == 0:
        raise ValueError("`raw_speech` is empty: there is no clip.")
    is_list_of_clips = isinstance(raw_speech, (list, tuple)) and np.ndim(raw_speech[0]) > 0
    if not is_list_of_clips:
        whole = _as_array(raw_speech, "raw_speech")
        if whole.ndim != dimensions + 1:
            return [to_mono_float(whole, channel_axis, "raw_speech")]
        if len(whole) == 0:
            raise ValueError(f"`raw_speech` is empty: its shape is {whole.shape}. Leave such clips out.")
        if channel_axis is None and 1 < whole.shape[1] <= MOST_CHANNELS < len(whole):
            # soundfile's way to hold channels, which would pass for thousands of clips of a few samples.
            raise _channels_not_named("raw_speech", whole.shape)
        raw_speech = list(whole)
    return [to_mono_float(clip, channel_axis, f"raw_speech[{i}]") for i, clip in enumerate(raw_speech)]


def to_mono_float(clip: Any, channel_axis: int | None, name: str, may_be_empty: bool = False) -> torch.Tensor:
    """
    One clip as floats of one channel.

    Args:
        clip (`Any`):
            Floats within -1 and 1, or PCM integers of 8 bits (unsigned), 16 or 32.
        channel_axis (`int`, *optional*):
            The axis of the channels, which are averaged; `None` for mono.
        name (`str`):
            What errors call it.
        may_be_empty (`bool`, *optional*, defaults to `False`):
            Whether no sample is fine.

    Returns:
        `torch.Tensor` of shape `(num_samples,)`: float32 on the CPU.
    """
    array = _as_array(clip, name)
    if channel_axis is None and array.ndim in (2, 3):
        raise _channels_not_named(name, array.shape)
    if array.ndim != (1 if channel_axis is None else 2):
        wanted = "(samples,)" if channel_axis is None else f"two axes, with the channels on axis {channel_axis}"
        raise ValueError(f"`{name}` has the shape {array.shape}; it must have {wanted}.")
    if array.size == 0 and not may_be_empty:
        raise ValueError(f"`{name}` is empty: its shape is {array.shape}. Leave such clips out.")
    samples = _as_floats(array, name)
    if channel_axis is not None:
        if channel_axis not in (-2, -1, 0, 1):
            raise ValueError(f"`channel_axis` must be 0 or 1 (or -1, -2), got {channel_axis}.")
        if array.shape[channel_axis] > MOST_CHANNELS:
            # The axis of the samples: their mean would pass for a clip of as many samples as there are channels.
            raise ValueError(
                f"`channel_axis` is {channel_axis}, and `{name}` of the shape {array.shape} would have "
                f"{array.shape[channel_axis]} channels: name the other axis. Floats of one channel need none."
            )
        samples = samples.mean(axis=channel_axis)
    return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))


def resample(samples: torch.Tensor, from_rate: int, to_rate: int) -> torch.Tensor:
    """The clip at another rate. A clip of no length at the new rate keeps one sample."""
    if from_rate == to_rate:
        return samples
    resampled = _soxr().resample(samples.numpy(), from_rate, to_rate)
    return torch.from_numpy(resampled) if len(resampled) else samples[:1]


def streaming_resampler(from_rate: int, to_rate: int) -> Any:
    """What resamples chunk by chunk, to the very samples that [`resample`] gives; `None` where the rates are equal."""
    return None if from_rate == to_rate else _soxr().ResampleStream(from_rate, to_rate, 1, dtype="float32")


def _channels_not_named(name: str, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"`{name}` has the shape {shape}: say which axis holds the channels, `channel_axis=-1` for audio as soundfile reads "
        "it and `channel_axis=0` as torchaudio has it."
    )


def _as_array(values: Any, name: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"`{name}` is no array of samples: its rows have different lengths.") from error
    if array.dtype.kind not in "iuf":
        raise ValueError(
            f"`{name}` holds {array.dtype}, not samples: pass floats within -1 and 1 or PCM integers. Files are read with "
            "`soundfile.read`."
        )
    return array


def _as_floats(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if array.dtype in (np.int16, np.int32):
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    if array.dtype.kind != "f" and array.size:
        raise ValueError(
            f"`{name}` holds {array.dtype}, whose scale is unknown: pass floats within -1 and 1, or PCM as uint8, int16 or "
            "int32 (24-bit PCM in the upper bytes of int32, as soundfile reads it)."
        )
    samples = array.astype(np.float32)
    if not np.isfinite(samples).all():
        raise ValueError(
            f"`{name}` has {int((~np.isfinite(samples)).sum())} samples that are NaN or infinite: look at what made them, or "
            "put 0 in their place (`numpy.nan_to_num(audio, posinf=0, neginf=0)`)."
        )
    if samples.size and np.abs(samples).max() > _LARGEST_FLOAT:
        raise ValueError(
            f"`{name}` has floats up to {np.abs(samples).max():g} where -1 to 1 is full scale: 16-bit PCM that became "
            "floats is divided by 32768, or passed as int16."
        )
    return samples


def _soxr() -> Any:
    try:
        import soxr
    except ModuleNotFoundError as error:
        raise missing_extra(error, needed_by="Resampling audio") or error from error
    return soxr
