"""What drafts while decoding is what was trained."""

import pytest
import torch

from mtp.models import add_adapter, tiny_model


@pytest.mark.parametrize("residual", [True, False])
def test_drafting_says_what_the_trained_sampler_says(residual):
    """`draft` spells `sample_states` out; fed its own guesses one by one, the sampler gives the same ones."""
    model = add_adapter(tiny_model(), sampler_residual=residual)
    head, embed, unembed = model.mtp_head, model.get_input_embeddings(), model.get_output_embeddings()
    states, token = torch.randn(4, head.hidden_size, generator=torch.Generator().manual_seed(3)), torch.tensor([5])
    guesses, reached = head.draft("default", token, states, embed, unembed, least_probability=1e-9)
    assert head.draft("default", token, states, embed, unembed)[0].tolist() == guesses.tolist()
    path = 1.0
    for state, guess, probability in zip(states.split(1), guesses, reached, strict=True):
        said = unembed(head.sample_states("default", embed(token), state)).softmax(-1)
        token = said.argmax(-1)
        assert token == guess
        path *= said.max().item()
        assert probability == pytest.approx(path, rel=1e-4)


def test_drafting_ends_with_the_first_unlikely_guess():
    """A guess that is hardly ever reached would be paid for and thrown away."""
    model = add_adapter(tiny_model())
    head, embed, unembed = model.mtp_head, model.get_input_embeddings(), model.get_output_embeddings()
    states, token = torch.randn(4, head.hidden_size, generator=torch.Generator().manual_seed(3)), torch.tensor([5])
    all_guesses, reached = head.draft("default", token, states, embed, unembed, least_probability=1e-9)
    guesses, some = head.draft("default", token, states, embed, unembed, least_probability=1.01 * reached[1])
    assert guesses.tolist() == all_guesses[:2].tolist() and some == reached[:2]
