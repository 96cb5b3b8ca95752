"""What states say is what the model says: how likely a guess is, too."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ext.mtp.two_pass import two_pass_forward
from hf_ext.mtp.unembedding import unembedding
from mtp.models import SHAPES, random_prompt, skilled_model, tiny_model


@pytest.mark.parametrize("shape", SHAPES)
def test_states_say_what_the_model_says(shape):
    model, prompt = tiny_model(shape, "eager"), random_prompt(7)
    with torch.no_grad():
        states = model.get_decoder()(prompt).last_hidden_state
        torch.testing.assert_close(unembedding(model)(states), model(prompt).logits)


def test_logits_of_cohere_are_multiplied():
    """A sixteenth by default."""
    settings = {"vocab_size": 20, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = AutoConfig.for_model("cohere", **settings, num_attention_heads=2, num_key_value_heads=2)
    model, prompt = AutoModelForCausalLM.from_config(config).eval(), random_prompt(7)
    with torch.no_grad():
        states = model.get_decoder()(prompt).last_hidden_state
        torch.testing.assert_close(unembedding(model)(states), model(prompt).logits)


@pytest.fixture
def twins():
    """Two models that say the same: one divides its logits by four, the other has an output embedding as much smaller."""
    models = [skilled_model("granite"), skilled_model("granite", logits_scaling=1.0)]
    with torch.no_grad():
        models[1].get_output_embeddings().weight /= 4
    return models


def test_training_sees_the_models_own_distribution(twins):
    """As targets, and of masks: of logits four times as large other losses would come."""
    ids = random_prompt(9)
    batch = {"input_ids": ids, "labels": ids, "anchors": torch.tensor([[2, 4]])}
    found, expected = (two_pass_forward(model, "default", **batch, soft_target_weight=0.5) for model in twins)
    for name in ("base_loss", "sampler_loss", "token_sampler_loss"):
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("use_sampler", [True, False])
def test_adaptive_decoding_knows_how_likely_its_guesses_are(twins, use_sampler):
    """Else it would think itself surer than it is."""
    options = {
        "speculation_strategy": "adaptive",
        "speculation_threshold": 0.2,
        "use_sampler": use_sampler,
        "return_dict_in_generate": True,
    }
    for seed in range(4):
        steps = [
            model.generate(random_prompt(6, seed), max_new_tokens=30, do_sample=False, **options).step_lengths
            for model in twins
        ]
        assert steps[0] == steps[1]
