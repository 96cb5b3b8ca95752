"""A clip in any of the forms that users have it in."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_ext.kws.audio_input import check_sampling_rate, resample, to_mono_float
from hf_ext.kws.training.utterances import read_audio, seconds_of


def read_clip(
    audio: Any, own_rate: int, sampling_rate: int | None = None, channel_axis: int | None = None
) -> torch.Tensor:
    """
    A clip in any of the forms that the pipeline takes, as mono floats.

    Args:
        audio (`Any`), sampling_rate (`int`, *optional*), channel_axis (`int`, *optional*):
            As in a call of [`KeywordSpottingPipeline`].
        own_rate (`int`):
            Rate to return, in hertz.

    Returns:
        `torch.Tensor` of shape `(num_samples,)`.
    """
    row = audio if isinstance(audio, Mapping) and "audio" in audio else {"audio": audio}
    clip = row["audio"]
    if isinstance(clip, (bytes, bytearray)):
        clip = {"bytes": bytes(clip)}
    if isinstance(clip, Mapping) and "raw" in clip:
        clip = {**clip, "array": clip["raw"]}
    if isinstance(clip, Mapping) and "array" in clip:
        rate = clip.get("sampling_rate", sampling_rate)
        channel_axis = clip.get("channel_axis", channel_axis)
        clip = clip["array"]
    elif isinstance(clip, (np.ndarray, torch.Tensor)):
        # Items of a `KwsPairDataset` have it beside the samples.
        rate = row.get("sampling_rate", sampling_rate)
    else:
        return read_audio({**row, "audio": _checked_file(clip)}, own_rate)
    mono = to_mono_float(clip, channel_axis, name="audio")
    return resample(_piece(mono, row, check_sampling_rate(rate)), check_sampling_rate(rate), own_rate)


def _checked_file(clip: Any) -> Any:
    """The file if it can be one. Else what the user should do instead."""
    content = clip.get("bytes") if isinstance(clip, Mapping) else None
    path = clip.get("path") if isinstance(clip, Mapping) else clip
    if content:
        return {**clip, "path": path or f"of {len(content)} bytes"}
    if content == b"":
        raise ValueError("`audio` has no bytes: the file is empty.")
    if hasattr(clip, "get_all_samples"):
        # A decoder of torchcodec, which `datasets` makes where it is installed.
        return clip
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"`audio` is of type {type(clip).__name__}: pass a path, the bytes of a file, an array with its `sampling_rate`, or a "
            "dict of `array` and `sampling_rate`."
        )
    if str(path).startswith(("http://", "https://")):
        raise ValueError(f"`audio` is an address ({path}): download the file first and pass its path or its bytes.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"`audio` names no file: {os.fspath(path)}")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"`audio` is an empty file: {os.fspath(path)}")
    return clip


def _piece(samples: torch.Tensor, row: Mapping[str, Any], rate: int) -> torch.Tensor:
    start, end = seconds_of(row, "start"), seconds_of(row, "end")
    piece = samples[int((start or 0) * rate) : None if end is None else int(end * rate)]
    if len(piece) == 0:
        raise ValueError(
            f"`audio` has no sample from {start or 0} s to {end} s: it is {len(samples) / rate:g} s long."
        )
    return piece
