"""The table of phonemes of CED, and the three stages of training around it."""

import pytest
import torch

from hf_ext import KwsProcessor
from hf_ext.kws.modeling_ced_table import are_recognised, mean_states_of_runs
from kws.ced_setting import batch, small_model


SYMBOLS = KwsProcessor().tokenizer.convert_ids_to_tokens(range(74))


def spoken_by(model, inputs):
    """What the model itself recognises in each clip, as labels."""
    audio = model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
    labels = model.ctc_head(audio.last_hidden_state).argmax(-1).masked_fill(~audio.attention_mask, 0)
    rows = [[x for x in torch.unique_consecutive(row).tolist() if x] for row in labels]
    longest = max(map(len, rows))
    return torch.tensor([row + [-100] * (longest - len(row)) for row in rows])


class TestTable:
    def test_vectors_are_means_of_means_of_runs(self):
        model, inputs = small_model(), batch((60, 41, 90), (5, 9, 2))
        inputs["phoneme_labels"] = spoken_by(model, inputs)
        counts = model.build_phoneme_table([inputs])
        runs = {}
        for row in range(3):
            audio = model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
            frames = audio.last_hidden_state[row][audio.attention_mask[row]]
            labels, lengths = torch.unique_consecutive(model.ctc_head(frames).argmax(-1), return_counts=True)
            for label, part in zip(labels.tolist(), frames.split(lengths.tolist()), strict=True):
                runs.setdefault(label, []).append(part.mean(0))
        for label in range(4, 74):
            assert counts[label] == len(runs.get(label, []))
            expected = torch.stack(runs[label]).mean(0) if label in runs else torch.zeros(16)
            torch.testing.assert_close(model.phoneme_table.vectors[label], expected, atol=1e-5, rtol=1e-4)

    def test_batches_do_not_matter(self):
        inputs = batch()
        inputs["phoneme_labels"] = spoken_by(small_model(), inputs)
        whole, parts = small_model(), small_model()
        whole.build_phoneme_table([inputs])
        parts.build_phoneme_table({name: x[i : i + 1] for name, x in inputs.items()} for i in range(3))
        torch.testing.assert_close(whole.phoneme_table.vectors, parts.phoneme_table.vectors, atol=1e-5, rtol=1e-4)

    def test_clips_with_errors_are_left_out(self):
        model, inputs = small_model(), batch()
        inputs["phoneme_labels"] = spoken_by(model, inputs)
        inputs["phoneme_labels"][1, 0] = 73
        first_and_last = {name: x[::2] for name, x in inputs.items()}
        assert torch.equal(model.build_phoneme_table([inputs]), model.build_phoneme_table([first_and_last]))
        every = model.build_phoneme_table([inputs], only_exact=False).sum()
        assert every > model.build_phoneme_table([first_and_last]).sum()

    def test_no_more_clips_are_read_than_needed(self):
        inputs = batch()
        inputs["phoneme_labels"] = spoken_by(small_model(), inputs)

        def endless():
            while True:
                yield inputs

        five = small_model().build_phoneme_table(endless(), max_clips=5)
        one_and_two = [inputs, {name: x[:2] for name, x in inputs.items()}]
        assert torch.equal(five, small_model().build_phoneme_table(one_and_two, max_clips=None))

    def test_vowels_that_were_not_heard_are_like_their_other_stresses(self):
        inputs = batch((300,) * 4, (2,) * 4)
        heard, model = small_model(), small_model()
        counts = heard.build_phoneme_table([inputs], only_exact=False)
        assert torch.equal(counts, model.build_phoneme_table([inputs], symbols=SYMBOLS, only_exact=False))
        plain, filled = heard.phoneme_table.vectors, model.phoneme_table.vectors
        copied = 0
        for phoneme in range(4, 74):
            stresses = [i for i in range(4, 74) if SYMBOLS[i].rstrip("012") == SYMBOLS[phoneme].rstrip("012")]
            others = [i for i in stresses if counts[i]]
            if counts[phoneme] or not others:
                assert torch.equal(filled[phoneme], plain[phoneme])
            else:
                copied += 1
                torch.testing.assert_close(filled[phoneme], plain[others].mean(0))
        assert copied

    def test_encoder_is_frozen_unless_it_is_trained_on(self):
        for freeze in (True, False):
            model = small_model().train()
            model.build_phoneme_table([batch()], only_exact=False, freeze_encoder=freeze)
            assert model.training and model.config.freeze_encoder is freeze
            assert model.encoder.training is not freeze

    def test_repeated_phonemes_count_each(self):
        labels = torch.tensor([[0, 7, 7, 0, 7, 9, 9, 0], [5, 0, 0, 0, 0, 0, 0, 5]])
        spoken = torch.tensor([[7, 7, 9, -100], [5, 5, 0, 0]])
        assert are_recognised(labels, spoken).tolist() == [True, True]
        assert are_recognised(labels, spoken.flip(0)).tolist() == [False, False]
        phonemes, means = mean_states_of_runs(torch.arange(16.0).reshape(2, 8, 1), labels)
        assert phonemes.tolist() == [7, 7, 9, 5, 5]
        assert means.flatten().tolist() == [1.5, 4.0, 5.5, 8.0, 15.0]

    def test_symbols_of_no_sound_have_no_vector(self):
        model = small_model()
        with torch.no_grad():
            model.ctc_head.bias[2] = 0.5
        audio = model.get_audio_features(batch()["input_features"])
        heard = model.ctc_head(audio.last_hidden_state).argmax(-1)
        assert heard.eq(2).any() and heard.gt(3).any()
        assert not model.build_phoneme_table([batch()], only_exact=False)[:4].any()
        assert not model.phoneme_table.vectors[:4].any()

    def test_nothing_to_build_from_is_an_error(self):
        model, inputs = small_model(), batch()
        inputs["phoneme_labels"] = torch.full((3, 40), 73)
        before = model.phoneme_table.vectors.clone()
        with pytest.raises(ValueError, match="None of the 3 clips in `batches` could be used with `only_exact`"):
            model.build_phoneme_table([inputs])
        assert torch.equal(model.phoneme_table.vectors, before) and not model.config.freeze_encoder
        with pytest.raises(ValueError, match="There are 2 `symbols` for a `vocab_size` of 74"):
            model.build_phoneme_table([inputs], symbols=["AA", "B"])
        del inputs["phoneme_labels"]
        with pytest.raises(ValueError, match="`batches` have no `phoneme_labels`"):
            model.build_phoneme_table([inputs])


class TestStages:
    def test_three_stages_tell_words_apart(self):
        # Each phoneme has a sound of its own, five frames of features long.
        random = torch.Generator().manual_seed(0)
        sounds = torch.randn(74, 16, generator=random)
        words = torch.tensor([[10, 20, 30, 40], [40, 30, 20, 10], [10, 30, 20, 40], [50, 20, 60, 40]])
        clips = sounds[words].repeat_interleave(16, dim=1)
        clips = (clips + 0.3 * torch.randn(4, *clips.shape, generator=random)).flatten(0, 1)
        spoken = words.repeat(4, 1)
        model = small_model(hidden_size=32).train()
        for loss, keywords in (("ctc", words), ("utterance", words)):
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            for step in range(60):
                said = spoken if step % 2 else keywords.roll(1 + step // 2 % 3, 0).repeat(4, 1)
                output = model(clips, keyword_ids=said, labels=(said == spoken).all(-1).float(), phoneme_labels=spoken)
                optimizer.zero_grad()
                output[f"{loss}_loss"].backward()
                optimizer.step()
            if loss == "ctc":
                heard = model.build_phoneme_table([{"input_features": clips, "attention_mask": torch.ones(clips.shape[:2]), "phoneme_labels": spoken}])  # fmt: skip
                assert set(heard.nonzero().flatten().tolist()) == set(words.flatten().tolist())
        model.eval()
        scores = model.score(model.get_audio_features(clips), model.get_text_features(words))
        assert torch.equal(scores.argmax(-1), torch.arange(4).repeat(4))
