import pytest
import torch

from hf_ext.mtp import layout
from hf_ext.mtp.layout import Slots


def test_table_of_two_masks_per_token() -> None:
    """The paper's example with k = 2: blocks, slots, positions, labels and gate."""
    slots = layout.interleaved(num_tokens=3, num_masks=2)
    assert slots.block.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert slots.slot.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert slots.position.tolist() == [0, 1, 2, 1, 2, 3, 2, 3, 4]
    assert slots.label_position.tolist() == [1, 2, 3, 2, 3, 4, 3, 4, 5]
    assert slots.is_mask.tolist() == [False, True, True] * 3


def test_visibility_cell_by_cell() -> None:
    """Figure 4 of the paper, k = 2: who sees whom."""
    slots = layout.interleaved(num_tokens=3, num_masks=2)
    expected = [
        # x0 m1 m2 x1 m1 m2 x2 m1 m2
        [1, 0, 0, 0, 0, 0, 0, 0, 0],  # x0
        [1, 1, 0, 0, 0, 0, 0, 0, 0],  # m1
        [1, 1, 1, 0, 0, 0, 0, 0, 0],  # m2
        [1, 0, 0, 1, 0, 0, 0, 0, 0],  # x1
        [1, 0, 0, 1, 1, 0, 0, 0, 0],  # m1
        [1, 0, 0, 1, 1, 1, 0, 0, 0],  # m2
        [1, 0, 0, 1, 0, 0, 1, 0, 0],  # x2
        [1, 0, 0, 1, 0, 0, 1, 1, 0],  # m1
        [1, 0, 0, 1, 0, 0, 1, 1, 1],  # m2
    ]
    assert layout.visible(slots, slots).int().tolist() == expected


@pytest.mark.parametrize(("num_tokens", "num_masks"), [(1, 1), (1, 4), (5, 3), (7, 1)])
def test_closed_form(num_tokens: int, num_masks: int) -> None:
    """Every cell is what the sentence of the paper says, spelled out in plain Python."""
    slots = layout.interleaved(num_tokens, num_masks)
    pairs = list(zip(slots.block.tolist(), slots.slot.tolist(), strict=True))
    expected = [
        [(kj == 0 and kb <= qb) or (kb == qb and 1 <= kj <= qj) for kb, kj in pairs]  #
        for qb, qj in pairs
    ]
    assert layout.visible(slots, slots).tolist() == expected


def test_tokens_alone_are_causal() -> None:
    """Without masks the rule is the triangle of an ordinary decoder."""
    slots = layout.tokens(0, 6)
    assert torch.equal(layout.visible(slots, slots), torch.ones(6, 6).tril().bool())


def test_sliding_window_counts_positions() -> None:
    """A windowed layer hides whatever stands the window's length back or more, for masks from their own position."""
    slots = layout.interleaved(num_tokens=6, num_masks=2)
    everything, windowed = layout.visible(slots, slots), layout.visible(slots, slots, sliding_window=3)
    distance = slots.position[:, None] - slots.position[None, :]
    assert torch.equal(windowed, everything & (distance < 3))
    assert windowed.sum() < everything.sum()


def test_sliding_window_of_tokens_is_the_models_own() -> None:
    """For ordinary tokens it is the band that transformers' sliding layers see: themselves and `window - 1` before."""
    slots = layout.tokens(0, 8)
    band = torch.ones(8, 8).tril().triu(-2).bool()
    assert torch.equal(layout.visible(slots, slots, sliding_window=3), band)


@pytest.mark.parametrize(("num_tokens", "num_masks"), [(3, 2), (6, 4)])
def test_tokens_first_is_the_same_sequence_in_another_order(num_tokens: int, num_masks: int) -> None:
    """[tokens | masks] is a permutation of the paper's order: same slots, positions, labels and visibility."""
    paper = layout.interleaved(num_tokens, num_masks)
    ours = layout.tokens(0, num_tokens) + layout.masks_behind(torch.arange(num_tokens), num_masks)
    order = torch.argsort(ours.block * (num_masks + 1) + ours.slot)
    assert torch.equal(ours.position[order], paper.position)
    assert torch.equal(ours.label_position[order], paper.label_position)
    assert torch.equal(ours.is_mask[order], paper.is_mask)
    assert torch.equal(layout.visible(ours, ours)[order][:, order], layout.visible(paper, paper))


def test_only_differences_of_blocks_matter() -> None:
    """A decoding step may count from its own first token, with negative blocks for what is cached."""
    near = layout.tokens(-4, 2) + layout.masks_behind(torch.tensor([0, 1]), 2)
    far = layout.tokens(96, 102) + layout.masks_behind(torch.tensor([100, 101]), 2)
    assert torch.equal(layout.visible(near, near), layout.visible(far, far))
    assert torch.equal(near.position + 100, far.position)


def test_masks_behind_chosen_tokens_per_row() -> None:
    """Anchors differ from row to row of a batch; tokens broadcast over it."""
    anchors = torch.tensor([[0, 2], [1, 3]])
    slots = layout.tokens(0, 4) + layout.masks_behind(anchors, 2)
    assert slots.block[:, 4:].tolist() == [[0, 0, 2, 2], [1, 1, 3, 3]]
    assert slots.slot[:, 4:].tolist() == [[1, 2, 1, 2]] * 2
    single = Slots(slots.block[1], slots.slot[1])
    assert torch.equal(layout.visible(slots, slots)[1], layout.visible(single, single))
