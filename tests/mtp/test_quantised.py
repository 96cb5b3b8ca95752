"""Adapters over a base model that bitsandbytes has quantised."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from mtp.models import details, gated_config, make_skilled, random_prompt, randomise
from mtp.training.setting import tiny_lm, tiny_trainer


# bitsandbytes' kernels for the CPU take rows of whole blocks only.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
# Without a threshold for outliers, which looks at all rows of a pass, a row's result does not depend on the others.
KINDS = {
    "8 bit": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
}

# bitsandbytes says with every product in 8 bits that it computes in half precision.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with some order in its text."""
    path = tmp_path_factory.mktemp("dense")
    tiny_lm(**SIZES).save_pretrained(path)
    return path


def quantised(folder: Path, kind: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=KINDS[kind], device_map="cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["quadratic", "linear"])
def test_output_is_the_base_models(folder: Path, kind: str, strategy: str) -> None:
    """Token for token, while guesses come true."""
    base = quantised(folder, kind)
    prompts = [random_prompt(length, seed=length) for length in (1, 4, 7, 12)]
    call = {"max_new_tokens": 30, "eos_token_id": None}
    expected = [base.generate(p, attention_mask=torch.ones_like(p), do_sample=False, **call) for p in prompts]
    model = get_peft_model(base, gated_config(sampler_residual=False))
    randomise(model)
    make_skilled(model)
    steps = 0
    for prompt, tokens in zip(prompts, expected, strict=True):
        mask = torch.ones_like(prompt)
        output = details(model, prompt, attention_mask=mask, speculation_strategy=strategy, **call)
        assert output.sequences.tolist() == tokens.tolist()
        steps += int(output.num_steps)
    assert steps < 30 * len(prompts) - 4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_over_the_same_weights_unpacked(folder: Path, kind: str, tmp_path: Path) -> None:
    """Quantised weights pass gradients on as the dense layers with the same values do."""
    found = gradients(tmp_path, quantised(folder, kind))
    expected = gradients(tmp_path, quantised(folder, kind).dequantize())
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99
    assert 0.9 < found.norm() / expected.norm() < 1.1


def gradients(output_dir: Path, base: PreTrainedModel) -> torch.Tensor:
    """Those of the adapter's weights in the last of some steps, one behind the other."""
    trainer = tiny_trainer(output_dir, model=base, optim="sgd", max_steps=2)
    latest: dict[str, torch.Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda value, name=name: latest.update({name: value.flatten().float()}))
    trainer.train()
    return torch.cat(list(dict(sorted(latest.items())).values()))


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_adapter_alone(folder: Path, kind: str, tmp_path: Path) -> None:
    """The quantised weights stay, and what was saved is there when it is loaded over them again."""
    base = quantised(folder, kind)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    trainer = tiny_trainer(tmp_path, model=base)
    trainable = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all("lora_" in name for name in trainable)
    assert all(not value.equal(trainer.model.get_parameter(name)) for name, value in trainable.items())
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantised(folder, kind), tmp_path / "adapter")
    weights = again.base_model.model.state_dict()
    for name, value in before.items():
        assert value.equal(weights[_adapted(name)]), name
    saved, loaded = get_peft_model_state_dict(trainer.model), get_peft_model_state_dict(again)
    assert all(value.float().equal(loaded[name].float()) for name, value in saved.items())


def _adapted(name: str) -> str:
    """The name of a base model's tensor where its layer has an adapter around it."""
    layer, _, tensor = name.partition("_proj.")
    return f"{layer}_proj.base_layer.{tensor}" if tensor else name


def test_weights_repacked_for_inference_are_refused(folder: Path, tmp_path: Path) -> None:
    """Where bitsandbytes has done so, before anything is trained in vain."""
    base = quantised(folder, "4 bit")
    base.generate(random_prompt(5), attention_mask=torch.ones(1, 5), max_new_tokens=2)
    if not base.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("this processor takes them as they are")
    with pytest.raises(ValueError, match="repacked for inference"):
        tiny_trainer(tmp_path, model=base)
