import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCTC, AutoProcessor, Trainer, TrainingArguments

from hf_ext import KwsConformerConfig, KwsConformerForCTC, KwsProcessor, SlickConfig, SlickForKeywordSpotting
from kws.saving import assert_same_model
from kws.travelling import output_without_the_package


SMALL = {"num_mel_bins": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "hidden_dropout": 0.0}


def small_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return KwsConformerForCTC(KwsConformerConfig(**{**SMALL, **kwargs})).eval()


def batch(frames=(60, 41, 90), mels=16):
    random = torch.Generator().manual_seed(1)
    features = torch.zeros(len(frames), max(frames), mels)
    for row, length in enumerate(frames):
        features[row, :length] = torch.randn(length, mels, generator=random)
    mask = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    return {"input_features": features, "attention_mask": mask.long()}


LABELS = torch.tensor([[5, 6, 7, -100], [8, 9, 9, 10], [11, -100, -100, -100]])


class TestForward:
    def test_rows_are_those_of_each_clip_by_itself(self):
        model, inputs = small_model(), batch()
        together = model(**inputs).logits
        for row, (frames, steps) in enumerate([(60, 14), (41, 9), (90, 21)]):
            alone = model(inputs["input_features"][row : row + 1, :frames]).logits
            torch.testing.assert_close(alone[0], together[row, :steps], atol=1e-5, rtol=1e-4)

    def test_loss_is_the_mean_of_the_clips_by_themselves(self):
        model, inputs = small_model(), batch()
        output = model(**inputs, labels=LABELS)
        each = []
        for row, (count, steps) in enumerate(zip([3, 4, 1], [14, 9, 21], strict=True)):
            logits = output.logits[row, :steps].log_softmax(-1)[:, None]
            each.append(F.ctc_loss(logits, LABELS[row : row + 1, :count], [steps], [count], blank=0))
        torch.testing.assert_close(output.loss, torch.stack(each).mean())

    def test_padding_of_labels_is_minus_100_or_0(self):
        model, inputs = small_model(), batch()
        torch.testing.assert_close(
            model(**inputs, labels=LABELS).loss, model(**inputs, labels=LABELS.clamp(min=0)).loss
        )

    def test_features_say_which_logits_are_no_padding(self):
        features = small_model().get_audio_features(**batch())
        assert features.attention_mask.sum(-1).tolist() == [14, 9, 21]

    def test_tuples(self):
        model, inputs = small_model(), batch()
        assert model(**inputs).loss is None
        loss, logits = model(**inputs, labels=LABELS, return_dict=False)
        assert loss.dim() == 0 and logits.shape == (3, 21, 74)

    def test_one_clip_of_one_state_is_trained_on(self):
        model = small_model().train()
        loss = model(torch.randn(1, 8, 16), labels=torch.tensor([[5]])).loss
        loss.backward()
        assert loss.isfinite() and all(weight.grad.isfinite().all() for weight in model.parameters())

    def test_every_weight_is_trained(self):
        model = small_model().train()
        model(**batch(), labels=LABELS).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    def test_a_few_steps_learn_a_word(self):
        model, inputs, labels = small_model().train(), batch((40, 40)), torch.tensor([[5, 6, 7], [9, 8, -100]])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        before = model(**inputs, labels=labels).loss.item()
        for _ in range(40):
            optimizer.zero_grad()
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
        assert model(**inputs, labels=labels).loss.item() < before / 4

    def test_with_the_trainer(self, tmp_path):
        columns = {**batch(), "labels": LABELS}
        rows = [{name: values[row] for name, values in columns.items()} for row in range(3)]
        arguments = TrainingArguments(
            output_dir=tmp_path, max_steps=2, per_device_train_batch_size=3, report_to="none", use_cpu=True
        )
        trainer = Trainer(model=small_model(), args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0


class TestMoving:
    def test_encoder_and_head_move_to_slick(self):
        model = small_model()
        slick = SlickForKeywordSpotting(SlickConfig(**SMALL)).eval()
        slick.encoder.load_state_dict(model.encoder.state_dict())
        slick.ctc_head.load_state_dict(model.ctc_head.state_dict())
        moved = slick(**batch(), phoneme_labels=LABELS).ctc_logits
        torch.testing.assert_close(moved, model(**batch()).logits, rtol=0, atol=0)

    def test_every_weight_has_the_name_that_it_has_in_slick(self):
        slick = SlickForKeywordSpotting(SlickConfig(**SMALL)).state_dict()
        ours = small_model().state_dict()
        assert {name: w.shape for name, w in ours.items()} == {name: slick[name].shape for name in ours}


class TestSaving:
    @pytest.mark.parametrize("auto", [AutoModel, AutoModelForCTC, KwsConformerForCTC])
    def test_loaded_model_gives_the_same(self, auto, tmp_path):
        model = small_model()
        model.save_pretrained(tmp_path)
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is KwsConformerForCTC
        assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
        assert_same_model(loaded, model, batch())

    def test_processor_beside_it(self, tmp_path):
        small_model(num_mel_bins=80).save_pretrained(tmp_path)
        KwsProcessor().save_pretrained(tmp_path)
        assert type(AutoProcessor.from_pretrained(tmp_path)) is KwsProcessor

    def test_travels_with_its_code(self, tmp_path):
        model, inputs = small_model(), batch()
        there = output_without_the_package(model, inputs, "AutoModelForCTC", tmp_path)
        torch.testing.assert_close(there, model(**inputs).logits.detach())


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"input_features": torch.zeros(3, 90, 80)}, "`feature_size` of the feature extractor"),
            ({"labels": torch.full((3, 2), 74)}, "`labels` has the phoneme 74 and `vocab_size` is 74"),
            ({"labels": torch.ones(3, dtype=torch.long)}, r"the shape \(3, num_spoken\), got \(3,\)"),
            ({"labels": torch.ones(2, 4, dtype=torch.long)}, r"the shape \(3, num_spoken\), got \(2, 4\)"),
        ],
    )
    def test_input_is_refused_by_name(self, change, message):
        with pytest.raises(ValueError, match=message):
            small_model()(**{**batch(), **change})

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_attention_heads": 5}, "`num_attention_heads` "),
            ({"conv_kernel_size": 4}, "must be odd, got 4"),
            ({"num_mel_bins": 3}, "at least 7"),
        ],
    )
    def test_settings_are_refused_by_name(self, settings, message):
        with pytest.raises(ValueError, match=message):
            KwsConformerConfig(**settings)
