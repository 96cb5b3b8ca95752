import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, DistilBertConfig, DistilBertModel, T5Config

from hf_ext import AutoModelForKeywordSpotting, DspForKeywordSpotting, DspKwsConfig
from kws.saving import assert_same_model
from kws.travelling import output_without_the_package
from versions import CHECKPOINTING


SMALL = {
    "num_mel_bins": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "hidden_dropout": 0.0,
    "projection_size": 12,
}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lights", "on", "off", "com", "##put", "##er", "play", "music"]
PARTITIONINGS = ["dynamic", "dynamic_mean", "equal", "attention"]


def text_config():
    return DistilBertConfig(vocab_size=len(PIECES), dim=8, hidden_dim=16, n_layers=1, n_heads=2, dropout=0.3)


def small_model(seed=0, words=False, **kwargs):
    torch.manual_seed(seed)
    text = {"text_config": text_config()} if words else {}
    return DspForKeywordSpotting(DspKwsConfig(**{**SMALL, **text, **kwargs})).eval()


def clips(frames=(60, 41, 90), mels=16):
    random = torch.Generator().manual_seed(1)
    features = torch.zeros(len(frames), max(frames), mels)
    for row, length in enumerate(frames):
        features[row, :length] = torch.randn(length, mels, generator=random)
    mask = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    return {"input_features": features, "attention_mask": mask.long()}


def batch(frames=(60, 41, 90), phonemes=(5, 9, 2)):
    random = torch.Generator().manual_seed(2)
    ids = torch.zeros(len(phonemes), max(phonemes), dtype=torch.long)
    for row, length in enumerate(phonemes):
        ids[row, :length] = torch.randint(4, 74, (length,), generator=random)
    return {**clips(frames), "keyword_ids": ids}


def batch_of_words(frames=(60, 41, 90)):
    """ "lights on", "computer play music" and "off", as the processor gives them."""
    ids = [[2, 5, 6, 3, 0, 0, 0], [2, 8, 9, 10, 11, 12, 3], [2, 7, 3, 0, 0, 0, 0]]
    words = [[-1, 0, 1, -1, -1, -1, -1], [-1, 0, 0, 0, 1, 2, -1], [-1, 0, -1, -1, -1, -1, -1]]
    ids, words = torch.tensor(ids)[: len(frames)], torch.tensor(words)[: len(frames)]
    return {
        **clips(frames),
        "keyword_ids": ids,
        "keyword_attention_mask": ids.ne(0).long(),
        "keyword_word_ids": words,
    }


def inputs_of(model):
    return batch() if model.config.text_config is None else batch_of_words()


def text_of(model, inputs):
    return model.get_text_features(**{name: values for name, values in inputs.items() if name.startswith("keyword")})


@pytest.fixture(scope="module", params=[*PARTITIONINGS, "words"])
def model(request):
    return small_model(words=True) if request.param == "words" else small_model(partitioning=request.param)


class TestSize:
    def test_weights_beside_distilbert_are_as_many_as_the_paper_says(self):
        with torch.device("meta"):
            model = DspForKeywordSpotting(DspKwsConfig(text_config=DistilBertConfig()))
        only_in_training = ("ctc_head", "log_temperature")
        kept = {n: p.numel() for n, p in model.named_parameters() if not n.startswith(only_in_training)}
        text = sum(size for name, size in kept.items() if name.startswith("text_encoder"))
        assert text == pytest.approx(66e6, rel=0.01)
        assert sum(kept.values()) - text == pytest.approx(3.7e6, rel=0.01)


class TestForward:
    def test_rows_are_those_of_each_clip_by_itself(self, model):
        inputs = inputs_of(model)
        together = model(**inputs).logits
        for row in range(3):
            alone = {name: values[row : row + 1] for name, values in inputs.items()}
            frames = int(alone.pop("attention_mask").sum())
            tokens = int(alone["keyword_ids"].ne(0).sum())
            alone = {name: values[:, :tokens] for name, values in alone.items()}
            alone["input_features"] = inputs["input_features"][row : row + 1, :frames]
            torch.testing.assert_close(model(**alone).logits[0], together[row], atol=1e-5, rtol=1e-4)

    def test_scores_of_all_pairs_are_those_of_the_pairs(self, model):
        inputs = inputs_of(model)
        audio = model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
        scores = model.score(audio, text_of(model, inputs))
        assert scores.shape == (3, 3)
        torch.testing.assert_close(scores.diagonal(), model(**inputs).logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            model(**inputs, labels=torch.ones(3)).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4
        )
        rolled = {n: v.roll(1, 0) if n.startswith("keyword") else v for n, v in inputs.items()}
        torch.testing.assert_close(scores[range(3), [2, 0, 1]], model(**rolled).logits, atol=1e-5, rtol=1e-4)

    def test_a_word_is_the_mean_of_its_pieces(self):
        model, inputs = small_model(words=True), batch_of_words()
        text = text_of(model, inputs)
        assert text.attention_mask.sum(-1).tolist() == [2, 3, 1]
        hidden = model.text_encoder(inputs["keyword_ids"], inputs["keyword_attention_mask"]).last_hidden_state
        computer = F.normalize(model.text_proj(hidden[1, 1:4].mean(0)), dim=-1)
        torch.testing.assert_close(text.last_hidden_state[1, 0], computer)

    def test_score_is_the_mean_cosine_of_parts_and_units(self):
        for partitioning in ("dynamic", "dynamic_mean", "equal"):
            model = small_model(partitioning=partitioning)
            audio, text = model.get_audio_features(**clips()), model.get_text_features(batch()["keyword_ids"])
            path, scores = model.partition(audio, text), model.score(audio, text)
            for clip in range(3):
                for phrase, length in enumerate([5, 9, 2]):
                    parts = [audio[0][clip][path[clip, phrase] == unit].mean(0) for unit in range(length)]
                    units = text.last_hidden_state[phrase, :length]
                    score = F.cosine_similarity(torch.stack(parts), units).mean()
                    expected = model.log_scale.exp() * score + model.bias
                    torch.testing.assert_close(scores[clip, phrase], expected, atol=1e-5, rtol=1e-4)

    def test_attention_weighs_all_frames(self):
        model = small_model(partitioning="attention", attention_temperature=0.5)
        audio, text = model.get_audio_features(**clips((60,))), model.get_text_features(batch()["keyword_ids"][:1])
        frames, units = audio.last_hidden_state[0], text.last_hidden_state[0, :5]
        parts = torch.stack([(frames @ unit / 0.5).softmax(0) @ frames for unit in units])
        expected = model.log_scale.exp() * F.cosine_similarity(parts, units).mean() + model.bias
        torch.testing.assert_close(model.score(audio, text)[0, 0], expected, atol=1e-5, rtol=1e-4)

    def test_partitions_give_each_unit_frames_in_order(self):
        for partitioning in ("dynamic", "dynamic_mean", "equal"):
            model = small_model(partitioning=partitioning)
            audio, text = model.get_audio_features(**clips()), model.get_text_features(batch()["keyword_ids"])
            path = model.partition(audio, text)
            for clip, frames in enumerate(audio.attention_mask.sum(-1)):
                for phrase, length in enumerate([5, 9, 2]):
                    steps = path[clip, phrase, :frames].diff()
                    assert ((steps == 0) | (steps == 1)).all()
                    assert path[clip, phrase, 0] == 0 and path[clip, phrase, frames - 1] == length - 1
                    assert (path[clip, phrase, frames:] == -1).all()

    def test_more_units_than_frames_are_the_lowest_score(self):
        model = small_model()
        inputs = batch((7, 60, 60), (3, 3, 3))
        # Seven frames of features are one state of the encoder.
        assert model(**inputs).logits[0] == model.bias - model.log_scale.exp()
        assert model(**inputs).logits[1] > model.bias - model.log_scale.exp()
        loss = model(**inputs, labels=torch.ones(3)).loss
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_tuples(self, model):
        inputs = inputs_of(model)
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], model(**inputs).logits)


class TestLosses:
    def labels(self):
        spoken = torch.tensor([[5, 6, 7, -100], [8, 9, 9, 10], [11, -100, -100, -100]])
        return {"labels": torch.tensor([1, 0, 1]), "phoneme_labels": spoken}

    def test_sum_is_weighted(self):
        model = small_model(utterance_loss_weight=2, contrastive_loss_weight=3, ctc_loss_weight=0.5)
        output = model(**batch(), **self.labels())
        expected = 2 * output.utterance_loss + 3 * output.contrastive_loss + 0.5 * output.ctc_loss
        torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(
            output.utterance_loss, F.binary_cross_entropy_with_logits(output.logits, torch.tensor([1.0, 0.0, 1.0]))
        )

    def test_contrastive_loss_is_cross_entropy_where_all_phrases_differ(self, model):
        inputs = inputs_of(model)
        audio = model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
        cosines = (model.score(audio, text_of(model, inputs)) - model.bias) / model.log_scale.exp()
        scores, rows = cosines / 0.07, torch.arange(3)
        expected = F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, rows)
        found = model(**inputs, labels=torch.ones(3)).contrastive_loss
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("labels", [[0, 0, 0], [1]])
    def test_without_right_or_without_wrong_pairs_it_is_nothing(self, labels):
        model, count = small_model(), len(labels)
        inputs = {name: values[:count] for name, values in batch().items()}
        output = model(**inputs, labels=torch.tensor(labels))
        assert output.contrastive_loss == 0
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_what_is_not_given_gives_no_loss(self, model):
        inputs, labels = inputs_of(model), self.labels()
        assert model(**inputs).loss is None
        assert model(**inputs, labels=labels["labels"]).ctc_loss is None
        only_ctc = model(**clips(), phoneme_labels=labels["phoneme_labels"])
        assert only_ctc.logits is None and only_ctc.contrastive_loss is None
        torch.testing.assert_close(only_ctc.loss, only_ctc.ctc_loss)

    def test_every_weight_is_trained_but_those_of_a_frozen_text_encoder(self, model):
        model.train()
        model(**inputs_of(model), **self.labels()).loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
        others = {name for name, _ in model.named_parameters()} - trained
        frozen = "text_encoder" if model.config.unit == "word" else "nothing"
        assert all(name.startswith(frozen) for name in others)
        assert model.config.unit == "phoneme" or others
        model.zero_grad()
        model.eval()

    def test_gradients_are_those_of_the_chosen_cuts(self):
        model = small_model()
        inputs = batch((60,), (4,))
        audio = model.get_audio_features(inputs["input_features"])
        text = model.get_text_features(inputs["keyword_ids"])
        (found,) = torch.autograd.grad(model.score(audio, text).sum(), model.audio_proj.weight, retain_graph=True)
        path = model.partition(audio, text)[0, 0]
        parts = torch.stack([audio[0][0][path == unit].mean(0) for unit in range(4)])
        score = model.log_scale.exp() * F.cosine_similarity(parts, text[0][0]).mean()
        (expected,) = torch.autograd.grad(score, model.audio_proj.weight)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    def test_a_few_steps_tell_two_phrases_apart(self):
        model = small_model(hidden_size=32).train()
        inputs = batch((60, 60), (3, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        pairs = {name: torch.cat([values, values]) for name, values in inputs.items()}
        pairs["keyword_ids"] = torch.cat([inputs["keyword_ids"], inputs["keyword_ids"].flip(0)])
        labels = torch.tensor([1, 1, 0, 0])
        for _ in range(60):
            optimizer.zero_grad()
            model(**pairs, labels=labels).loss.backward()
            optimizer.step()
        assert ((model.eval()(**pairs).logits > 0) == labels.bool()).all()

    @pytest.mark.parametrize("mode", ["autocast", "bfloat16", "checkpointing"])
    @pytest.mark.parametrize("words", [False, True])
    def test_in_less_memory(self, mode, words):
        model = small_model(words=words).train()
        inputs = {**(batch_of_words() if words else batch()), **self.labels()}
        if mode == "checkpointing":
            expected = model(**inputs).loss
            getattr(model, f"{CHECKPOINTING}_enable")()
            torch.testing.assert_close(model(**inputs).loss, expected)
        if mode == "bfloat16":
            model, inputs["input_features"] = model.to(torch.bfloat16), inputs["input_features"].to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = model(**inputs).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


class TestTextEncoder:
    def test_frozen_it_stays_in_evaluation(self):
        model = small_model(words=True).train()
        assert not model.text_encoder.training and model.encoder.training
        torch.testing.assert_close(
            text_of(model, batch_of_words()).last_hidden_state, text_of(model, batch_of_words()).last_hidden_state
        )
        assert not any(p.requires_grad for p in model.text_encoder.parameters())

    def test_it_is_trained_if_wanted(self):
        model = small_model(words=True, freeze_text_encoder=False).train()
        assert model.text_encoder.training
        model(**batch_of_words(), labels=torch.tensor([1, 0, 1])).loss.backward()
        assert all(p.grad is not None for p in model.text_encoder.parameters())

    def test_pretrained(self, tmp_path):
        torch.manual_seed(3)
        pretrained = DistilBertModel(text_config()).eval()
        pretrained.save_pretrained(tmp_path / "text")
        model = DspForKeywordSpotting.from_text_pretrained(tmp_path / "text", **SMALL, partitioning="equal")
        assert model.config.partitioning == "equal" and not model.text_encoder.training
        assert not any(p.requires_grad for p in model.text_encoder.parameters())
        for name, weight in pretrained.state_dict().items():
            assert torch.equal(weight, model.text_encoder.state_dict()[name])
        model.save_pretrained(tmp_path / "model")
        assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


class TestSaving:
    @pytest.mark.parametrize("auto", [AutoModel, AutoModelForKeywordSpotting, DspForKeywordSpotting])
    def test_loaded_model_gives_the_same(self, model, auto, tmp_path):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.bias.fill_(0.5)
        model.save_pretrained(tmp_path)
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is DspForKeywordSpotting
        found, expected = loaded.config.to_dict(), AutoConfig.from_pretrained(tmp_path).to_dict()
        for config in (found, expected):
            # Loading a model notes the type of its weights in each part of the configuration.
            (config["text_config"] or {}).pop("dtype", None)
        assert found == expected
        inputs = inputs_of(model)
        assert_same_model(loaded, model, inputs)
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }

    def test_travels_with_its_code(self, tmp_path):
        model, inputs = small_model(words=True), batch_of_words()
        there = output_without_the_package(model, inputs, "AutoModel", tmp_path)
        torch.testing.assert_close(there, model(**inputs).logits.detach())


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "change", "message"),
        [
            (False, {"input_features": torch.zeros(3, 60, 80), "attention_mask": None}, "`feature_size` of the"),
            (False, {"keyword_ids": torch.ones(2, 5, dtype=torch.long)}, "2 phrases in `keyword_ids` for 3 clips"),
            (False, {"keyword_ids": torch.ones(3, dtype=torch.long)}, "`keyword_ids` must have the shape"),
            (False, {"keyword_ids": None, "labels": torch.ones(3)}, "`keyword_ids` are missing"),
            (False, {"keyword_word_ids": torch.zeros(3, 9)}, "this model takes phonemes"),
            (True, {"keyword_word_ids": None}, "`keyword_word_ids` are missing"),
            (True, {"keyword_word_ids": torch.zeros(3, 2, dtype=torch.long)}, r"of shape \(3, 2\)"),
            (True, {"keyword_word_ids": torch.ones(3, 7, dtype=torch.long)}, "leave a word out"),
        ],
    )
    def test_input_is_refused_by_name(self, words, change, message):
        inputs = batch_of_words() if words else batch()
        with pytest.raises(ValueError, match=message):
            small_model(words=words)(**{**inputs, **change})

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_attention_heads": 5}, "`num_attention_heads` "),
            ({"conv_kernel_size": 4}, "must be odd, got 4"),
            ({"num_mel_bins": 3}, "at least 7"),
            ({"contrastive_loss_weight": -1}, "`contrastive_loss_weight` must be finite and not negative, got -1"),
            ({"attention_temperature": float("nan")}, "`attention_temperature` must be positive, got nan"),
            ({"attention_temperature": 0}, "`attention_temperature` must be positive, got 0"),
            ({"initial_temperature": -1.0}, "`initial_temperature` must be positive, got -1.0"),
            ({"text_config": {"dim": 3}}, "`text_config` has no `model_type`"),
            ({"text_config": T5Config()}, "'t5', which is no text encoder"),
        ],
    )
    def test_settings_are_refused_by_name(self, settings, message):
        with pytest.raises(ValueError, match=message):
            DspKwsConfig(**settings)

    def test_other_partitionings_are_refused(self):
        with pytest.raises(StrictDataclassFieldValidationError, match="partitioning"):
            DspKwsConfig(partitioning="ctc")

    def test_attention_has_no_partition(self):
        model = small_model(partitioning="attention")
        audio, text = model.get_audio_features(**clips()), model.get_text_features(batch()["keyword_ids"])
        with pytest.raises(ValueError, match="every frame belongs to every unit"):
            model.partition(audio, text)
