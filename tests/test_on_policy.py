"""The model's own text: complete, in order, and the same after an interruption."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext import generate_completions


class PaddingOnly:
    """All that is asked of a tokenizer when prompts are token ids."""

    pad_token_id = 0


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
            eos_token_id=3,
            bos_token_id=None,
        )
    ).eval()


PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 5], [6, 6], [1, 2]]


def test_greedy_completions_are_those_of_single_calls(model):
    """Row by row, in the order of the prompts, through the end token and not beyond."""
    rows = generate_completions(model, PaddingOnly(), PROMPTS, batch_size=2, max_new_tokens=12, disable_tqdm=True)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = torch.tensor([prompt])
        single = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert row["input_ids"] == single[0].tolist()
        assert row["completion_mask"] == [0] * len(prompt) + [1] * (single.shape[1] - len(prompt))


def test_an_interrupted_run_goes_on_to_the_same_text(model, tmp_path):
    """Sampled text too, from a file whose last line was cut in the middle."""
    arguments = {"batch_size": 2, "max_new_tokens": 8, "do_sample": True, "seed": 3, "disable_tqdm": True}
    whole = generate_completions(model, PaddingOnly(), PROMPTS, **arguments)
    path = tmp_path / "text.jsonl"
    generate_completions(model, PaddingOnly(), PROMPTS, output_file=path, **arguments)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:7])
    again = generate_completions(model, PaddingOnly(), PROMPTS, output_file=path, **arguments)
    assert again.to_dict() == whole.to_dict()


@pytest.mark.parametrize("changed", [{"max_new_tokens": 9}, {"prompts": [[4], [5]]}])
def test_a_file_of_another_run_is_refused(model, tmp_path, changed):
    """Other arguments or other prompts would mix two texts."""
    path = tmp_path / "text.jsonl"
    generate_completions(model, PaddingOnly(), [[4]], output_file=path, max_new_tokens=4, disable_tqdm=True)
    arguments = {"prompts": [[4]], "max_new_tokens": 4, **changed}
    with pytest.raises(ValueError, match="other arguments"):
        generate_completions(model, PaddingOnly(), output_file=path, disable_tqdm=True, **arguments)


@pytest.mark.parametrize(
    ("prompts", "batch_size", "named"), [([], 4, "`prompts`"), ([[1], []], 4, r"\[1\]"), ([[1]], 0, "`batch_size`")]
)
def test_nothing_to_complete_is_refused(model, prompts, batch_size, named):
    """By name, before anything is generated."""
    with pytest.raises(ValueError, match=named):
        generate_completions(model, PaddingOnly(), prompts, batch_size=batch_size)
