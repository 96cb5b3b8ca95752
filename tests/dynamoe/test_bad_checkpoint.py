"""A checkpoint that is not what its configuration says is refused when it is loaded, by name and with the way out."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dynamoe.models import WIDTH, random_ids, tiny_model, tiny_moe
from hf_ext import DynaMoeConfig, DynaMoeForCausalLM
from hf_ext.dynamoe.routing import START


@pytest.fixture
def saved(tmp_path):
    tiny_moe().save_pretrained(tmp_path)
    return tmp_path


def change_base(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["base_config"].update(changes)
    path.write_text(json.dumps(config))
    return config


def change_weights(folder, keep):
    path = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if keep(k)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, r"lacks \d+ of \d+ tensors"),
        ({"num_hidden_layers": 1}, r"holds \d+ tensors that the configuration has no place for.*`base_config`"),
        ({"num_attention_heads": 8}, r"other shapes.*o_proj.*\(32, 32\) in place of \(32, 64\).*`base_config`"),
        ({"vocab_size": 41}, r"other shapes.*\(40, 32\) in place of \(41, 32\)"),
        ({"model_type": "qwen2"}, r"lacks \d+ of \d+ tensors.*q_proj\.bias"),
        ({"intermediate_size": 48}, "`expert_widths` must be the whole MLP of 48"),
    ],
)
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, DynaMoeForCausalLM])
def test_a_base_config_that_is_not_that_of_the_weights(changes, words, auto, saved):
    change_base(saved, **changes)
    with pytest.raises(ValueError, match=words):
        auto.from_pretrained(saved)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, DynaMoeForCausalLM])
def test_routers_of_another_size_start_at_the_full_expert(auto, saved):
    """Where the caller asks for fresh ones: transformers leaves them to the base model's rule, which skips them."""
    model = auto.from_pretrained(saved, router_hidden_size=9, ignore_mismatched_sizes=True)
    fresh = {"hidden.weight": 1 / 32**0.5, "hidden.bias": 1 / 32**0.5, "out.weight": 0, "out.bias": START}
    for mlp in model.nested_mlps():
        for name, weight in mlp.router.named_parameters():
            assert weight.abs().max() <= fresh[name], name
    assert (model(random_ids(2, 5), sensitivity=0.9, output_router_logits=True).expert_index == 2).all()


def test_a_checkpoint_without_its_routers(saved):
    change_weights(saved, lambda key: ".router." not in key)
    with pytest.raises(ValueError, match=r"lacks 8 of \d+ tensors .*router.*its routers were not saved"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_checkpoint_that_lacks_a_tensor(saved):
    change_weights(saved, lambda key: "layers.1.mlp.dense.up_proj" not in key)
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ tensors .*up_proj.*truncated.*download it again"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_truncated_file(size, saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated, damaged or a Git LFS pointer"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_shard_that_is_absent(tmp_path):
    tiny_moe().save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(OSError, match=gone.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_weights_of_a_dense_model(tmp_path):
    """Under a nested model's configuration."""
    tiny_model().save_pretrained(tmp_path)
    tiny_moe().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .*`convert_to_dynamoe`"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sensitivity", 1.5), ("label_sensitivity", -1), ("expert_widths", [20, 10, WIDTH]), ("router_hidden_size", 0)],
)
def test_settings_given_while_loading_are_checked(name, value, saved):
    """As those of the file are, and not at the first call."""
    for auto in (AutoConfig, AutoModelForCausalLM, DynaMoeForCausalLM):
        with pytest.raises(ValueError, match=f"`{name}` must"):
            auto.from_pretrained(saved, **{name: value})
    config, unused = AutoConfig.from_pretrained(saved, sensitivity=0.5, other=1, return_unused_kwargs=True)
    assert config.sensitivity == 0.5 and unused == {"other": 1}


def test_a_dense_model_is_not_loaded_as_a_nested_one(tmp_path):
    """Its configuration has none of the fields, whose defaults describe a model of 7 billion parameters."""
    tiny_model().save_pretrained(tmp_path)
    for own in (DynaMoeConfig, DynaMoeForCausalLM):
        with pytest.raises(ValueError, match=r"is that of a 'llama' model.*`convert_to_dynamoe`"):
            own.from_pretrained(tmp_path)
