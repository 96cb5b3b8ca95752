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
    guesses, probabilities = head.draft("default", token, states, embed, unembed)
    for state, guess, probability in zip(states.split(1), guesses, probabilities, strict=True):
        said = unembed(head.sample_states("default", embed(token), state)).softmax(-1)
        token = said.argmax(-1)
        assert token == guess
        torch.testing.assert_close(said.max(), probability)
