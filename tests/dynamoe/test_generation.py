"""`generate` on a nested model: every way of decoding gives what the plainest way gives."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers.generation.utils

from dynamoe.models import SHAPES, random_ids, tiny_model, tiny_moe, unnested


SENSITIVITIES = [1.0, 0.5]


def greedy(moe, ids, **options):
    return moe.generate(ids, **{"max_new_tokens": 8, "do_sample": False, "disable_compile": True, **options})


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_decoding_equals_uncached(shape, sensitivity):
    """Logits token by token, past a sliding window too, with a growing cache and one of fixed size."""
    moe, ids = tiny_moe(shape), random_ids(2, 14)
    moe.set_sensitivity(sensitivity)
    with torch.no_grad():
        expected, out = moe(ids), moe(ids[:, :3])
        logits = [out.logits]
        for token in ids[:, 3:].split(1, dim=1):
            out = moe(token, past_key_values=out.past_key_values)
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected.logits, rtol=1e-4, atol=1e-4)
    plain = greedy(moe, ids, use_cache=False)
    assert torch.equal(greedy(moe, ids), plain)
    assert torch.equal(greedy(moe, ids, cache_implementation="static"), plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_sensitivity_generates_what_the_dense_model_does(shape):
    moe, ids = tiny_moe(shape), random_ids(2, 6)
    dense = unnested(moe)
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        assert torch.equal(greedy(moe, ids, **options), greedy(dense, ids, **options))
    samples = []
    for model in (moe, dense):
        torch.manual_seed(0)
        samples.append(greedy(model, ids, do_sample=True, num_return_sequences=2))
    assert torch.equal(*samples)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("shape", ["llama", "mistral", "gpt_neox"])
def test_padded_rows_generate_what_each_does_alone(shape, cache):
    """Padding on the left changes neither what a row says nor where its tokens go."""
    moe = tiny_moe(shape)
    moe.set_sensitivity(0.5)
    rows = [random_ids(1, length, seed=length) for length in (3, 6, 9)]
    mask = torch.stack([(torch.arange(9) >= 9 - row.shape[1]).long() for row in rows])
    batch = torch.cat([torch.nn.functional.pad(row, (9 - row.shape[1], 0)) for row in rows])
    together = greedy(moe, batch, attention_mask=mask, cache_implementation=cache)
    for row, out in zip(rows, together, strict=True):
        assert torch.equal(greedy(moe, row)[0, row.shape[1] :], out[9:])


def test_each_row_has_its_own_sensitivity():
    """A tensor of one per row, in sampling and beam search repeated with its row."""
    moe, ids = tiny_moe(), random_ids(3, 6)
    sensitivity = torch.tensor([0.2, 0.5, 1.0])
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        together = greedy(moe, ids, sensitivity=sensitivity, **options)
        for row in range(3):
            alone = greedy(moe, ids[row : row + 1], sensitivity=float(sensitivity[row]), **options)
            assert torch.equal(together[row], alone[0])
    assert not torch.equal(greedy(moe, ids, sensitivity=0.2), greedy(moe, ids, sensitivity=1.0))
    assert greedy(moe, ids, sensitivity=sensitivity, do_sample=True, num_return_sequences=2).shape == (6, 14)


def test_generation_takes_the_arguments_of_a_call():
    """A sensitivity, an expert; the model's own sensitivity stays."""
    moe, ids = tiny_moe(), random_ids(2, 6)
    by_call = greedy(moe, ids, sensitivity=0.5)
    smallest = greedy(moe, ids, expert_index=0)
    assert torch.equal(smallest, greedy(moe, ids, sensitivity=0.0))
    moe.set_sensitivity(0.5)
    assert torch.equal(greedy(moe, ids), by_call)


@pytest.fixture
def quiet_assistant(monkeypatch):
    """transformers asks the assistant in a way that it calls deprecated itself."""
    monkeypatch.setattr(transformers.generation.utils.logger, "warning_once", lambda *_: None)


@pytest.mark.usefixtures("quiet_assistant")
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_speculation_gives_the_same_text(sensitivity):
    """Guesses from the prompt, and from a small dense model, verified by the nested one."""
    moe, ids = tiny_moe(), random_ids(1, 8).repeat(1, 2)
    moe.set_sensitivity(sensitivity)
    expected = greedy(moe, ids, max_new_tokens=16)
    assert torch.equal(greedy(moe, ids, max_new_tokens=16, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(greedy(moe, ids, max_new_tokens=16, assistant_model=tiny_model(seed=1)), expected)


@pytest.mark.usefixtures("quiet_assistant")
def test_a_nested_model_drafts_for_itself():
    """At a low sensitivity it guesses for itself at full: the dense model's text."""
    moe, ids = tiny_moe(), random_ids(1, 8)
    drafter = tiny_moe()
    drafter.set_sensitivity(0.3)
    expected = greedy(unnested(moe), ids, max_new_tokens=16)
    assert torch.equal(greedy(moe, ids, max_new_tokens=16, assistant_model=drafter), expected)


@pytest.mark.usefixtures("quiet_assistant")
def test_the_arguments_of_a_call_are_not_the_assistants():
    """A dense one doesn't know them, and a nested one has a sensitivity of its own."""
    moe, ids, drafter = tiny_moe(), random_ids(1, 8), tiny_moe()
    drafter.set_sensitivity(0.0)
    expected = greedy(moe, ids, sensitivity=0.5)
    for assistant in (tiny_model(seed=1), drafter):
        assert torch.equal(greedy(moe, ids, sensitivity=0.5, assistant_model=assistant), expected)
    assert drafter.expert_usage().shares[:, 0].eq(1).all()


@pytest.mark.usefixtures("quiet_assistant")
@pytest.mark.parametrize("exit_layer", [1, 2])
def test_a_model_that_guesses_by_its_first_layers(exit_layer):
    """The same text; what was only guessed is not counted, and the next call has all layers."""
    moe, ids = tiny_moe(num_hidden_layers=3), random_ids(1, 8)
    moe.set_sensitivity(0.5)
    expected = greedy(moe, ids)
    moe.expert_usage(reset=True)
    assert torch.equal(greedy(moe, ids, assistant_early_exit=exit_layer), expected)
    usage = moe.expert_usage()
    assert usage.shares.shape == (3, 3) and 8 + 7 <= usage.num_tokens < 8 + 4 * 7
    moe.expert_usage(reset=True)
    assert torch.equal(greedy(moe, ids), expected) and moe.expert_usage().num_tokens == 8 + 7


def test_guidance_runs_as_the_call_does():
    """Its pass without the prompt has the sensitivity or the expert of the call, and of each row."""
    moe, ids = tiny_moe(), random_ids(2, 6)
    expected = {}
    for value, call in ((0.0, {"expert_index": 0}), (0.5, {"sensitivity": 0.5})):
        by_call = greedy(moe, ids, guidance_scale=3.0, **call)
        moe.set_sensitivity(value)
        expected[value] = greedy(moe, ids, guidance_scale=3.0)
        moe.set_sensitivity(1.0)
        assert torch.equal(by_call, expected[value])
    by_row = greedy(moe, ids, guidance_scale=3.0, sensitivity=torch.tensor([0.0, 0.5]))
    assert torch.equal(by_row, torch.stack([expected[0.0][0], expected[0.5][1]]))


def test_a_prompt_of_embeddings_generates_the_same():
    moe, ids = tiny_moe(), random_ids(2, 6)
    moe.set_sensitivity(0.5)
    embeddings = moe.get_input_embeddings()(ids)
    out = moe.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)
    assert torch.equal(out, greedy(moe, ids)[:, 6:])


def test_calls_in_threads_take_turns():
    """Each gets what it asks for, and every token is counted."""
    moe, ids = tiny_moe(), random_ids(2, 8)
    expected = {value: greedy(moe, ids, sensitivity=value) for value in (0.2, 0.9)}
    moe.expert_usage(reset=True)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda value: (value, greedy(moe, ids, sensitivity=value)), [0.2, 0.9] * 12))
    assert all(torch.equal(out, expected[value]) for value, out in found)
    assert moe.expert_usage().num_tokens == 24 * 2 * (8 + 7)


def test_output_can_be_a_tuple():
    moe, ids = tiny_moe(), random_ids(1, 5)
    with torch.no_grad():
        assert torch.equal(moe(ids, return_dict=False)[0], moe(ids).logits)
