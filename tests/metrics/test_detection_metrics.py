import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_ext.metrics
from hf_ext.metrics import (
    bootstrap_interval,
    det_points,
    equal_error_rate,
    frr_at_false_alarms_per_hour,
    interval_iou,
    localization_scores,
    roc_auc,
    share_of_macs_skipped,
)


pytest.importorskip("sklearn")
pytest.importorskip("scipy")


def trials(num=400, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, num)
    scores = rng.standard_normal(num) + labels
    return (scores.round(1) if ties else scores), labels


def rates_at(scores, labels, threshold):
    return np.mean(scores[labels == 0] >= threshold), np.mean(scores[labels == 1] < threshold)


class TestRocAuc:
    @pytest.mark.parametrize("ties", [False, True])
    def test_is_the_chance_that_a_match_scores_higher(self, ties):
        scores, labels = trials(ties=ties)
        pairs = list(itertools.product(scores[labels == 1], scores[labels == 0]))
        assert roc_auc(scores, labels) == pytest.approx(np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs]))

    def test_extremes(self):
        assert roc_auc([1, 2, 3], [0, 1, 1]) == 1.0
        assert roc_auc([3, 2, 1], [0, 1, 1]) == 0.0
        assert roc_auc([1, 1, 1], [0, 1, 1]) == 0.5

    def test_what_was_never_detected_comes_last(self):
        assert roc_auc([-np.inf, 0.5, 0.1], [1, 1, 0]) == 0.5


class TestEqualErrorRate:
    def test_both_rates_are_equal_there(self):
        scores, labels = trials(2000)
        rate = equal_error_rate(scores, labels)
        gaps = [(abs(np.subtract(*rates_at(scores, labels, t))), t) for t in scores]
        false_alarms, misses = rates_at(scores, labels, min(gaps)[1])
        assert rate == pytest.approx((false_alarms + misses) / 2, abs=2e-3)

    def test_two_bells_one_apart(self):
        # Phi(-1/2) for normal scores whose means are one deviation apart.
        assert equal_error_rate(*trials(20_000)) == pytest.approx(0.3085, abs=0.01)

    def test_extremes(self):
        assert equal_error_rate([1, 2], [0, 1]) == 0.0
        assert equal_error_rate([2, 1], [0, 1]) == 1.0
        assert equal_error_rate([1, 1, 1], [0, 1, 1]) == 0.5

    def test_pooled_is_not_the_mean_over_words(self):
        # Each word by itself is perfect; one threshold for both is not.
        scores, labels = [0.9, 0.8, 0.5, 0.4], [1, 0, 1, 0]
        assert equal_error_rate(scores[:2], labels[:2]) == equal_error_rate(scores[2:], labels[2:]) == 0.0
        assert equal_error_rate(scores, labels) == 0.5


class TestDetPoints:
    @pytest.mark.parametrize("ties", [False, True])
    def test_each_point_is_what_its_threshold_gives(self, ties):
        scores, labels = trials(100, ties=ties)
        points = det_points(scores, labels)
        for false_alarms, misses, threshold in zip(*points, strict=True):
            assert (false_alarms, misses) == pytest.approx(rates_at(scores, labels, threshold))
        assert points.thresholds[0] == np.inf
        assert (points.false_alarm_rates[-1], points.miss_rates[-1]) == (1.0, 0.0)

    def test_no_threshold_is_left_out_where_both_rates_fall_evenly(self):
        # One match and one mismatch of each score, as scores that were rounded have it.
        scores, labels = np.repeat(np.arange(10), 2), np.tile([0, 1], 10)
        points = det_points(scores, labels)
        assert points.thresholds.tolist() == [np.inf, *range(9, -1, -1)]
        assert points.miss_rates[points.false_alarm_rates <= 0.35].min() == pytest.approx(0.7)


class TestFrrAtFalseAlarms:
    @pytest.mark.parametrize("bound", [0.0, 0.1, 0.5, 1.0, 7.3, 1000.0])
    @pytest.mark.parametrize("ties", [False, True])
    def test_against_a_search_of_all_thresholds(self, bound, ties):
        scores, labels = trials(300, ties=ties)
        allowed = [t for t in [*scores, np.inf] if np.sum(scores[labels == 0] >= t) <= bound * 10]
        expected = min(np.mean(scores[labels == 1] < t) for t in allowed)
        point = frr_at_false_alarms_per_hour(scores, labels, hours=10, false_alarms_per_hour=bound)
        assert point.false_rejection_rate == pytest.approx(expected)
        assert point.false_alarms_per_hour <= bound
        assert np.mean(scores[labels == 1] < point.threshold) == point.false_rejection_rate

    def test_a_bound_that_floats_round_below_a_whole_number(self):
        scores, labels = [0.5, 0.9, 0.8, 0.7, 0.4], [1, 0, 0, 0, 0]
        point = frr_at_false_alarms_per_hour(scores, labels, hours=30, false_alarms_per_hour=0.1)
        assert point.false_rejection_rate == 0.0

    def test_without_false_alarms_only_the_undetected_are_missed(self):
        assert frr_at_false_alarms_per_hour([0.5, -np.inf], [1, 1], hours=1).false_rejection_rate == 0.5

    def test_alarms_of_infinite_score_may_be_within_the_bound(self):
        assert frr_at_false_alarms_per_hour([0.5, np.inf], [1, 0], 1, 1).false_rejection_rate == 0.0
        assert frr_at_false_alarms_per_hour([0.5, 0.7], [1, 0], 1e300, 1e300).false_rejection_rate == 0.0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([0.5], [0], 1), "no keyword"),
            (([0.5], [1], 0), "`hours` must be positive and finite, got 0"),
            (([0.5], [1], np.nan), "`hours` must be positive and finite, got nan"),
            (([0.5], [1], np.inf), "`hours` must be positive and finite, got inf"),
            (([0.5], [1], 1, -1), "must be finite and not negative, got -1"),
            (([0.5], [1], 1, np.inf), "must be finite and not negative, got inf"),
            (([0.5, np.inf, np.inf], [1, 0, 0], 1, 1), "`scores` are infinite for 2 detections"),
        ],
    )
    def test_bad_arguments_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            frr_at_false_alarms_per_hour(*arguments)


class TestBootstrap:
    def test_covers_the_truth_about_as_often_as_it_says(self):
        truth = 0.7602  # Phi(1 / sqrt(2))
        intervals = [bootstrap_interval(roc_auc, *trials(100, seed), num_resamples=60) for seed in range(30)]
        assert sum(low <= truth <= high for low, high in intervals) >= 24

    def test_is_reproducible_and_narrows_with_confidence(self):
        wide = bootstrap_interval(roc_auc, *trials(100), num_resamples=100)
        narrow = bootstrap_interval(roc_auc, *trials(100), confidence=0.5, num_resamples=100)
        assert wide == bootstrap_interval(roc_auc, *trials(100), num_resamples=100)
        assert wide[0] < narrow[0] < narrow[1] < wide[1]

    def test_repeated_trials_are_no_more_evidence_in_groups(self):
        scores, labels = trials(60)
        repeated = np.tile(scores, 10), np.tile(labels, 10)
        apart = bootstrap_interval(roc_auc, *repeated, num_resamples=100)
        grouped = bootstrap_interval(roc_auc, *repeated, groups=list(range(60)) * 10, num_resamples=100)
        assert grouped[1] - grouped[0] > 2 * (apart[1] - apart[0])

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"confidence": 1.0}, "`confidence` must lie between"),
            ({"num_resamples": 0}, "`num_resamples` must be at least 1"),
            ({"groups": ["a"]}, "`groups` has 1 entries for 4 scores"),
        ],
    )
    def test_bad_arguments_are_refused(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(roc_auc, [1, 2, 3, 4], [0, 1, 0, 1], **kwargs)

    def test_groups_of_one_class_each_are_refused_where_they_are_too_few(self):
        with pytest.raises(ValueError, match="`groups` are too few"):
            bootstrap_interval(roc_auc, [1, 2], [0, 1], groups=["a", "b"])


def test_tensors_as_models_give_them():
    scores, labels = torch.tensor([0.75, 0.5, 0.625, 0.125]), torch.tensor([1, 1, 0, 0])
    for given in (scores, scores.bfloat16(), scores.clone().requires_grad_()):
        assert roc_auc(given, labels) == 0.75
        assert bootstrap_interval(roc_auc, given, labels) == bootstrap_interval(
            roc_auc, scores.tolist(), labels.tolist()
        )
    gates = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    assert share_of_macs_skipped(gates, [1, 3], mask=torch.tensor([True])) == 0.75


@pytest.mark.parametrize("metric", [roc_auc, equal_error_rate, det_points])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([], [], "all the same"),
        ([0.1, 0.2], [1, 1], "all the same"),
        ([0.1, 0.2], [0, 2], r"`labels` must be 0 or 1, got \[2\]"),
        ([0.1, np.nan], [0, 1], "1 values that are NaN"),
        ([0.1], [0, 1], "one length"),
        ([[0.1, 0.2]], [[0, 1]], "one length"),
    ],
)
def test_bad_trials_are_refused(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(scores, labels)


class TestLocalization:
    @pytest.mark.parametrize(
        ("a", "b", "iou"),
        [((0, 1), (0, 1), 1.0), ((0, 1), (1, 2), 0.0), ((0, 4), (1, 2), 0.25), ((0, 2), (1, 3), 1 / 3)],
    )
    def test_iou_either_way_round(self, a, b, iou):
        assert interval_iou(a, b) == interval_iou(b, a) == pytest.approx(iou)

    @pytest.mark.parametrize("interval", [(1, 1), (2, 1), (0, np.nan), (0, np.inf)])
    def test_no_interval_is_refused(self, interval):
        with pytest.raises(ValueError, match="must end after it starts"):
            interval_iou(interval, (0, 1))
        with pytest.raises(ValueError, match="must end after it starts"):
            localization_scores([[interval]], [[]])

    def test_all_clips_are_counted_together(self):
        found = [[(0, 1)], [(0, 1), (5, 6)], []]
        actual = [[(0, 1)], [(0, 0.9)], [(3, 4)]]
        scores = localization_scores(found, actual)
        assert scores == pytest.approx((2 / 3, 2 / 3, 2 / 3, 0.95))

    def test_one_interval_is_matched_once(self):
        assert localization_scores([[(0, 1), (0, 1)]], [[(0, 1)]]).precision == 0.5

    def test_matches_are_as_many_as_can_be(self):
        # Taking the best overlap first would leave one interval alone.
        found, actual = [[(0, 10), (4, 14)]], [[(1, 11), (-4, 6)]]
        assert localization_scores(found, actual, min_iou=0.25).f1 == 1.0

    def test_labels_have_to_agree(self):
        assert localization_scores([[(0, 1, "stop")]], [[(0, 1, "go")]]).f1 == 0.0
        assert localization_scores([[(0, 1, "stop")]], [[(0, 1, "stop")]]).f1 == 1.0

    @pytest.mark.parametrize(
        "as_type", [tuple, list, np.array, torch.tensor, lambda pair: torch.tensor(pair).bfloat16()]
    )
    def test_intervals_of_any_type(self, as_type):
        found, actual = [[as_type([0.0, 1.0])]], [[(0.0, 1.0)]]
        assert localization_scores(found, actual) == localization_scores(actual, found) == (1.0, 1.0, 1.0, 1.0)

    def test_labels_of_lists_are_those_of_tuples(self):
        assert localization_scores([[[0, 1, "go"]]], [[(0, 1, "go")]]).f1 == 1.0
        assert localization_scores([[[0, 1, "go"]]], [[(0, 1, "stop")]]).f1 == 0.0

    @pytest.mark.parametrize("interval", [0.0, (0.0,), (0.0, 1.0, "go", 0.9), "01", {"start": 0.0, "end": 1.0}])
    def test_what_is_no_interval_is_refused(self, interval):
        for sides in ([[interval]], [[(0, 1)]]), ([[interval]], [[]]), ([[(0, 1)]], [[interval]]):
            with pytest.raises(ValueError, match="is no interval"):
                localization_scores(*sides)

    def test_nothing_there_and_nothing_found(self):
        assert localization_scores([[]], [[]]).f1 == 1.0
        assert localization_scores([[(0, 1)]], [[]])[:3] == (0.0, 0.0, 0.0)

    def test_bad_arguments_are_refused(self):
        with pytest.raises(ValueError, match="1 clips and `references` has 2"):
            localization_scores([[]], [[], []])
        with pytest.raises(ValueError, match="`min_iou` must be positive"):
            localization_scores([[]], [[]], min_iou=0)


class TestMacsSkipped:
    def test_by_hand(self):
        gates = [[[1, 1], [0, 1]], [[0, 0], [1, 1]]]
        assert share_of_macs_skipped(gates, [10, 30]) == pytest.approx((10 + 40) / 160)
        assert share_of_macs_skipped(gates, [10, 30], always_on=60) == pytest.approx(50 / 400)
        assert share_of_macs_skipped(gates, [10, 30], mask=[[1, 1], [0, 1]]) == pytest.approx(10 / 120)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([[0.5]], [1]), "other than 0 and 1"),
            (([[1, 0]], [1]), "don't fit"),
            (([[1]], [-1]), "must not be negative"),
            (([[1, 0]], [1, np.nan]), "must not be negative and must be finite"),
            (([[1]], [1], np.inf), "must not be negative and must be finite"),
            ((np.zeros((0, 1)), [1]), "no frame"),
            (([[1]], [0]), "no work"),
            (([[1]], [1], 0, [1, 1]), "`mask` has the shape"),
        ],
    )
    def test_bad_arguments_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            share_of_macs_skipped(*arguments)


FOUND = [[{"start": 0.0, "end": 1.0, "label": "stop"}, {"start": 3.0, "end": 4.0, "label": "go"}], []]
ACTUAL = [[{"start": 0.0, "end": 0.8, "label": "stop"}], []]
TRIALS = {"predictions": [0.9, 0.4, 0.6, 0.1], "references": [1, 1, 0, 0]}


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("roc_auc", TRIALS, {"roc_auc": 0.75}),
        ("equal_error_rate", TRIALS, {"equal_error_rate": 0.5}),
        ("det_points", TRIALS, {"miss_rates": [1.0, 0.5, 0.5, 0.0, 0.0]}),
        ("frr_at_false_alarms_per_hour", {**TRIALS, "hours": 2.0}, {"false_rejection_rate": 0.0}),
        ("localization_scores", {"predictions": FOUND, "references": ACTUAL}, {"precision": 0.5, "mean_iou": 0.8}),
        (
            "share_of_macs_skipped",
            {"predictions": [[1, 0]], "macs_per_module": [1, 3]},
            {"share_of_macs_skipped": 0.75},
        ),
    ],
)
def test_evaluate_loads_each_folder_offline(name, arguments, expected, monkeypatch, tmp_path):
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    metric = evaluate.load(str(Path(hf_ext.metrics.__file__).parent / name), cache_dir=str(tmp_path))
    result = metric.compute(**arguments)
    assert {key: result[key] for key in expected} == expected
    if name in ("roc_auc", "equal_error_rate"):
        low, high = metric.compute(**arguments, confidence=0.9)[f"{name}_interval"]
        assert low <= expected[name] <= high


def test_missing_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ImportError, match=r"sklearn.*hf-ext\[eval\]"):
        roc_auc([1, 2], [0, 1])
