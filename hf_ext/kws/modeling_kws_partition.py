"""Which frames of a clip belong to which unit of a phrase, its phonemes or words."""

import torch
from torch.nn import functional as F


@torch.no_grad()
def dynamic_partition(similarity: torch.Tensor, frame_mask: torch.Tensor, unit_mask: torch.Tensor) -> torch.Tensor:
    """
    Cuts clips into consecutive parts, one for each unit in order, so that the sum of the similarities of frames and their
    units is the greatest of all such partitions ([dynamic sequence
    partitioning](https://huggingface.co/papers/2306.05245)).

    Frame by frame, the best sum that ends with a unit comes from the same unit or from the one before; each row is exact in
    the precision of `similarity`, at least that of float32. Of equal sums the one that stays longer with the later units wins.

    Args:
        similarity (`torch.Tensor` of shape `(..., num_frames, num_units)`):
            How well each frame fits each unit.
        frame_mask (`torch.Tensor` of shape `(..., num_frames)`):
            True for frames that are no padding, which stands on the right.
        unit_mask (`torch.Tensor` of shape `(..., num_units)`):
            True for units that are no padding, which stands on the right.

    Returns:
        `torch.Tensor` of shape `(..., num_frames)`: the unit of each frame. -1 for padding, and for all frames of a clip that
        has fewer than there are units.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext.kws.modeling_kws_partition import dynamic_partition

    >>> similarity = torch.tensor([[0.9, 0.0], [0.2, 0.1], [0.8, 0.3], [0.0, 0.7]])
    >>> dynamic_partition(similarity, torch.ones(4, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    tensor([0, 0, 0, 1])
    ```
    """
    if similarity.dtype in (torch.float16, torch.bfloat16):
        similarity = similarity.float()
    batch, (num_frames, num_units) = similarity.shape[:-2], similarity.shape[-2:]
    before_the_first = torch.arange(num_units, device=similarity.device) > 0
    best = similarity[..., 0, :].masked_fill(before_the_first, -torch.inf)
    moves = [torch.zeros_like(best, dtype=torch.bool)]
    for frame in range(1, num_frames):
        from_previous = F.pad(best[..., :-1], (1, 0), value=-torch.inf)
        moves.append(from_previous > best)
        best = torch.maximum(best, from_previous) + similarity[..., frame, :]

    lengths, last = frame_mask.sum(-1).expand(batch), unit_mask.sum(-1).expand(batch) - 1
    unit, path = last.clamp(min=0), []
    for frame in reversed(range(num_frames)):
        inside = frame < lengths
        path.append(unit.where(inside, -1))
        moved = moves[frame].gather(-1, unit[..., None]).squeeze(-1)
        unit = unit - (moved & inside).long()
    return _where_possible(torch.stack(path[::-1], dim=-1), lengths, last + 1)


@torch.no_grad()
def dynamic_mean_partition(
    frames: torch.Tensor, units: torch.Tensor, frame_mask: torch.Tensor, unit_mask: torch.Tensor
) -> torch.Tensor:
    """
    As [`dynamic_partition`], where the cosines of units and the means of their frames have the greatest sum. It takes the
    square of the number of frames.

    Args:
        frames (`torch.Tensor` of shape `(..., num_frames, size)`):
            Vectors of the frames.
        units (`torch.Tensor` of shape `(..., num_units, size)`):
            Vectors of the units.
        frame_mask (`torch.Tensor` of shape `(..., num_frames)`), unit_mask (`torch.Tensor` of shape `(..., num_units)`):
            As in [`dynamic_partition`].

    Returns:
        `torch.Tensor` of shape `(..., num_frames)`: as [`dynamic_partition`] returns it.
    """
    if frames.dtype in (torch.float16, torch.bfloat16):
        frames, units = frames.float(), units.float()
    units = F.normalize(units, dim=-1)
    # Of the part from one cut to a later one, the sum is a difference of two sums, and its cosine that of its mean.
    sums = F.pad(frames.cumsum(-2), (0, 0, 1, 0))
    norms = torch.cdist(sums, sums, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-8)
    ahead = torch.ones_like(norms, dtype=torch.bool).triu(1)
    projected = sums @ units.transpose(-1, -2)
    batch, (num_cuts, num_units) = projected.shape[:-2], projected.shape[-2:]
    best = projected.new_full((*batch, num_cuts), -torch.inf)
    best[..., 0] = 0
    starts = []
    for unit in range(num_units):
        along = projected[..., unit]
        cosines = (along[..., None, :] - along[..., :, None]) / norms
        totals = (best[..., :, None] + cosines).masked_fill(~ahead, -torch.inf)
        best, start = totals.max(-2)
        starts.append(start)

    lengths, counts = frame_mask.sum(-1).expand(batch), unit_mask.sum(-1).expand(batch)
    places = torch.arange(num_cuts - 1, device=frames.device)
    path = torch.full((*batch, num_cuts - 1), -1, device=frames.device)
    end = lengths
    for unit in reversed(range(num_units)):
        used = unit < counts
        start = starts[unit].gather(-1, end[..., None]).squeeze(-1).where(used, end)
        path = path.masked_fill((places >= start[..., None]) & (places < end[..., None]), unit)
        end = start
    return _where_possible(path, lengths, counts)


def equal_partition(frame_mask: torch.Tensor, unit_mask: torch.Tensor) -> torch.Tensor:
    """
    Cuts clips into equal parts, one for each unit.

    Args:
        frame_mask (`torch.Tensor` of shape `(..., num_frames)`), unit_mask (`torch.Tensor` of shape `(..., num_units)`):
            As in [`dynamic_partition`].

    Returns:
        `torch.Tensor` of shape `(..., num_frames)`: as [`dynamic_partition`] returns it.
    """
    lengths, counts = torch.broadcast_tensors(frame_mask.sum(-1), unit_mask.sum(-1))
    places = torch.arange(frame_mask.shape[-1], device=frame_mask.device)
    path = places * counts[..., None] // lengths[..., None].clamp(min=1)
    return _where_possible(path.where(places < lengths[..., None], -1), lengths, counts)


def _where_possible(path: torch.Tensor, num_frames: torch.Tensor, num_units: torch.Tensor) -> torch.Tensor:
    """No part is empty: without a frame for each unit there is no partition."""
    possible = (num_units > 0) & (num_units <= num_frames)
    return path.where(possible[..., None], -1)
