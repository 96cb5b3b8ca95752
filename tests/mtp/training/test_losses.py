"""The terms of the objective against their formulas."""

import pytest
import torch

from hf_ext.mtp.losses import IGNORE_INDEX, latent_consistency, leading_agreement, token_cross_entropy


@pytest.fixture
def predictions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) * 3
    teacher = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) * 3
    labels = torch.tensor([[0, 6, IGNORE_INDEX], [IGNORE_INDEX, 2, 2]])
    return logits, teacher, labels


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_cross_entropy_to_label_and_teacher_is_the_formula(predictions, weight):
    """Position by position, minus the sum over the vocabulary of target times log-probability."""
    logits, teacher, labels = predictions
    loss = token_cross_entropy(logits, labels, teacher, weight)
    assert loss.shape == labels.shape
    for row in range(2):
        for column in range(3):
            label = int(labels[row, column])
            if label == IGNORE_INDEX:
                assert loss[row, column] == 0
                continue
            said = logits[row, column].exp() / logits[row, column].exp().sum()
            taught = teacher[row, column].exp() / teacher[row, column].exp().sum()
            expected = 0.0
            for token in range(7):
                target = (1 - weight) * (token == label) + weight * taught[token]
                expected -= target * said[token].log()
            torch.testing.assert_close(loss[row, column], expected, rtol=1e-9, atol=0)


def test_a_teacher_without_weight_changes_nothing(predictions):
    """The paper's loss, bit for bit."""
    logits, teacher, labels = predictions
    assert torch.equal(token_cross_entropy(logits, labels, teacher), token_cross_entropy(logits, labels))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_ignored_positions_have_no_gradient(predictions, weight):
    """Neither through the label nor through the teacher."""
    logits, teacher, labels = predictions
    logits.requires_grad_()
    token_cross_entropy(logits, labels, teacher, weight).sum().backward()
    moved = logits.grad.abs().sum(-1) > 0
    assert torch.equal(moved, labels != IGNORE_INDEX)


def test_cross_entropy_of_half_precision_is_taken_in_single(predictions):
    """Equal to that of the same logits in fp32, and fp32 itself."""
    logits, teacher, labels = (tensor if tensor.dtype == torch.long else tensor.bfloat16() for tensor in predictions)
    loss = token_cross_entropy(logits, labels, teacher, 0.5)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, token_cross_entropy(logits.float(), labels, teacher.float(), 0.5))


def test_latent_consistency_is_the_mean_square():
    """Over the hidden dimension, with a gradient for the mask and none for the token."""
    masks = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    tokens = torch.tensor([[1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    loss = latent_consistency(masks, tokens)
    assert loss.tolist() == [(0 + 4 + 9 + 16) / 4]
    loss.sum().backward()
    assert tokens.grad is None
    assert masks.grad.tolist() == [[0.0, 1.0, 1.5, 2.0]]


def test_leading_agreement_counts_up_to_the_first_miss():
    """For every pattern of four guesses."""
    for pattern in range(16):
        agrees = [bool(pattern >> bit & 1) for bit in range(4)]
        expected = next((index for index, agreed in enumerate(agrees) if not agreed), 4)
        assert leading_agreement(torch.tensor([[agrees]])).tolist() == [[expected]]
