"""Distances of pronunciations, nearest phrases and made-up confusables."""

import time
from random import Random

import pytest

from hf_ext.kws.g2p import PHONEMES
from hf_ext.kws.training.mining import PhoneticIndex, confusable_phonemes, phonetic_distance, sound_alike


def plain_distance(first, second):
    """The textbook's, cell by cell."""
    table = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, table = table, [i]
        for j, b in enumerate(second, 1):
            table.append(min(above[j] + 1, table[-1] + 1, above[j - 1] + (a.rstrip("012") != b.rstrip("012"))))
    return table[-1]


def test_plain_distance_is_the_textbooks():
    generator = Random(0)
    for _ in range(200):
        first, second = (generator.choices(PHONEMES[:12], k=generator.randint(1, 9)) for _ in range(2))
        assert phonetic_distance(first, second, weighted=False) == plain_distance(first, second)


def test_weighted_distance_is_a_metric_that_knows_what_is_near():
    generator = Random(1)
    for _ in range(100):
        a, b, c = (generator.choices(PHONEMES, k=generator.randint(1, 6)) for _ in range(3))
        assert phonetic_distance(a, b) == pytest.approx(phonetic_distance(b, a))
        assert phonetic_distance(a, b) <= plain_distance(a, b) + 1e-5
        assert phonetic_distance(a, c) <= phonetic_distance(a, b) + phonetic_distance(b, c) + 1e-5
    assert phonetic_distance("B AE1 T", "P AE2 T") < phonetic_distance("B AE1 T", "S AE1 T")
    assert phonetic_distance("B IH1 T", "B IY1 T") < phonetic_distance("B IH1 T", "B AO1 T")
    assert phonetic_distance("B IH1 T", "B IH0 T") == 0


def test_additions_at_either_end_cost_the_same():
    # The original LibriPhrase distance punishes an extension, so that its hard negatives lack them.
    assert phonetic_distance("F R EH1 N D", "F R EH1 N D Z") == phonetic_distance("R EH1 N D", "F R EH1 N D") == 1


def test_nearest_is_what_comparing_with_all_gives():
    generator = Random(2)
    spoken = [generator.choices(PHONEMES[::5], k=generator.randint(1, 7)) for _ in range(300)]
    phrases = [f"{{{' '.join(phonemes)}}}" for phonemes in spoken]
    index = PhoneticIndex(phrases)
    for query in spoken[:20]:
        all_of_them = sorted(
            phonetic_distance(query, other)
            for other in map(list, {tuple(row) for row in spoken})
            if not sound_alike(query, other)
        )
        found = [neighbour.distance for neighbour in index.nearest(f"{{{' '.join(query)}}}", num_phrases=7)]
        assert found == pytest.approx(all_of_them[:7])


def test_nearest_leaves_out_what_sounds_the_same():
    index = PhoneticIndex(["two", "too", "to", "new", "do", "{T UH1}"])
    assert {"too", "to", "two"}.isdisjoint(neighbour.phrase for neighbour in index.nearest("two"))
    assert index.nearest("two")[0].phrase == "do"
    assert index.nearest("two", max_distance=0.05) == []
    assert sound_alike(["T", "AH0"], ["T", "IH1"]) and not sound_alike(["T", "AH0"], ["T", "EH1"])


def test_shared_ends_are_found_however_far_the_phrases_are():
    index = PhoneticIndex(["turn the volume up", "turn the volume down", "volume up", "lights up", "turn left"])
    assert index.sharing("turn the volume up", "prefix")[0] == "turn the volume down"
    assert index.sharing("turn the volume up", "suffix")[0] == "volume up"
    assert "turn the volume up" not in index.sharing("turn the volume up", "prefix")
    with pytest.raises(ValueError, match="`end` must be"):
        index.sharing("volume", "middle")


def test_ten_thousand_phrases_are_fast():
    generator = Random(3)
    phrases = {f"{{{' '.join(generator.choices(PHONEMES, k=generator.randint(4, 20)))}}}" for _ in range(10_000)}
    index = PhoneticIndex(phrases)
    start = time.process_time()
    for phrase in index.phrases[:20]:
        assert len(index.nearest(phrase, num_phrases=5)) == 5
    assert time.process_time() - start < 4


@pytest.mark.parametrize("kind", ["substitute", "insert", "delete", "prefix", "suffix"])
def test_confusables_are_near_different_and_repeatable(kind):
    original = ["K", "AH0", "M", "P", "Y", "UW1", "T", "ER0"]
    made = [confusable_phonemes(original, Random(seed), kinds=(kind,)) for seed in range(50)]
    assert made == [confusable_phonemes(original, Random(seed), kinds=(kind,)) for seed in range(50)]
    assert len(set(made)) > 10
    for phonemes in made:
        assert not sound_alike(phonemes, original)
        assert set(phonemes) <= set(PHONEMES) and len(phonemes) <= 25
        if kind in ("substitute", "insert", "delete"):
            assert 1 <= phonetic_distance(phonemes, original, weighted=False) <= 3
        if kind == "prefix":
            assert list(phonemes[:2]) == original[:2]
        if kind == "suffix":
            assert list(phonemes[-2:]) == original[-2:]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`kinds` must name some of"):
        confusable_phonemes("HH EY1", Random(0), kinds=("swap",))
    with pytest.raises(ValueError, match="allow other kinds"):
        confusable_phonemes("HH", Random(0), kinds=("delete",))
    with pytest.raises(ValueError, match="unknown symbols"):
        phonetic_distance("HEY", "HH EY1")
    with pytest.raises(ValueError, match="`indel_cost` must be positive, got 0"):
        phonetic_distance("HH", "HH", indel_cost=0)
    with pytest.raises(ValueError, match="`phrases` is empty"):
        PhoneticIndex([])
    with pytest.raises(TypeError, match="must be a list of phrases, got the one text 'hey'"):
        PhoneticIndex("hey")
    with pytest.raises(ValueError, match="`num_phrases` must be at least 1"):
        PhoneticIndex(["hey"]).nearest("hey", num_phrases=0)
