import numpy as np
import pytest
import torch

from hf_ext import KwsAugmenter, KwsFeatureExtractor, KwsWindowDataCollator, KwsWindowDataset, hold_out, load_noises
from hf_ext.kws.training.windows import speech_interval


def tone(seconds, silence=0.3, rate=16000):
    """A loud tone between silences."""
    time = torch.arange(int(seconds * rate)) / rate
    quiet = torch.zeros(int(silence * rate))
    return torch.cat([quiet, 0.5 * torch.sin(2 * torch.pi * 1000 * time), quiet])


def row(text="yes", seconds=0.4):
    return {"audio": {"array": tone(seconds).numpy(), "sampling_rate": 16000}, "text": text}


def windows(**kwargs):
    noise = torch.randn(40000, generator=torch.Generator().manual_seed(0))
    settings = {"snr_db": (20.0, 20.0), "num_windows": 40, **kwargs}
    return KwsWindowDataset([row(), row("no", 0.6)], [noise], {"yes": 0, "no": 1}, **settings)


class TestWords:
    def test_found_by_loudness(self):
        start, end = speech_interval(tone(0.4))
        assert start == pytest.approx(0.3 * 16000, abs=640) and end == pytest.approx(0.7 * 16000, abs=640)

    @pytest.mark.parametrize("clip", [torch.zeros(100), torch.zeros(16000), torch.ones(16000)])
    def test_silence_and_a_constant_are_whole(self, clip):
        assert speech_interval(clip) == (0, len(clip))


class TestWindows:
    def test_place_is_where_the_word_is(self):
        for window in windows(shares={"keyword": 1.0}, snr_db=(40.0, 40.0)):
            offset, width = window["location"]
            start, end = speech_interval(torch.from_numpy(window["audio"]))
            size = len(window["audio"])
            assert (start + end) / 2 / size - 0.5 == pytest.approx(offset, abs=0.02)
            assert (end - start) / size == pytest.approx(width, abs=0.06)
            assert abs(offset * size) <= 0.1 * 16000 + 1
            assert window["label"] == (0 if width < 0.45 else 1)

    def test_noise_has_no_word_and_edges_no_label(self):
        kinds = [window for window in windows(shares={"noise": 0.5, "edge": 0.5}, snr_db=(40.0, 40.0))]
        assert {window["label"] for window in kinds} == {-100}
        loud = {kind: [np.abs(w["audio"]).max() for w in kinds if w["kind"] == kind] for kind in ("noise", "edge")}
        assert max(loud["noise"]) < 0.1 and min(loud["edge"]) > 0.4

    def test_shares(self):
        kinds = [window["kind"] for window in windows(num_windows=400, shares={"keyword": 0.25, "noise": 0.75})]
        assert kinds.count("keyword") / 400 == pytest.approx(0.25, abs=0.07)

    def test_what_is_drawn_depends_on_seed_and_place_alone(self):
        some, again, other = windows(), windows(), windows(seed=1)
        assert np.array_equal(some[7]["audio"], again[7]["audio"])
        assert not np.array_equal(some[7]["audio"], other[7]["audio"])
        assert not np.array_equal(some[7]["audio"], some[9]["audio"])

    def test_level_over_the_background(self):
        silent = windows(shares={"noise": 1.0}, snr_db=(10.0, 10.0))
        word = 0.5 / 2**0.5
        for window in silent:
            level = float(np.sqrt(np.square(window["audio"]).mean()))
            assert 20 * np.log10(word / level) == pytest.approx(10, abs=1)

    def test_batch_for_the_model(self):
        data = windows(num_windows=6)
        batch = KwsWindowDataCollator(KwsFeatureExtractor(feature_size=40, win_length=480))(list(data))
        assert batch["input_features"].shape == (6, 120, 40)
        assert batch["labels"].tolist() == [window["label"] for window in data]
        assert ((batch["location_targets"][:, 1] > 0) == (batch["labels"] >= 0)).all()


class TestHoldingOut:
    def test_speakers_are_kept_apart(self):
        rows = [{"audio": str(i), "speaker": str(i % 30), "text": "yes"} for i in range(90)]
        train, held_out = hold_out(rows)
        assert len(held_out) == 9 and len(train) == 81
        assert not {row["speaker"] for row in train} & {row["speaker"] for row in held_out}
        assert len(hold_out(rows, by="audio", share=0.2)[1]) == 18
        assert hold_out(rows, seed=1)[1] != held_out == hold_out(rows)[1]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"speaker": "a"}, {"text": "yes"}], "1 of the 2 `rows` lack 'speaker'"),
            ([{"speaker": "a"}, {"speaker": None}], "1 of the 2 `rows` lack 'speaker'"),
            ([{"speaker": "a"}] * 2, r"no more than 1 'speaker' \(\['a'\]\)"),
        ],
    )
    def test_rows_that_cannot_be_are_refused(self, rows, message):
        with pytest.raises(ValueError, match=message):
            hold_out(rows)
        with pytest.raises(ValueError, match=r"`share` must be from 0 to 1 and not 1, got 1\.0"):
            hold_out([{"speaker": "a"}, {"speaker": "b"}], share=1.0)

    def test_noises_are_cut_in_two(self, tmp_path):
        soundfile = pytest.importorskip("soundfile")
        ramp = np.linspace(-0.5, 0.5, 1600)
        soundfile.write(tmp_path / "b.wav", ramp, 16_000, subtype="FLOAT")
        soundfile.write(tmp_path / "a.wav", np.zeros((800, 2)), 8_000)
        (tmp_path / "README.md").write_text("no recording")
        first, rest = load_noises(tmp_path, train_share=0.75)
        # In the order of the names, and all at one rate.
        assert [len(noise) for noise in first] == [1200, 1200] and [len(noise) for noise in rest] == [400, 400]
        torch.testing.assert_close(torch.cat([first[1], rest[1]]), torch.from_numpy(ramp).float())

    def test_a_folder_without_recordings_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="has no recordings"):
            load_noises(tmp_path)
        with pytest.raises(ValueError, match="`train_share` must be from 0 to 1, got 2"):
            load_noises(tmp_path, train_share=2)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"shares": {"keyword": -1.0}}, "`shares` must give"),
            ({"shares": {"word": 1.0}}, "`shares` must give"),
            ({"noises": []}, "0 `noises`"),
            ({"noises": [torch.zeros(0)]}, "`noises` must be recordings"),
            ({"noises": [torch.zeros(2, 100)]}, "`noises` must be recordings"),
            ({"noises": [torch.zeros(100).numpy()]}, "`noises` must be recordings"),
            (
                {"augmenter": KwsAugmenter(sampling_rate=8000)},
                "`augmenter` works at 8000 Hz and `sampling_rate` is 16000",
            ),
            ({"window_samples": 0}, r"`window_samples` \(0\) must be positive"),
            ({"snr_db": (5.0,)}, "`snr_db` must be a range from least to most"),
            ({"snr_db": 5.0}, "`snr_db` must be a range from least to most"),
            ({"num_windows": -1}, r"`num_windows` \(-1\) not negative"),
            ({"utterances": []}, "0 `utterances`"),
            ({"label2id": {"no": 0}}, r"does not have: \['yes'\]"),
        ],
    )
    def test_is_refused_by_name(self, change, message):
        settings = {"utterances": [row()], "noises": [torch.randn(100)], "label2id": {"yes": 0}}
        with pytest.raises(ValueError, match=message):
            KwsWindowDataset(**{**settings, **change})

    def test_windows_end(self):
        assert len(list(windows(num_windows=3))) == 3
        with pytest.raises(IndexError, match="no window 3"):
            windows(num_windows=3)[3]
