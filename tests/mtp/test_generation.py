import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_ext.mtp import generation
from mtp.models import (
    SHAPES_AND_ATTENTION,
    SLIDING_WINDOW,
    VOCAB_SIZE,
    add_adapter,
    details,
    disabled,
    make_skilled,
    plain,
    random_prompt,
    skilled_model,
    tiny_model,
)


STRATEGIES = ("quadratic", "linear", "adaptive")
CALLS = [
    {"num_speculative_tokens": 4, "speculation_strategy": "quadratic"},
    {"num_speculative_tokens": 1, "speculation_strategy": "quadratic", "use_sampler": False},
    {"num_speculative_tokens": 3, "speculation_strategy": "linear"},
    {"num_speculative_tokens": 2, "speculation_strategy": "linear", "use_sampler": False},
    {"num_speculative_tokens": 4, "speculation_strategy": "adaptive"},
    {"num_speculative_tokens": 3, "speculation_strategy": "adaptive", "use_sampler": False},
]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """A model and an adapter whose guesses often come true."""
    return skilled_model()


@pytest.fixture
def short_first_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Prompts longer than this go through prefill."""
    monkeypatch.setattr(generation, "LONGEST_PROMPT_IN_FIRST_STEP", 6)
    yield 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("shape", "attention"), SHAPES_AND_ATTENTION)
def test_output_is_the_base_models(shape: str, attention: str, dtype: torch.dtype) -> None:
    """Token for token, for random and for skilled adapters, any strategy, count and sampler, in prompts of any length."""
    model = add_adapter(tiny_model(shape, attention).to(dtype))
    skilled = skilled_model(shape, attention).to(dtype)
    for length in (1, 2 * SLIDING_WINDOW - 5):
        prompt = random_prompt(length, seed=length)
        expected = plain(model, prompt, max_new_tokens=20)
        for adapted, calls in ((model, CALLS[:3]), (skilled, CALLS)):
            for call in calls:
                output = adapted.generate(prompt, max_new_tokens=20, **call)
                assert output.tolist() == expected.tolist(), (length, call, adapted is skilled)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_output_is_the_base_models_on_many_prompts(llama: PreTrainedModel, strategy: str) -> None:
    """Forty prompts of one to forty tokens."""
    for length in range(1, 41):
        prompt = random_prompt(length, seed=100 + length)
        expected = plain(llama, prompt, max_new_tokens=12)
        assert llama.generate(prompt, max_new_tokens=12, speculation_strategy=strategy).tolist() == expected.tolist()


@pytest.mark.parametrize("std", [0.0, 1e-3, 1.0, 30.0])
def test_scale_of_the_adapter_does_not_matter(std: float) -> None:
    """From an adapter that does nothing to one whose activations are beyond reason."""
    model = add_adapter(tiny_model(), std=std)
    prompt = random_prompt(9)
    assert model.generate(prompt, max_new_tokens=30).tolist() == plain(model, prompt, max_new_tokens=30).tolist()


@pytest.mark.parametrize("shape", ["llama", "mistral", "gemma3", "gpt2"])
def test_long_prompt_goes_through_prefill(shape: str, short_first_step: int) -> None:
    """A prompt longer than the first step takes, at the limit and beyond it."""
    model = skilled_model(shape)
    for length in (short_first_step, short_first_step + 1, 3 * SLIDING_WINDOW):
        prompt = random_prompt(length, seed=length)
        expected = plain(model, prompt, max_new_tokens=20)
        assert model.generate(prompt, max_new_tokens=20).tolist() == expected.tolist(), length


def test_prompt_longer_than_the_first_step_takes() -> None:
    """The limit as it is: prompts of 511 to 514 tokens and of 700."""
    model = skilled_model(max_position_embeddings=1024)
    for length in (511, 512, 513, 514, 700):
        prompt = random_prompt(length, seed=length)
        assert model.generate(prompt, max_new_tokens=10).tolist() == plain(model, prompt, max_new_tokens=10).tolist()


@pytest.mark.parametrize("shape", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_prefill_in_chunks(shape: str, chunk: int) -> None:
    """`prefill_chunk_size` changes memory, not text."""
    model = skilled_model(shape)
    prompt = random_prompt(29)
    expected = plain(model, prompt, max_new_tokens=16)
    assert model.generate(prompt, max_new_tokens=16, prefill_chunk_size=chunk).tolist() == expected.tolist()


@pytest.mark.parametrize("prefill", [False, True], ids=["first-step", "prefill"])
@pytest.mark.parametrize("shape", ["llama", "mistral", "gemma3", "gpt_neox", "gpt2"])
def test_left_padding(shape: str, prefill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded prompt with its mask continues like the same call of plain decoding, and like the prompt without."""
    monkeypatch.setattr(generation, "LONGEST_PROMPT_IN_FIRST_STEP", 4 if prefill else 512)
    model = skilled_model(shape)
    prompt = random_prompt(17)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt], dim=-1)
    mask = (torch.arange(22)[None] >= 5).long()
    expected = plain(model, padded, attention_mask=mask, max_new_tokens=20)
    for strategy in STRATEGIES:
        output = model.generate(padded, attention_mask=mask, max_new_tokens=20, speculation_strategy=strategy)
        assert output.tolist() == expected.tolist(), strategy
        assert output[0, 5:].tolist() == model.generate(prompt, max_new_tokens=20)[0].tolist()


@pytest.mark.parametrize("shape", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("held", [1, 14, 18])
def test_cache_that_holds_a_part_of_the_prompt(shape: str, held: int) -> None:
    """A DynamicCache given by the user is continued, as in plain decoding."""
    model = skilled_model(shape)
    prompt = random_prompt(19)
    outputs = []
    for generate in (plain, type(model).generate):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt[:, :held], past_key_values=cache)
        outputs.append(generate(model, prompt, past_key_values=cache, max_new_tokens=20).tolist())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("shape", ["llama", "mistral", "gemma3", "gpt2"])
def test_returned_cache_can_be_continued(shape: str) -> None:
    """It holds all but the last token, as plain decoding leaves it, and a second call goes on from it."""
    model = skilled_model(shape)
    first = details(model, random_prompt(15), max_new_tokens=14)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    expected = plain(model, first.sequences, max_new_tokens=14)
    cache = copy.deepcopy(first.past_key_values)
    again = details(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=14)
    assert again.sequences.tolist() == expected.tolist()
    assert plain(model, first.sequences, past_key_values=cache, max_new_tokens=14).tolist() == expected.tolist()


@pytest.mark.parametrize("shape", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("length", [3, 15])
def test_returned_cache_can_be_learned_from(shape: str, length: int) -> None:
    """The loop is in inference mode, what it leaves is not: a loss over further tokens reaches the weights."""
    model = skilled_model(shape).requires_grad_(True)
    for given in (None, DynamicCache(config=model.config)):
        found = details(model, random_prompt(length), max_new_tokens=14, past_key_values=given)
        assert not found.sequences.is_inference()
        cache = found.past_key_values
        loss = model(random_prompt(5), past_key_values=cache, labels=random_prompt(5)).loss
        (gradient,) = torch.autograd.grad(loss, model.get_output_embeddings().weight)
        assert gradient.norm() > 0
        cache.layers[0].keys.zero_()


def test_guesses_come_true(llama: PreTrainedModel) -> None:
    """The tests of this file do exercise acceptance: a skilled adapter emits well over one token per step."""
    rates = [
        float(details(llama, random_prompt(8, seed), max_new_tokens=40).tokens_per_step.mean()) for seed in range(8)
    ]
    assert sum(rates) / len(rates) > 1.3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_steps_add_up(llama: PreTrainedModel, strategy: str, count: int) -> None:
    """Each step emits 1 to k + 1 tokens, their sum is the output's length, and the figures agree."""
    for seed in range(5):
        prompt = random_prompt(6, seed)
        output = details(llama, prompt, max_new_tokens=33, num_speculative_tokens=count, speculation_strategy=strategy)
        (lengths,) = output.step_lengths
        assert sum(lengths) == output.sequences.shape[1] - prompt.shape[1] == 33
        assert all(1 <= length <= count + 1 for length in lengths)
        assert output.num_steps.tolist() == [len(lengths)]
        assert output.tokens_per_step.tolist() == pytest.approx([33 / len(lengths)])


def reference_guesses(model: Any, tokens: list[int], chosen: int, num_masks: int, use_sampler: bool) -> list[int]:
    """What is guessed to follow `chosen` behind `tokens`: all tokens and one block of masks in an ordinary causal pass."""
    head = model.mtp_head
    embed, unembed = model.get_input_embeddings(), model.get_output_embeddings()
    vectors = head.lora_mask_vectors["default"][None, :num_masks]
    with torch.no_grad(), head.gate.open(num_masks, (1, len(tokens) + num_masks)):
        inputs = torch.cat([embed(torch.tensor([tokens])), vectors], dim=1)
        states = model.get_decoder()(inputs_embeds=inputs).last_hidden_state[0, len(tokens) :]
        guesses = []
        for state in states:
            if use_sampler:
                state = head.sample_states("default", embed(torch.tensor([chosen])), state[None])[0]
            chosen = int(unembed(state).argmax())
            guesses.append(chosen)
    return guesses


@pytest.mark.parametrize("use_sampler", [True, False])
@pytest.mark.parametrize("strategy", ["quadratic", "linear"])
@pytest.mark.parametrize("shape", ["llama", "mistral", "qwen2", "gpt2"])
def test_steps_are_those_of_the_paper(shape: str, strategy: str, use_sampler: bool) -> None:
    """Each step verifies what one block of masks behind the tokens known by then guesses, computed from nothing."""
    model = skilled_model(shape).double()
    with torch.no_grad():
        # Guesses that depend on the masks too.
        weight = model.mtp_head.lora_sampler_in["default"].weight
        weight[:, weight.shape[0] :].normal_(std=0.5)
    prompt, total, count = random_prompt(9), 30, 3
    call = {"num_speculative_tokens": count, "speculation_strategy": strategy, "use_sampler": use_sampler}
    output = details(model, prompt, max_new_tokens=total, **call)
    text, known = plain(model, prompt, max_new_tokens=total)[0].tolist(), prompt.shape[1]
    guesses: list[int] = []
    steps = []
    while known < len(text):
        accepted = 0
        while accepted < len(guesses) and text[known + accepted : known + accepted + 1] == [guesses[accepted]]:
            accepted += 1
        steps.append(min(accepted + 1, len(text) - known))
        has_masks = strategy == "quadratic" or accepted == len(guesses)
        known += steps[-1]
        guesses = reference_guesses(model, text[: known - 1], text[known - 1], count, use_sampler) if has_masks else []
    assert output.step_lengths == [steps]


def test_forward_passes_are_steps(llama: PreTrainedModel) -> None:
    """`num_steps` counts what it costs: no pass of the model beside the steps for a prompt that the first step takes."""
    calls = []
    handle = llama.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    try:
        output = details(llama, random_prompt(6), max_new_tokens=30)
    finally:
        handle.remove()
    assert len(calls) == int(output.num_steps[0]) < 30


def test_quadratic_needs_no_more_steps_than_linear(llama: PreTrainedModel) -> None:
    """On average over prompts: every rejected guess leaves quadratic decoding with guesses, and linear without."""
    steps = dict.fromkeys(STRATEGIES, 0)
    for seed in range(12):
        for strategy in STRATEGIES:
            output = details(llama, random_prompt(8, seed), max_new_tokens=40, speculation_strategy=strategy)
            steps[strategy] += int(output.num_steps[0])
    assert steps["quadratic"] < steps["linear"]
    assert steps["quadratic"] <= steps["adaptive"]


def test_threshold_of_zero_is_quadratic(llama: PreTrainedModel) -> None:
    """Adaptive decoding with threshold 0 takes the very steps of quadratic decoding."""
    prompt = random_prompt(8)
    adaptive = details(llama, prompt, max_new_tokens=40, speculation_strategy="adaptive", speculation_threshold=0.0)
    assert adaptive.step_lengths == details(llama, prompt, max_new_tokens=40).step_lengths


def test_one_certain_guess_per_step() -> None:
    """Where the text is a plain count and the sampler knows how to count, every step emits k + 1 tokens."""
    model = skilled_model("gpt2")
    counting = tiny_model("gpt2")
    with torch.no_grad():
        for weights in (model, counting):
            for name, parameter in weights.named_parameters():
                if "attn" in name or "mlp" in name or "wpe" in name:
                    parameter.zero_()
    prompt = torch.tensor([[3]])
    output = details(model, prompt, max_new_tokens=1 + 3 * 5)
    assert output.sequences.tolist() == counting.generate(prompt, max_new_tokens=16, do_sample=False).tolist()
    assert output.sequences[0].tolist() == [(3 + i) % VOCAB_SIZE for i in range(17)]
    assert output.step_lengths == [[1, 5, 5, 5]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_autocast(attention: str, lora_dtype: torch.dtype) -> None:
    """Each product in the dtype that autocast gives it, as in plain decoding; padding is hidden there too."""
    model = skilled_model(attention=attention)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(lora_dtype)
    prompt, mask = random_prompt(9), torch.tensor([[0] * 3 + [1] * 6])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(model, prompt, attention_mask=mask, max_new_tokens=20)
        output = details(model, prompt, attention_mask=mask, max_new_tokens=20)
    assert output.sequences.tolist() == expected.tolist()
    assert max(output.step_lengths[0]) > 1


def test_adapter_in_fp32_on_a_base_in_bf16() -> None:
    """Mixed dtypes run, and text and steps are sound."""
    model = add_adapter(tiny_model().to(torch.bfloat16))
    make_skilled(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    prompt = random_prompt(9)
    output = details(model, prompt, max_new_tokens=24)
    assert output.sequences.shape == (1, 33)
    assert sum(output.step_lengths[0]) == 24
    with disabled(model), torch.no_grad():
        logits = model(output.sequences[:, :-1]).logits[0, 8:].float()
    # In bf16 a pass of another shape may turn a near tie: what was emitted is the base model's best up to rounding.
    chosen = logits.gather(-1, output.sequences[0, 9:, None])[:, 0]
    assert (logits.max(dim=-1).values - chosen).max() <= 0.05 * logits.abs().max()


class TestMaximumLength:
    """Where the model's positions end; gpt2 has a table that ends there."""

    @pytest.mark.parametrize("prefill", [False, True], ids=["first-step", "prefill"])
    @pytest.mark.parametrize("length", [1, 30, 47, 63])
    def test_generation_ends_at_the_last_position(
        self, length: int, prefill: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Masks that would stand behind the table's end do no harm."""
        monkeypatch.setattr(generation, "LONGEST_PROMPT_IN_FIRST_STEP", 4 if prefill else 512)
        model = skilled_model("gpt2", n_positions=64)
        prompt = random_prompt(length)
        for call in CALLS:
            output = model.generate(prompt, max_length=64, **call)
            assert output.shape == (1, 64)
            assert output.tolist() == plain(model, prompt, max_length=64).tolist(), call

    def test_prompt_at_the_maximum(self) -> None:
        """A prompt that fills the table gets the one token that plain decoding gives too."""
        model = skilled_model("gpt2", n_positions=64)
        prompt = random_prompt(64)
        assert model.generate(prompt, max_new_tokens=1).tolist() == plain(model, prompt, max_new_tokens=1).tolist()

    def test_beyond_the_table_fails_as_plain_decoding_does(self) -> None:
        """No text is made up behind the table's end."""
        model = skilled_model("gpt2", n_positions=16)
        for generate in (plain, type(model).generate):
            with pytest.raises(IndexError):
                generate(model, random_prompt(14), max_new_tokens=8)

    @pytest.mark.parametrize("shape", ["llama", "mistral"])
    def test_rotary_model_goes_on(self, shape: str) -> None:
        """A model without a table generates past its maximum as plain decoding does."""
        model = skilled_model(shape, max_position_embeddings=32)
        for length in (20, 32, 40):
            prompt = random_prompt(length, seed=length)
            expected = plain(model, prompt, max_new_tokens=24)
            for call in CALLS[::2]:
                assert model.generate(prompt, max_new_tokens=24, **call).tolist() == expected.tolist(), (length, call)

    def test_rope_that_stretches_is_refused_where_it_does(self) -> None:
        """Dynamic rope turns every key by the length of the pass; several tokens of one pass would differ."""
        model = skilled_model("llama-dynamic-rope")
        with pytest.raises(ValueError, match=r"'dynamic' changes .* position 64 .* reach 60 \+ 4"):
            model.generate(random_prompt(30), max_new_tokens=30)
