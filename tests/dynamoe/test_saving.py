"""A nested model is saved and loaded, by its own class and by the Auto classes, and is the same."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dynamoe.models import SHAPES, random_ids, tiny_model, tiny_moe
from hf_ext import DynaMoeConfig, DynaMoeForCausalLM, convert_to_dynamoe
from hf_ext.hub.model_card import dynamoe_model_card


def assert_same(loaded, moe, sensitivity=0.5):
    """Tensors, configuration, and logits in both forms."""
    assert type(loaded) is DynaMoeForCausalLM and not loaded.training
    expected = moe.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    ids = random_ids(2, 9)
    with torch.no_grad():
        whole, routed = moe(ids).logits, moe(ids, sensitivity=sensitivity).logits
        torch.testing.assert_close(loaded(ids).logits, whole)
        torch.testing.assert_close(loaded(ids, sensitivity=sensitivity).logits, routed)
        # A file's tensors begin at any address, and those may be multiplied by other kernels, which round otherwise.
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()
        assert torch.equal(loaded(ids).logits, whole)
        loaded.expert_usage(reset=True)
        assert torch.equal(loaded(ids, sensitivity=sensitivity).logits, routed)
    assert loaded.expert_usage().num_tokens == ids.numel()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("auto", [DynaMoeForCausalLM, AutoModelForCausalLM])
def test_save_and_load_are_the_same(shape, auto, tmp_path):
    moe = tiny_moe(shape)
    moe.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert_same(loaded, moe)
    shares = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert shares == moe.config.base_config.tie_word_embeddings == loaded.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype, tmp_path):
    """Of the model and its routers, on the disk too."""
    moe = tiny_moe(dtype=dtype)
    moe.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), moe)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_shards_are_put_together(shape, tmp_path):
    moe = tiny_moe(shape)
    moe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), moe)


def test_the_configuration_comes_back(tmp_path):
    moe = tiny_moe("mistral", router_type="classifier", similarity="cosine")
    moe.set_sensitivity(0.75)
    moe.config.detach_router_input = False
    moe.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is DynaMoeConfig and type(config.base_config) is type(moe.config.base_config)
    for name in (
        "expert_widths",
        "router_type",
        "router_hidden_size",
        "similarity",
        "sensitivity",
        "detach_router_input",
    ):
        assert getattr(config, name) == getattr(moe.config, name), name
    assert config.base_config.sliding_window == 6 and config.num_experts == 3
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "dynamoe" and written["base_config"]["model_type"] == "mistral"
    assert DynaMoeConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_no_folder_of_this_machine_is_saved(tmp_path):
    """In a configuration that goes to the Hub."""
    tiny_model().save_pretrained(tmp_path / "dense")
    moe = convert_to_dynamoe(str(tmp_path / "dense"), 3, importance="none")
    moe.save_pretrained(tmp_path / "moe")
    for name in ("config.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "moe" / name).read_text()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_chosen_when_loading(attention, tmp_path):
    moe = tiny_moe("llama", attention)
    moe.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert loaded.model.config._attn_implementation == attention
    assert_same(loaded, moe)


def test_generation_settings_come_along(tmp_path):
    moe = tiny_moe()
    moe.generation_config.eos_token_id, moe.generation_config.max_new_tokens = 3, 7
    moe.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == 3 and loaded.generation_config.max_new_tokens == 7


def test_from_config_makes_the_same_shapes():
    """`AutoModelForCausalLM.from_config` of a nested configuration, and a model's own configuration."""
    moe = tiny_moe("phi3")
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(moe.config))
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in moe.state_dict().items()}


@pytest.mark.parametrize("shape", ["llama-bias", "phi3", "gpt_neox"])
def test_layers_on_the_disk_are_routed_too(shape, tmp_path):
    """Offloaded weights are there only while their own module runs: the result is the same."""
    moe, ids = tiny_moe(shape), random_ids(2, 9)
    moe.save_pretrained(tmp_path / "moe")
    parts = [
        "model.lm_head",
        "model.embed_out",
        *(f"model.model.{n}" for n in ("embed_tokens", "norm", "rotary_emb", "layers.0")),
    ]
    parts += [f"model.gpt_neox.{n}" for n in ("embed_in", "final_layer_norm", "rotary_emb", "layers.0")]
    names = {name for name, _ in moe.named_modules()}
    device_map = {name: "cpu" for name in parts if name in names}
    device_map |= {name: "disk" for name in names if name.endswith(".layers.1")}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "moe", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    with torch.no_grad():
        for options in ({}, {"sensitivity": 0.5}, {"expert_index": 1}):
            expected = moe(ids, **options).logits
            torch.testing.assert_close(loaded(ids, **options).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_card_of_a_classifier_says_what_it_serves():
    moe = tiny_moe(router_type="classifier")
    moe.set_sensitivity(0.7)
    moe.set_sensitivity(1.0)
    card = dynamoe_model_card(moe, "me/fast", facts={"steps": 5}).text
    assert "model.set_sensitivity(0.7)  # what its routers were trained for, or 1.0" in card
    assert "| steps | 5 |" in card and "| sensitivity as saved | 1.0 |" in card
