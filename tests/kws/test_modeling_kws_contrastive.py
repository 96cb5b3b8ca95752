"""Which phrases are right for which clips of a batch, and what that costs."""

import torch

from hf_ext.kws.modeling_kws_contrastive import contrastive_loss, said_phrases


def test_clips_that_say_the_same_are_no_negatives():
    # Clips say A, A, B, C; they are asked for A, B, B, A.
    phrases = torch.tensor([[5, 6, 0], [7, 0, 0], [7, 0, 0], [5, 6, 0]])
    labels, spoken = torch.tensor([1, 0, 1, 0]), torch.tensor([[5, 6], [5, 6], [7, -100], [8, -100]])
    expected = [[1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert said_phrases(phrases, None, labels, spoken).int().tolist() == expected
    alone = [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert said_phrases(phrases, None, labels).int().tolist() == alone
    # What stands behind the mask is no part of a phrase.
    mask, phrases[3, 2] = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]]), 9
    assert said_phrases(phrases, mask, labels, spoken).int().tolist() == expected


def test_contrastive_loss_against_a_loop():
    torch.manual_seed(0)
    scores, said = torch.randn(5, 5), torch.rand(5, 5) < 0.3
    each = []
    for clip, phrase in said.nonzero().tolist():
        among_phrases = torch.cat([scores[clip, phrase][None], scores[clip][~said[clip]]])
        among_clips = torch.cat([scores[clip, phrase][None], scores[:, phrase][~said[:, phrase]]])
        each.append(-among_phrases.log_softmax(0)[0] - among_clips.log_softmax(0)[0])
    torch.testing.assert_close(contrastive_loss(scores, said), torch.stack(each).mean())
