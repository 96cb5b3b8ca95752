"""Windows of background, with a keyword at a known place or without one."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from hf_ext.kws.feature_extraction_kws import KwsFeatureExtractor
from hf_ext.kws.training.augmentation import KwsAugmenter
from hf_ext.kws.training.effects import check_range
from hf_ext.kws.training.utterances import read_audio


# What a window holds: a keyword near its middle, background alone, a keyword at its edge that the next window will have.
WINDOW_KINDS = ("keyword", "noise", "edge")


def speech_interval(clip: torch.Tensor, sampling_rate: int = 16000, range_db: float = 25.0) -> tuple[int, int]:
    """
    Where a clip of one word is loud: from the first to the last 20 ms that are at most `range_db` below the loudest.

    Args:
        clip (`torch.Tensor` of shape `(num_samples,)`):
            A word with silence or quiet background around it.
        sampling_rate (`int`, *optional*, defaults to `16000`):
            In hertz.
        range_db (`float`, *optional*, defaults to `25.0`):
            In decibels.

    Returns:
        `tuple[int, int]`: the first sample and the one behind the last, with 20 ms to spare on both sides.
    """
    size = sampling_rate // 50
    if len(clip) <= size:
        return 0, len(clip)
    power = F.avg_pool1d(clip.square()[None, None], size, stride=size // 2)[0, 0]
    loud = (power >= power.max() * 10 ** (-range_db / 10)).nonzero()[:, 0]
    start, end = int(loud[0]) * (size // 2) - size, int(loud[-1]) * (size // 2) + 2 * size
    return max(start, 0), min(end, len(clip))


def hold_out(
    rows: Sequence[Mapping[str, Any]], by: str = "speaker", share: float = 0.1, at_least: int = 1, seed: int = 0
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """
    Rows to train on, and rows to evaluate on that share no speaker with them (or nothing else that a column tells).

    Args:
        rows (`Sequence[Mapping]`):
            As [`load_utterances`] gives them.
        by (`str`, *optional*, defaults to `"speaker"`):
            The column whose values are kept apart; `"audio"` keeps apart clips alone.
        share (`float`, *optional*, defaults to `0.1`):
            Of the values that are held out.
        at_least (`int`, *optional*, defaults to `1`):
            The fewest values that are held out. Phrases need two, to be told from each other.
        seed (`int`, *optional*, defaults to `0`):
            Of which.

    Returns:
        `tuple[list, list]`: the rows to train on and those that are held out.

    Raises:
        ValueError: if a row has nothing in the column, all have the same value, or the share is none.

    Example:

    ```python
    >>> from hf_ext import hold_out

    >>> rows = [{"text": "yes", "speaker": str(i % 5)} for i in range(20)]
    >>> train, held_out = hold_out(rows)
    >>> len(train), len(held_out)
    (16, 4)
    ```
    """
    if not 0 <= share < 1:
        raise ValueError(f"`share` must be from 0 to 1 and not 1, got {share}: some are left to train on.")
    lacking = sum(row.get(by) is None for row in rows)
    if lacking:
        raise ValueError(f"{lacking} of the {len(rows)} `rows` lack {by!r}, what `by` holds them out by.")
    values = sorted({row[by] for row in rows})
    if len(values) <= at_least:
        raise ValueError(
            f"The `rows` have no more than {at_least} {by!r} ({values}): that many can't be held out by it."
        )
    chosen = set(Random(seed).sample(values, max(at_least, int(share * len(values)))))
    return [row for row in rows if row[by] not in chosen], [row for row in rows if row[by] in chosen]


def load_noises(
    folder: str | os.PathLike[str], sampling_rate: int = 16000, train_share: float = 0.8
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    Recordings of background, each cut in two: what training mixes in, and what it never hears.

    Args:
        folder (`str` or `os.PathLike`):
            A folder of WAV, FLAC or Ogg files.
        sampling_rate (`int`, *optional*, defaults to `16000`):
            In hertz; other rates are resampled and channels averaged.
        train_share (`float`, *optional*, defaults to `0.8`):
            Of each recording, from its beginning.

    Returns:
        `tuple[list[torch.Tensor], list[torch.Tensor]]`: the beginnings and the ends, of shape `(num_samples,)` each.

    Raises:
        FileNotFoundError: if there is no recording.
        ValueError: if the share is none.
    """
    if not 0 <= train_share <= 1:
        raise ValueError(f"`train_share` must be from 0 to 1, got {train_share}.")
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".wav", ".flac", ".ogg"))
    if not paths:
        raise FileNotFoundError(f"`folder` ({folder}) has no recordings (.wav, .flac or .ogg).")
    noises = [read_audio({"audio": path}, sampling_rate) for path in paths]
    cuts = [int(train_share * len(noise)) for noise in noises]
    return (
        [noise[:cut] for noise, cut in zip(noises, cuts, strict=True)],
        [noise[cut:] for noise, cut in zip(noises, cuts, strict=True)],
    )


class KwsWindowDataset(Dataset):
    """
    Windows of background noise with a keyword in the middle, with one at the edge, or with none.

    Keywords are clips of one word; where the word is in a clip is told by its loudness. A window holds its keyword if their
    centres are at most `max_offset` apart, and otherwise, from `min_edge_offset` on, it doesn't. Nothing is drawn between.
    What a window becomes depends on `seed` and its place in the data alone.

    Args:
        utterances (`Sequence[Mapping]`):
            Rows with `audio` as `load_utterances` gives them and `text`, the keyword.
        noises (`Sequence[torch.Tensor]`):
            Recordings of background, of shape `(num_samples,)` each at `sampling_rate`.
        label2id (`Mapping[str, int]`):
            The keywords.
        window_samples (`int`, *optional*, defaults to `19520`):
            Samples of a window: 120 frames of 30 ms every 10 ms.
        num_windows (`int`, *optional*):
            Windows to draw; one for each utterance by default. They take turns.
        shares (`Mapping[str, float]`, *optional*, defaults to `{"keyword": 0.5, "noise": 0.35, "edge": 0.15}`):
            How often a window is of which kind. Half of the windows hold a keyword; the paper doesn't say.
        max_offset (`float`, *optional*, defaults to `0.1`), min_edge_offset (`float`, *optional*, defaults to `0.3`):
            Seconds from the centre of the window to that of the keyword.
        snr_db (`tuple[float, float]`, *optional*, defaults to `(0.0, 20.0)`):
            Range of the keyword's level over the background's. Background alone is as loud as if it had one.
        augmenter ([`KwsAugmenter`], *optional*):
            Changes each keyword before it is mixed in; its own noise and margins are best off.
        sampling_rate (`int`, *optional*, defaults to `16000`), seed (`int`, *optional*, defaults to `0`):
            Of the clips, and of what is drawn.

    Raises:
        ValueError: if there are no utterances or noises, a noise is empty, a text is no keyword, the shares are none, or
            the sampling rates differ.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext import KwsFeatureExtractor, KwsWindowDataCollator, KwsWindowDataset

    >>> clip = {"array": torch.randn(8000).numpy() / 10, "sampling_rate": 16000}
    >>> windows = KwsWindowDataset([{"audio": clip, "text": "yes"}], [torch.randn(50000)], {"yes": 0}, num_windows=4)
    >>> collator = KwsWindowDataCollator(KwsFeatureExtractor(feature_size=40, win_length=480))
    >>> batch = collator([window for window in windows])
    >>> batch["input_features"].shape, batch["location_targets"].shape
    (torch.Size([4, 120, 40]), torch.Size([4, 2]))
    ```
    """

    def __init__(
        self,
        utterances: Sequence[Mapping[str, Any]],
        noises: Sequence[torch.Tensor],
        label2id: Mapping[str, int],
        window_samples: int = 19520,
        num_windows: int | None = None,
        shares: Mapping[str, float] | None = None,
        max_offset: float = 0.1,
        min_edge_offset: float = 0.3,
        snr_db: tuple[float, float] = (0.0, 20.0),
        augmenter: KwsAugmenter | None = None,
        sampling_rate: int = 16000,
        seed: int = 0,
    ) -> None:
        shares = dict(shares or {"keyword": 0.5, "noise": 0.35, "edge": 0.15})
        unknown = sorted(set(shares) - set(WINDOW_KINDS))
        if unknown or any(share < 0 for share in shares.values()) or not sum(shares.values()):
            raise ValueError(f"`shares` must give {list(WINDOW_KINDS)} shares of 0 or more, not all 0, got {shares}.")
        check_range("snr_db", snr_db)
        if not len(utterances) or not len(noises):
            raise ValueError(
                f"There are {len(utterances)} `utterances` and {len(noises)} `noises`: windows need at least one of each."
            )
        if augmenter is not None and augmenter.sampling_rate != sampling_rate:
            raise ValueError(
                f"`augmenter` works at {augmenter.sampling_rate} Hz and `sampling_rate` is {sampling_rate}: make them equal."
            )
        if any(not torch.is_tensor(noise) or noise.dim() != 1 or len(noise) == 0 for noise in noises):
            raise ValueError("`noises` must be recordings of shape (num_samples,): tensors with a sample each.")
        if window_samples < 1 or (num_windows is not None and num_windows < 0):
            raise ValueError(
                f"`window_samples` ({window_samples}) must be positive and `num_windows` ({num_windows}) not negative."
            )
        others = sorted({row["text"] for row in utterances} - set(label2id))
        if others:
            raise ValueError(f"`utterances` has texts that `label2id` does not have: {others[:5]}.")
        self.utterances = utterances
        self.noises = noises
        self.label2id = label2id
        self.window_samples = window_samples
        self.num_windows = len(utterances) if num_windows is None else num_windows
        self.shares = shares
        self.max_offset = max_offset
        self.min_edge_offset = min_edge_offset
        self.snr_db = snr_db
        self.augmenter = augmenter
        self.sampling_rate = sampling_rate
        self.seed = seed

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Iterating a sequence ends with this error.
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no window {index}: the data has {len(self)}.")
        index %= len(self)
        drawn_from = Random(f"{self.seed} {index}")
        kind = drawn_from.choices(list(self.shares), list(self.shares.values()))[0]
        row = self.utterances[index % len(self.utterances)]
        word = self._word(row, drawn_from)
        duration, half = len(word) / self.sampling_rate, self.window_samples / self.sampling_rate / 2
        if kind == "edge":
            # At least a tenth of a second of it is seen.
            latest = max(half + duration / 2 - 0.1, self.min_edge_offset)
            offset = drawn_from.choice((-1, 1)) * drawn_from.uniform(self.min_edge_offset, latest)
        else:
            offset = drawn_from.uniform(-self.max_offset, self.max_offset)
        spoken = self._placed(word, offset)
        background = self._background(drawn_from)
        # The level goes by the whole word, not by what the window has of it.
        level = word.square().mean().sqrt().clamp(min=1e-4) * 10 ** (-drawn_from.uniform(*self.snr_db) / 20)
        background = background * level / background.square().mean().sqrt().clamp(min=1e-8)
        audio = background if kind == "noise" else spoken + background
        has_keyword = kind == "keyword"
        return {
            "audio": audio.clamp(-1, 1).numpy(),
            "sampling_rate": self.sampling_rate,
            "label": self.label2id[row["text"]] if has_keyword else -100,
            "location": (offset / (2 * half), duration / (2 * half)) if has_keyword else (0.0, 0.0),
            "kind": kind,
        }

    def _word(self, row: Mapping[str, Any], drawn_from: Random) -> torch.Tensor:
        clip = read_audio(row, self.sampling_rate)
        start, end = speech_interval(clip, self.sampling_rate)
        word = clip[start:end]
        seed = drawn_from.getrandbits(63)
        if self.augmenter is not None:
            changed, lengths = self.augmenter(word[None], None, torch.Generator().manual_seed(seed))
            word = changed[0, : int(lengths[0])]
        return word[: self.window_samples]

    def _placed(self, word: torch.Tensor, offset: float) -> torch.Tensor:
        """The word so many seconds from the middle, as far as the window has it."""
        start = round(self.window_samples / 2 + offset * self.sampling_rate - len(word) / 2)
        return F.pad(word, (start, self.window_samples - start - len(word)))

    def _background(self, drawn_from: Random) -> torch.Tensor:
        noise = drawn_from.choice(self.noises)
        # A recording that is too short goes round.
        noise = noise.repeat(-(-self.window_samples // len(noise)))
        start = drawn_from.randint(0, len(noise) - self.window_samples)
        return noise[start : start + self.window_samples]


@dataclass
class KwsWindowDataCollator:
    """
    Windows as a batch for [`GatedConformerForKeywordDetection`].

    Args:
        feature_extractor ([`KwsFeatureExtractor`]):
            The model's.
    """

    feature_extractor: KwsFeatureExtractor

    def __call__(self, windows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            windows (`Sequence[Mapping]`):
                Items of [`KwsWindowDataset`].

        Returns:
            `dict[str, torch.Tensor]`: what the model takes: `input_features`, `attention_mask`, `labels` and
            `location_targets`.
        """
        features = self.feature_extractor(
            [window["audio"] for window in windows],
            sampling_rate=windows[0]["sampling_rate"],
            return_tensors="pt",
        )
        return {
            **features,
            "labels": torch.tensor([window["label"] for window in windows]),
            "location_targets": torch.tensor([window["location"] for window in windows]),
        }
