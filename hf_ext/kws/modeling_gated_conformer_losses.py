"""What the gated conformer's heads learn, whether, which and where, and what its gates do: how little is enough."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .modeling_gated_conformer_outputs import GatedConformerOutput


def keyword_losses(
    output: GatedConformerOutput,
    labels: torch.Tensor,
    detection_targets: torch.Tensor | None = None,
    location_targets: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    The losses of detection (binary cross-entropy), classification (cross-entropy) and localisation (L1).

    Args:
        output ([`GatedConformerOutput`]):
            The scores and places of each window.
        labels (`torch.Tensor` of shape `(batch_size, num_windows)`), detection_targets (`torch.Tensor` of the same shape,
        *optional*), location_targets (`torch.Tensor` of shape `(batch_size, num_windows, 2)`, *optional*):
            As [`GatedConformerForKeywordDetection`] takes them.

    Returns:
        `dict[str, torch.Tensor]`: `detection_loss`, a mean over windows, and `classification_loss` and `localization_loss`,
        means over those that hold a keyword. What has no windows is 0, with a gradient, as training in several processes needs
        one of every weight.

    Raises:
        ValueError: if targets have another shape or are above 1, or a label is none of the model's.
    """
    mask = output.window_mask
    labels = _of_windows("labels", labels, mask)
    num_labels = output.class_logits.shape[-1]
    if labels.numel() and int(labels.max()) >= num_labels:
        raise ValueError(
            f"`labels` has the keyword {int(labels.max())} and the model has {num_labels} (`num_labels`)."
        )
    if labels.is_floating_point():
        raise ValueError(f"`labels` must be integers, the numbers of keywords, got {labels.dtype}.")
    has_keyword = labels >= 0
    targets = has_keyword.float()
    if detection_targets is not None:
        targets = _of_windows("detection_targets", detection_targets, mask).float()
        if targets.numel() and float(targets.max()) > 1:
            raise ValueError(f"`detection_targets` must be at most 1, got {float(targets.max()):g}.")
    counts = targets >= 0
    detected = output.detection_logits[mask].float()[counts]
    classes = output.class_logits[mask].float()[has_keyword]
    places = output.locations[mask].float()[has_keyword]
    distances = 0.0 * places
    if location_targets is not None:
        distances = (places - _of_windows("location_targets", location_targets, mask, 2).float()[has_keyword]).abs()
    return {
        "detection_loss": _mean(F.binary_cross_entropy_with_logits(detected, targets[counts], reduction="none")),
        "classification_loss": _mean(F.cross_entropy(classes, labels[has_keyword], reduction="none")),
        "localization_loss": _mean(distances.sum(-1)),
    }


def expected_work(
    output: GatedConformerOutput,
    labels: torch.Tensor,
    macs: Sequence[int] | None = None,
    noise_factor: float = 1.0,
) -> torch.Tensor:
    """
    The loss of the gates: the share of the modules' work that they let through, by their probabilities.

    Args:
        output ([`GatedConformerOutput`]):
            The probabilities of each window's gates.
        labels (`torch.Tensor` of shape `(batch_size, num_windows)`):
            As [`GatedConformerForKeywordDetection`] takes them.
        macs (`Sequence[int]`, *optional*):
            Work of each module; the same for all by default, as in the paper.
        noise_factor (`float`, *optional*, defaults to `1.0`):
            How many times as much a window without a keyword counts.

    Returns:
        `torch.Tensor` of shape `()`: a mean over windows.
    """
    probabilities = output.gate_probabilities[output.window_mask].float()
    work = probabilities.new_ones(probabilities.shape[-1]) if macs is None else probabilities.new_tensor(macs)
    shares = probabilities @ (work / work.sum())
    has_keyword = _of_windows("labels", labels, output.window_mask) >= 0
    return _mean(shares.where(has_keyword, noise_factor * shares))


def _of_windows(name: str, values: torch.Tensor, mask: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Targets of the windows that are no padding; clips of one window each may leave its axis out."""
    if mask.shape[1] == 1 and values.shape == (len(mask), *sizes):
        values = values[:, None]
    if values.shape != (*mask.shape, *sizes):
        raise ValueError(
            f"`{name}` has the shape {tuple(values.shape)} and must have {(*mask.shape, *sizes)}, the clips by their windows. "
            "Windows begin every `hop_frames`; clips of at most `window_frames` have one."
        )
    return values.to(mask.device)[mask]


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.sum() / max(values.numel(), 1)
