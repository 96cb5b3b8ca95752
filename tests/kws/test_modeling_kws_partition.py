"""Partitions against all partitions there are."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from hf_ext.kws.modeling_kws_partition import dynamic_mean_partition, dynamic_partition, equal_partition


def all_partitions(num_frames, num_units):
    """The unit of each frame, for every way to cut the frames into parts that are not empty."""
    for cuts in itertools.combinations(range(1, num_frames), num_units - 1):
        yield [sum(frame >= cut for cut in cuts) for frame in range(num_frames)]


def random_masks(random, num_frames, num_units):
    """Of three clips and two phrases each, in all kinds of lengths."""
    frames = torch.randint(1, num_frames + 1, (3, 1, 1), generator=random)
    units = torch.randint(1, num_units + 1, (3, 2, 1), generator=random)
    return torch.arange(num_frames) < frames, torch.arange(num_units) < units


def assert_best(path, frame_mask, unit_mask, value):
    """`value` of a clip, a phrase and a partition is greatest for the one that was found."""
    for clip, phrase in itertools.product(range(3), range(2)):
        num_frames, num_units = int(frame_mask[clip, 0].sum()), int(unit_mask[clip, phrase].sum())
        found = path[clip, phrase].tolist()
        if num_units > num_frames:
            assert set(found) == {-1}
            continue
        best = max(all_partitions(num_frames, num_units), key=lambda units: value(clip, phrase, units))
        assert found == best + [-1] * (len(found) - num_frames)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(12))
def test_sum_of_similarities_is_the_greatest(seed, dtype):
    random = torch.Generator().manual_seed(seed)
    num_frames, num_units = (int(torch.randint(1, top, (), generator=random)) for top in (9, 6))
    similarity = torch.randn(3, 2, num_frames, num_units, generator=random, dtype=dtype)
    masks = random_masks(random, num_frames, num_units)

    def total(clip, phrase, units):
        return sum(similarity[clip, phrase, frame, unit].item() for frame, unit in enumerate(units))

    assert_best(dynamic_partition(similarity, *masks), *masks, total)


@pytest.mark.parametrize("seed", range(8))
def test_sum_of_the_cosines_of_means_is_the_greatest(seed):
    random = torch.Generator().manual_seed(seed)
    num_frames, num_units = (int(torch.randint(1, top, (), generator=random)) for top in (8, 5))
    frames = torch.randn(3, 1, num_frames, 4, generator=random, dtype=torch.float64)
    units = torch.randn(3, 2, num_units, 4, generator=random, dtype=torch.float64)
    masks = random_masks(random, num_frames, num_units)

    def total(clip, phrase, path):
        parts = frames[clip, 0, : len(path)].split([path.count(unit) for unit in range(max(path) + 1)])
        means = torch.stack([part.mean(0) for part in parts])
        return F.cosine_similarity(means, units[clip, phrase, : len(means)]).sum().item()

    assert_best(dynamic_mean_partition(frames, units, *masks), *masks, total)


def test_what_is_behind_the_masks_does_not_matter():
    random = torch.Generator().manual_seed(0)
    masks = random_masks(random, 9, 4)
    similarity = torch.randn(3, 2, 9, 4, generator=random)
    hidden = ~(masks[0][..., None] & masks[1][..., None, :])
    for value in (1e9, -1e9):
        changed = similarity.masked_fill(hidden, value)
        assert torch.equal(dynamic_partition(changed, *masks), dynamic_partition(similarity, *masks))


def test_equal_sums_stay_with_the_later_unit():
    path = dynamic_partition(torch.zeros(5, 3), torch.ones(5, dtype=torch.bool), torch.ones(3, dtype=torch.bool))
    assert path.tolist() == [0, 1, 2, 2, 2]


def test_half_precision_is_not_summed_in_half_precision():
    # In bfloat16 the sum stands still at 256: one more frame, and whichever follows, would make no difference.
    similarity = torch.ones(400, 2, dtype=torch.bfloat16)
    similarity[350:, 0] = 0.5
    path = dynamic_partition(similarity, torch.ones(400, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    assert (path[350:] == 1).all()
    similarity[:350, 1] = 0.5
    path = dynamic_partition(similarity, torch.ones(400, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    assert path.tolist() == [0] * 350 + [1] * 50


@pytest.mark.parametrize("num_frames", [4, 5, 11, 12])
def test_equal_parts_differ_by_one_frame_at_most(num_frames):
    frame_mask = torch.arange(12) < num_frames
    path = equal_partition(frame_mask, torch.ones(4, dtype=torch.bool))
    counts = path[:num_frames].bincount(minlength=4)
    assert counts.max() - counts.min() <= 1 and counts.min() > 0
    assert (path[:num_frames].diff() >= 0).all() and (path[num_frames:] == -1).all()


def test_a_phrase_without_units_has_no_partition():
    masks = torch.ones(5, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    vectors = torch.randn(5, 4), torch.randn(3, 4)
    for path in (
        dynamic_partition(torch.randn(5, 3), *masks),
        dynamic_mean_partition(*vectors, *masks),
        equal_partition(*masks),
    ):
        assert path.tolist() == [-1] * 5
