"""The recipe of nested experts: from nothing but a dense model, on its own texts or on others, and going on where it stopped."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, HfArgumentParser

from dynamoe.models import tiny_model
from dynamoe.training.setting import tiny_tokenizer
from recipes import as_words, imported_recipe


@pytest.fixture(scope="module")
def recipe():
    with imported_recipe("train_dynamoe") as module:
        yield module


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_model(eos_token_id=1, pad_token_id=0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(recipe, dense, folder, **changes):
    settings = {
        "model": dense,
        "output_dir": folder,
        "num_texts": 24,
        "text_length": 12,
        "router_hidden_size": 8,
        "max_steps": 4,
        "router_steps": 1,
        "per_device_train_batch_size": 4,
        "warmup_steps": 0,
        "save_steps": 2,
        "save_total_limit": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    parser = HfArgumentParser((recipe.RecipeArguments, recipe.NestedTrainingArguments))
    recipe.main(*parser.parse_args_into_dataclasses(as_words(settings)))


def test_it_needs_nothing_but_the_model(recipe, dense, tmp_path, capsys):
    """It leaves a model that loads by its folder, and says what each sensitivity uses."""
    run(recipe, dense, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.isfinite(model(torch.tensor([[2, 3, 4]]), sensitivity=0.5).logits).all()
    printed = capsys.readouterr().out
    assert "sensitivity 0.5: " in printed and "sensitivity 1: 100.0% of the MLPs" in printed


def test_texts_can_be_given(recipe, dense, tmp_path):
    """Then the model writes none."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"w{i} w5 w6 w7"}) + "\n" for i in range(2, 26)))
    run(recipe, dense, tmp_path / "out", texts=texts, max_steps=2)
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "texts.jsonl").exists()


def test_a_few_texts_are_enough_to_try(recipe, dense, tmp_path):
    """One of them is kept for the evaluation, whose figures stand in the card."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"w{i} w5 w6 w7"}) + "\n" for i in range(2, 6)))
    run(recipe, dense, tmp_path / "out", texts=texts, max_steps=1)
    assert "at sensitivity 0.5" in (tmp_path / "out" / "README.md").read_text()


def test_it_goes_on_where_it_stopped(recipe, dense, tmp_path):
    """To the same weights as without the interruption, with the texts that it had written."""
    run(recipe, dense, tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    written = (tmp_path / "texts.jsonl").read_bytes()
    run(recipe, dense, tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert (tmp_path / "texts.jsonl").read_bytes() == written
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), expected, rtol=0, atol=0)
