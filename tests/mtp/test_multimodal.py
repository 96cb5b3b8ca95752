"""Models that take images: their text is decoded, prompts with images are refused."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from mtp.models import SLIDING_WINDOW, VOCAB_SIZE, add_adapter, details, make_skilled, plain, random_prompt


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **layers,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": SLIDING_WINDOW,
        "initializer_range": 0.3,
    }
    no_ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = Gemma3Config(
        text_config={**text, "vocab_size": VOCAB_SIZE + 3, "max_position_embeddings": 128, **no_ends},
        vision_config={**layers, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=VOCAB_SIZE,
        eoi_token_index=VOCAB_SIZE + 1,
        image_token_index=VOCAB_SIZE + 2,
    )
    model = add_adapter(Gemma3ForConditionalGeneration(config).eval())
    make_skilled(model)
    return model


def test_text_is_the_base_models(model: PreTrainedModel) -> None:
    """Token for token."""
    prompt = random_prompt(9)
    expected = plain(model, prompt, max_new_tokens=20)
    assert details(model, prompt, max_new_tokens=20, do_sample=False).sequences.tolist() == expected.tolist()


def test_layers_for_images_are_left_alone(model: PreTrainedModel) -> None:
    """No mask comes there."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert adapted and all("language_model.layers" in name for name in adapted)


def test_prompt_with_an_image(model: PreTrainedModel) -> None:
    """Is refused: the image would be lost."""
    with pytest.raises(ValueError, match=r"would not reach the model.*leave out .*images"):
        model.generate(random_prompt(9), pixel_values=torch.zeros(1, 3, 28, 28), max_new_tokens=9, do_sample=False)
