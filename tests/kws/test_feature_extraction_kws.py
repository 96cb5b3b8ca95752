import sys

import numpy as np
import pytest
import torch
from transformers.audio_utils import spectrogram

from hf_ext import KwsFeatureExtractor


def noise(seconds=1.0, rate=16000, channels=None, seed=0):
    shape = (int(seconds * rate),) if channels is None else (int(seconds * rate), channels)
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="module", params=["log_mel", "fbank"])
def extractor(request):
    return KwsFeatureExtractor(request.param)


def features_of(extractor, audio, rate=16000, **kwargs):
    return extractor(audio, sampling_rate=rate, return_tensors="pt", **kwargs)["input_features"]


class TestAgainstTransformers:
    @pytest.mark.parametrize(
        "settings", [{}, {"feature_size": 40, "f_min": 60.0, "f_max": 7000.0}, {"win_length": 512}]
    )
    def test_log_mel(self, settings):
        extractor = KwsFeatureExtractor("log_mel", **settings)
        audio = noise()
        expected = spectrogram(
            audio,
            window=np.hanning(extractor.win_length + 1)[:-1],
            frame_length=extractor.win_length,
            hop_length=160,
            fft_length=512,
            power=2.0,
            center=False,
            mel_filters=extractor.mel_filters.astype(np.float64),
            mel_floor=1e-6,
            log_mel="log",
        ).T
        np.testing.assert_allclose(features_of(extractor, audio)[0].numpy(), expected, atol=2e-5)

    def test_fbank_as_the_audio_spectrogram_transformer_has_it(self):
        # Its feature extractor imitates Kaldi's where torchaudio is absent.
        from transformers.audio_utils import mel_filter_bank, window_function

        audio = noise()
        filters = mel_filter_bank(257, 80, 20, 8000, 16000, None, "kaldi", triangularize_in_mel_space=True)
        expected = spectrogram(
            audio * 2.0**15,
            window_function(400, "povey", periodic=False),
            frame_length=400,
            hop_length=160,
            fft_length=512,
            power=2.0,
            center=False,
            preemphasis=0.97,
            remove_dc_offset=True,
            mel_filters=filters,
            mel_floor=1.192092955078125e-07,
            log_mel="log",
        ).T
        np.testing.assert_allclose(features_of(KwsFeatureExtractor("fbank"), audio)[0].numpy(), expected, atol=1e-4)


class TestBatches:
    def test_rows_are_those_of_each_clip(self, extractor):
        clips = [noise(1.0), noise(0.43, seed=1), noise(0.01, seed=2)]
        batch = extractor(clips, sampling_rate=16000, return_tensors="pt")
        assert batch["input_features"].shape == (3, 98, 80)
        assert batch["attention_mask"].sum(-1).tolist() == [98, 41, 1]
        for row, mask, clip in zip(batch["input_features"], batch["attention_mask"].bool(), clips, strict=True):
            torch.testing.assert_close(row[mask], features_of(extractor, clip)[0], atol=1e-6, rtol=1e-6)
            assert row[~mask].eq(0).all()

    @pytest.mark.parametrize(
        "as_type", [np.asarray, torch.tensor, list, lambda a: a.astype(np.float64), lambda a: [a], lambda a: a[None]]
    )
    def test_kinds_of_clips(self, extractor, as_type):
        audio = noise(0.2)
        torch.testing.assert_close(features_of(extractor, as_type(audio)), features_of(extractor, audio))

    def test_padding_and_truncation_in_frames(self, extractor):
        clips = [noise(1.0), noise(0.5)]
        padded = features_of(extractor, clips, padding="max_length", max_length=120)
        cut = features_of(extractor, clips, padding="max_length", max_length=50, truncation=True)
        assert (padded.shape, cut.shape) == ((2, 120, 80), (2, 50, 80))
        unpadded = extractor(clips, sampling_rate=16000, padding=False)["input_features"]
        assert [len(rows) for rows in unpadded] == [98, 48]

    def test_long_audio_goes_through_in_blocks(self, extractor, monkeypatch):
        monkeypatch.setattr("hf_ext.kws.feature_extraction_kws._FRAMES_PER_BLOCK", 7)
        in_blocks = features_of(extractor, noise())
        monkeypatch.undo()
        torch.testing.assert_close(in_blocks, features_of(extractor, noise()), atol=1e-6, rtol=1e-6)

    def test_extraction_has_gradients(self, extractor):
        samples = torch.from_numpy(noise(0.1))[None].requires_grad_()
        extractor.extract(samples).sum().backward()
        assert samples.grad.abs().sum() > 0


class TestStreaming:
    @pytest.mark.parametrize("rate", [16000, 8000, 44100])
    @pytest.mark.parametrize("sizes", [(1, 40), (160, 161), (1, 5000), (100_000, 100_001)])
    def test_any_cut_gives_the_frames_of_the_whole(self, extractor, rate, sizes):
        pytest.importorskip("soxr")
        audio, rng = noise(1.0, rate), np.random.default_rng(1)
        state, parts, start = extractor.start_stream(sampling_rate=rate), [], 0
        while start < len(audio):
            size = int(rng.integers(*sizes))
            features, state = extractor.stream(audio[start : start + size], state)
            parts.append(features)
            start += size
        features, state = extractor.stream(audio[:0], state, final=True)
        streamed = torch.cat([*parts, features])
        whole = features_of(extractor, audio, rate)[0]
        assert streamed.shape == whole.shape
        assert state.finished and state.num_frames == len(whole)
        torch.testing.assert_close(streamed, whole, atol=1e-6, rtol=1e-6)

    def test_frames_come_as_soon_as_they_are_complete(self, extractor):
        state = extractor.start_stream(sampling_rate=16000)
        counts = []
        for _ in range(5):
            features, state = extractor.stream(np.zeros(160, np.float32), state)
            counts.append(len(features))
        assert counts == [0, 0, 1, 1, 1]

    def test_streams_do_not_share_anything(self, extractor):
        states = [extractor.start_stream(sampling_rate=48000) for _ in range(2)]
        audio = [noise(0.3, 48000, seed=seed) for seed in range(2)]
        parts = [[], []]
        for start in range(0, 14400, 480):
            for i in range(2):
                end = start + 480
                features, states[i] = extractor.stream(audio[i][start:end], states[i], final=end == 14400)
                parts[i].append(features)
        for i in range(2):
            whole = features_of(extractor, audio[i], 48000)[0]
            torch.testing.assert_close(torch.cat(parts[i]), whole, atol=1e-6, rtol=1e-6)

    def test_channels_and_integers(self, extractor):
        pcm = (noise(0.3, channels=2) * 32767).astype(np.int16)
        state = extractor.start_stream(sampling_rate=16000, channel_axis=-1)
        first, state = extractor.stream(pcm[:1000], state)
        second, _ = extractor.stream(pcm[1000:], state, final=True)
        whole = features_of(extractor, pcm, channel_axis=-1)[0]
        torch.testing.assert_close(torch.cat([first, second]), whole, atol=1e-6, rtol=1e-6)

    def test_a_short_stream_has_one_frame_as_a_short_clip(self, extractor):
        features, _ = extractor.stream(noise(0.005), extractor.start_stream(sampling_rate=16000), final=True)
        torch.testing.assert_close(features, features_of(extractor, noise(0.005))[0], atol=1e-6, rtol=1e-6)

    def test_a_finished_stream_takes_nothing_more(self, extractor):
        _, state = extractor.stream(noise(0.1), extractor.start_stream(sampling_rate=16000), final=True)
        with pytest.raises(ValueError, match="ended"):
            extractor.stream(noise(0.1), state)

    def test_bad_chunks_are_refused(self, extractor):
        state = extractor.start_stream(sampling_rate=16000)
        with pytest.raises(ValueError, match="`chunk` has 1 samples that are NaN"):
            extractor.stream(np.array([0.0, np.nan]), state)
        with pytest.raises(ValueError, match="channel_axis"):
            extractor.stream(noise(0.1, channels=2), state)


class TestAudioOfAnyKind:
    @pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
    def test_another_rate_gives_nearly_the_same_frames(self, rate):
        pytest.importorskip("soxr")
        times = np.arange(rate) / rate
        tone = sum(np.sin(2 * np.pi * f * times) for f in (300, 900, 2100)).astype(np.float32) / 10
        reference = np.arange(16000) / 16000
        expected = sum(np.sin(2 * np.pi * f * reference) for f in (300, 900, 2100)).astype(np.float32) / 10
        extractor = KwsFeatureExtractor(mel_floor=1e-3)
        # The first and last frames hear the edge of the tone.
        got = features_of(extractor, tone, rate)[0, 3:-3]
        assert (got - features_of(extractor, expected)[0, 3:-3]).abs().max() < 0.05

    @pytest.mark.parametrize("channels", [1, 2, 8])
    def test_channels_are_averaged(self, extractor, channels):
        audio = noise(0.2, channels=channels)
        expected = features_of(extractor, audio.mean(-1))
        torch.testing.assert_close(features_of(extractor, audio, channel_axis=-1), expected)
        torch.testing.assert_close(features_of(extractor, audio.T, channel_axis=0), expected)
        torch.testing.assert_close(features_of(extractor, [audio, audio], channel_axis=-1)[1:], expected)
        torch.testing.assert_close(features_of(extractor, np.stack([audio, audio]), channel_axis=1)[1:], expected)

    @pytest.mark.parametrize(
        ("dtype", "scale", "offset"), [(np.int16, 2**15, 0), (np.int32, 2**31, 0), (np.uint8, 2**7, 2**7)]
    )
    def test_pcm_is_brought_to_full_scale(self, extractor, dtype, scale, offset):
        pcm = (noise(0.2).clip(-0.9, 0.9).astype(np.float64) * scale + offset).round().astype(dtype)
        as_floats = ((pcm.astype(np.float64) - offset) / scale).astype(np.float32)
        torch.testing.assert_close(features_of(extractor, pcm), features_of(extractor, as_floats))

    @pytest.mark.parametrize(
        "audio", [np.zeros(16000), np.full(16000, 0.5), np.ones(1), noise().clip(-0.01, 0.01) * 100]
    )
    def test_silent_constant_single_and_clipped_samples_have_finite_features(self, extractor, audio):
        assert features_of(extractor, audio).isfinite().all()

    def test_one_sample_at_a_high_rate(self, extractor):
        assert features_of(extractor, np.ones(1), 48000).shape == (1, 1, 80)


class TestBadInput:
    @pytest.mark.parametrize(
        ("audio", "kwargs", "message"),
        [
            ([], {}, "`raw_speech` is empty"),
            (np.zeros(0), {}, "`raw_speech` is empty"),
            (np.zeros((0, 100)), {"channel_axis": 0}, "`raw_speech` is empty"),
            ([np.zeros(9), np.zeros(0)], {}, r"`raw_speech\[1\]` is empty"),
            (np.array([0.0, np.nan]), {}, "1 samples that are NaN or infinite"),
            ([np.zeros(9), np.array([np.inf, -np.inf])], {}, r"`raw_speech\[1\]` has 2 samples"),
            (np.zeros(()), {}, r"shape \(\)"),
            ([np.zeros((9, 2))], {}, "channel_axis=-1"),
            (np.zeros((2, 9, 2)), {}, "channel_axis=-1"),
            (np.zeros((16000, 2)), {}, "channel_axis=-1"),
            (np.zeros((16000, 8)), {}, "channel_axis=-1"),
            (np.zeros(9), {"channel_axis": 0}, "two axes"),
            (np.zeros((9, 2)), {"channel_axis": 2}, "must be 0 or 1"),
            (np.zeros((16000, 2)), {"channel_axis": 0}, "16000 channels: name the other axis"),
            ([np.zeros((8, 16000))], {"channel_axis": -1}, "16000 channels: name the other axis"),
            (np.zeros(9, dtype=np.int64), {}, "int64, whose scale is unknown"),
            ([0, 1, 2], {}, "int64, whose scale is unknown"),
            (np.zeros(9, dtype=bool), {}, "holds bool"),
            (np.zeros(9, dtype=complex), {}, "holds complex128"),
            ("clip.wav", {}, "soundfile.read"),
            (noise() * 32768, {}, "divided by 32768"),
            (np.zeros(9), {"sampling_rate": None}, "`sampling_rate` is not given"),
            (np.zeros(9), {"sampling_rate": 0}, "positive number of hertz, got 0"),
            (np.zeros(9), {"sampling_rate": -16000}, "positive number of hertz"),
            (np.zeros(9), {"sampling_rate": 16000.5}, "positive number of hertz"),
            (np.zeros(9), {"sampling_rate": "16 kHz"}, "positive number of hertz"),
        ],
    )
    def test_audio_is_refused_by_name(self, extractor, audio, kwargs, message):
        with pytest.raises(ValueError, match=message):
            extractor(audio, **{"sampling_rate": 16000, **kwargs})

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"feature_type": "mfcc"}, "'log_mel' or 'fbank', got 'mfcc'"),
            ({"hop_length": 0}, "`hop_length` must be at least 1"),
            ({"win_length": 400.5}, "`win_length` must be at least 1, and an integer, got 400.5"),
            ({"hop_length": 500}, "leaves samples out"),
            ({"f_max": 0.0}, r"`f_max` \(0.0\) must be a range"),
            ({"f_max": 9000.0}, "half the sampling rate"),
            ({"mean": [0.0]}, "`mean` has 1 values for 80 channels"),
            ({"mean": [np.nan] * 80}, "`mean` has values that are NaN or infinite"),
            ({"std": [1.0] * 79 + [0.0]}, "`std` must be positive in each channel, got 0.0"),
            ({"mel_floor": 0.0}, "`mel_floor` must be positive"),
            ({"mel_floor": float("nan")}, "`mel_floor` must be positive, got nan"),
            ({"sampling_rate": 0}, "`sampling_rate` must be a positive number of hertz, got 0"),
            ({"sampling_rate": "16000"}, "`sampling_rate` must be a positive number of hertz, got '16000'"),
            ({"padding_side": "left"}, "`padding_side` must be 'right'"),
        ],
    )
    def test_settings_are_refused_by_name(self, settings, message):
        with pytest.raises(ValueError, match=message):
            KwsFeatureExtractor(**settings)

    def test_missing_soxr_is_named(self, extractor, monkeypatch):
        monkeypatch.setitem(sys.modules, "soxr", None)
        with pytest.raises(ImportError, match=r"soxr.*hf-ext\[audio\]"):
            extractor(noise(), sampling_rate=8000)


def test_settings_are_saved(tmp_path):
    extractor = KwsFeatureExtractor("fbank", feature_size=40, mean=[1.0] * 40, std=[2.0] * 40)
    extractor.save_pretrained(tmp_path)
    loaded = KwsFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    assert "mel_filters" not in loaded.to_dict() and "window" not in loaded.to_dict()
    torch.testing.assert_close(features_of(loaded, noise()), features_of(extractor, noise()))


def test_statistics_normalise_each_channel():
    plain = features_of(KwsFeatureExtractor(), noise())
    mean, std = plain[0].mean(0), plain[0].std(0)
    extractor = KwsFeatureExtractor(mean=mean.tolist(), std=std.tolist())
    torch.testing.assert_close(features_of(extractor, noise()), (plain - mean) / std)


@pytest.mark.parametrize("as_type", [np.float32, torch.tensor])
def test_statistics_may_be_arrays_and_are_saved_as_lists(as_type, tmp_path):
    mean, std = [0.5] * 80, [2.0] * 80
    KwsFeatureExtractor(mean=as_type(mean), std=as_type(std)).save_pretrained(tmp_path)
    loaded = KwsFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.mean, loaded.std) == (mean, std)


def test_normalized_to_clips_has_their_mean_and_deviation(tmp_path):
    clips = [noise(seconds=0.5), noise(seconds=0.9) / 4]
    plain = KwsFeatureExtractor(feature_size=40)
    normalized = plain.normalized(clips, sampling_rate=16000)
    frames = torch.cat([features_of(normalized, clip)[0] for clip in clips])
    torch.testing.assert_close(frames.mean(0), torch.zeros(40), atol=1e-3, rtol=0)
    torch.testing.assert_close(frames.std(0, correction=0), torch.ones(40), atol=1e-3, rtol=0)
    assert plain.mean is None
    normalized.save_pretrained(tmp_path)
    assert KwsFeatureExtractor.from_pretrained(tmp_path).std == normalized.std
    # A second time it is as if it had been the first.
    assert normalized.normalized(clips, sampling_rate=16000).mean == normalized.mean
    silence = plain.normalized([np.zeros(16000, dtype=np.float32)], sampling_rate=16000)
    assert min(silence.std) > 0
    with pytest.raises(ValueError, match="`clips` is empty"):
        plain.normalized([], sampling_rate=16000)


def test_default_settings_are_those_of_slick():
    extractor = KwsFeatureExtractor()
    assert (extractor.feature_type, extractor.feature_size, extractor.sampling_rate) == ("log_mel", 80, 16000)
    assert (extractor.win_length, extractor.hop_length) == (400, 160)


def test_speech_from_a_file(extractor, shared_data):
    soundfile = pytest.importorskip("soundfile")
    audio, rate = soundfile.read(sorted((shared_data / "speech/speech_commands").rglob("*.ogg"))[0])
    assert features_of(extractor, audio, rate).std() > 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_other_device(extractor):
    on_gpu = features_of(extractor, noise(), device="cuda")
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), features_of(extractor, noise()), atol=1e-4, rtol=1e-4)
