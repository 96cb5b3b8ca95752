import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    pipeline,
)

from hf_ext import (
    GatedConformerConfig,
    GatedConformerForKeywordDetection,
    KwsConformerConfig,
    KwsConformerForCTC,
    KwsFeatureExtractor,
)
from hf_ext.metrics import share_of_macs_skipped
from kws.gated_conformer_setting import SMALL, features, small_model
from kws.travelling import output_without_the_package


def same(ours, expected, atol=1e-5):
    for name in ("detection_logits", "class_logits", "locations", "gates", "gate_probabilities"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), atol=atol, rtol=1e-4)


def streamed(model, clips, sizes, **kwargs):
    state, outputs = model.start_stream(len(clips)), []
    chunks = clips.split(sizes, dim=1)
    for number, chunk in enumerate(chunks):
        output, state = model.stream(chunk, state, final=number == len(chunks) - 1, **kwargs)
        outputs.append(output)
    joined = {
        name: torch.cat([output[name] for output in outputs], 1)
        for name in ("detection_logits", "class_logits", "locations", "gates", "gate_probabilities")
    }
    starts = torch.cat([output.window_starts for output in outputs])
    return type(outputs[0])(**joined, window_starts=starts), state


class TestSize:
    def test_defaults_have_fewer_weights_than_the_papers_predecessor(self):
        model = GatedConformerForKeywordDetection(GatedConformerConfig(num_labels=1000))
        assert model.num_parameters() == pytest.approx(1_020_000, rel=0.01)
        assert model.config.window_steps == 29

    def test_macs_are_those_that_torch_counts(self):
        model = small_model()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as every:
            model(features(1, 40, 16), gate_threshold=0.0)
        macs = model.count_macs()
        assert sum(macs.modules) + macs.always_on == every.get_total_flops() // 2

    def test_macs_that_are_skipped_are_not_run(self):
        model, clip = small_model(), features(1, 40, 16)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            gates = model(clip).gates
        macs = model.count_macs()
        assert 0 < gates.mean() < 1
        skipped = share_of_macs_skipped(gates[0], macs.modules, macs.always_on)
        ran = counted.get_total_flops() / 2 / (sum(macs.modules) + macs.always_on)
        # Gates are computed anew only behind a module that ran, hence a little less.
        assert 1 - skipped - 0.02 < ran <= 1 - skipped


class TestStreaming:
    @pytest.mark.parametrize("seed", range(6))
    def test_any_chunks_give_the_windows_of_the_whole(self, seed):
        random = np.random.default_rng(seed)
        model, frames = small_model(seed), int(random.integers(41, 140))
        clips = features(2, frames, 16, seed=seed)
        sizes, left = [], frames
        while left:
            sizes.append(min(int(random.choice([0, 1, 2, 3, 5, 8, 40, 90])), left))
            left -= sizes[-1]
        ours, state = streamed(model, clips, sizes)
        expected = model(clips)
        assert 0 < expected.gates.mean() < 1
        same(ours, expected)
        assert ours.window_starts.tolist() == expected.window_starts.tolist()
        assert state.num_windows == expected.detection_logits.shape[1] and state.finished

    @pytest.mark.parametrize("size", [1, 4, 7, 1000])
    def test_chunks_of_one_size(self, size):
        model, clips = small_model(), features(1, 90, 16)
        same(streamed(model, clips, size)[0], model(clips))
        same(streamed(model, clips, size, gated=False)[0], model(clips, gated=False))

    @pytest.mark.parametrize("size", [1, 7, 30, 1000])
    @pytest.mark.parametrize("hop", [40, 44, 120])
    def test_windows_may_be_farther_apart_than_they_are_long(self, hop, size):
        model, clips = small_model(hop_frames=hop), features(1, 300, 16)
        ours, _ = streamed(model, clips, size)
        same(ours, model(clips))
        assert ours.window_starts.tolist() == model(clips).window_starts.tolist()

    @pytest.mark.parametrize("frames", [1, 6, 7, 20, 39, 40])
    def test_less_than_a_window_is_one_when_the_stream_ends(self, frames):
        model, clips = small_model(), features(1, frames, 16)
        expected = model(clips)
        assert expected.detection_logits.shape == (1, 1)
        same(streamed(model, clips, 3)[0], expected)

    def test_state_stays_as_it_was(self):
        model, clip = small_model(), features(1, 60, 16)
        _, state = model.stream(clip[:, :30], model.start_stream())
        once, _ = model.stream(clip[:, 30:], state)
        again, _ = model.stream(clip[:, 30:], state)
        same(again, once, atol=0)

    def test_state_does_not_grow(self):
        model, state = small_model(), None
        state, sizes = model.start_stream(), set()
        for _ in range(50):
            _, state = model.stream(features(1, 8, 16), state)
            sizes.add((state.frames.shape[1], state.steps.shape[1]))
        assert max(frames for frames, _ in sizes) < 7 and max(steps for _, steps in sizes) < model.config.window_steps

    def test_a_stream_needs_its_own_state(self):
        model = small_model()
        _, state = model.stream(features(1, 8, 16), model.start_stream(), final=True)
        with pytest.raises(ValueError, match="have ended"):
            model.stream(features(1, 8, 16), state)
        with pytest.raises(ValueError, match="2 rows and `state` is of 1 streams"):
            model.stream(features(2, 8, 16), model.start_stream())
        with pytest.raises(ValueError, match=r"model\.eval"):
            model.train().stream(features(1, 8, 16), model.start_stream())


class TestGates:
    def test_skipping_is_multiplying_by_nought(self):
        model, clips = small_model(), features(8, 40, 16)
        output = model(clips)
        hidden = model.subsampling(clips)
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
        for index, layer in enumerate(model.layers):
            gates = output.gates[:, 0, 4 * index : 4 * index + 4]
            for gate, run in zip(gates.T, layer._modules_in_order(), strict=True):
                hidden = hidden + gate[:, None, None] * run(hidden, mask)
            hidden = layer.norm(hidden)
        expected = model.classifier(hidden.amax(1))
        assert len(output.gates.flatten(1).unique(dim=0)) > 1
        torch.testing.assert_close(output.logits, expected, atol=1e-6, rtol=1e-5)

    def test_closed_modules_are_not_run(self):
        model, ran = small_model(), []
        for layer in model.layers:
            for name in ("feed_forward_in", "attention", "convolution", "feed_forward_out"):
                getattr(layer, name).register_forward_hook(lambda module, args, result: ran.append(len(args[0])))
        gates = model(features(8, 40, 16)).gates.sum((0, 1))
        # Each module saw the windows whose gate is open and no other; one that none is open for was not called.
        assert ran == [int(count) for count in gates if count]

    def test_rows_of_a_batch_are_those_of_each_by_itself(self):
        model, clips = small_model(), features(6, 40, 16)
        together = model(clips)
        for row in range(6):
            alone = model(clips[row : row + 1])
            torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-5, rtol=1e-4)
            assert torch.equal(alone.gates[0], together.gates[row])

    def test_thresholds_from_all_to_nothing(self):
        model, clips = small_model(), features(2, 80, 16)
        shares = [float(model(clips, gate_threshold=threshold).gates.mean()) for threshold in (0.0, 0.3, 0.7, 1.0)]
        assert shares[0] == 1 and shares[-1] == 0
        assert shares == sorted(shares, reverse=True)
        same(model(clips, gate_threshold=0.5), model(clips))

    def test_all_gates_open_is_the_ungated_conformer(self):
        sizes = {
            name: SMALL[name] for name in ("num_mel_bins", "hidden_size", "num_hidden_layers", "conv_kernel_size")
        }
        ungated = KwsConformerForCTC(KwsConformerConfig(**sizes, intermediate_size=24)).eval()
        model, clip = small_model(), features(2, 40, 16)
        # The blocks have the same names: an encoder that was trained to hear phonemes moves over.
        left = model.layers.load_state_dict(ungated.encoder.layers.state_dict(), strict=False)
        assert not left.unexpected_keys and all(".gates." in name for name in left.missing_keys)
        hidden = model.subsampling(clip)
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
        for layer in ungated.encoder.layers:
            hidden = layer(hidden, mask)
        expected = model.classifier(hidden.amax(1))
        for options in ({"gate_threshold": 0.0}, {"gated": False}):
            torch.testing.assert_close(model(clip, **options).logits, expected, atol=1e-6, rtol=1e-5)

    def test_gates_begin_open_as_often_as_said(self):
        torch.manual_seed(0)
        model = GatedConformerForKeywordDetection(GatedConformerConfig(**SMALL, gate_open_probability=0.8))
        probabilities = model.eval()(features(3, 40, 16)).gate_probabilities
        torch.testing.assert_close(probabilities, torch.full_like(probabilities, 0.8))

    def test_training_samples_as_often_as_the_probability_says(self):
        model = small_model().train()
        with torch.no_grad():
            output = model(features(1, 40, 16).expand(4000, -1, -1))
        assert set(output.gates.unique().tolist()) == {0.0, 1.0}
        first = output.gates[:, 0, 0].mean()
        torch.testing.assert_close(first, output.gate_probabilities[0, 0, 0], atol=0.03, rtol=0)

    def test_soft_gates_are_between(self):
        gates = small_model(gate_relaxation="soft").train()(features(8, 40, 16)).gates
        assert ((gates > 0) & (gates < 1)).any()

    def test_without_gates_every_module_trains(self):
        model, clips = small_model().train(), features(4, 40, 16)
        output = model(clips, labels=torch.tensor([0, 1, 2, -100]), gated=False)
        assert (output.gates == 1).all()
        torch.testing.assert_close(output.loss, output.detection_loss + output.classification_loss)


class TestPadding:
    def test_rows_are_those_of_each_clip_by_itself(self):
        model, lengths = small_model(), [90, 5, 33, 57]
        clips = features(4, 90, 16)
        mask = torch.arange(90) < torch.tensor(lengths)[:, None]
        together = model(clips, attention_mask=mask.long())
        for row, length in enumerate(lengths):
            alone = model(clips[row : row + 1, :length])
            windows = int(together.window_mask[row].sum())
            assert windows == alone.detection_logits.shape[1]
            torch.testing.assert_close(
                together.class_logits[row, :windows], alone.class_logits[0], atol=1e-5, rtol=1e-4
            )
            torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=1e-4)

    def test_padding_does_not_matter_in_training(self):
        clips, labels = features(3, 30, 16), torch.tensor([0, -100, 2])
        padded = torch.cat([clips, torch.full((3, 10, 16), 3.0)], 1)
        mask = (torch.arange(40) < 30).expand(3, -1).long()
        losses = []
        for inputs in ({"input_features": clips}, {"input_features": padded, "attention_mask": mask}):
            model = small_model().train()
            torch.manual_seed(2)
            losses.append(model(**inputs, labels=labels).loss)
        torch.testing.assert_close(*losses)

    def test_loss_of_clips_of_several_windows_leaves_padding_out(self):
        model, clips = small_model(), features(2, 56, 16)
        mask = (torch.arange(56) < torch.tensor([56, 40])[:, None]).long()
        labels = torch.tensor([[0, -100, 1], [2, 0, 0]])
        changed = torch.tensor([[0, -100, 1], [2, 1, -100]])
        losses = [model(clips, attention_mask=mask, labels=some).loss for some in (labels, changed)]
        torch.testing.assert_close(*losses)


class TestLocating:
    def output(self, model):
        output = model(features(1, 64, 16))
        output.detection_logits = torch.tensor([[-9.0, 9.0, 9.0, -9.0]])
        output.class_logits = torch.tensor([[[0.0, 0, 0], [0, 9, 0], [0, 20, 0], [0, 0, 0]]])
        output.locations = torch.tensor([[[0.0, 0.5], [0.1, 0.5], [-0.1, 0.5], [0.0, 0.5]]])
        return output

    def test_one_keyword_for_neighbouring_windows(self):
        model = small_model(id2label={0: "yes", 1: "no", 2: "go"}, label2id={"yes": 0, "no": 1, "go": 2})
        ((keyword,),) = model.locate(self.output(model))
        # The third window begins at frame 16 and lasts 40.
        assert (keyword.label, keyword.start, keyword.end) == ("no", pytest.approx(22), pytest.approx(42))
        assert keyword.score == pytest.approx(0.9999, abs=1e-3)

    def test_repeats_and_thresholds(self):
        model = small_model()
        assert len(model.locate(self.output(model), max_iou=1.0)[0]) == 2
        assert model.locate(self.output(model), threshold=1.0) == [[]]

    def test_nothing_is_found_in_padding(self):
        model, mask = small_model(), (torch.arange(64) < torch.tensor([64, 40])[:, None]).long()
        found = model.locate(model(features(2, 64, 16), attention_mask=mask), threshold=0.0, max_iou=1.0)
        assert [len(keywords) for keywords in found] == [4, 1]


class TestSaving:
    @pytest.mark.parametrize("auto", [AutoModel, AutoModelForAudioClassification, GatedConformerForKeywordDetection])
    def test_loaded_model_gives_the_same(self, auto, tmp_path):
        model = small_model(id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1}, num_labels=2)
        model.save_pretrained(tmp_path)
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is GatedConformerForKeywordDetection
        assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
        assert loaded.config.id2label == {0: "yes", 1: "no"}
        same(loaded(features(2, 60, 16)), model(features(2, 60, 16)), atol=0)

    def test_transformers_own_pipeline(self, tmp_path):
        small_model(id2label={0: "yes", 1: "no", 2: "go"}, label2id={"yes": 0, "no": 1, "go": 2}).save_pretrained(
            tmp_path
        )
        KwsFeatureExtractor(feature_size=16).save_pretrained(tmp_path)
        assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is KwsFeatureExtractor
        classify = pipeline("audio-classification", model=str(tmp_path))
        for seconds in (0.2, 1.5):
            found = classify(np.zeros(int(16000 * seconds), dtype=np.float32))
            assert {row["label"] for row in found} == {"yes", "no", "go"}

    def test_travels_with_its_code(self, tmp_path):
        model = small_model()
        inputs = {"input_features": features(2, 60, 16)}
        there = output_without_the_package(
            model, inputs, "AutoModelForAudioClassification", tmp_path, output="class_logits"
        )
        torch.testing.assert_close(there, model(**inputs).class_logits.detach())


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"input_features": torch.zeros(2, 40, 80)}, "`feature_size` of the feature extractor"),
            ({"input_features": torch.zeros(2, 40)}, "`input_features` must have the shape"),
            ({"labels": torch.tensor([0, 3])}, "the keyword 3 and the model has 3"),
            ({"labels": torch.tensor([0])}, r"`labels` has the shape \(1,\)"),
            ({"attention_mask": torch.ones(2, 41)}, r"`attention_mask` has the shape \(2, 41\)"),
            ({"gate_threshold": 1.5}, "`gate_threshold` must be from 0 to 1, got 1.5"),
            ({"detection_targets": torch.ones(2)}, "need `labels`"),
            ({"labels": torch.zeros(2)}, "`labels` must be integers, the numbers of keywords, got torch.float32"),
            (
                {"labels": torch.zeros(2).long(), "detection_targets": torch.full((2,), 2.0)},
                "`detection_targets` must be at most 1, got 2",
            ),
            ({"labels": torch.tensor([0, 1]), "location_targets": torch.ones(2)}, "`location_targets` has the shape"),
            ({"input_features": torch.zeros(2, 90, 16), "labels": torch.tensor([0, 1])}, r"must have \(2, 7\)"),
        ],
    )
    def test_input_is_refused_by_name(self, change, message):
        with pytest.raises(ValueError, match=message):
            small_model()(**{"input_features": features(2, 40, 16), **change})

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_attention_heads": 5}, "`num_attention_heads` "),
            ({"conv_kernel_size": 4}, "must be odd, got 4"),
            ({"window_frames": 6}, "at least 7"),
            ({"hop_frames": 6}, "multiple of 4"),
            ({"num_hidden_layers": -1}, "`num_hidden_layers` must be at least 1, got -1"),
            ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1, got 0"),
            ({"gate_threshold": 1.5}, "`gate_threshold` must be from 0 to 1, got 1.5"),
            ({"gate_open_probability": 1.0}, "`gate_open_probability` must be between"),
            ({"gate_temperature": 0.0}, "`gate_temperature` must be positive"),
            ({"gate_loss_weight": -1.0}, "`gate_loss_weight` must be finite and not negative"),
            ({"gate_temperature": float("nan")}, "`gate_temperature` must be positive"),
            ({"detection_loss_weight": float("nan")}, "`detection_loss_weight` must be finite and not negative"),
            ({"gate_noise_factor": -1.0}, "`gate_noise_factor` must be finite and not negative"),
        ],
    )
    def test_settings_are_refused_by_name(self, settings, message):
        with pytest.raises(ValueError, match=message):
            GatedConformerConfig(**settings)
