import random
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_ext.metrics
from hf_ext.metrics import distinct_ngrams, first_difference, ngram_overlap, tokens_per_step


class TestTokensPerStep:
    def test_plain_decoding_has_one(self):
        assert tokens_per_step([1] * 17) == 1.0

    def test_rows_are_pooled_not_averaged(self):
        # Averaging the rows' own means would give (4 + 1) / 2.
        assert tokens_per_step([[4], [1, 1, 1]]) == pytest.approx(7 / 4)

    def test_ragged_rows_and_a_row_without_steps(self):
        assert tokens_per_step([[2, 2], [], [5]]) == 3.0

    @pytest.mark.parametrize("as_type", [torch.tensor, np.array, tuple])
    def test_tensors_arrays_and_tuples(self, as_type):
        assert tokens_per_step(as_type([1, 2, 3])) == 2.0

    @pytest.mark.parametrize("empty", [[], [[]], [[], []]])
    def test_no_step_is_refused(self, empty):
        with pytest.raises(ValueError, match="no step"):
            tokens_per_step(empty)

    def test_a_step_without_token_is_refused(self):
        with pytest.raises(ValueError, match="a step of 0 tokens"):
            tokens_per_step([3, 0])


class TestDistinctNgrams:
    def test_text_without_repetition_has_one(self):
        assert distinct_ngrams(list(range(100))) == 1.0

    @pytest.mark.parametrize("period", [1, 3, 10])
    def test_a_loop_has_as_many_distinct_ngrams_as_its_period(self, period):
        looping = [i % period for i in range(103)]
        assert distinct_ngrams(looping) == pytest.approx(period / 100)

    def test_same_text_in_two_sequences_is_no_loop(self):
        assert distinct_ngrams([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]) == 1.0

    def test_ngrams_do_not_reach_across_sequences(self):
        assert distinct_ngrams([[1, 2, 3], [4, 5, 6]], n=4) == 1.0
        assert distinct_ngrams([[1, 1], [1, 1], [1, 1, 1]], n=2) == pytest.approx(3 / 4)

    def test_shorter_than_n_or_empty_repeats_nothing(self):
        assert distinct_ngrams([1, 1, 1]) == 1.0
        assert distinct_ngrams([]) == 1.0

    def test_tensor_rows(self):
        assert distinct_ngrams(torch.zeros(2, 8, dtype=torch.long)) == pytest.approx(2 / 10)
        assert distinct_ngrams([torch.zeros(8, dtype=torch.long)]) == pytest.approx(1 / 5)

    def test_n_below_one_is_refused(self):
        with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
            distinct_ngrams([1, 2], n=0)


class TestNgramOverlap:
    def test_against_a_search_by_hand(self):
        rng = random.Random(0)
        corpus = [[rng.randrange(3) for _ in range(rng.randrange(60))] for _ in range(20)]
        sequences = [[rng.randrange(3) for _ in range(rng.randrange(40))] for _ in range(10)]
        for n in (1, 2, 4, 5, 7):
            standing = {tuple(row[i : i + n]) for row in corpus for i in range(len(row) - n + 1)}
            windows = [tuple(row[i : i + n]) for row in sequences for i in range(len(row) - n + 1)]
            expected = sum(window in standing for window in windows) / len(windows)
            assert ngram_overlap(sequences, corpus, n=n) == pytest.approx(expected)

    def test_a_copy_overlaps_wholly_and_other_text_not_at_all(self):
        text = list(range(200))
        assert ngram_overlap(text, [text]) == 1.0
        assert ngram_overlap(text, [list(range(500, 700))]) == 0.0

    def test_a_window_across_two_documents_does_not_count(self):
        assert ngram_overlap([1, 2, 3, 4], [[1, 2], [3, 4]], n=4) == 0.0

    def test_a_window_that_occurs_twice_counts_twice(self):
        assert ngram_overlap([1, 1, 1, 2], [[1, 1]], n=2) == pytest.approx(2 / 3)

    def test_corpus_may_be_a_generator_of_tensors(self):
        corpus = (torch.arange(start, start + 10) for start in (0, 100))
        assert ngram_overlap([torch.arange(102, 108)], corpus, n=4) == 1.0

    def test_sequences_shorter_than_n_overlap_with_nothing(self):
        assert ngram_overlap([1, 2, 3], [[1, 2, 3]], n=64) == 0.0
        assert ngram_overlap([], [[1, 2, 3]], n=2) == 0.0

    def test_collisions_of_the_hash_are_not_taken_for_matches(self, monkeypatch):
        monkeypatch.setattr(
            hf_ext.metrics.decoding,
            "_window_hashes",
            lambda tokens, n: np.zeros(max(len(tokens) - n + 1, 0), np.uint64),
        )
        assert ngram_overlap([1, 2, 3], [[7, 8, 9, 2, 3]], n=2) == pytest.approx(1 / 2)


class TestFirstDifference:
    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ([], [], None),
            ([1, 2], [1, 2], None),
            ([1, 2], [3, 2], 0),
            ([1, 2, 3], [1, 2, 4], 2),
            ([1, 2], [1, 2, 3], 2),
            ([1, 2, 3], [], 0),
        ],
    )
    def test_index_or_none_either_way_round(self, a, b, expected):
        assert first_difference(a, b) == expected
        assert first_difference(b, a) == expected

    def test_tensor_against_list(self):
        assert first_difference(torch.tensor([1, 2, 3]), [1, 2, 3]) is None


def test_evaluate_loads_the_folder_offline(monkeypatch, tmp_path):
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    folder = Path(hf_ext.metrics.__file__).parent / "tokens_per_step"
    metric = evaluate.load(str(folder), cache_dir=str(tmp_path))
    assert metric.compute(predictions=[[1, 4, 3], [1, 1]]) == {
        "tokens_per_step": 2.0,
        "num_tokens": 10,
        "num_steps": 5,
    }
