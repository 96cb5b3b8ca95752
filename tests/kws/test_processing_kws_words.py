"""The processor with the tokenizer of a text encoder, and models of words that are trained with it."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, BertTokenizer, DistilBertConfig, PreTrainedTokenizer, pipeline

from hf_ext import (
    DspForKeywordSpotting,
    DspKwsConfig,
    KwsDataCollator,
    KwsFeatureExtractor,
    KwsPairDataset,
    KwsProcessor,
    KwsTrainer,
    KwsTrainingConfig,
    PhonemeTokenizer,
)
from kws.training.setting import UTTERANCES, logged


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lights", "on", "off", "com", "##put", "##er", "it", "'", "s"]
PIECES += ["play", "music", "stop", "vol", "##ume", "up", "yes", "no"]
CLIP = np.random.default_rng(0).uniform(-1, 1, 8000).astype(np.float32)
WITHOUT_CONFUSABLES = {"positive": 0.5, "random": 0.3, "hard": 0.2}


@pytest.fixture(scope="module")
def processor():
    return KwsProcessor(tokenizer=BertTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)}))


def small_model(**kwargs):
    torch.manual_seed(0)
    text = DistilBertConfig(vocab_size=len(PIECES), dim=8, hidden_dim=16, n_layers=1, n_heads=2)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "projection_size": 8}
    return DspForKeywordSpotting(DspKwsConfig(text_config=text, **sizes, **kwargs))


def test_pieces_know_their_words(processor):
    inputs = processor(text=["lights on", "it's computer"], return_tensors="pt")
    assert processor.tokenizer.convert_ids_to_tokens(inputs["keyword_ids"][1]) == [
        *["[CLS]", "it", "'", "s", "com", "##put", "##er", "[SEP]"]
    ]
    assert inputs["keyword_word_ids"].tolist() == [[-1, 0, 1, -1, -1, -1, -1, -1], [-1, 0, 0, 0, 1, 1, 1, -1]]
    assert inputs["keyword_attention_mask"].sum(-1).tolist() == [4, 8]


def test_punctuation_around_words_is_no_part_of_them(processor):
    plain = processor(text="lights on", return_tensors="np")
    for text in ("Lights, on!", "  lights -- on "):
        for name, values in processor(text=text, return_tensors="np").items():
            np.testing.assert_array_equal(values, plain[name])


def test_names_of_inputs(processor):
    inputs = processor(audio=CLIP, text="stop", sampling_rate=16000, return_tensors="pt")
    assert list(inputs) == processor.model_input_names
    assert "keyword_word_ids" not in KwsProcessor().model_input_names


@pytest.mark.parametrize("auto", [AutoProcessor, KwsProcessor])
def test_saved_and_loaded_beside_the_model(processor, auto, tmp_path):
    small_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is KwsProcessor and type(loaded.tokenizer) is BertTokenizer
    for name, values in processor(CLIP, ["computer"], sampling_rate=16000, return_tensors="pt").items():
        torch.testing.assert_close(loaded(CLIP, ["computer"], sampling_rate=16000, return_tensors="pt")[name], values)


@pytest.mark.parametrize("auto", [AutoProcessor, KwsProcessor])
def test_a_model_of_phonemes_has_its_processor_too(auto, tmp_path):
    DspKwsConfig().save_pretrained(tmp_path)
    KwsProcessor(tokenizer=PhonemeTokenizer(lexicon={"hey": "HH AY1"})).save_pretrained(tmp_path)
    assert auto.from_pretrained(tmp_path).tokenizer.tokenize("hey") == ["HH", "AY1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{HH EY1} computer", "has phonemes in braces, and the tokenizer takes words"),
        ("?!", r"The text '\?!' has no words"),
        (["stop", "lights \x00"], "makes nothing of"),
    ],
)
def test_text_without_words_is_refused(processor, text, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text)


def test_a_tokenizer_that_knows_no_words_is_refused():
    with pytest.raises(TypeError, match="a fast tokenizer of a text encoder, got SlowTokenizer"):
        KwsProcessor(KwsFeatureExtractor(), SlowTokenizer())


class SlowTokenizer(PreTrainedTokenizer):
    vocab_files_names = {}

    @property
    def vocab_size(self):
        return 0

    def get_vocab(self):
        return {}


def test_the_trainer_trains_it_and_phonemes_are_those_of_the_text(processor, tmp_path):
    run = KwsTrainer(
        model=small_model(hidden_dropout=0.0),
        args=KwsTrainingConfig(
            str(tmp_path),
            max_steps=30,
            per_device_train_batch_size=14,
            logging_steps=1,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=KwsPairDataset(UTTERANCES * 2, shares=WITHOUT_CONFUSABLES),
        eval_dataset=KwsPairDataset(UTTERANCES, shares=WITHOUT_CONFUSABLES, every_kind=True),
        processing_class=processor,
    )
    before = {name: weight.clone() for name, weight in run.model.text_encoder.named_parameters()}
    run.train()
    for name in ("utterance_loss", "contrastive_loss", "ctc_loss"):
        values = logged(run, name)
        assert np.mean(values[-5:]) < np.mean(values[:5]), name
    assert run.evaluate()["eval_auc"] > 0.5
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.text_encoder.named_parameters())
    labels = run.data_collator([run.train_dataset[0]])["phoneme_labels"][0]
    assert labels.tolist() == PhonemeTokenizer()(run.train_dataset[0]["text"])["input_ids"]


def test_made_up_confusables_are_no_words(processor, tmp_path):
    """The trainer refuses them before the first step, and the processor where it meets one."""
    pairs = KwsPairDataset(UTTERANCES, shares={"confusable": 1})
    with pytest.raises(ValueError, match=r"`train_dataset` has the kind 'confusable'.*leave it out of the `shares`"):
        KwsTrainer(
            model=small_model(),
            args=KwsTrainingConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True),
            train_dataset=pairs,
            processing_class=processor,
        )
    with pytest.raises(ValueError, match="leave them out, also the kind 'confusable'"):
        KwsDataCollator(processor)([pairs[0]])


@pytest.mark.parametrize("chosen", ["contrastive", "utterance"])
def test_weights_of_the_trainer_choose_the_losses(processor, chosen, tmp_path):
    weights = {f"{name}_loss_weight": float(name == chosen) for name in ("utterance", "prefix", "ctc", "contrastive")}
    run = KwsTrainer(
        model=small_model(),
        args=KwsTrainingConfig(
            str(tmp_path), max_steps=1, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, **weights
        ),
        train_dataset=KwsPairDataset(UTTERANCES, shares=WITHOUT_CONFUSABLES),
        processing_class=processor,
    )
    run.train()
    assert logged(run, "loss") == pytest.approx(logged(run, f"{chosen}_loss"), rel=1e-3)


def test_the_pipeline_takes_words(processor, tmp_path):
    model = small_model().eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = pipeline("keyword-spotting", model=str(tmp_path))(
        {"array": CLIP, "sampling_rate": 16000}, candidate_labels=["play music", "stop"]
    )
    inputs = processor([CLIP, CLIP], ["play music", "stop"], sampling_rate=16000, return_tensors="pt")
    expected = dict(zip(["play music", "stop"], model(**inputs).logits.sigmoid().tolist(), strict=True))
    assert {answer["label"]: answer["score"] for answer in found} == pytest.approx(expected, rel=1e-4)
