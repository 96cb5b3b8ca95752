"""The cost of reading a phrase in the output of a CTC head."""

import itertools

import pytest
import torch

from hf_ext import SlickConfig, SlickForKeywordSpotting
from hf_ext.kws.modeling_kws_ctc_score import ctc_phrase_scores, ctc_symbols_heard


def cheapest_reading(log_probs, phonemes):
    """Over every segment and every path through it that spells the phonemes."""
    costs = log_probs - log_probs.amax(-1, keepdim=True)
    frames = len(costs)
    readings = []
    for start, end in itertools.combinations(range(frames + 1), 2):
        for path in itertools.product([0, *sorted(set(phonemes))], repeat=end - start):
            spelled = [symbol for symbol, _ in itertools.groupby(path) if symbol]
            if spelled == phonemes:
                readings.append(sum(costs[start + i, symbol].item() for i, symbol in enumerate(path)))
    return max(readings) / len(phonemes)


def test_equals_the_best_of_all_paths_through_all_segments():
    generator = torch.Generator().manual_seed(0)
    log_probs = (2 * torch.randn(3, 6, 5, generator=generator)).log_softmax(-1)
    mask = torch.arange(6) < torch.tensor([[6], [4], [5]])
    phonemes = torch.tensor([[1, 2, 0], [3, 3, 0], [2, 0, 0], [1, 2, 4]])
    scores = ctc_phrase_scores(log_probs, mask, phonemes, phonemes > 0)
    for clip, row, length in zip(log_probs, scores, mask.sum(-1).tolist(), strict=True):
        expected = [cheapest_reading(clip[:length], [p for p in phrase if p]) for phrase in phonemes.tolist()]
        torch.testing.assert_close(row, torch.tensor(expected))
    one_each = ctc_phrase_scores(log_probs, mask, phonemes[:3, None], phonemes[:3, None] > 0)
    torch.testing.assert_close(one_each[:, 0], scores.diagonal())


def test_likeliest_symbols_that_spell_the_phrase_cost_nothing():
    said = torch.tensor([0, 3, 3, 0, 0, 2, 4, 4, 0])
    log_probs = torch.nn.functional.one_hot(said, 5).float()[None].mul(9).log_softmax(-1)
    mask = torch.ones(1, len(said), dtype=torch.bool)
    phrases = torch.tensor([[3, 2, 4], [2, 4, 0], [2, 3, 4]])
    scores = ctc_phrase_scores(log_probs, mask, phrases, phrases > 0)[0]
    # A phrase inside of what was said is read there as well; another order is not.
    assert scores[0] == 0 and scores[1] == 0 and scores[2] < -1


def test_clip_shorter_than_the_phrase_costs_more_than_any_reading():
    log_probs = torch.randn(1, 2, 9).log_softmax(-1)
    phrase = torch.tensor([[1, 2, 3]])
    score = ctc_phrase_scores(log_probs, torch.ones(1, 2, dtype=torch.bool), phrase, phrase > 0)
    assert score < -1000 and torch.isfinite(score).all()


def test_silence_around_a_clip_changes_nothing():
    torch.manual_seed(0)
    log_probs = (3 * torch.randn(1, 8, 6)).log_softmax(-1)
    silence = torch.tensor([9.0, 0, 0, 0, 0, 0]).log_softmax(-1).expand(1, 5, 6)
    phrase = torch.tensor([[1, 2, 3]])
    alone = ctc_phrase_scores(log_probs, torch.ones(1, 8, dtype=torch.bool), phrase, phrase > 0)
    inside = torch.cat([silence, log_probs, silence], dim=1)
    torch.testing.assert_close(
        ctc_phrase_scores(inside, torch.ones(1, 18, dtype=torch.bool), phrase, phrase > 0), alone
    )


@pytest.mark.parametrize("head_type", ["flatten", "shared"])
def test_score_and_forward_weigh_matcher_and_reading_alike(head_type):
    torch.manual_seed(0)
    config = SlickConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=16, head_type=head_type)
    model = SlickForKeywordSpotting(config).eval()
    features, ids = torch.randn(3, 60, 80), torch.randint(4, 74, (3, 5))
    audio, text = model.get_audio_features(features), model.get_text_features(ids)
    by_matcher = model.score(audio, text)
    config.update({"matcher_score_weight": 0.0, "ctc_score_weight": 2.0, "score_bias": 0.5})
    reading = (model.score(audio, text) - 0.5) / 2
    assert (reading < 0).all()
    config.update({"matcher_score_weight": 3.0})
    both = model.score(audio, text)
    torch.testing.assert_close(both, 3 * by_matcher + 2 * reading + 0.5)
    output = model(features, keyword_ids=ids, labels=torch.ones(3))
    torch.testing.assert_close(output.logits, both.diagonal())
    # The loss is the paper's, whatever the weights of the score are.
    expected = torch.nn.functional.binary_cross_entropy_with_logits(by_matcher.diagonal(), torch.ones(3))
    torch.testing.assert_close(output.utterance_loss, expected)


def test_symbols_heard_are_those_of_the_greedy_reading():
    torch.manual_seed(0)
    log_probs, mask = torch.randn(4, 40, 5).log_softmax(-1), torch.arange(40) < torch.tensor([40, 39, 7, 1])[:, None]
    greedy = [
        sum(symbol != 0 for symbol, _ in itertools.groupby(row[kept].tolist()))
        for row, kept in zip(log_probs.argmax(-1), mask, strict=True)
    ]
    assert ctc_symbols_heard(log_probs, mask).tolist() == greedy
    assert ctc_symbols_heard(log_probs[..., :1].expand(-1, -1, 5), mask).tolist() == [0] * 4


@pytest.mark.parametrize("ctc_score_weight", [0.0, 2.0])
def test_matcher_counts_down_to_its_floor_and_where_little_else_is_heard(ctc_score_weight):
    torch.manual_seed(0)
    config = SlickConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    model = SlickForKeywordSpotting(config).eval()
    features, ids = torch.randn(3, 60, 80), torch.randint(4, 74, (3, 5))
    ids[1, 2:] = 0
    audio, text = model.get_audio_features(features), model.get_text_features(ids)
    by_matcher = model.score(audio, text)
    config.update({"matcher_score_weight": 0.0, "ctc_score_weight": ctc_score_weight})
    reading = model.score(audio, text)
    heard = ctc_symbols_heard(model.ctc_head(audio.last_hidden_state).log_softmax(-1), audio.attention_mask)
    floor, surplus = by_matcher.median(), heard[:, None] - (ids > 0).sum(-1)
    most = int(surplus.median())
    assert most >= 0 and 0 < (surplus <= most).sum() < surplus.numel()
    config.update({"matcher_score_weight": 1.0, "matcher_score_floor": float(floor), "matcher_max_surplus": most})
    expected = reading + by_matcher.clamp(min=floor) * (surplus <= most)
    torch.testing.assert_close(model.score(audio, text), expected)
    torch.testing.assert_close(model(features, keyword_ids=ids).logits, expected.diagonal())


def test_cohort_takes_off_what_can_be_read_anywhere(tmp_path):
    torch.manual_seed(0)
    config = SlickConfig(
        hidden_size=16, num_hidden_layers=1, intermediate_size=16, matcher_score_weight=0.0, ctc_score_weight=1.0
    )
    model = SlickForKeywordSpotting(config).eval()
    features, ids, cohort = torch.randn(3, 60, 80), torch.randint(4, 74, (2, 5)), torch.randint(4, 74, (8, 4))
    audio, text = model.get_audio_features(features), model.get_text_features(ids)
    alone = model.score(audio, text)
    theirs = model.score(audio, model.get_text_features(cohort)).topk(2).values.mean(-1, keepdim=True)
    model.set_cohort(cohort)
    torch.testing.assert_close(model.score(audio, text), alone - 0.45 * theirs)
    model.save_pretrained(tmp_path)
    loaded = SlickForKeywordSpotting.from_pretrained(tmp_path)
    torch.testing.assert_close(
        loaded.score(loaded.get_audio_features(features), loaded.get_text_features(ids)), model.score(audio, text)
    )
    # In a clip that no phrase of the cohort fits into, a phrase gains nothing worth a detection by it.
    short = model.get_audio_features(torch.randn(1, 8, 80))
    assert model.score(short, model.get_text_features(ids)).max() < -100


def test_cohort_is_no_longer_than_what_is_loaded(tmp_path):
    model = SlickForKeywordSpotting(SlickConfig(hidden_size=16, num_hidden_layers=1, head_type="shared"))
    with pytest.raises(ValueError, match="a phrase of 26 phonemes, and those of a cohort have at most 25"):
        model.set_cohort(torch.full((1, 26), 9))
    # Padding beyond it is none of the phrase.
    model.set_cohort(torch.tensor([[9] * 25 + [0] * 5]))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(SlickForKeywordSpotting.from_pretrained(tmp_path).cohort, torch.full((1, 25), 9))
