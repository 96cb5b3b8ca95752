from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    LogitsProcessor,
    MaxTimeCriteria,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextStreamer,
    pipeline,
)
from transformers.generation import BaseStreamer

from mtp.models import VOCAB_SIZE, gated_config, make_skilled, plain, random_prompt, skilled_model, tiny_model


STRATEGIES = pytest.mark.parametrize("strategy", ["quadratic", "linear", "adaptive"])
LETTERS = "abcdefghijklmnopqrst"
PROMPTS = [random_prompt(length, seed=length) for length in (1, 6, 17)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Its guesses often come true, so that what is cut is cut inside a step."""
    return skilled_model()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Token `i` is the letter number `i`, with nothing between two letters."""
    letters = Tokenizer(WordLevel({LETTERS[i]: i for i in range(VOCAB_SIZE)}, unk_token="a"))
    letters.pre_tokenizer = Split(Regex("."), "isolated")
    letters.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters)


def same(model: PreTrainedModel, prompt: torch.Tensor, strategy: str | None = None, **kwargs: Any) -> list[int]:
    """Asserts that the call gives what plain decoding gives and returns the new tokens."""
    kwargs = {"max_new_tokens": 30, **kwargs}
    expected = plain(model, prompt, **kwargs)
    output = model.generate(prompt, speculation_strategy=strategy, **kwargs)
    assert output.tolist() == expected.tolist()
    return output[0, prompt.shape[1] :].tolist()


def compare(
    model: PreTrainedModel, prompt: torch.Tensor, make: Callable[[], dict[str, Any]], strategy: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for arguments with a memory: made anew for each of the two calls, and returned as they were left."""
    for_plain, for_ours = make(), make()
    expected = plain(model, prompt, max_new_tokens=30, **for_plain)
    output = model.generate(prompt, max_new_tokens=30, speculation_strategy=strategy, **for_ours)
    assert output.tolist() == expected.tolist()
    return for_plain, for_ours


class TestStopping:
    """Output ends at the very token where plain output ends."""

    @STRATEGIES
    def test_eos(self, model: PreTrainedModel, strategy: str) -> None:
        """Any token as the end, whether guessed or not; nothing behind it is emitted."""
        for prompt in PROMPTS:
            for eos in range(0, VOCAB_SIZE, 2):
                tokens = same(model, prompt, strategy, eos_token_id=eos, pad_token_id=0, max_new_tokens=16)
                assert eos not in tokens[:-1]

    def test_several_ends(self, model: PreTrainedModel) -> None:
        """A list of ends: the first one met."""
        for ends in ([3, 9], [1, 2, 5], [18, 19]):
            tokens = same(model, PROMPTS[1], eos_token_id=ends, pad_token_id=0)
            assert not set(ends) & set(tokens[:-1])

    def test_end_among_accepted_guesses(self, model: PreTrainedModel) -> None:
        """A step is cut behind the end though more of its guesses are right, and the figures count what is emitted."""
        free = model.generate(PROMPTS[1], max_new_tokens=30, return_dict_in_generate=True)
        new = free.sequences[0, 6:].tolist()
        cut = 0
        start = 0
        for length in free.step_lengths[0]:
            end = new[start]
            if length > 1 and end not in new[:start]:
                output = model.generate(
                    PROMPTS[1], max_new_tokens=30, eos_token_id=end, pad_token_id=0, return_dict_in_generate=True
                )
                assert output.sequences[0, 6:].tolist() == new[: start + 1]
                assert sum(output.step_lengths[0]) == start + 1
                cut += 1
            start += length
        assert cut > 0

    @STRATEGIES
    @pytest.mark.parametrize("limit", [1, 2, 3, 4, 7])
    def test_max_new_tokens(self, model: PreTrainedModel, limit: int, strategy: str) -> None:
        """Never more than asked for."""
        for prompt in PROMPTS:
            assert len(same(model, prompt, strategy, max_new_tokens=limit)) == limit

    def test_max_length(self, model: PreTrainedModel) -> None:
        """The limit that counts the prompt."""
        assert len(same(model, PROMPTS[2], max_new_tokens=None, max_length=25)) == 8

    def test_end_at_the_limit(self, model: PreTrainedModel) -> None:
        """An end that plain decoding would reach just behind the limit is not emitted."""
        tokens = same(model, PROMPTS[1])
        for limit in range(1, 12):
            same(model, PROMPTS[1], max_new_tokens=limit, eos_token_id=tokens[limit], pad_token_id=0)

    @STRATEGIES
    def test_min_new_tokens(self, model: PreTrainedModel, strategy: str) -> None:
        """Ends are suppressed up to a length."""
        for eos in same(model, PROMPTS[1])[:4]:
            tokens = same(model, PROMPTS[1], strategy, eos_token_id=eos, pad_token_id=0, min_new_tokens=9)
            assert len(tokens) >= 9

    @STRATEGIES
    def test_stop_strings(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, strategy: str) -> None:
        """A string over one token and one over two."""
        tokens = same(model, PROMPTS[1])
        text = tokenizer.decode(tokens)
        for start in range(0, 20, 2):
            for stop in (text[start], text[start : start + 2]):
                cut = same(model, PROMPTS[1], strategy, stop_strings=["absent", stop], tokenizer=tokenizer)
                assert tokenizer.decode(cut) == text[: text.index(stop) + len(stop)]

    @STRATEGIES
    def test_own_criteria(self, model: PreTrainedModel, strategy: str) -> None:
        """A criterion sees the same sequences as in plain decoding, each one token longer, and stops at the same."""

        class AfterThree(StoppingCriteria):
            """Stops when a token has come three times."""

            def __init__(self, token: int):
                self.token, self.seen = token, []

            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                self.seen.append(input_ids.tolist())
                return (input_ids == self.token).sum(-1) >= 3

        for token in (7, 15, 19):
            first, second = compare(
                model, PROMPTS[1], lambda token=token: {"stopping_criteria": [AfterThree(token)]}, strategy
            )
            assert first["stopping_criteria"][0].seen == second["stopping_criteria"][0].seen

    def test_time_limit(self, model: PreTrainedModel) -> None:
        """A limit on time that is over at once leaves one token."""
        criteria = [MaxTimeCriteria(max_time=-1.0)]
        assert len(same(model, PROMPTS[1], stopping_criteria=criteria)) == 1

    def test_no_limit_of_length(self, model: PreTrainedModel) -> None:
        """The default length of generate holds."""
        assert len(same(model, PROMPTS[1], max_new_tokens=None)) == len(plain(model, PROMPTS[1])[0, 6:])


class TestProcessors:
    """Logits processors act on every token as in plain decoding."""

    @STRATEGIES
    @pytest.mark.parametrize(
        "options",
        [
            {"repetition_penalty": 1.6},
            {"no_repeat_ngram_size": 2},
            {"bad_words_ids": [[14], [3, 4]]},
            {"suppress_tokens": [7, 8, 15]},
            {"begin_suppress_tokens": [7, 8, 15]},
            {"sequence_bias": {(15,): -4.0, (3, 4): 5.0}},
            {"forced_eos_token_id": 5, "eos_token_id": 5, "pad_token_id": 0},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[2]]},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_built_in(self, model: PreTrainedModel, options: dict[str, Any], strategy: str) -> None:
        """Each of those that `generate` builds."""
        for prompt in PROMPTS:
            same(model, prompt, strategy, **options)

    @STRATEGIES
    def test_with_a_memory(self, model: PreTrainedModel, strategy: str) -> None:
        """A processor is called once per token, in order, with the same ids and the same logits."""

        class Wave(LogitsProcessor):
            """Adds something that depends on how often it was called."""

            def __init__(self) -> None:
                self.ids: list[list[int]] = []
                self.scores: list[torch.Tensor] = []

            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                self.ids.append(input_ids[0].tolist())
                self.scores.append(scores.clone())
                return scores + torch.sin(torch.arange(scores.shape[-1]) + 3.0 * len(self.ids))

        for prompt in PROMPTS:
            first, second = compare(model, prompt, lambda: {"logits_processor": [Wave()]}, strategy)
            plain_wave, our_wave = first["logits_processor"][0], second["logits_processor"][0]
            assert plain_wave.ids == our_wave.ids
            assert torch.allclose(torch.cat(plain_wave.scores), torch.cat(our_wave.scores), atol=1e-4)

    def test_processor_in_place(self, model: PreTrainedModel) -> None:
        """One that writes into the logits that it gets changes this token's row alone."""

        class InPlace(LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                scores[:, 15] = -torch.inf
                return scores

        tokens = same(model, PROMPTS[1], logits_processor=[InPlace()])
        assert 15 not in tokens

    def test_ordinary_tensors(self, model: PreTrainedModel) -> None:
        """Whatever others' code is given, and what is returned, may be changed and learned from, as in plain decoding."""
        given: list[torch.Tensor] = []

        class Keeps(LogitsProcessor, StoppingCriteria, BaseStreamer):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                assert not torch.is_inference_mode_enabled()
                given.extend((input_ids, scores) if isinstance(scores, torch.Tensor) else (input_ids,))
                return scores if isinstance(scores, torch.Tensor) else torch.tensor([False])

            def put(self, value: torch.Tensor) -> None:
                given.append(value)

            def end(self) -> None:
                pass

        keeps = Keeps()
        output = model.generate(
            PROMPTS[1],
            max_new_tokens=9,
            logits_processor=[keeps],
            stopping_criteria=[keeps],
            streamer=keeps,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        tensors = [*given, output.sequences, *output.scores, *output.logits]
        assert len(tensors) > 4 * 9
        assert not any(tensor.is_inference() for tensor in tensors)


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


class TestStreamers:
    """What reaches a streamer."""

    @STRATEGIES
    def test_tokens_one_by_one(self, model: PreTrainedModel, strategy: str) -> None:
        """The prompt, then each token, then one end, as in plain decoding; nothing behind the token that stops."""
        for options in ({}, {"eos_token_id": 15, "pad_token_id": 0}):
            first, second = compare(model, PROMPTS[1], lambda o=options: {"streamer": Recorder(), **o}, strategy)
            assert first["streamer"].given == second["streamer"].given
            assert first["streamer"].ended == second["streamer"].ended == 1

    def test_text(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """TextStreamer prints the same text."""
        for skip_prompt in (True, False):
            streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt)
            plain(model, PROMPTS[1], max_new_tokens=12, streamer=streamer)
            expected = capsys.readouterr().out
            model.generate(PROMPTS[1], max_new_tokens=12, streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt))
            assert capsys.readouterr().out == expected != ""


class TestPipeline:
    """`pipeline("text-generation")` of a model made by PEFT."""

    def test_settings_of_the_model(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Guesses are as many as the model's own configuration says, and the text is the same."""
        model = get_peft_model(tiny_model(), gated_config())
        make_skilled(model)
        model.generation_config.num_speculative_tokens = 2
        inputs, call = tokenizer("hello", return_tensors="pt"), {"max_new_tokens": 30, "do_sample": False}
        steps = model.generate(**inputs, **call, return_dict_in_generate=True).step_lengths[0]
        assert max(steps) == 3

        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        passes = []
        handle = model.get_base_model().get_decoder().register_forward_hook(lambda *_: passes.append(1))
        text = pipe("hello", **call)
        handle.remove()
        assert len(passes) == len(steps)
        beams = pipe("hello", **call, num_beams=3)
        with model.disable_adapter():
            assert pipe("hello", **call) == text
            assert pipe("hello", **call, num_beams=3) == beams

    def test_sampling_is_its_default(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """It is refused like sampling in a call."""
        pipe = pipeline("text-generation", model=get_peft_model(tiny_model(), gated_config()), tokenizer=tokenizer)
        with pytest.raises(ValueError, match=r"or a pipeline may set too: pass `do_sample=False`"):
            pipe("hello", max_new_tokens=9)


class TestOutputs:
    """What is returned beside the tokens."""

    @STRATEGIES
    @pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}], ids=["raw", "processed"])
    def test_scores_and_logits(self, model: PreTrainedModel, options: dict[str, Any], strategy: str) -> None:
        """One row per emitted token, equal to plain decoding's up to rounding."""
        call = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        for prompt in PROMPTS:
            expected = plain(model, prompt, **call, **options)
            output = model.generate(prompt, speculation_strategy=strategy, **call, **options)
            assert output.sequences.tolist() == expected.sequences.tolist()
            for name in ("scores", "logits"):
                ours, theirs = getattr(output, name), getattr(expected, name)
                assert len(ours) == len(theirs) == 20
                assert [row.dtype for row in ours] == [row.dtype for row in theirs]
                assert torch.allclose(torch.stack(ours), torch.stack(theirs), atol=1e-4)

    def test_only_what_is_asked_for(self, model: PreTrainedModel) -> None:
        """Scores and logits are None unless asked for; a plain tensor without `return_dict_in_generate`."""
        output = model.generate(PROMPTS[1], max_new_tokens=9, return_dict_in_generate=True)
        assert output.scores is None
        assert output.logits is None
        assert isinstance(model.generate(PROMPTS[1], max_new_tokens=9, output_scores=True), torch.Tensor)

    def test_transition_scores(self, model: PreTrainedModel) -> None:
        """`compute_transition_scores` works on it."""
        call = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}
        ours, theirs = model.generate(PROMPTS[1], **call), plain(model, PROMPTS[1], **call)
        scores = [
            model.compute_transition_scores(o.sequences, o.scores, normalize_logits=True) for o in (ours, theirs)
        ]
        assert torch.allclose(*scores, atol=1e-4)

    @STRATEGIES
    def test_cache_when_output_is_cut(self, model: PreTrainedModel, strategy: str) -> None:
        """Whatever ended the output, the cache holds all but its last token."""
        for eos in same(model, PROMPTS[1])[:12]:
            for limit in (1, 5, 12):
                output = model.generate(
                    PROMPTS[1],
                    max_new_tokens=limit,
                    eos_token_id=eos,
                    pad_token_id=0,
                    speculation_strategy=strategy,
                    return_dict_in_generate=True,
                )
                assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1

    def test_beam_search_is_plain(self, model: PreTrainedModel) -> None:
        """Beams take transformers' own way, and find what they find without the adapter."""
        same_beams = model.generate(PROMPTS[1], max_new_tokens=12, num_beams=3, do_sample=False)
        assert same_beams.tolist() == plain(model, PROMPTS[1], max_new_tokens=12, num_beams=3).tolist()

    def test_prompt_lookup_is_plain(self, model: PreTrainedModel) -> None:
        """So does transformers' own assisted decoding."""
        output = model.generate(PROMPTS[2], max_new_tokens=12, prompt_lookup_num_tokens=3, do_sample=False)
        assert output.tolist() == plain(model, PROMPTS[2], max_new_tokens=12).tolist()
