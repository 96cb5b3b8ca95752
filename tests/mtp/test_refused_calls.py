"""What `generate` refuses, naming the argument and its value, and what is possible."""

import copy
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from hf_ext import mtp_generate
from hf_ext.mtp.two_pass import two_pass_forward
from mtp.models import plain, random_prompt, skilled_model, tiny_model


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

    @pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), "a", True, [0.5]])
    def test_threshold(self, model: PreTrainedModel, threshold: Any) -> None:
        """Not a probability."""
        message = f"`speculation_threshold` must be a number from 0 to 1, got {threshold!r}."
        with pytest.raises(ValueError, match=re.escape(message)):
            model.generate(random_prompt(4), speculation_strategy="adaptive", speculation_threshold=threshold)

    @pytest.mark.parametrize("use_sampler", ["no", 0, 1.0])
    def test_use_sampler(self, model: PreTrainedModel, use_sampler: Any) -> None:
        """Neither True nor False."""
        with pytest.raises(ValueError, match=rf"`use_sampler` must be True or False, got {use_sampler!r}\."):
            model.generate(random_prompt(4), max_new_tokens=4, use_sampler=use_sampler)

    def test_empty_prompt(self, model: PreTrainedModel) -> None:
        """No token at all."""
        with pytest.raises(ValueError, match="`input_ids` is empty"):
            model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=4)

    def test_embeddings_as_prompt(self, model: PreTrainedModel) -> None:
        """A prompt of embeddings has no token ids for the sampler."""
        embeddings = model.get_input_embeddings()(random_prompt(4)).detach()
        with pytest.raises(ValueError, match="`inputs_embeds` was given"):
            model.generate(inputs_embeds=embeddings, max_new_tokens=4)

    @pytest.mark.parametrize(
        ("shape", "name", "value", "message"),
        [
            ("gpt2", "token_type_ids", torch.tensor([[1, 1, 1, 1]]), "`token_type_ids` would not reach the model"),
            ("llama", "position_ids", torch.tensor([[3, 4, 5, 6]]), "`position_ids` must count .* from 0"),
        ],
    )
    def test_inputs_that_steps_leave_out(self, shape: str, name: str, value: torch.Tensor, message: str) -> None:
        """What plain decoding gives the model and the steps don't."""
        with pytest.raises(ValueError, match=message):
            skilled_model(shape).generate(random_prompt(4), max_new_tokens=4, **{name: value})

    def test_positions_of_the_prompt(self, model: PreTrainedModel) -> None:
        """Are no bad input where they are those that `generate` would give."""
        inputs = {"attention_mask": torch.tensor([[0, 1, 1, 1]]), "position_ids": torch.tensor([[0, 0, 1, 2]])}
        expected = plain(model, random_prompt(4), max_new_tokens=9, **inputs)
        assert model.generate(random_prompt(4), max_new_tokens=9, **inputs).tolist() == expected.tolist()

    def test_prompt_of_one_token(self, model: PreTrainedModel) -> None:
        """Is no bad input: it works as in plain decoding."""
        prompt = random_prompt(1)
        assert model.generate(prompt, max_new_tokens=9).tolist() == plain(model, prompt, max_new_tokens=9).tolist()

    @pytest.mark.parametrize("mask", [[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 1]])
    def test_padding_that_is_not_left(self, model: PreTrainedModel, mask: list[int]) -> None:
        """Right padding and holes."""
        with pytest.raises(ValueError, match=r"`attention_mask` has zeros .* 'left'"):
            model.generate(random_prompt(4), attention_mask=torch.tensor([mask]), max_new_tokens=4)

    def test_padding_alone(self, model: PreTrainedModel) -> None:
        """No token of the prompt is left."""
        with pytest.raises(ValueError, match="`attention_mask` is 0 everywhere"):
            model.generate(random_prompt(4), attention_mask=torch.zeros(1, 4, dtype=torch.long), max_new_tokens=4)

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

    @pytest.mark.parametrize("stored", [False, True], ids=["in the call", "stored"])
    def test_sampling(self, stored: bool) -> None:
        """Random tokens; a checkpoint may ask for them itself, which the call can overrule."""
        model = skilled_model()
        model.generation_config.do_sample = stored
        with pytest.raises(ValueError, match=r"greedy so far, got `do_sample=True`.*pass `do_sample=False`"):
            model.generate(random_prompt(4), max_new_tokens=4, **({} if stored else {"do_sample": True}))
        expected = plain(model, random_prompt(4), max_new_tokens=4)
        assert model.generate(random_prompt(4), max_new_tokens=4, do_sample=False).tolist() == expected.tolist()

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

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_options_without_an_adapter(self, model: PreTrainedModel, num_beams: int) -> None:
        """Asking for guesses while adapters are disabled."""
        with pytest.raises(ValueError, match=r"num_speculative_tokens.*no multi-token adapter is active"):
            plain(model, random_prompt(4), max_new_tokens=4, num_speculative_tokens=2, num_beams=num_beams)

    @pytest.mark.parametrize(
        ("other", "shown"),
        [
            ({"num_beams": 3}, "`num_beams=3` for beam search"),
            ({"num_beams": 3, "do_sample": True}, "`num_beams=3` for beam sample"),
            ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens=3` for assisted generation"),
            ({"assistant_model": tiny_model()}, "`assistant_model` for assisted generation"),
            ({"assistant_early_exit": 1}, "`assistant_early_exit=1` for assisted generation"),
            (
                {"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True},
                "`penalty_alpha=0.6` for contrastive search",
            ),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    @pytest.mark.parametrize("option", [{"num_speculative_tokens": 2}, {"speculation_strategy": "linear"}])
    def test_options_beside_another_way_to_decode(
        self, model: PreTrainedModel, option: dict[str, Any], other: dict[str, Any], shown: str
    ) -> None:
        """In the call or in a configuration that it is given: both arguments are named, one has to go."""
        ((name, value),) = option.items()
        message = (
            re.escape(f"`{name}={value!r}` asks for multi-token decoding, and {shown}") + ".* Leave one of the two out"
        )
        with pytest.raises(ValueError, match=message):
            model.generate(random_prompt(4), max_new_tokens=4, **option, **other)
        other = dict(other)
        apart = {name: other.pop(name) for name in ("assistant_model", "trust_remote_code") if name in other}
        config = GenerationConfig(max_new_tokens=4, **option, **other)
        with pytest.raises(ValueError, match=message):
            model.generate(random_prompt(4), generation_config=config, **apart)

    @pytest.mark.parametrize("copied", [False, True])
    def test_stored_options_beside_another_way_to_decode(self, copied: bool) -> None:
        """Are no bad input: they are for calls that decode in the usual way. A pipeline passes a copy of them."""
        model = skilled_model()
        model.generation_config.num_speculative_tokens = 2
        call = {"max_new_tokens": 9, "num_beams": 3}
        if copied:
            config = copy.deepcopy(model.generation_config)
            config.update(**call)
            call = {"generation_config": config}
        output = model.generate(random_prompt(4), **call)
        assert output.tolist() == plain(model, random_prompt(4), max_new_tokens=9, num_beams=3).tolist()

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
