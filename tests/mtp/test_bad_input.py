import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_ext import GatedLoraConfig, GatedLoraModel, mtp_generate
from hf_ext.mtp.two_pass import two_pass_forward
from mtp.models import gated_config, plain, random_prompt, randomise, skilled_model, tiny_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return skilled_model()


class TestCalls:
    """What `generate` refuses, naming the argument and its value, and what is possible."""

    @pytest.mark.parametrize("count", [0, -1, 5, True, 2.5])
    def test_num_speculative_tokens(self, model: PreTrainedModel, count: Any) -> None:
        """Not an integer from 1 to `num_masks`."""
        with pytest.raises(ValueError, match=rf"`num_speculative_tokens` .* from 1 to .* 4, got {count}\."):
            model.generate(random_prompt(4), max_new_tokens=4, num_speculative_tokens=count)

    def test_num_speculative_tokens_in_generation_config(self) -> None:
        """The same where the value is stored with the model."""
        model = skilled_model()
        model.generation_config.num_speculative_tokens = 9
        with pytest.raises(ValueError, match=r"`num_speculative_tokens` .* got 9\."):
            model.generate(random_prompt(4), max_new_tokens=4)

    def test_strategy(self, model: PreTrainedModel) -> None:
        """An unknown strategy; the message lists those there are."""
        with pytest.raises(
            ValueError, match=r"`speculation_strategy` .*'quadratic', 'linear', 'adaptive'.* got 'cubic'"
        ):
            model.generate(random_prompt(4), max_new_tokens=4, speculation_strategy="cubic")

    @pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
    def test_threshold(self, model: PreTrainedModel, threshold: float) -> None:
        """Not a probability."""
        with pytest.raises(ValueError, match=rf"`speculation_threshold` must be from 0 to 1, got {threshold}"):
            model.generate(random_prompt(4), speculation_strategy="adaptive", speculation_threshold=threshold)

    def test_empty_prompt(self, model: PreTrainedModel) -> None:
        """No token at all."""
        with pytest.raises(ValueError, match="`input_ids` is empty"):
            model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=4)

    def test_embeddings_as_prompt(self, model: PreTrainedModel) -> None:
        """A prompt of embeddings has no token ids for the sampler."""
        embeddings = model.get_input_embeddings()(random_prompt(4)).detach()
        with pytest.raises(ValueError, match="`inputs_embeds` was given"):
            model.generate(inputs_embeds=embeddings, max_new_tokens=4)

    def test_prompt_of_one_token(self, model: PreTrainedModel) -> None:
        """Is no bad input: it works as in plain decoding."""
        prompt = random_prompt(1)
        assert model.generate(prompt, max_new_tokens=9).tolist() == plain(model, prompt, max_new_tokens=9).tolist()

    @pytest.mark.parametrize("mask", [[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 1]])
    def test_padding_that_is_not_left(self, model: PreTrainedModel, mask: list[int]) -> None:
        """Right padding and holes."""
        with pytest.raises(ValueError, match=r"`attention_mask` has zeros .* 'left'"):
            model.generate(random_prompt(4), attention_mask=torch.tensor([mask]), max_new_tokens=4)

    @pytest.mark.parametrize("prompt", [[5, 3, 6, 7], [5, 6, 7, 3]])
    def test_padding_token_in_the_text(self, prompt: list[int]) -> None:
        """Without a mask `generate` takes it for padding; the message says how to have it read."""
        model, input_ids = skilled_model(), torch.tensor([prompt])
        model.generation_config.pad_token_id = 3
        with pytest.raises(ValueError, match=r"no mask was given.*padding token.*a mask of ones"):
            model.generate(input_ids, max_new_tokens=9)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        expected = plain(model, **inputs, max_new_tokens=9)
        assert model.generate(**inputs, max_new_tokens=9).tolist() == expected.tolist()

    def test_batch(self, model: PreTrainedModel) -> None:
        """Two sequences in one call."""
        with pytest.raises(ValueError, match=r"one sequence per call so far, got a batch of 2\..*disable_adapter"):
            model.generate(torch.cat([random_prompt(4)] * 2), max_new_tokens=4)

    def test_sampling(self, model: PreTrainedModel) -> None:
        """Random tokens."""
        with pytest.raises(ValueError, match="greedy so far, got `do_sample=True`"):
            model.generate(random_prompt(4), max_new_tokens=4, do_sample=True)

    def test_static_cache(self, model: PreTrainedModel) -> None:
        """A cache that can't be cropped."""
        with pytest.raises(ValueError, match="cropped, got StaticCache"):
            model.generate(random_prompt(4), max_new_tokens=4, cache_implementation="static")

    def test_no_cache(self, model: PreTrainedModel) -> None:
        """No cache."""
        with pytest.raises(ValueError, match="got `use_cache=False`"):
            model.generate(random_prompt(4), max_new_tokens=4, use_cache=False)

    @pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
    def test_outputs_of_layers(self, name: str) -> None:
        """What the layers say of a pass with masks in it."""
        model = skilled_model(attention="eager")
        with pytest.raises(ValueError, match=f"`{name}=True`"):
            model.generate(random_prompt(4), max_new_tokens=4, return_dict_in_generate=True, **{name: True})

    def test_attention_without_masks_of_its_own(self, model: PreTrainedModel) -> None:
        """An attention kernel that takes no mask."""
        other = skilled_model()
        other.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="'flash_attention_2'"):
            other.generate(random_prompt(4), max_new_tokens=4)

    def test_options_without_an_adapter(self, model: PreTrainedModel) -> None:
        """Asking for guesses while adapters are disabled."""
        with pytest.raises(ValueError, match=r"num_speculative_tokens.*no multi-token adapter is active"):
            plain(model, random_prompt(4), max_new_tokens=4, num_speculative_tokens=2)

    def test_callable_on_a_plain_model(self) -> None:
        """`custom_generate=mtp_generate` where there is no adapter."""
        with pytest.raises(ValueError, match="LlamaForCausalLM carries no multi-token adapter"):
            tiny_model().generate(random_prompt(4), max_new_tokens=4, custom_generate=mtp_generate)

    @pytest.mark.parametrize("shape", ["llama", "phi3"])
    def test_rope_with_two_sets_of_frequencies(self, shape: str) -> None:
        """Refused where a pass could reach the second set, which begins before the model's last position; else exact."""
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
        model = skilled_model(
            shape,
            rope_parameters={**rope, "original_max_position_embeddings": 32},
            # Phi-3's configuration keeps it here, and it counts for more.
            **({"original_max_position_embeddings": 32} if shape == "phi3" else {}),
        )
        with pytest.raises(ValueError, match=r"'longrope' changes .* position 32 .* 28 \+ 4\. .*`max_new_tokens`"):
            model.generate(random_prompt(8), max_new_tokens=20)
        expected = plain(model, random_prompt(8), max_new_tokens=19)
        output = model.generate(random_prompt(8), max_new_tokens=19, return_dict_in_generate=True)
        assert output.sequences.tolist() == expected.tolist()
        assert max(output.step_lengths[0]) > 1

    def test_rope_of_each_type_of_layer(self) -> None:
        """The first limit counts where layers of different types stretch from different lengths on."""

        def longrope(limit: int) -> dict[str, Any]:
            factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
            rest = {"rope_theta": 10000.0, "original_max_position_embeddings": limit}
            return {"rope_type": "longrope", **factors, **rest}

        ropes = {"full_attention": longrope(32), "sliding_attention": longrope(24)}
        model = skilled_model("gemma3", rope_parameters=ropes)
        with pytest.raises(ValueError, match=r"'longrope' changes .* position 24 "):
            model.generate(random_prompt(8), max_new_tokens=12)
        expected = plain(model, random_prompt(8), max_new_tokens=11)
        assert model.generate(random_prompt(8), max_new_tokens=11).tolist() == expected.tolist()

    def test_training_on_rope_with_two_sets_of_frequencies(self) -> None:
        """Refused where the masks' pass would rotate by another set than the text's; up to there it trains."""
        factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
        rope = {"rope_type": "longrope", **factors, "original_max_position_embeddings": 32}
        model = skilled_model("llama", rope_parameters=rope)
        for length, refused in ((28, False), (29, True)):
            ids, anchors = random_prompt(length), torch.tensor([[2, 5]])
            with pytest.raises(ValueError, match=r"Lower `max_length` to 28") if refused else nullcontext():
                two_pass_forward(model, "default", ids, ids, anchors)

    def test_layer_that_sees_some_of_the_tokens(self) -> None:
        """Masks can't be told from tokens there."""

        class Expert(nn.Module):
            def __init__(self, linear: nn.Module):
                super().__init__()
                self.linear = linear

            def forward(self, states: torch.Tensor) -> torch.Tensor:
                output = self.linear(states[0, ::2])
                return output.repeat_interleave(2, dim=0)[None, : states.shape[1]]

        model = skilled_model()
        attention = model.model.layers[0].self_attn
        attention.q_proj = Expert(attention.q_proj)
        with pytest.raises(ValueError, match=r"can't tell masks from tokens.*`target_modules`"):
            model.generate(random_prompt(4), max_new_tokens=9)

    def test_unknown_argument_is_still_refused(self, model: PreTrainedModel) -> None:
        """A misspelt option."""
        with pytest.raises(ValueError, match="num_speculativ_tokens"):
            model.generate(random_prompt(4), max_new_tokens=4, num_speculativ_tokens=2)

    def test_refusal_leaves_the_model_usable(self, model: PreTrainedModel) -> None:
        """An error inside the loop leaves no gate open and no hook behind."""

        def fail(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            raise RuntimeError("stop here")

        prompt = random_prompt(6)
        with torch.no_grad():
            before = model(prompt).logits
            with pytest.raises(RuntimeError, match="stop here"):
                model.generate(prompt, max_new_tokens=9, stopping_criteria=[fail])
            assert torch.equal(model(prompt).logits, before)
        assert model.mtp_head.gate.positions == 0
        assert not model.get_decoder()._forward_hooks
        assert not any("forward" in vars(module) for module in model.modules())


class TestConfiguration:
    """What the configuration refuses, with the reason."""

    @pytest.mark.parametrize("num_masks", [0, -3])
    def test_num_masks(self, num_masks: int) -> None:
        """Fewer than one mask."""
        with pytest.raises(ValueError, match=f"`num_masks` must be at least 1, got {num_masks}"):
            GatedLoraConfig(num_masks=num_masks)

    def test_task_type(self) -> None:
        """Another task."""
        with pytest.raises(ValueError, match=r"`task_type` must be 'CAUSAL_LM' .* got 'SEQ_CLS'"):
            GatedLoraConfig(task_type="SEQ_CLS")

    @pytest.mark.parametrize(
        ("option", "value", "reason"),
        [
            ("use_dora", True, "mask tokens only"),
            ("bias", "all", "no longer the base model's"),
            ("bias", "lora_only", "no longer the base model's"),
            ("lora_bias", True, "mask tokens only"),
            ("modules_to_save", ["norm"], "no longer the base model's"),
            ("trainable_token_indices", [1, 2], "no longer the base model's"),
            ("target_parameters", ["mlp.experts.gate_up_proj"], "mask tokens only"),
            ("layer_replication", [(0, 1), (0, 2)], "no longer the base model's"),
            ("init_lora_weights", "pissa", "rewrites base weights"),
            ("init_lora_weights", "olora", "rewrites base weights"),
            ("target_modules", "lm_head", "output embedding"),
            ("target_modules", ["q_proj", "lm_head"], "output embedding"),
            ("target_modules", ["model.embed_tokens"], "input embedding"),
        ],
    )
    def test_option(self, option: str, value: Any, reason: str) -> None:
        """Options of LoRA that reach ordinary tokens or have no gated form."""
        with pytest.raises(ValueError, match=rf"(?s)`{option}=.*{reason}"):
            GatedLoraConfig(**{option: value})


class TestBases:
    """Models that an adapter can't be put on."""

    @pytest.mark.parametrize("targets", [r".*(lm_head|q_proj)", r".*embed_tokens|.*q_proj"])
    def test_embedding_by_regular_expression(self, targets: str) -> None:
        """A pattern that matches an embedding is seen on the model."""
        with pytest.raises(ValueError, match=r"`target_modules.*[Ee]mbedding"):
            get_peft_model(tiny_model(), gated_config(target_modules=targets))

    def test_targets_that_are_no_linear_layers(self) -> None:
        """A norm."""
        with pytest.raises(ValueError, match="RMSNorm"):
            get_peft_model(tiny_model(), gated_config(target_modules=["input_layernorm"]))

    def test_encoder_decoder(self) -> None:
        """T5."""
        config = T5Config(
            vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
            get_peft_model(T5ForConditionalGeneration(config), gated_config(target_modules=["q", "v"]))

    def test_without_a_language_modelling_head(self) -> None:
        """The bare decoder."""
        with pytest.raises(ValueError, match=r"needs .* language-modelling head, got LlamaModel"):
            get_peft_model(LlamaModel(tiny_model().config), gated_config())

    def test_no_transformers_model(self) -> None:
        """Any other module."""
        with pytest.raises(ValueError, match=r"needs a transformers model .* got Sequential"):
            GatedLoraModel(nn.Sequential(nn.Linear(2, 2)), gated_config(target_modules=["0"]), "default")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), gated_config())
    randomise(model)
    model.save_pretrained(folder)
    return folder


def through_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def through_auto_model(base: Path, adapter: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(adapter)


def through_load_adapter(base: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(adapter)
    return model


WAYS = pytest.mark.parametrize("load", [through_peft, through_auto_model, through_load_adapter])
Load = Callable[[Path, Path], Any]


class TestFiles:
    """Adapter files that are damaged, or meet another base, by every way to load them."""

    @pytest.fixture
    def damaged(self, adapter_folder: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))

    @WAYS
    @pytest.mark.parametrize("kept", [0, 5, 300, -1, "pointer"])
    def test_unreadable(self, load: Load, kept: int | str, base_folder: Path, damaged: Path) -> None:
        """A part of a file, or what Git LFS leaves in its place: the folder and a way out are named."""
        file = damaged / "adapter_model.safetensors"
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n"
        file.write_bytes(pointer if isinstance(kept, str) else file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=rf"{damaged}' can't be read \(.+\): .*truncated.* again") as caught:
            load(base_folder, damaged)
        assert isinstance(caught.value.__cause__, SafetensorError)

    def test_other_adapters_have_the_errors_of_their_library(self, base_folder: Path, tmp_path: Path) -> None:
        """An ordinary LoRA passes through, whichever way it is loaded."""
        get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
        for load in (through_peft, through_load_adapter):
            with pytest.raises(SafetensorError):
                load(base_folder, tmp_path)

    @WAYS
    @pytest.mark.parametrize("name", ["layers.1.self_attn.q_proj.lora_B.weight", "mtp_head.lora_mask_vectors"])
    def test_tensor_missing(self, load: Load, name: str, base_folder: Path, damaged: Path) -> None:
        """One tensor of a LoRA layer or of the head."""
        weights = load_file(damaged / "adapter_model.safetensors")
        (key,) = [key for key in weights if key.endswith(name)]
        del weights[key]
        save_file(weights, damaged / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"lacks 1 of {len(weights) + 1} tensors \(.*{name.rsplit('.', 2)[-2]}"):
            load(base_folder, damaged)

    @WAYS
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_a_number(self, load: Load, value: float, base_folder: Path, damaged: Path) -> None:
        """One value of one tensor."""
        weights = load_file(damaged / "adapter_model.safetensors")
        key = next(key for key in weights if key.endswith("mtp_head.lora_sampler_in.weight"))
        weights[key][0, 0] = value
        save_file(weights, damaged / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"NaN or infinity in 1 tensors \(.*lora_sampler_in"):
            load(base_folder, damaged)

    @pytest.mark.parametrize(("damage", "message"), [("unreadable", "can't be read"), ("not a number", "NaN")])
    def test_model_is_plain_after_a_refusal(self, damage: str, message: str, base_folder: Path, damaged: Path) -> None:
        """A refused adapter is taken out again: the model generates plainly, and a good one can be loaded."""
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        expected = model.generate(random_prompt(5), max_new_tokens=9, do_sample=False).tolist()
        file = damaged / "adapter_model.safetensors"
        weights = load_file(file)
        key = next(iter(weights))
        save_file({**weights, key: weights[key] * float("nan")}, file, metadata={"format": "pt"})
        if damage == "unreadable":
            file.write_bytes(b"half")
        with pytest.raises(ValueError, match=message):
            model.load_adapter(damaged)
        assert model.generate(random_prompt(5), max_new_tokens=9, do_sample=False).tolist() == expected
        save_file(weights, file, metadata={"format": "pt"})
        model.load_adapter(damaged)
        output = model.generate(random_prompt(5), max_new_tokens=9, return_dict_in_generate=True)
        assert output.sequences.tolist() == expected
        assert output.step_lengths is not None

    @pytest.mark.parametrize("load", [through_peft, through_load_adapter])
    @pytest.mark.parametrize(
        ("field", "name", "value", "other"),
        [
            ("hidden_size", "base_hidden_size", 24, 30),
            ("num_hidden_layers", "base_num_layers", 2, 3),
            ("vocab_size", "base_vocab_size", 20, 22),
        ],
    )
    def test_other_base(
        self, load: Load, field: str, name: str, value: int, other: int, adapter_folder: Path, tmp_path: Path
    ) -> None:
        """Another width, depth or vocabulary: both values are named."""
        tiny_model(**{field: other}).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"`{name}` is {value} in the adapter and {other} in the model"):
            load(tmp_path, adapter_folder)

    def test_other_base_named_by_the_adapter(self, adapter_folder: Path, damaged: Path, tmp_path: Path) -> None:
        """The same where the adapter's own folder names a base that has changed meanwhile."""
        tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "other")
        config = damaged / "adapter_config.json"
        base = GatedLoraConfig.from_pretrained(damaged).base_model_name_or_path
        config.write_text(config.read_text().replace(base, str(tmp_path / "other")))
        with pytest.raises(ValueError, match="`base_num_layers` is 2 in the adapter and 3 in the model"):
            AutoModelForCausalLM.from_pretrained(damaged)
