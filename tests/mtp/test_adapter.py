import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_ext import MtpGenerationMixin
from mtp.models import (
    SHAPES_AND_ATTENTION,
    add_adapter,
    disabled,
    gated_config,
    make_skilled,
    plain,
    random_prompt,
    randomise,
    tiny_model,
)


def skilled_peft_model(adapter: str = "default", **changes: Any) -> PeftModel:
    """A PeftModel whose guesses often come true."""
    model = get_peft_model(tiny_model(), gated_config(**{"sampler_residual": False, **changes}), adapter_name=adapter)
    randomise(model, adapter=adapter)
    make_skilled(model, adapter=adapter)
    return model


def details(model: Any, **kwargs: Any) -> Any:
    """Multi-token generation with all that it tells."""
    return model.generate(random_prompt(7), **{"max_new_tokens": 30, "return_dict_in_generate": True, **kwargs})


def num_passes(model: Any, **kwargs: Any) -> int:
    """Forward passes of the decoder during one call of `generate`."""
    calls: list[int] = []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    handle = base.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    model.generate(random_prompt(7), max_new_tokens=30, do_sample=False, **kwargs)
    handle.remove()
    return len(calls)


def adapter_tensors(model: torch.nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Tensors of one adapter, the adapter's name taken out of theirs."""
    found = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if "lora_" in name and adapter in parts:
            found[".".join(part for part in parts if part != adapter)] = tensor
    return found


@pytest.mark.parametrize(("shape", "attention"), SHAPES_AND_ATTENTION)
def test_logits_are_the_base_models_bit_for_bit(shape: str, attention: str) -> None:
    """An attached, active adapter changes no logit of ordinary tokens, in evaluation and in training mode."""
    base, adapted = tiny_model(shape, attention), add_adapter(tiny_model(shape, attention), std=1.0)
    prompt = random_prompt(21)
    with torch.no_grad():
        expected = base(prompt).logits
        assert torch.equal(adapted(prompt).logits, expected)
    assert torch.equal(adapted(prompt).logits.detach(), expected)


def test_training_mode_keeps_logits() -> None:
    """`model.train()` through PEFT switches no dropout of the base model on."""
    base = tiny_model(attention_dropout=0.5)
    prompt = random_prompt(21)
    with torch.no_grad():
        expected = base(prompt).logits
        assert torch.equal(
            get_peft_model(base, gated_config(lora_dropout=0.5)).train()(input_ids=prompt).logits, expected
        )


def test_only_the_adapter_is_trainable() -> None:
    """The base model is frozen; LoRA, masks and sampler are not."""
    model = get_peft_model(tiny_model(), gated_config())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_all_linear_adapts_all_but_the_head() -> None:
    """Seven projections per layer."""
    model = get_peft_model(tiny_model(), gated_config())
    adapted = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_masks(frozen: bool, tmp_path: Path) -> None:
    """`frozen_masks` keeps the mask vectors out of training, after switching adapters and loading too."""
    model = get_peft_model(tiny_model(), gated_config(frozen_masks=frozen))
    vectors = model.base_model.mtp_head.lora_mask_vectors
    assert vectors["default"].requires_grad is not frozen
    model.add_adapter("other", gated_config())
    model.set_adapter("other")
    model.set_adapter("default")
    assert vectors["default"].requires_grad is not frozen
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    assert loaded.base_model.mtp_head.lora_mask_vectors["default"].requires_grad is not frozen
    assert torch.equal(loaded.base_model.mtp_head.lora_mask_vectors["default"], vectors["default"])


@pytest.mark.parametrize("shape", ["llama", "gemma", "gpt2"])
def test_masks_start_like_the_embedding(shape: str) -> None:
    """With its mean and deviation, as the layers get it: gemma scales inside the embedding."""
    model = get_peft_model(tiny_model(shape, seed=3), gated_config(num_masks=400))
    vectors = model.base_model.mtp_head.lora_mask_vectors["default"].detach()
    table = model.get_input_embeddings()(torch.arange(20)).detach()
    assert torch.allclose(vectors.std(0).mean(), table.std(0).mean(), rtol=0.1)
    assert torch.allclose(vectors.mean(0), table.mean(0), atol=0.3 * float(table.std()))


class TestSwitching:
    """Several adapters on one model, and none."""

    def test_disabled_adapter_is_plain_decoding(self) -> None:
        """Inside `with model.disable_adapter()` every token takes one pass, and outside fewer do."""
        model = skilled_peft_model()
        with model.disable_adapter():
            assert num_passes(model) == 30
        assert num_passes(model) < 30

    def test_disabled_adapters_of_an_injected_model(self) -> None:
        """The same by `disable_adapters` and `enable_adapters` of transformers."""
        model = add_adapter(tiny_model())
        make_skilled(model)
        with disabled(model):
            assert num_passes(model) == 30
        assert num_passes(model) < 30

    def test_disabled_adapter_samples_and_takes_batches(self) -> None:
        """What multi-token decoding refuses works inside."""
        model = skilled_peft_model()
        batch = torch.cat([random_prompt(4, 0), random_prompt(4, 1)])
        with model.disable_adapter():
            assert model.generate(batch, max_new_tokens=5, do_sample=True).shape == (2, 9)

    def test_side_by_side(self) -> None:
        """Each of two adapters with its own number of masks takes its own steps; the text is the same."""
        model = skilled_peft_model()
        alone = details(model).step_lengths
        model.add_adapter("second", gated_config(num_masks=1, r=3, sampler_residual=False))
        assert details(model).step_lengths == alone
        randomise(model, adapter="second", seed=5)
        make_skilled(model, adapter="second")
        model.set_adapter("second")
        second = details(model)
        assert max(second.step_lengths[0]) == 2
        with pytest.raises(ValueError, match="`num_masks` of 1, got 4"):
            details(model, num_speculative_tokens=4)
        model.set_adapter("default")
        assert details(model).step_lengths == alone != second.step_lengths
        assert second.sequences.tolist() == details(model).sequences.tolist()

    def test_delete(self) -> None:
        """`delete_adapter` removes all of one adapter and nothing of the other; without any, decoding is plain."""
        model = skilled_peft_model()
        model.add_adapter("second", gated_config())
        randomise(model, adapter="second")
        kept = {name: tensor.clone() for name, tensor in adapter_tensors(model, "second").items()}
        model.delete_adapter("default")
        assert not adapter_tensors(model, "default")
        assert model.active_adapter == "second"
        assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter_tensors(model, "second").items())
        assert details(model).sequences.tolist() == plain_tokens()

    def test_delete_the_last_of_an_injected_model(self) -> None:
        """The model is left to plain decoding."""
        model = add_adapter(tiny_model())
        model.delete_adapter("default")
        assert num_passes(model) == 30
        assert not [name for name, _ in model.named_parameters() if "lora_" in name]

    def test_beside_an_ordinary_lora(self, tmp_path: Path) -> None:
        """An ordinary LoRA can't share a PeftModel with it by accident: PEFT keeps one method per model."""
        model = skilled_peft_model()
        expected = details(model).step_lengths
        with pytest.raises(ValueError):
            model.add_adapter("ordinary", LoraConfig(r=2, target_modules=["q_proj"]))
        assert details(model).step_lengths == expected


def plain_tokens() -> list[list[int]]:
    """What [`details`] has to give on the model of this file."""
    return tiny_model().generate(random_prompt(7), max_new_tokens=30, do_sample=False).tolist()


class TestUnloadAndCopy:
    """Getting the base model back, and a second one."""

    def test_unload(self) -> None:
        """A model of the original class, without head or LoRA, that generates plainly."""
        original = tiny_model()
        names = set(original.state_dict())
        base = get_peft_model(original, gated_config()).unload()
        assert type(base) is type(tiny_model())
        assert not isinstance(base, MtpGenerationMixin)
        assert not hasattr(base, "mtp_head")
        assert set(base.state_dict()) == names
        assert base.generate(random_prompt(7), max_new_tokens=30, do_sample=False).tolist() == plain_tokens()

    def test_adapter_after_unload(self) -> None:
        """The model that came back can be adapted again."""
        base = get_peft_model(tiny_model(), gated_config()).unload()
        assert details(get_peft_model(base, gated_config(num_masks=3))).sequences.tolist() == plain_tokens()

    def test_deepcopy(self) -> None:
        """A copy takes the same steps, and its gate and its weights are its own."""
        model = skilled_peft_model()
        expected = details(model)
        twin = copy.deepcopy(model)
        assert details(twin).step_lengths == expected.step_lengths
        randomise(twin, std=3.0, seed=9)
        assert details(twin).sequences.tolist() == expected.sequences.tolist()
        assert details(model).step_lengths == expected.step_lengths

    def test_class_keeps_its_name(self) -> None:
        """What `save_pretrained` of the adapted model writes into config.json names the original class."""
        model = add_adapter(tiny_model())
        assert isinstance(model, MtpGenerationMixin)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert isinstance(model, type(tiny_model()))

    @pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
    def test_merging_is_refused(self, method: str) -> None:
        """With the reason; the model goes on as before."""
        model = skilled_peft_model()
        expected = details(model).step_lengths
        with pytest.raises(NotImplementedError, match="can't be merged: it acts on mask tokens only"):
            getattr(model, method)()
        assert details(model).step_lengths == expected

    def test_combining_is_refused(self) -> None:
        """A weighted sum of samplers is none."""
        model = skilled_peft_model()
        model.add_adapter("second", gated_config())
        with pytest.raises(NotImplementedError, match=r"`add_weighted_adapter` would .* sampler random"):
            model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
        assert set(model.peft_config) == {"default", "second"}

    def test_merging_one_layer_is_refused(self) -> None:
        """Also where a layer is asked directly."""
        layer = next(m for m in skilled_peft_model().modules() if isinstance(m, LoraLayer))
        for safe in (True, False):
            with pytest.raises(NotImplementedError, match="can't be merged"):
                layer.merge(safe_merge=safe)


class TestFiles:
    """Saving and loading."""

    @pytest.mark.parametrize("adapter", ["default", "fast"])
    def test_round_trip(self, adapter: str, tmp_path: Path) -> None:
        """The same tensors bit for bit and the same steps, under any name."""
        model = skilled_peft_model(adapter)
        model.save_pretrained(tmp_path)
        folder = tmp_path if adapter == "default" else tmp_path / adapter
        loaded = PeftModel.from_pretrained(tiny_model(), folder, adapter_name="again")
        before, after = adapter_tensors(model, adapter), adapter_tensors(loaded, "again")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert details(loaded).step_lengths == details(model).step_lengths

    def test_files(self, tmp_path: Path) -> None:
        """One safetensors file with the adapter alone, its configuration and a card; nothing pickled."""
        model = skilled_peft_model()
        model.save_pretrained(tmp_path)
        assert {f.name for f in tmp_path.iterdir()} == {
            "adapter_model.safetensors",
            "adapter_config.json",
            "README.md",
        }
        weights = load_file(tmp_path / "adapter_model.safetensors")
        assert all("lora_" in name for name in weights)
        assert len(weights) == len(adapter_tensors(model, "default"))

    def test_injected_model_saves_its_adapter(self, tmp_path: Path) -> None:
        """`save_pretrained` of a transformers model with the adapter writes what PEFT reads."""
        tiny_model().save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        add_adapter(model, sampler_residual=False)
        make_skilled(model)
        model.save_pretrained(tmp_path / "adapter")
        assert not list((tmp_path / "adapter").glob("model*.safetensors"))
        for loaded in (
            PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        ):
            assert details(loaded).step_lengths == details(model).step_lengths

    def test_configuration_round_trip(self, tmp_path: Path) -> None:
        """Every field of the configuration survives, the base's shape included."""
        model = get_peft_model(tiny_model(), gated_config(num_masks=3, frozen_masks=True, sampler_residual=False, r=5))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).peft_config["default"]
        saved = model.peft_config["default"]
        for name in ("num_masks", "frozen_masks", "sampler_residual", "r", "lora_alpha", "target_modules"):
            assert getattr(loaded, name) == getattr(saved, name), name
        assert (loaded.base_hidden_size, loaded.base_num_layers, loaded.base_vocab_size) == (24, 2, 20)

    def test_sampler_without_residual(self, tmp_path: Path) -> None:
        """The paper's own sampler is loaded as such."""
        model = get_peft_model(tiny_model(), gated_config(sampler_residual=False))
        randomise(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
        assert details(loaded).step_lengths == details(model).step_lengths
        assert loaded.base_model.mtp_head.residual == {"default": False}

    @pytest.mark.parametrize("resized", ["before", "after"])
    @pytest.mark.parametrize("shape", ["llama", "qwen2"])
    def test_resized_vocabulary(self, shape: str, resized: str, tmp_path: Path) -> None:
        """Before the adapter is made or after: text is the base's, and what is saved fits the base as it is then."""
        base = tiny_model(shape)
        if resized == "before":
            base.resize_token_embeddings(24)
        model = get_peft_model(base, gated_config(sampler_residual=False))
        randomise(model)
        make_skilled(model)
        if resized == "after":
            model.resize_token_embeddings(24)
        with model.disable_adapter():
            expected = model.generate(random_prompt(7), max_new_tokens=30, do_sample=False)
        output = details(model)
        assert output.sequences.tolist() == expected.tolist()
        model.save_pretrained(tmp_path / "adapter")
        model.unload().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert details(PeftModel.from_pretrained(base, tmp_path / "adapter")).step_lengths == output.step_lengths
        with pytest.raises(ValueError, match="`base_vocab_size` is 24 in the adapter and 20 in the model"):
            PeftModel.from_pretrained(tiny_model(shape), tmp_path / "adapter")

    def test_second_adapter_is_loaded_beside_the_first(self, tmp_path: Path) -> None:
        """`load_adapter` of PEFT."""
        skilled_peft_model(num_masks=2).save_pretrained(tmp_path)
        model = skilled_peft_model()
        first = details(model).step_lengths
        model.load_adapter(tmp_path, adapter_name="second")
        assert details(model).step_lengths == first
        model.set_adapter("second")
        assert max(details(model).step_lengths[0]) <= 3


def test_plain_helper() -> None:
    """The reference of these tests is the untouched model's own output."""
    model: PreTrainedModel = add_adapter(tiny_model())
    assert plain(model, random_prompt(7), max_new_tokens=30).tolist() == plain_tokens()
