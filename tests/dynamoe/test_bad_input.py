"""What can't work is refused by name, value and way out, and leaves everything as it was."""

import copy
import json
import math

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from dynamoe.models import WIDTH, WIDTHS, calibration_rows, random_ids, tiny_model, tiny_moe
from hf_ext import DynaMoeConfig, convert_to_dynamoe


NAMES_OF_ALL = "llama, mistral, qwen2, qwen3, gemma, olmo, phi3, gpt_neox"


def refuse(model, words, error=ValueError, **options):
    """Tries to convert, and looks at the message and at the model."""
    options = {"calibration_dataset": calibration_rows(), "disable_tqdm": True, **options}
    is_model = isinstance(model, torch.nn.Module)
    before = copy.deepcopy(model) if is_model else None
    with pytest.raises(error) as caught:
        convert_to_dynamoe(model, **options)
    for word in words:
        assert str(word) in str(caught.value), (word, str(caught.value))
    if is_model:
        assert [n for n, _ in model.named_modules()] == [n for n, _ in before.named_modules()]
        assert model.training == before.training
        for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
            assert torch.equal(now, then) and now.requires_grad == then.requires_grad, name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts": 0}, ["`num_experts`", "at least 2", "got 0"]),
        ({"num_experts": 1}, ["`num_experts`", "at least 2", "got 1"]),
        ({"num_experts": True}, ["`num_experts`", "got True"]),
        ({"num_experts": 2.0}, ["`num_experts`", "got 2.0"]),
        ({"num_experts": 5}, ["`num_experts`=5", f"{WIDTH} neurons", "`expert_widths`", "(5, 10, 14, 19, 24)"]),
        ({"expert_widths": [12]}, ["`expert_widths`", "at least two", "[12]"]),
        ({"expert_widths": [0, 24]}, ["`expert_widths`", "[0, 24]"]),
        ({"expert_widths": [12, 12, 24]}, ["`expert_widths`", "ascend", "[12, 12, 24]"]),
        ({"expert_widths": [12, 6, 24]}, ["`expert_widths`", "ascend"]),
        ({"expert_widths": [6, 12]}, ["`expert_widths`", "whole MLP of 24", "got 12"]),
        ({"expert_widths": [6, 48]}, ["`expert_widths`", "whole MLP of 24", "got 48"]),
        ({"expert_widths": [6.5, 24]}, ["`expert_widths`", "integers", "6.5"]),
        ({"expert_widths": 24}, ["`expert_widths`", "got 24"]),
        ({"importance": "magnitude"}, ["`importance`", "'taylor'", "got 'magnitude'"]),
        ({"calibration_dataset": None}, ["`calibration_dataset`", "importance='none'"]),
        ({"calibration_dataset": []}, ["`calibration_dataset`", "no text"]),
        ({"calibration_dataset": [{"input_ids": [1]}]}, ["`calibration_dataset`", "no text of two tokens"]),
        ({"calibration_dataset": [{"label": 3}]}, ["Row 0", "no text", "`input_ids`", "found `label` (int)"]),
        (
            {"calibration_dataset": [{"text": None, "id": 3}]},
            ["Row 0", "no text", "found `text` (NoneType), `id` (int)"],
        ),
        ({"calibration_dataset": [{}]}, ["Row 0", "no text", "found nothing"]),
        ({"calibration_dataset": [7]}, ["Row 0", "no text", "int"]),
        ({"calibration_dataset": "corpus.txt"}, ["`calibration_dataset`", "str", "load_dataset"]),
        ({"calibration_dataset": {"train": []}}, ["`calibration_dataset`", "splits ['train']"]),
        ({"calibration_dataset": ["a text"]}, ["`calibration_dataset` is text", "`processing_class`"]),
        (
            {"calibration_dataset": ["a text"], "processing_class": "gpt2"},
            ["`processing_class`", "got 'gpt2'", "AutoTokenizer.from_pretrained"],
        ),
        ({"calibration_dataset": [{"input_ids": [1, 40]}]}, ["token 40", "vocabulary has 40", "`processing_class`"]),
        ({"calibration_dataset": [{"input_ids": [1, -100]}]}, ["`input_ids` of row 0", "-100"]),
        ({"calibration_dataset": [{"input_ids": [[1, 2]]}]}, ["`input_ids` of row 0", "one text"]),
        ({"calibration_tokens": 0}, ["`calibration_tokens`", "at least 2", "got 0"]),
        ({"batch_size": 0}, ["`batch_size`", "at least 1", "got 0"]),
        ({"max_length": 1}, ["`max_length`", "at least 2", "got 1"]),
        ({"router_hidden_size": 0}, ["`router_hidden_size`", "got 0"]),
        ({"router_type": "mlp"}, ["router_type", "ordinal", "mlp"]),
        ({"similarity": "l2"}, ["similarity", "projection", "l2"]),
    ],
)
def test_settings_that_cannot_work(options, words):
    error = Exception if {"router_type", "similarity"} & options.keys() else ValueError
    refuse(tiny_model().train(), words, error=error, **options)


def test_widths_may_come_from_anywhere(tmp_path):
    """From a generator, which can be read once, and from arrays."""
    tiny_model().save_pretrained(tmp_path)
    for widths in (iter(WIDTHS), numpy.array(WIDTHS), torch.tensor(WIDTHS)):
        moe = convert_to_dynamoe(tmp_path, expert_widths=widths, importance="none")
        assert moe.config.expert_widths == WIDTHS and {type(width) for width in moe.config.expert_widths} == {int}


def test_a_model_converted_twice(tmp_path):
    """The object, and the folder that it was saved to, before its weights are read."""
    moe = tiny_moe()
    refuse(moe, ["DynaMoeForCausalLM already", "dense model"])
    refuse(moe.model, ["nested already"])
    moe.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refuse(str(tmp_path), [str(tmp_path), "DynaMoE model already"])


def test_a_quantised_base(tmp_path):
    """As a model, and as a folder, before its weights are read."""
    model = tiny_model()
    model.is_quantized = True
    refuse(model, ["quantised", "dtype=torch.bfloat16"])
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuse(tmp_path, [str(tmp_path), "quantised", "quantise the result"])


def test_an_architecture_that_cannot_be_converted(tmp_path):
    """Named with those that can and the modules looked for; from a folder before its weights are read."""
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = [
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)),
        MixtralForCausalLM(MixtralConfig(**small, intermediate_size=16, num_key_value_heads=2, num_local_experts=2)),
        Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **small, intermediate_size=24, num_key_value_heads=2, num_experts=2, moe_intermediate_size=8,
                shared_expert_intermediate_size=32,
            )
        ),
    ]  # fmt: skip
    for model in models:
        words = [
            f"'{model.config.model_type}'",
            NAMES_OF_ALL,
            "gate_proj/up_proj/down_proj",
            "dense_h_to_4h",
            "found 0",
        ]
        refuse(model, words)
        folder = tmp_path / model.config.model_type
        model.config.save_pretrained(folder)
        refuse(folder, words)
    T5Config().save_pretrained(tmp_path / "t5")
    refuse(tmp_path / "t5", ["'t5'", "no causal language model", NAMES_OF_ALL])


def test_mlps_that_compute_something_else_with_such_projections(monkeypatch):
    """By another formula, or within a mixture: they have the names, and slices of them would be nonsense."""
    with monkeypatch.context() as patch:
        patch.setattr(
            LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        )
        refuse(tiny_model(), ["'llama'", "LlamaMLP", "output projection of activated neurons", NAMES_OF_ALL])
    small = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    mixture = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **small, **heads))
    refuse(mixture, ["'llama4_text'", "Llama4TextMLP", NAMES_OF_ALL])


def test_a_model_with_an_adapter():
    """Whose weights would stay with the old neurons."""
    config = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    refuse(get_peft_model(tiny_model(), config), ["PeftModelForCausalLM", "merge_and_unload"], error=TypeError)
    model = tiny_model()
    model.add_adapter(config)
    refuse(model, ["carries an adapter", "merge"])


def test_a_model_whose_activations_are_no_numbers():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = math.inf
    refuse(model, ["NaN or infinite in 1 of 2 layers, the first 1", "dtype=torch.bfloat16"])


def test_a_model_without_its_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model().config)
    with pytest.raises(ValueError, match=r"offloaded or have no weights.*load all of it"):
        convert_to_dynamoe(model, 3, importance="none")


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, True, "0.8", [0.5]])
def test_a_sensitivity_that_is_none(value):
    """In `set_sensitivity`, a call, `generate` and a configuration."""
    moe, ids = tiny_moe(), random_ids(2, 5)
    for use in (
        moe.set_sensitivity,
        lambda value: moe(ids, sensitivity=value),
        lambda value: moe.generate(ids, sensitivity=value, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="`sensitivity` must"):
            use(value)
    with pytest.raises(Exception, match="sensitivity"):
        DynaMoeConfig(base_config=tiny_model().config, expert_widths=WIDTHS, sensitivity=value)
    assert moe.config.sensitivity == 1.0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor([0.5]), r"`sensitivity`.*\(2,\), one for each row, got shape \(1,\)"),
        (torch.tensor([[0.5], [0.5]]), r"`sensitivity`.*got shape \(2, 1\)"),
        (torch.tensor(0.5), r"`sensitivity`.*got shape \(\)"),
        (torch.tensor([0.5, 1.5]), r"`sensitivity` must lie between 0.*got 1\.5"),
        (torch.tensor([0.5, math.nan]), "`sensitivity` must lie between 0.*got nan"),
    ],
)
def test_a_sensitivity_for_other_rows(value, words):
    with pytest.raises(ValueError, match=words):
        tiny_moe()(random_ids(2, 5), sensitivity=value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "`expert_index` must be from 0 to 2, got 3"),
        (-1, "`expert_index` must be from 0 to 2, got -1"),
        (True, "`expert_index` must be from 0 to 2, got True"),
        (1.0, r"`expert_index` must be from 0 to 2, got 1\.0"),
        (torch.zeros(2, 4, dtype=torch.long), r"`expert_index`.*\(2, 5\) or \(2, 2, 5\).*\(2, 4\)"),
        (torch.zeros(3, 2, 5, dtype=torch.long), r"`expert_index`.*\(3, 2, 5\)"),
        (torch.zeros(2, 5), r"`expert_index`.*integers.*torch\.float32"),
        (torch.full((2, 5), 3), "`expert_index` must be from 0 to 2, got 3 to 3"),
        (torch.full((2, 5), -1), "`expert_index` must be from 0 to 2, got -1 to -1"),
    ],
)
def test_experts_that_do_not_exist(value, words):
    with pytest.raises(ValueError, match=words):
        tiny_moe()(random_ids(2, 5), expert_index=value)


def test_an_expert_for_each_token_in_generate():
    """Its passes have other lengths than the prompt."""
    ids = random_ids(1, 5)
    with pytest.raises(ValueError, match=r"In `generate`.*give a number"):
        tiny_moe().generate(ids, expert_index=ids % 3, max_new_tokens=3)


def test_labels_to_follow_that_are_not_measured():
    moe, ids = tiny_moe(), random_ids(2, 5)
    with pytest.raises(ValueError, match="`forcing_mask` needs `output_nearness=True`"):
        moe(ids, forcing_mask=ids > 0)
    with pytest.raises(ValueError, match=r"`forcing_mask` must have shape \(2, 5\), got \(2, 4\)"):
        moe(ids, forcing_mask=ids[:, 1:] > 0, output_nearness=True)
    for value, got in ((ids, r"torch\.int64"), ([True], r"\[True\]")):
        with pytest.raises(ValueError, match=rf"`forcing_mask` must be a tensor of torch\.bool, got {got}"):
            moe(ids, forcing_mask=value, output_nearness=True)
    with pytest.raises(ValueError, match=r"`outputs` lack .*`output_nearness=True`"):
        moe.router_losses(moe(ids, output_router_logits=True))


def test_a_refused_call_does_not_change_the_next():
    moe, ids = tiny_moe(), random_ids(2, 5)
    with torch.no_grad():
        expected = moe(ids).logits
        with pytest.raises(ValueError):
            moe(ids, sensitivity=0.5, expert_index=7)
        with pytest.raises(IndexError):
            moe(ids + 99, sensitivity=0.5)
        assert torch.equal(moe(ids).logits, expected)


def test_no_input():
    with pytest.raises(ValueError, match=r"`input_ids`.*`inputs_embeds`"):
        tiny_moe()(attention_mask=torch.ones(1, 3))


def test_a_truncated_file_of_a_dense_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    refuse(tmp_path, [tmp_path, "is truncated, damaged or a Git LFS pointer"])


def test_a_configuration_without_a_base():
    with pytest.raises(ValueError, match="`base_config` has no `model_type`"):
        DynaMoeConfig(base_config={"hidden_size": 8})
    with pytest.raises(ValueError, match=r"'gpt2'.*`intermediate_size`=None"):
        DynaMoeConfig(base_config=AutoConfig.for_model("gpt2"))


def test_a_configuration_of_what_is_none():
    with pytest.raises(TypeError, match=r"`base_config` must be .*got 'llama'.*`AutoConfig\.from_pretrained`"):
        DynaMoeConfig(base_config="llama")
    with pytest.raises(ValueError, match=r"`label_sensitivity` must lie between 0.*got 5"):
        DynaMoeConfig(base_config=tiny_model().config, label_sensitivity=5)


def test_an_unknown_activation_or_a_bare_module_is_refused():
    with pytest.raises(TypeError, match="`model` must be a PreTrainedModel or its name, got Linear"):
        convert_to_dynamoe(torch.nn.Linear(2, 2), importance="none")
