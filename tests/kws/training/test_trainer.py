"""The trainer of keyword spotting: what a step is made of, what is logged, and that it learns."""

import math
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, BertTokenizer, EvalPrediction, HfArgumentParser, TrainingArguments
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging as transformers_logging

from hf_ext import (
    CedConfig,
    CedForKeywordSpotting,
    DspForKeywordSpotting,
    DspKwsConfig,
    GatedConformerConfig,
    GatedConformerForKeywordDetection,
    KwsFeatureExtractor,
    KwsPairDataset,
    KwsProcessor,
    KwsTrainer,
    KwsTrainingConfig,
    KwsTrialDataset,
    SlickConfig,
    SlickForKeywordSpotting,
    load_speech_commands,
)
from hf_ext.kws.training.augmentation import KwsAugmenter
from hf_ext.kws.training.trainer import detection_metrics
from kws.training.setting import LOSSES, UTTERANCES, WORDS, logged, tiny_model, trainer, weights_of


def assert_same_run(found, expected):
    for name in ("loss", *LOSSES):
        assert logged(expected, name)
        assert logged(found, name) == pytest.approx(logged(expected, name), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(weights_of(found), weights_of(expected), rtol=1e-3, atol=1e-5)


def test_a_few_steps_lower_every_loss(tmp_path):
    # The same pairs again and again: each word with itself and with the next.
    rows = [{**row, "phrase": row["text"], "label": 1, "kind": "positive"} for row in UTTERANCES]
    rows += [{**row, "phrase": WORDS[i - 1], "label": 0, "kind": "random"} for i, row in enumerate(UTTERANCES)]
    run = trainer(
        tmp_path,
        train_dataset=KwsTrialDataset(rows),
        max_steps=80,
        per_device_train_batch_size=14,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    run.train()
    for name in LOSSES:
        values = logged(run, name)
        assert np.mean(values[-5:]) < 0.7 * np.mean(values[:3]), name


def test_accumulation_is_the_larger_batch(tmp_path):
    # Seven rows in two micro-batches of four and three: the rows count alike, not the micro-batches.
    pairs = KwsPairDataset(UTTERANCES)
    settings = {"max_steps": 3, "learning_rate": 1e-3, "optim": "sgd", "max_grad_norm": 0.0}
    runs = []
    for size, count in [(8, 1), (4, 2), (2, 4)]:
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
        runs.append(trainer(tmp_path, tiny_model(frozen_norms=True), pairs, **sizes, **settings))
        runs[-1].train()
    assert_same_run(runs[1], runs[0])
    assert_same_run(runs[2], runs[0])


def test_loss_is_the_weighted_sum(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    expected = [2 * a + b + 5 * c for a, b, c in zip(*(logged(run, name) for name in LOSSES), strict=True)]
    assert logged(run, "loss") == pytest.approx(expected, rel=1e-3)
    run = trainer(tmp_path, max_steps=1, utterance_loss_weight=1.0, prefix_loss_weight=0.0, ctc_loss_weight=0.0)
    run.train()
    assert logged(run, "loss") == pytest.approx(logged(run, "utterance_loss"), rel=1e-3)


def test_phonemes_come_first_if_wanted(tmp_path):
    run = trainer(tmp_path, max_steps=2, ctc_steps=2, weight_decay=0.0)
    before = weights_of(run)
    run.train()
    moved = {name for name, weight in weights_of(run).items() if not torch.equal(weight, before[name])}
    assert any(name.startswith("encoder") for name in moved) and "ctc_head.weight" in moved
    assert not any(name.startswith(("matcher", "head", "phoneme_embedding")) for name in moved)


def test_resuming_is_as_if_nothing_had_happened(tmp_path):
    pairs = KwsPairDataset(UTTERANCES * 2, augmenter=KwsAugmenter())
    settings = {"max_steps": 6, "train_dataset": pairs, "hide_stripes": True}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    # The data has an epoch of four steps: it stops in the second.
    trainer(tmp_path / "parts", **settings, save_strategy="steps", save_steps=5).train()
    resumed = trainer(tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    assert pairs.epoch == 1
    assert logged(resumed, "ctc_loss") == pytest.approx(logged(whole, "ctc_loss"), rel=1e-5)
    torch.testing.assert_close(weights_of(resumed), weights_of(whole))


def test_workers_draw_the_pairs_of_each_epoch(tmp_path):
    settings = {"max_steps": 4, "train_dataset": KwsPairDataset(UTTERANCES)}
    runs = [trainer(tmp_path, **settings, dataloader_num_workers=count) for count in (0, 1)]
    for run in runs:
        run.train()
    assert_same_run(runs[1], runs[0])


def test_clips_of_like_length_are_batched_together(tmp_path):
    pairs = KwsPairDataset(UTTERANCES * 8)
    durations = pairs.durations()
    assert durations[:3] == [len(row["audio"]["array"]) / 16000 for row in UTTERANCES[:3]]

    def spread_in_batches(strategy):
        run = trainer(tmp_path, train_dataset=pairs, train_sampling_strategy=strategy)
        places = list(run._get_train_sampler())
        assert sorted(places) == list(range(len(pairs)))
        batches = [[durations[place] for place in places[start : start + 4]] for start in range(0, len(places), 4)]
        return sum(max(batch) - min(batch) for batch in batches)

    assert spread_in_batches("group_by_length") < 0.6 * spread_in_batches("random")
    run = trainer(tmp_path, train_dataset=pairs, train_sampling_strategy="group_by_length")
    run.train()
    tested = KwsPairDataset(UTTERANCES, every_kind=True)
    assert len(tested.durations()) == len(tested)
    plain = trainer(tmp_path, model=run.model, eval_dataset=tested).evaluate()
    assert run.evaluate(tested)["eval_auc"] == pytest.approx(plain["eval_auc"])


def test_settings_come_from_the_command_line(tmp_path):
    (args,) = HfArgumentParser(KwsTrainingConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--ctc_loss_weight", "3", "--ctc_steps", "7", "--hide_stripes"]
    )
    assert (args.ctc_loss_weight, args.ctc_steps, args.hide_stripes) == (3.0, 7, True)
    assert (args.label_names, args.lr_scheduler_type) == (["labels", "pair_kinds"], "cosine")


def test_evaluation_tells_negatives_apart(tmp_path):
    pairs = KwsPairDataset(UTTERANCES, every_kind=True)
    run = trainer(tmp_path, eval_dataset=pairs, hide_stripes=True, per_device_eval_batch_size=5)
    figures = run.evaluate()
    for name in ("auc", "eer", "random_auc", "random_eer", "hard_auc", "hard_eer", "confusable_auc"):
        assert 0 <= figures[f"eval_{name}"] <= 1
    assert figures["eval_loss"] == pytest.approx(
        2 * figures["eval_utterance_loss"] + figures["eval_prefix_loss"] + 5 * figures["eval_ctc_loss"], rel=1e-3
    )
    # The same, whatever the batches are.
    other = trainer(tmp_path, eval_dataset=pairs, per_device_eval_batch_size=28).evaluate()
    for name in ("eval_loss", "eval_auc", "eval_hard_eer"):
        assert figures[name] == pytest.approx(other[name], rel=1e-4)


def test_figures_are_pooled_and_leave_out_what_is_not_there():
    draw = Random(0)
    logits = np.array([2.0, 1.0, 1.5, -1.0, 0.5, 1.2])
    labels, kinds = np.array([1, 1, 0, 0, 0, 0]), np.array([0, 0, 2, 1, 1, 2])
    order = list(range(6))
    draw.shuffle(order)
    figures = detection_metrics(EvalPrediction(logits[order], (labels[order], kinds[order])))
    assert figures["random_auc"] == 1 and figures["random_eer"] == 0
    assert figures["hard_auc"] == 0.5 and figures["auc"] == 0.75
    assert "confusable_auc" not in figures
    assert detection_metrics(EvalPrediction(logits[:2], (labels[:2], kinds[:2]))) == {}


def test_model_and_processor_are_saved(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run.save_model()
    assert isinstance(AutoModel.from_pretrained(tmp_path), SlickForKeywordSpotting)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), KwsProcessor)
    assert math.isfinite(logged(run, "loss")[0])


def test_the_card_says_what_was_reached(tmp_path):
    run = trainer(tmp_path, max_steps=2, eval_dataset=KwsPairDataset(UTTERANCES, every_kind=True))
    run.train()
    figures = run.evaluate()
    run.save_model()
    card = (tmp_path / "README.md").read_text()
    assert f'pipeline("keyword-spotting", model="{tmp_path.name}")' in card and "| steps | 2 |" in card
    assert f"| hard | {figures['eval_hard_auc']:.1%} | {figures['eval_hard_eer']:.1%} |" in card
    assert "arxiv:2409.09067" in card and str(tmp_path.parent) not in card
    run.create_model_card(model_name="spotter", dataset="my words", tags="mine", license="mit")
    card = (tmp_path / "README.md").read_text()
    assert all(words in card for words in ("# spotter", "| training data | my words |", "- mine", "license: mit"))


def test_the_card_says_what_was_reached_on_each_of_several_sets(tmp_path):
    # One is called as a kind of negative is.
    sets = {
        "far": KwsPairDataset(UTTERANCES[:4], every_kind=True),
        "hard": KwsPairDataset(UTTERANCES, every_kind=True),
    }
    run = trainer(tmp_path, eval_dataset=sets)
    figures = run.evaluate()
    run.save_model()
    card = (tmp_path / "README.md").read_text()
    for name in sets:
        for kind, row in {"": "all", "random_": "random", "hard_": "hard", "confusable_": "confusable"}.items():
            auc, eer = (figures[f"eval_{name}_{kind}{measure}"] for measure in ("auc", "eer"))
            assert f"| {name}, {row} | {auc:.1%} | {eer:.1%} |" in card


def test_metrics_of_ones_own_leave_a_card(tmp_path):
    run = KwsTrainer(
        model=tiny_model(),
        args=KwsTrainingConfig(str(tmp_path), report_to="none", use_cpu=True),
        eval_dataset=KwsPairDataset(UTTERANCES),
        compute_metrics=lambda prediction: {"auc": 0.5},
    )
    assert run.evaluate()["eval_auc"] == 0.5
    run.save_model()
    assert "equal error rate" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [
        (SlickForKeywordSpotting, SlickConfig),
        (CedForKeywordSpotting, CedConfig),
        (DspForKeywordSpotting, DspKwsConfig),
    ],
)
def test_nothing_is_warned_of(model_class, config_class, tmp_path):
    model = model_class(config_class(hidden_size=16, num_hidden_layers=1, intermediate_size=16))
    with CaptureLogger(transformers_logging.get_logger("transformers")) as captured:
        trainer(tmp_path, model, max_steps=1).train()
    assert captured.out == ""


def test_bad_settings_are_named(tmp_path):
    for setting, message in [
        ({"ctc_loss_weight": -1.0}, "`ctc_loss_weight` must be finite and not negative, got -1"),
        ({"prefix_loss_weight": float("nan")}, "`prefix_loss_weight` must be finite and not negative, got nan"),
        ({name + "_weight": 0.0 for name in LOSSES}, "are all 0"),
        ({"ctc_steps": 3, "ctc_loss_weight": 0.0}, "which is 0"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "`dataloader_persistent_workers=True`"),
    ]:
        with pytest.raises(ValueError, match=message):
            KwsTrainingConfig(str(tmp_path), **setting)
    with pytest.raises(TypeError, match="`args` must be a KwsTrainingConfig"):
        KwsTrainer(model=tiny_model(), args=TrainingArguments(str(tmp_path)))
    settings = KwsTrainingConfig(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(TypeError, match="`processing_class` must be a KwsProcessor"):
        KwsTrainer(model=tiny_model(), args=settings, processing_class=KwsFeatureExtractor())
    with pytest.raises(ValueError, match="makes 40 channels and the model takes 80"):
        KwsTrainer(
            model=tiny_model(), args=settings, processing_class=KwsProcessor(KwsFeatureExtractor(feature_size=40))
        )


def test_models_that_cannot_be_trained_on_the_phrases_are_named(tmp_path):
    detector = GatedConformerForKeywordDetection(GatedConformerConfig(num_mel_bins=80, num_hidden_layers=1))
    with pytest.raises(TypeError, match="`model` is a GatedConformerForKeywordDetection, which takes no phrases"):
        trainer(tmp_path, detector)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"has 74 phonemes and the model takes 10 \(`vocab_size`\)"):
        trainer(tmp_path, SlickForKeywordSpotting(SlickConfig(vocab_size=10, **sizes)))
    narrow = SlickForKeywordSpotting(SlickConfig(max_phonemes=9, **sizes))
    with pytest.raises(ValueError, match=r"`train_dataset` has phrases of up to 12 phonemes and the model takes 9"):
        trainer(tmp_path, narrow)
    words = KwsProcessor(tokenizer=BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}))
    with pytest.raises(ValueError, match=r"`train_dataset` has the kind 'confusable', .* and the model takes words"):
        KwsTrainer(
            model=tiny_model(),
            args=KwsTrainingConfig(str(tmp_path), report_to="none", use_cpu=True),
            train_dataset=KwsPairDataset(UTTERANCES),
            processing_class=words,
        )
    fitting = KwsPairDataset(UTTERANCES, max_phonemes=9)
    with pytest.raises(ValueError, match=r"`eval_dataset` has phrases of up to 12 phonemes"):
        trainer(tmp_path, narrow, fitting, KwsPairDataset(UTTERANCES))
    with pytest.raises(ValueError, match=r"`eval_dataset\['far'\]` has phrases of up to 12 phonemes"):
        trainer(tmp_path, narrow, fitting, {"near": fitting, "far": KwsPairDataset(UTTERANCES)})
    trial = {**UTTERANCES[0], "phrase": "play some other music", "label": 0, "kind": "random"}
    with pytest.raises(ValueError, match=r"`eval_dataset` has phrases of up to 15 phonemes"):
        trainer(tmp_path, narrow, fitting, KwsTrialDataset([trial]))
    assert trainer(tmp_path, narrow, fitting, max_steps=1).train().global_step == 1
    # Without made-up phrases they are as long as what is said.
    trainer(tmp_path, narrow, KwsPairDataset(UTTERANCES, shares={"positive": 1.0}))


def test_recorded_commands_are_learned_from(tmp_path, shared_data):
    """From a folder of recordings to falling losses, by the public names alone."""
    words = ["yes", "no", "stop", "seven", "happy"]
    rows = load_speech_commands(shared_data / "speech" / "speech_commands", words=words)[::4]
    pairs = KwsPairDataset(rows, augmenter=KwsAugmenter(max_margin=0.1))
    run = trainer(tmp_path, train_dataset=pairs, max_steps=16, per_device_train_batch_size=8, learning_rate=1e-2)
    run.train()
    for name in ("loss", "ctc_loss"):
        values = logged(run, name)
        assert np.mean(values[-3:]) < 0.8 * np.mean(values[:3]), name
    figures = run.evaluate(KwsPairDataset(rows, every_kind=True))
    assert 0 <= figures["eval_hard_auc"] <= 1
