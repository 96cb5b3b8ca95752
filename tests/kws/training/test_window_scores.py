import numpy as np
import pytest
import torch

from hf_ext import KwsFeatureExtractor, KwsWindowDataCollator, decide_windows, time_windows
from hf_ext.kws.training.window_scores import KwsWindowDecisions
from kws.gated_conformer_setting import small_model


COLLATOR = KwsWindowDataCollator(KwsFeatureExtractor(feature_size=16))
# Forty frames of 25 ms every 10 ms.
SAMPLES = 6640


def windows(number=6):
    random = np.random.default_rng(0)
    kinds = ("keyword", "noise", "edge")
    return [
        {
            "audio": random.normal(size=SAMPLES).astype(np.float32) / 10,
            "sampling_rate": 16000,
            "label": i % 2 if kinds[i % 3] == "keyword" else -100,
            "location": (0.1, 0.5) if kinds[i % 3] == "keyword" else (0.0, 0.0),
            "kind": kinds[i % 3],
        }
        for i in range(number)
    ]


def model_that_says(label, detected=True):
    """The same of every window: this label, and that it is in the middle half."""
    model = small_model()
    with torch.no_grad():
        for head in (model.detection_head, model.classifier, model.location_head):
            head.weight.zero_()
            head.bias.zero_()
        model.detection_head.bias.fill_(5.0 if detected else -5.0)
        model.classifier.bias[label] = 5.0
        model.location_head.bias.copy_(torch.tensor([0.1, 0.25]))
    return model


class TestDecisions:
    def test_right_is_the_right_keyword_or_nothing(self):
        some = windows()
        labels = np.array([window["label"] for window in some])
        assert (decide_windows(model_that_says(1), some, COLLATOR).right == (labels == 1)).all()
        assert (decide_windows(model_that_says(1, detected=False), some, COLLATOR).right == (labels < 0)).all()

    def test_places_of_keywords_alone_count(self):
        iou = decide_windows(model_that_says(1), windows(), COLLATOR).iou
        # Half of the length, around the same centre.
        np.testing.assert_allclose(iou[[0, 3]], 0.5, atol=1e-6)
        assert np.isnan(iou[[1, 2, 4, 5]]).all()

    def test_batches_do_not_matter(self):
        model, some = small_model(), windows(7)
        ours, expected = (decide_windows(model, some, COLLATOR, batch_size=size) for size in (3, 64))
        assert (ours.right == expected.right).all() and (ours.gates == expected.gates).all()
        assert 0 < ours.gates.mean() < 1

    def test_options_go_to_the_model(self):
        model, some = small_model(), windows()
        assert decide_windows(model, some, COLLATOR, gate_threshold=1.0).gates.sum() == 0
        assert (decide_windows(model, some, COLLATOR, gated=False).gates == 1).all()

    def test_figures_by_kind(self):
        decisions = KwsWindowDecisions(
            right=np.array([True, False, True, True]),
            iou=np.array([0.5, 0.7, np.nan, np.nan]),
            gates=np.array([[1, 1], [1, 0], [0, 0], [0, 1]]),
            kinds=np.array(["keyword", "keyword", "noise", "noise"]),
        )
        assert decisions.figures((30, 10), always_on=10) == {
            "accuracy": 0.75,
            "accuracy, keyword": 0.5,
            "skipped, keyword": 0.125,
            "skipped of all, keyword": 0.1,
            "accuracy, noise": 1.0,
            "skipped, noise": 0.875,
            "skipped of all, noise": 0.7,
            "IoU of words": 0.6,
        }

    def test_what_cannot_be_decided_is_refused(self):
        with pytest.raises(ValueError, match="`windows` is empty"):
            decide_windows(small_model(), [], COLLATOR)
        with pytest.raises(ValueError, match=r"model\.eval"):
            decide_windows(small_model().train(), windows(), COLLATOR)


def test_times_are_of_each_kind_and_follow_the_work():
    torch.set_num_threads(1)
    model = small_model(num_hidden_layers=6)
    contenders = {"all": (model, {"gated": False}), "nothing": (model, {"gate_threshold": 1.0})}
    times = time_windows(contenders, windows(60), COLLATOR)
    assert set(times) == set(contenders)
    for kind in ("edge", "keyword", "noise"):
        assert times["nothing"][kind] < times["all"][kind]
