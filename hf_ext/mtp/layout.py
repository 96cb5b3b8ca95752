"""
Where mask tokens stand, which label each predicts and who sees whom: section 2.1 of the paper, written once.

Every entry of a sequence is a *slot* `(block, slot)`. Slot 0 of block `i` is the ordinary token `x_i`; slot `j >= 1` is
the mask `m_j` that stands behind it. The paper's example with two masks per token:

    tokens    x0 m1 m2 | x1 m1 m2 | x2 m1 m2
    block      0  0  0    1  1  1    2  2  2
    slot       0  1  2    0  1  2    0  1  2
    position   0  1  2    1  2  3    2  3  4        block + slot
    label     x1 x2 x3   x2 x3 x4   x3 x4 x5        block + slot + 1

The order in which the slots are stored is free: training and decoding put ordinary tokens first and masks after, since
then the ordinary tokens lie contiguous in the key-value cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slots:
    """
    A run of slots in the order in which they are stored.

    Args:
        block (`torch.LongTensor` of shape `(..., length)`):
            Index of the ordinary token that each slot belongs to. Only differences matter, so a decoding step may
            count from its own first token and give cached tokens negative indices.
        slot (`torch.LongTensor` of shape `(..., length)`):
            0 for the ordinary token itself, `j >= 1` for the mask `m_j` behind it.

    Example:

    ```python
    >>> slots = interleaved(num_tokens=3, num_masks=2)
    >>> slots.position.tolist()
    [0, 1, 2, 1, 2, 3, 2, 3, 4]
    >>> slots.label_position.tolist()
    [1, 2, 3, 2, 3, 4, 3, 4, 5]
    ```
    """

    block: torch.Tensor
    slot: torch.Tensor

    @property
    def position(self) -> torch.Tensor:
        """Position ids: a mask stands where the token would stand whose successor it predicts."""
        return self.block + self.slot

    @property
    def label_position(self) -> torch.Tensor:
        """Index of the ordinary token that each slot predicts."""
        return self.block + self.slot + 1

    @property
    def is_mask(self) -> torch.Tensor:
        """True where the gate of the LoRA layers is open."""
        return self.slot > 0

    def __add__(self, other: Slots) -> Slots:
        """Both runs, one behind the other; leading dimensions broadcast."""
        shape = torch.broadcast_shapes(self.block.shape[:-1], other.block.shape[:-1])

        def joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.cat([a.expand(*shape, a.shape[-1]), b.expand(*shape, b.shape[-1])], dim=-1)

        return Slots(joined(self.block, other.block), joined(self.slot, other.slot))


def tokens(start: int, stop: int, device: torch.device | str | None = None) -> Slots:
    """Ordinary tokens `x_start .. x_(stop-1)` without masks."""
    block = torch.arange(start, stop, device=device)
    return Slots(block, torch.zeros_like(block))


def masks_behind(blocks: torch.Tensor, num_masks: int) -> Slots:
    """The masks `m_1 .. m_num_masks` behind each of the given tokens `(..., num_blocks)`, block by block."""
    slot = torch.arange(1, num_masks + 1, device=blocks.device).repeat(blocks.shape[-1])
    return Slots(blocks.repeat_interleave(num_masks, dim=-1), slot.expand(*blocks.shape[:-1], -1))


def interleaved(num_tokens: int, num_masks: int) -> Slots:
    """The paper's own order, every token followed by its masks (figure 4)."""
    block = torch.arange(num_tokens).repeat_interleave(num_masks + 1)
    slot = torch.arange(num_masks + 1).repeat(num_tokens)
    return Slots(block, slot)


def visible(queries: Slots, keys: Slots, sliding_window: int | None = None) -> torch.Tensor:
    """
    Which key each query attends to.

    An ordinary token sees the ordinary tokens up to itself and no mask, so that it computes what the base model
    computes. A mask sees the ordinary tokens up to its own and the masks of its own block up to itself.

    Args:
        queries ([`Slots`] of shape `(..., num_queries)`):
            The slots that attend.
        keys ([`Slots`] of shape `(..., num_keys)`):
            The slots that are attended to.
        sliding_window (`int`, *optional*):
            Only keys fewer than this many positions back are seen, as in the base model's own windowed layers.

    Returns:
        `torch.BoolTensor` of shape `(..., num_queries, num_keys)`.
    """
    query_block, query_slot = queries.block[..., :, None], queries.slot[..., :, None]
    key_block, key_slot = keys.block[..., None, :], keys.slot[..., None, :]
    earlier_tokens = (key_slot == 0) & (key_block <= query_block)
    own_block = (key_block == query_block) & (key_slot >= 1) & (key_slot <= query_slot)
    allowed = earlier_tokens | own_block
    if sliding_window is not None:
        allowed &= queries.position[..., :, None] - keys.position[..., None, :] < sliding_window
    return allowed
