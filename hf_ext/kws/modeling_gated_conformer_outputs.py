"""What the gated conformer passes around and returns."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput


class GatedConformerMacs(NamedTuple):
    """
    Multiply-accumulates of one window of full length.

    Args:
        modules (`tuple[int, ...]`):
            Of each gated module, in the order of the gates: for each block feed-forward, attention, convolution, feed-forward.
        always_on (`int`):
            Of the entrance, the gates and the heads. It counts the entrance for a window by itself; in a stream only
            `hop_frames` of each window are new to it.
    """

    modules: tuple[int, ...]
    always_on: int


class DetectedKeyword(NamedTuple):
    """
    A keyword that was found.

    Args:
        label (`str`):
            Which one, of `id2label`.
        score (`float`):
            Probability that the window holds a keyword, times that of this one.
        start (`float`), end (`float`):
            Frames since the beginning of the clip or stream.
    """

    label: str
    score: float
    start: float
    end: float


def without_repeats(keywords: list[DetectedKeyword], max_iou: float) -> list[DetectedKeyword]:
    """The best of those that are the same keyword at the same place: neighbouring windows find it too."""
    kept: list[DetectedKeyword] = []
    for keyword in sorted(keywords, key=lambda keyword: -keyword.score):
        if all(other.label != keyword.label or _iou(other, keyword) <= max_iou for other in kept):
            kept.append(keyword)
    return kept


def _iou(a: DetectedKeyword, b: DetectedKeyword) -> float:
    intersection = max(0.0, min(a.end, b.end) - max(a.start, b.start))
    return intersection / (a.end - a.start + b.end - b.start - intersection)


@dataclass
class GatedConformerStreamState:
    """
    Where a batch of streams stands, between two calls of [`GatedConformerForKeywordDetection.stream`]. Each batch has its own;
    go on with the one that is returned.

    Args:
        frames (`torch.Tensor` of shape `(batch_size, num_frames, num_mel_bins)`):
            Frames that coming steps of the encoder's entrance see.
        steps (`torch.Tensor` of shape `(batch_size, num_steps, hidden_size)`):
            Steps that coming windows see.
        num_windows (`int`):
            Windows given out so far.
        finished (`bool`):
            Whether the last frames were passed.
        num_skipped (`int`):
            Coming steps that no window sees, with a `hop_frames` longer than a window.
    """

    frames: torch.Tensor
    steps: torch.Tensor
    num_windows: int = 0
    finished: bool = False
    num_skipped: int = 0


@dataclass
class GatedConformerOutput(ModelOutput):
    """
    Output of [`GatedConformerForKeywordDetection`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Weighted sum of the losses below, where there are labels.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
            Scores of the keywords, in the window that is the likeliest to hold one.
        detection_logits (`torch.FloatTensor` of shape `(batch_size, num_windows)`):
            Log odds that a window holds a keyword.
        class_logits (`torch.FloatTensor` of shape `(batch_size, num_windows, num_labels)`):
            Scores of the keywords.
        locations (`torch.FloatTensor` of shape `(batch_size, num_windows, 2)`):
            From the centre of the window to that of the keyword, and the keyword's length; both in windows.
        gates (`torch.FloatTensor` of shape `(batch_size, num_windows, num_modules)`):
            1 where a module ran and 0 where it was left out; in training what its output was multiplied by. For each block
            feed-forward, attention, convolution, feed-forward.
        gate_probabilities (`torch.FloatTensor` of shape `(batch_size, num_windows, num_modules)`):
            Of running.
        window_starts (`torch.LongTensor` of shape `(num_windows,)`):
            The first frame of each window.
        window_mask (`torch.BoolTensor` of shape `(batch_size, num_windows)`):
            True for windows that are no padding. In the others all is 0, and the log odds are those of nothing.
        detection_loss, classification_loss, localization_loss, gate_loss (`torch.FloatTensor` of shape `()`, *optional*):
            The losses, unweighted.
    """

    # A model output has a default for every field; those that are no `None` are always there.
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    detection_logits: torch.Tensor = None  # type: ignore[assignment]
    class_logits: torch.Tensor = None  # type: ignore[assignment]
    locations: torch.Tensor = None  # type: ignore[assignment]
    gates: torch.Tensor = None  # type: ignore[assignment]
    gate_probabilities: torch.Tensor = None  # type: ignore[assignment]
    window_starts: torch.Tensor = None  # type: ignore[assignment]
    window_mask: torch.Tensor = None  # type: ignore[assignment]
    detection_loss: torch.Tensor | None = None
    classification_loss: torch.Tensor | None = None
    localization_loss: torch.Tensor | None = None
    gate_loss: torch.Tensor | None = None
