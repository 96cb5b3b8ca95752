"""`pipeline("keyword-spotting")`: what goes in, what comes out, and what is refused in words."""

import io
import itertools

import numpy as np
import pytest
import soundfile
import soxr
import torch
from datasets import Audio, Dataset
from transformers import pipeline

from hf_ext import (
    GatedConformerConfig,
    GatedConformerForKeywordDetection,
    KeywordSpottingPipeline,
    KwsProcessor,
    PhonemeTokenizer,
    SlickConfig,
    SlickForKeywordSpotting,
)
from hf_ext.kws.spotting.pipeline import split_into_windows


LABELS = ["hey computer", "lights on", "zero"]
RATE = 16000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random model with its processor."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("kws") / "model"
    config = SlickConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    SlickForKeywordSpotting(config).save_pretrained(path)
    KwsProcessor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def spotter(folder):
    return pipeline("keyword-spotting", model=str(folder), device="cpu")


def speechlike(seconds=1.0, seed=0, rate=RATE):
    """Noise that swells, below 3 kHz."""
    noise = np.random.default_rng(seed).normal(size=int(seconds * rate)) * np.hanning(int(seconds * rate))
    smooth = np.convolve(noise, np.hanning(max(rate // 3000, 1) + 2), "same")
    return (0.5 * smooth / np.abs(smooth).max()).astype(np.float32)


def clip(samples, rate=RATE):
    return {"array": samples, "sampling_rate": rate}


def written(samples, rate=RATE, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", **options})
    return file.getvalue()


def scores(answers):
    assert [answer["score"] for answer in answers] == sorted((a["score"] for a in answers), reverse=True)
    return {answer["label"]: answer["score"] for answer in answers}


def assert_same(found, expected, atol=1e-5):
    found, expected = scores(found), scores(expected)
    assert found == pytest.approx(expected, abs=atol)


class TestAnswers:
    def test_each_label_has_a_chance_of_its_own(self, spotter):
        together = scores(spotter(clip(speechlike()), candidate_labels=LABELS))
        for label in LABELS:
            (alone,) = spotter(clip(speechlike()), candidate_labels=[label])
            assert alone["label"] == label and 0 < alone["score"] < 1
            assert together[label] == pytest.approx(alone["score"], abs=1e-6)

    def test_the_score_is_what_the_model_says(self, spotter):
        inputs = spotter.processor(audio=speechlike(), text="lights on", sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            logit = spotter.model(**inputs).logits[0]
        (answer,) = spotter(clip(speechlike()), candidate_labels="lights on", max_pronunciations=1)
        assert answer["score"] == pytest.approx(float(logit.sigmoid()), abs=1e-5)
        (answer,) = spotter(
            clip(speechlike()), candidate_labels="lights on", max_pronunciations=1, function_to_apply="none"
        )
        assert answer["score"] == pytest.approx(float(logit), abs=1e-5)

    def test_the_best_pronunciation_counts(self, spotter):
        ways = [f"{{{' '.join(way)}}}" for way in spotter.tokenizer.pronunciations("zero")]
        assert len(ways) == 2
        each = scores(spotter(clip(speechlike()), candidate_labels=ways))
        (zero,) = spotter(clip(speechlike()), candidate_labels=["zero"])
        assert zero["score"] == pytest.approx(max(each.values()), abs=1e-6)
        (first,) = spotter(clip(speechlike()), candidate_labels=["zero"], max_pronunciations=1)
        assert first["score"] == pytest.approx(each[ways[0]], abs=1e-6)

    def test_an_alternative_too_long_for_the_model_is_left_out(self):
        model = SlickForKeywordSpotting(SlickConfig(hidden_size=16, num_hidden_layers=1, max_phonemes=4))
        tokenizer = PhonemeTokenizer(lexicon={"blip": ["B L IH1 P", "B L IH1 P AH0"], "blips": "B L IH1 P S"})
        own = pipeline("keyword-spotting", model=model, processor=KwsProcessor(tokenizer=tokenizer), device="cpu")
        assert_same(
            own(clip(speechlike()), candidate_labels=["blip"]),
            own(clip(speechlike()), candidate_labels=["blip"], max_pronunciations=1),
        )
        with pytest.raises(
            ValueError, match="'blips': `keyword_ids` has a phrase of 5 phonemes and the model takes 4"
        ):
            own(clip(speechlike()), candidate_labels=["blip", "blips"])

    def test_commas_and_braces(self, spotter):
        listed = spotter(clip(speechlike()), candidate_labels=["{HH EY1} computer", "lights on"])
        assert_same(spotter(clip(speechlike()), candidate_labels=" {HH EY1} computer,lights on, "), listed)
        assert_same(
            [{**answer, "label": "x"} for answer in spotter(clip(speechlike()), candidate_labels=["hey, you"])],
            [{**answer, "label": "x"} for answer in spotter(clip(speechlike()), candidate_labels=["{HH EY1 Y UW1}"])],
        )

    def test_labels_may_be_given_beforehand(self, folder, spotter):
        prepared = pipeline("keyword-spotting", model=str(folder), device="cpu", candidate_labels=LABELS)
        assert_same(prepared(clip(speechlike())), spotter(clip(speechlike()), candidate_labels=LABELS))

    def test_phrases_are_encoded_once_for_a_list(self, spotter, monkeypatch):
        calls = []
        encode = spotter.model.get_text_features
        monkeypatch.setattr(spotter.model, "get_text_features", lambda **a: calls.append(1) or encode(**a))
        spotter([clip(speechlike(5.0, seed)) for seed in range(3)], candidate_labels=LABELS, batch_size=2)
        assert len(calls) == 1

    def test_a_saved_pipeline_is_the_same(self, spotter, tmp_path):
        spotter.save_pretrained(tmp_path)
        loaded = pipeline("keyword-spotting", model=str(tmp_path), device="cpu")
        assert isinstance(loaded, KeywordSpottingPipeline)
        assert_same(
            loaded(clip(speechlike()), candidate_labels=LABELS), spotter(clip(speechlike()), candidate_labels=LABELS)
        )

    def test_half_precision(self, folder, spotter):
        half = pipeline("keyword-spotting", model=str(folder), device="cpu", dtype=torch.bfloat16)
        assert_same(
            half(clip(speechlike()), candidate_labels=LABELS),
            spotter(clip(speechlike()), candidate_labels=LABELS),
            atol=0.05,
        )

    def test_the_number_format_may_change_after_phrases_are_given(self, folder):
        prepared = pipeline("keyword-spotting", model=str(folder), device="cpu", candidate_labels=LABELS)
        before = prepared(clip(speechlike()))
        prepared.model.bfloat16()
        assert_same(prepared(clip(speechlike())), before, atol=0.05)

    def test_a_tokenizer_of_ones_own_takes_the_place_of_the_processors(self, folder, spotter):
        tokenizer = PhonemeTokenizer(lexicon={"zorblax": "L AY1 T S AA1 N"})
        own = pipeline("keyword-spotting", model=str(folder), tokenizer=tokenizer, device="cpu")
        found = own(clip(speechlike()), candidate_labels=["zorblax"])
        (expected,) = spotter(clip(speechlike()), candidate_labels=["{L AY1 T S AA1 N}"])
        assert_same(found, [{**expected, "label": "zorblax"}])

    def test_a_model_that_takes_no_phrases_is_named(self):
        detector = GatedConformerForKeywordDetection(GatedConformerConfig(num_hidden_layers=1))
        other = pipeline("keyword-spotting", model=detector, processor=KwsProcessor(), device="cpu")
        with pytest.raises(TypeError, match="`model` is a GatedConformerForKeywordDetection, which takes no phrases"):
            other(clip(speechlike()), candidate_labels=LABELS)


class TestBatches:
    def test_mixed_lengths_are_as_one_at_a_time(self, spotter):
        clips = [clip(speechlike(seconds, seed)) for seed, seconds in enumerate((0.3, 7.1, 1.0, 2.99, 0.05, 4.0))]
        singly = [spotter(one, candidate_labels=LABELS) for one in clips]
        for size in (1, 2, 4, 16):
            for found, expected in zip(spotter(clips, candidate_labels=LABELS, batch_size=size), singly, strict=True):
                assert_same(found, expected)

    def test_datasets_and_generators_stream(self, spotter, tmp_path):
        paths = []
        for seed in range(3):
            paths.append(str(tmp_path / f"{seed}.wav"))
            soundfile.write(paths[-1], speechlike(seed=seed), RATE)
        expected = spotter(paths, candidate_labels=LABELS)
        rows = Dataset.from_dict({"audio": paths, "text": ["a", "b", "c"]}).cast_column("audio", Audio(decode=False))
        for source in (rows, (row for row in rows), ({"audio": path} for path in paths)):
            answers = spotter(source, candidate_labels=LABELS, batch_size=2)
            assert not isinstance(answers, list)
            for found, wanted in zip(answers, expected, strict=True):
                assert_same(found, wanted)

    def test_columns_that_datasets_would_decode_need_no_decoder_of_its(self, spotter, tmp_path):
        paths = [str(tmp_path / f"{seed}.wav") for seed in range(2)]
        for seed, path in enumerate(paths):
            soundfile.write(path, speechlike(seed=seed), RATE)
        expected = spotter(paths, candidate_labels=LABELS)
        rows = Dataset.from_dict({"audio": paths}).cast_column("audio", Audio(sampling_rate=8000))
        raw = rows.cast_column("audio", Audio(decode=False))
        for source in (rows, rows.to_iterable_dataset(), raw["audio"]):
            for found, wanted in zip(spotter(source, candidate_labels=LABELS, batch_size=2), expected, strict=True):
                assert_same(found, wanted)


class TestWindows:
    def test_the_best_window_counts(self, spotter):
        samples = speechlike(7.3)
        windows = split_into_windows(torch.from_numpy(samples), RATE, 2.0)
        each = [scores(spotter(clip(window.numpy()), candidate_labels=LABELS)) for window in windows]
        found = scores(spotter(clip(samples), candidate_labels=LABELS, chunk_length_s=2.0))
        assert found == pytest.approx({label: max(one[label] for one in each) for label in LABELS}, abs=1e-5)

    @pytest.mark.parametrize("stride", [None, 0.5, (0.0, 0.0), (0.3, 0.9)])
    def test_windows_cover_the_clip_and_share_what_is_asked(self, stride):
        for length in (20, 21, 55, 100):
            windows = split_into_windows(torch.arange(length), 10, 2.0, stride)
            assert {int(sample) for window in windows for sample in window} == set(range(length))
            assert all(len(window) == 20 for window in windows)
            shared = {None: 10, 0.5: 10, (0.0, 0.0): 0, (0.3, 0.9): 12}[stride]
            for one, following in itertools.pairwise(windows):
                assert int(one[-1]) - int(following[0]) + 1 >= shared

    def test_none_if_wanted(self, spotter):
        samples = torch.arange(100)
        assert len(split_into_windows(samples, 10, 0)) == 1
        whole = spotter(clip(speechlike(5.0)), candidate_labels=LABELS, chunk_length_s=0)
        assert_same(whole, spotter(clip(speechlike(5.0)), candidate_labels=LABELS, chunk_length_s=9.0))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"chunk_length_s": -1.0}, "`chunk_length_s` must be 0"),
            ({"chunk_length_s": 1e-9}, "at least 0.1, got 1e-09"),
            ({"chunk_length_s": 1.0, "stride_length_s": 0.5}, "both sides together must be shorter"),
            ({"stride_length_s": (-0.1, 0.0)}, "must not be negative"),
            ({"chunk_length_s": "3"}, "at least 0.1, got '3'"),
            ({"stride_length_s": [0.1, 0.1, 0.1]}, "a number of seconds or two, got "),
            ({"max_pronunciations": "2"}, "an integer of at least 1, got '2'"),
        ],
    )
    def test_settings_out_of_range_are_named(self, spotter, settings, message):
        with pytest.raises(ValueError, match=message):
            spotter(clip(speechlike()), candidate_labels=LABELS, **settings)


class TestAudio:
    def expected(self, spotter):
        return spotter(clip(speechlike()), candidate_labels=LABELS)

    def test_every_form_of_the_same_clip(self, spotter, tmp_path):
        samples = speechlike()
        path = tmp_path / "clip.wav"
        soundfile.write(path, samples, RATE, subtype="FLOAT")
        content = path.read_bytes()
        twice = np.concatenate([np.zeros(RATE, np.float32), samples])
        forms = [
            *(path, str(path), content, bytearray(content), {"path": str(path), "bytes": None}),
            *({"path": None, "bytes": content}, {"audio": {"bytes": content}}, {"audio": str(path)}),
            *({"raw": samples, "sampling_rate": RATE}, {"audio": clip(samples)}, clip(samples.tolist())),
            *(clip(torch.from_numpy(samples)), {"audio": clip(twice), "start": 1.0, "end": 2.0}),
            {"audio": samples, "sampling_rate": RATE, "phrase": "stop"},
        ]
        for form in forms:
            assert_same(spotter(form, candidate_labels=LABELS), self.expected(spotter))
        for form in (samples, samples.tolist()):
            assert_same(spotter(form, candidate_labels=LABELS, sampling_rate=RATE), self.expected(spotter))

    @pytest.mark.parametrize(
        ("subtype", "atol"), [("PCM_U8", 0.2), ("PCM_16", 1e-2), ("PCM_24", 1e-3), ("PCM_32", 1e-3), ("DOUBLE", 1e-4)]
    )
    def test_any_number_of_bits(self, spotter, subtype, atol):
        assert_same(
            spotter(written(speechlike(), subtype=subtype), candidate_labels=LABELS), self.expected(spotter), atol
        )

    @pytest.mark.parametrize("channels", [2, 8])
    def test_channels_are_averaged(self, spotter, channels):
        apart = np.zeros((RATE, channels), np.float32)
        apart[:, -1] = speechlike() * channels / 8
        mean = spotter(clip(apart.mean(1)), candidate_labels=LABELS)
        assert_same(spotter(written(apart, subtype="FLOAT"), candidate_labels=LABELS), mean)
        assert_same(spotter(clip(apart), candidate_labels=LABELS, channel_axis=-1), mean)
        assert_same(spotter({**clip(apart.T), "channel_axis": 0}, candidate_labels=LABELS), mean)

    @pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
    def test_any_rate(self, spotter, rate):
        samples = soxr.resample(speechlike(), RATE, rate)
        expected = spotter(clip(soxr.resample(samples, rate, RATE)), candidate_labels=LABELS)
        assert_same(spotter(clip(samples, rate), candidate_labels=LABELS), expected)
        assert_same(spotter(written(samples, rate, subtype="FLOAT"), candidate_labels=LABELS), expected)

    @pytest.mark.parametrize("format", [("FLAC", "PCM_16"), ("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", None)])
    def test_compressed_files(self, spotter, format):
        options = {"format": format[0], **({"subtype": format[1]} if format[1] else {})}
        assert scores(spotter(written(speechlike(), **options), candidate_labels=LABELS)).keys() == set(LABELS)

    @pytest.mark.parametrize(
        "samples",
        [
            np.zeros(1, np.float32),
            np.zeros(RATE, np.float32),
            np.full(RATE, 0.7, np.float32),
            np.clip(20 * speechlike(), -1, 1),
            (speechlike() * 127 + 128).astype(np.uint8),
            (speechlike() * 2**15).astype(np.int16),
            (speechlike() * 2**31).astype(np.int32),
        ],
        ids=["one sample", "silence", "constant", "clipped", "8 bits", "16 bits", "24 bits in 32"],
    )
    def test_odd_clips_have_scores(self, spotter, samples):
        for rate in (RATE, 44100):
            found = scores(spotter(clip(samples, rate), candidate_labels=LABELS))
            assert all(0 < score < 1 for score in found.values())

    def test_what_is_no_audio_is_refused_in_words(self, spotter, tmp_path):
        bad = speechlike()
        (tmp_path / "empty.wav").touch()
        (tmp_path / "corrupt.wav").write_bytes(b"RIFF" + bytes(range(200)))
        (tmp_path / "cut.flac").write_bytes(written(speechlike(), format="FLAC")[:100])
        for audio, message in [
            (clip(np.zeros(0, np.float32)), "`audio` is empty"),
            (clip(np.where(np.arange(RATE) == 5, np.nan, bad)), "1 samples that are NaN or infinite"),
            (clip(np.where(np.arange(RATE) > 7, np.inf, bad)), "NaN or infinite"),
            (clip(bad * 2**15), "divided by 32768"),
            (clip((bad * 2**15).astype(np.int64)), "whose scale is unknown"),
            (clip(np.stack([bad, bad])), "say which axis holds the channels"),
            (bad, "`sampling_rate` is not given"),
            ({"array": bad}, "`sampling_rate` is not given"),
            (clip(bad, -1), "must be a positive number of hertz, got -1"),
            ({"audio": clip(bad), "start": 2.0, "end": 3.0}, "no sample from 2.0 s to 3.0 s: it is 1 s long"),
            ({"audio": clip(bad), "start": -0.5}, "`start` must be in seconds .*, got -0.5"),
            (b"", "the file is empty"),
            (b"nonsense", "of 8 bytes can't be read"),
            (str(tmp_path / "empty.wav"), "is an empty file"),
            (str(tmp_path / "corrupt.wav"), "can't be read"),
            (str(tmp_path / "cut.flac"), "cut.flac"),
            ("https://example.com/clip.wav", "download the file first"),
            ([], "there is no clip"),
        ]:
            with pytest.raises(ValueError, match=message):
                spotter(audio, candidate_labels=LABELS)
        with pytest.raises(FileNotFoundError, match=r"names no file: .*missing\.wav"):
            spotter(str(tmp_path / "missing.wav"), candidate_labels=LABELS)
        splits = pytest.importorskip("datasets").DatasetDict({"train": []})
        with pytest.raises(TypeError, match=r"`audio` has the splits \['train'\]: pass one"):
            spotter(splits, candidate_labels=LABELS)
        with pytest.raises(TypeError, match="`audio` is of type int"):
            spotter(7, candidate_labels=LABELS)


class TestLabels:
    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (None, "`candidate_labels` is not given"),
            ([], "no phrase to look for"),
            (" , ", "no phrase to look for, got ' , '"),
            (["lights on", ""], "Nothing in the text '' can be pronounced"),
            (["?!"], r"Nothing in the text '\?!' can be pronounced"),
            (["привет"], "not Latin"),
            (["{XX} on"], "unknown symbols"),
            (
                ["one two three four five six seven eight nine ten"],
                "'one two three .* phonemes and the model takes 25",
            ),
        ],
    )
    def test_what_no_phrase_is_refused_in_words(self, spotter, labels, message):
        with pytest.raises(ValueError, match=message):
            spotter(clip(speechlike()), candidate_labels=labels)

    def test_digits_are_read_aloud(self, spotter):
        (digits,) = spotter(clip(speechlike()), candidate_labels="42")
        (words,) = spotter(clip(speechlike()), candidate_labels="forty two")
        assert digits["label"] == "42" and digits["score"] == pytest.approx(words["score"], abs=1e-6)

    def test_any_iterable_of_strings_will_do(self, spotter):
        expected = spotter(clip(speechlike()), candidate_labels=LABELS)
        for labels in (tuple(LABELS), set(LABELS), np.array(LABELS), (label for label in LABELS)):
            assert_same(spotter(clip(speechlike()), candidate_labels=labels), expected)

    @pytest.mark.parametrize("labels", [[1, 2], 5, b"lights", {"lights": 1}, [None]])
    def test_what_is_not_text_is_refused(self, spotter, labels):
        with pytest.raises(TypeError, match="must be strings, got"):
            spotter(clip(speechlike()), candidate_labels=labels)

    def test_unknown_settings_are_named(self, spotter):
        with pytest.raises(TypeError, match=r"no settings \['hypothesis_template'\]"):
            spotter(clip(speechlike()), candidate_labels=LABELS, hypothesis_template="{}")
        with pytest.raises(ValueError, match="`function_to_apply` must be one of"):
            spotter(clip(speechlike()), candidate_labels=LABELS, function_to_apply="softmax")
        with pytest.raises(ValueError, match="pass it together with `candidate_labels`"):
            spotter.__class__(model=spotter.model, processor=spotter.processor, device="cpu", candidate_labels="yes")(
                clip(speechlike()), max_pronunciations=1
            )
