"""The recipe of the model with wide MLPs: from rows of text alone, and going on where it stopped."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from recipes import as_words, imported_recipe


@pytest.fixture(scope="module")
def recipe():
    with imported_recipe("train_wide_lm") as module:
        yield module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    rows = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}."} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(recipe, data, folder, **changes):
    settings = {
        "data": data,
        "output_dir": folder,
        "vocab_size": 300,
        "hidden_size": 40,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": 2,
        "disable_tqdm": True,
        **changes,
    }
    parser = HfArgumentParser((recipe.RecipeArguments, recipe.WideLmArguments))
    words = as_words(settings)
    recipe.main(*parser.parse_args_into_dataclasses(["--columns", "question", "answer", *words]))


def test_it_needs_nothing_but_text(recipe, data, tmp_path):
    """It leaves a model and a tokenizer that load by their folder; rows begin and end, and their text comes back."""
    run(recipe, data, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "What is 12 + 12?\nIt is 24."
    ids = tokenizer(text)["input_ids"]
    assert (
        (ids[0], ids[-1])
        == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        == (
            model.config.bos_token_id,
            model.config.eos_token_id,
        )
    )
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_it_goes_on_where_it_stopped(recipe, data, tmp_path):
    """To the same weights, bit for bit."""
    run(recipe, data, tmp_path / "whole")
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "checkpoint")
    run(recipe, data, tmp_path / "resumed", resume_from_checkpoint=tmp_path / "checkpoint")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
