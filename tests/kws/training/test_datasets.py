"""Pairs of clips and phrases."""

from collections import Counter
from random import Random

import numpy as np
import pytest
import soundfile
import torch
from transformers import BertTokenizer

from hf_ext.kws.configuration_slick import SlickConfig
from hf_ext.kws.modeling_slick import SlickForKeywordSpotting
from hf_ext.kws.processing_kws import KwsProcessor
from hf_ext.kws.training.augmentation import KwsAugmenter
from hf_ext.kws.training.datasets import (
    PAIR_KINDS,
    KwsDataCollator,
    KwsPairDataset,
    KwsTrialDataset,
)
from hf_ext.kws.training.mining import PhoneticIndex, sound_alike
from hf_ext.kws.training.utterances import load_utterances, read_audio


WORDS = ["lights on", "lights off", "nights on", "play music", "stop", "volume up", "volume down"]


def utterances(words=WORDS, seconds=0.6, copies=1):
    noise = np.random.default_rng(0).normal(size=(len(words), int(16000 * seconds))).astype(np.float32)
    return [
        {"audio": {"array": 0.1 * clip, "sampling_rate": 16000}, "text": word}
        for word, clip in zip(words, noise, strict=True)
    ] * copies


def test_every_kind_says_what_it_is():
    pairs = KwsPairDataset(utterances(), every_kind=True)
    assert len(pairs) == len(WORDS) * len(PAIR_KINDS)
    tokenize = pairs.tokenizer.tokenize
    for i, pair in enumerate(pairs):
        assert pair["kind"] == PAIR_KINDS[i % 4]
        assert pair["text"] == WORDS[i // 4]
        same = sound_alike(tokenize(pair["phrase"]), tokenize(pair["text"]))
        assert same == (pair["label"] == 1) == (pair["kind"] == "positive")
        if pair["kind"] in ("random", "hard"):
            assert pair["phrase"] in WORDS
    assert {"lights off", "nights on"} <= set(pairs.hard_negatives("lights on"))
    assert "volume down" in pairs.hard_negatives("volume up")


def test_made_up_confusables_differ_in_what_was_chosen():
    pairs = KwsPairDataset(utterances(copies=5), shares={"confusable": 1}, confusable_kinds=("insert",))
    for pair in pairs:
        made, original = (pairs.tokenizer.tokenize(pair[name]) for name in ("phrase", "text"))
        assert len(original) < len(made) <= len(original) + 3
        # What was said is left when the insertions are taken out.
        rest = iter(made)
        assert all(phoneme in rest for phoneme in original)


@pytest.mark.parametrize(("kind", "words"), [("insert", ["lights on", "lights off"]), ("delete", ["a", "oh"])])
def test_phrases_that_the_kinds_allow_no_change_of_have_a_phoneme_replaced(kind, words):
    pairs = KwsPairDataset(utterances(words), shares={"confusable": 1}, confusable_kinds=(kind,), max_phonemes=6)
    for pair in pairs:
        phrase, spoken = (pairs.tokenizer.tokenize(pair[name]) for name in ("phrase", "text"))
        assert len(phrase) == len(spoken) and sum(a != b for a, b in zip(phrase, spoken, strict=True)) == 1


def test_no_pronunciation_of_the_text_is_a_made_up_confusable():
    pairs = KwsPairDataset(utterances(["a", "the", "either"]), shares={"confusable": 1}, seed=0)
    right = {text: pairs.tokenizer.pronunciations(text) for text in ("a", "the", "either")}
    for epoch in range(60):
        pairs.set_epoch(epoch)
        for pair in pairs:
            assert not any(
                sound_alike(pairs.tokenizer.tokenize(pair["phrase"]), spoken) for spoken in right[pair["text"]]
            )


def test_phrases_inside_of_the_spoken_one_are_left_out_if_wanted():
    words = ["turn the volume up", "volume up", "turn", "volume down"]
    pairs = KwsPairDataset(utterances(words), every_kind=True)
    assert "volume up" in pairs.hard_negatives(words[0])
    pairs = KwsPairDataset(utterances(words), every_kind=True, contained_is_negative=False)
    assert pairs.hard_negatives(words[0]) == ["volume down"]
    said = " ".join(phoneme.rstrip("012") for phoneme in pairs.tokenizer.tokenize(words[0]))
    for epoch in range(20):
        pairs.set_epoch(epoch)
        for i in range(1, 4):
            asked = " ".join(phoneme.rstrip("012") for phoneme in pairs.tokenizer.tokenize(pairs[i]["phrase"]))
            assert asked not in said


def test_shares_are_kept_and_draws_belong_to_place_and_epoch():
    pairs = KwsPairDataset(utterances(copies=150), shares={"positive": 0.5, "random": 0.3, "hard": 0.2})
    drawn = [pairs._trial(i, Random(i))["kind"] for i in range(len(pairs))]
    counts = Counter(drawn)
    assert counts["positive"] / len(pairs) == pytest.approx(0.5, abs=0.05)
    assert counts["hard"] / len(pairs) == pytest.approx(0.2, abs=0.05)
    first = [pairs[i]["phrase"] for i in range(30)]
    assert [pairs[i]["phrase"] for i in reversed(range(30))] == first[::-1]
    pairs.set_epoch(1)
    assert [pairs[i]["phrase"] for i in range(30)] != first
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_augmented_clips_are_repeatable():
    pairs = KwsPairDataset(utterances(), augmenter=KwsAugmenter())
    assert np.array_equal(pairs[3]["audio"], pairs[3]["audio"])
    before = pairs[3]["audio"]
    pairs.set_epoch(1)
    assert before.shape != pairs[3]["audio"].shape or not np.array_equal(before, pairs[3]["audio"])
    with pytest.raises(ValueError, match="`augmenter` works at 16000 Hz"):
        KwsPairDataset(utterances(), augmenter=KwsAugmenter(), sampling_rate=8000)


def test_utterances_that_are_too_long_are_left_out():
    long = "this is a sentence with many more phonemes than the model takes"
    pairs = KwsPairDataset(utterances([*WORDS[:3], long]), every_kind=True, shares={"positive": 1})
    assert [pair["text"] for pair in pairs] == WORDS[:3] and long not in pairs.phrases
    with pytest.raises(ValueError, match="`phrases_of_words`"):
        KwsPairDataset(utterances([long, "stop"]))


def test_collator_makes_what_the_model_takes():
    pairs = KwsPairDataset(utterances(), every_kind=True)
    items = [pairs[i] for i in (0, 1, 14, 27)]
    items[1]["audio"] = items[1]["audio"][:5000]
    batch = KwsDataCollator(KwsProcessor())(items)
    assert batch["labels"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert [PAIR_KINDS[kind] for kind in batch.pop("pair_kinds")] == [pair["kind"] for pair in items]
    assert (
        batch["phoneme_labels"][0][batch["phoneme_labels"][0] >= 0].tolist()
        == (KwsProcessor().tokenizer("lights on")["input_ids"])
    )
    output = SlickForKeywordSpotting(SlickConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=16))(**batch)
    assert output.loss.isfinite() and output.ctc_loss.isfinite() and output.prefix_loss.isfinite()


def test_stripes_belong_to_the_pair_and_not_to_the_batch():
    collate = KwsDataCollator(KwsProcessor(), hide_stripes=True)
    pairs = KwsPairDataset(utterances())
    together = collate([pairs[0], pairs[1]])["input_features"]
    alone = [collate([pairs[i]])["input_features"][0] for i in range(2)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together, KwsDataCollator(KwsProcessor())([pairs[0], pairs[1]])["input_features"])


def test_audio_comes_from_files_bytes_and_arrays(tmp_path):
    wave = 0.3 * np.sin(np.arange(16000) / 20).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, wave], axis=1), 16000, subtype="FLOAT")
    path = str(tmp_path / "a.wav")
    for audio in (path, {"path": path, "bytes": None}, {"path": None, "bytes": (tmp_path / "a.wav").read_bytes()}):
        np.testing.assert_allclose(read_audio({"audio": audio}), wave, atol=1e-6)
        np.testing.assert_allclose(read_audio({"audio": audio, "start": 0.25, "end": 0.5}), wave[4000:8000], atol=1e-6)
    assert len(read_audio({"audio": path}, sampling_rate=8000)) == 8000
    array = {"array": wave, "sampling_rate": 16000}
    np.testing.assert_allclose(read_audio({"audio": array, "start": 0.25, "end": 0.5}), wave[4000:8000])

    class Decoder:
        def __getitem__(self, name):
            return array[name]

    np.testing.assert_allclose(read_audio({"audio": Decoder()}), wave)
    with pytest.raises(ValueError, match="is empty"):
        read_audio({"audio": path, "start": 3.0, "end": 4.0})
    with pytest.raises(ValueError, match=r"a\.wav from 0\.75 s to its end"):
        soundfile.write(path, np.full(16000, np.nan), 16000, subtype="FLOAT")
        read_audio({"audio": path, "start": 0.75})
    (tmp_path / "b.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match=r"b\.wav can't be read"):
        read_audio({"audio": str(tmp_path / "b.wav")})


@pytest.mark.parametrize(
    ("samples", "problem"),
    [([], "is empty"), ([0.0, np.nan], "has 1 samples that are NaN"), ([0.0, -np.inf], "has 1 samples that are NaN")],
)
def test_a_whole_clip_that_is_refused_is_named_without_times(tmp_path, samples, problem):
    samples = np.array(samples, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    content = (tmp_path / "a.wav").read_bytes()
    for audio, name in (
        (tmp_path / "a.wav", "a.wav"),
        ({"path": None, "bytes": content}, "`bytes"),
        ({"array": samples, "sampling_rate": 16000}, "`array"),
    ):
        with pytest.raises(ValueError, match=f"{name}` {problem}"):
            read_audio({"audio": audio})


def test_folder_of_clips_is_read(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name,text,speaker\na/1.wav,"yes, please",s\na/2.wav,,s\n')
    assert load_utterances(tmp_path) == [
        {"audio": str(tmp_path / "a/1.wav"), "text": "yes, please", "speaker": "s"},
    ]
    with pytest.raises(FileNotFoundError, match=r"no metadata\.csv"):
        load_utterances(tmp_path / "a")
    (tmp_path / "metadata.csv").write_text("file_name,label\na/1.wav,yes\n")
    with pytest.raises(ValueError, match="lacks the columns"):
        load_utterances(tmp_path)


@pytest.mark.parametrize("decode", [True, False])
def test_datasets_rows_are_not_decoded(decode):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"audio": f"missing{i}.wav", "text": text} for i, text in enumerate(WORDS)])
    rows = rows.cast_column("audio", datasets.Audio(decode=decode))
    pairs = KwsPairDataset(rows)
    assert len(pairs) == len(WORDS)
    with pytest.raises(ValueError, match=r"missing0\.wav can't be read"):
        pairs[0]


def test_an_item_whose_samples_are_refused_is_named():
    rows = utterances()
    rows[2] = {**rows[2], "audio": {"array": np.full(800, np.nan), "sampling_rate": 16000}}
    with pytest.raises(
        ValueError, match=f"Item 2 of the data, of the text '{rows[2]['text']}': `array` has 800 samples"
    ):
        list(KwsPairDataset(rows))


def test_given_trials_stay_as_they_are():
    trial = {**utterances()[0], "phrase": "lights off", "label": 0, "kind": "hard"}
    item = KwsTrialDataset([trial])[0]
    assert (item["phrase"], item["label"], item["kind"], item["text"]) == ("lights off", 0, "hard", "lights on")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`shares` must give"):
        KwsPairDataset(utterances(), shares={"easy": 1.0})
    with pytest.raises(ValueError, match="negatives need two"):
        KwsPairDataset(utterances(["two"] * 2), vocabulary=["too"])
    pairs = KwsPairDataset(utterances())
    with pytest.raises(ValueError, match="different sampling rates"):
        KwsDataCollator(KwsProcessor())([pairs[0], {**pairs[1], "sampling_rate": 8000}])


class TestRows:
    """What is wrong with rows is told before anything is computed."""

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"text": None}, TypeError, "`utterances` has in row 7 the text None"),
            ({"text": 5}, TypeError, "`utterances` has in row 7 the text 5"),
            ({"audio": ...}, ValueError, r"`utterances` lacks \['audio'\] in row 7"),
            ({"text": ...}, ValueError, r"`utterances` lacks \['text'\] in row 7"),
        ],
    )
    def test_of_utterances(self, change, error, message):
        row = {name: value for name, value in {**utterances()[0], **change}.items() if value is not ...}
        with pytest.raises(error, match=message):
            KwsPairDataset([*utterances(), row])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"phrase": ...}, ValueError, r"`trials` lacks \['phrase'\] in row 1"),
            ({"label": 2}, ValueError, "in row 1 the label 2 and the kind 'hard'"),
            ({"label": None}, ValueError, "in row 1 the label None"),
            ({"kind": "easy"}, ValueError, "in row 1 the label 0 and the kind 'easy'"),
        ],
    )
    def test_of_trials(self, change, error, message):
        trial = {**utterances()[0], "phrase": "lights off", "label": 0, "kind": "hard"}
        row = {name: value for name, value in {**trial, **change}.items() if value is not ...}
        with pytest.raises(error, match=message):
            KwsTrialDataset([trial, row])

    def test_of_a_dataset(self):
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_dict({"audio": ["a.wav"], "sentence": ["yes"]})
        with pytest.raises(ValueError, match=r"`utterances` lacks \['text'\]"):
            KwsPairDataset(rows)
        for table in (KwsPairDataset, KwsTrialDataset):
            with pytest.raises(
                TypeError, match=r"is a table of pandas: make it a list of rows, with `to_dict\('records'\)`"
            ):
                table(rows.to_pandas())
        for others in (datasets.DatasetDict({"train": rows}), "folder"):
            with pytest.raises(TypeError, match="`utterances` must be a list of rows or a split of a dataset"):
                KwsPairDataset(others)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"shares": {"positive": float("nan")}}, "`shares` must give"),
            ({"num_neighbours": 0}, "`num_neighbours` must be at least 1, got 0"),
            ({"confusable_kinds": ()}, "`confusable_kinds` must name some of"),
            ({"confusable_kinds": ("swap",)}, "`confusable_kinds` must name some of"),
        ],
    )
    def test_of_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            KwsPairDataset(utterances(), **settings)

    def test_of_a_vocabulary(self):
        with pytest.raises(TypeError, match="`vocabulary` must be a list of phrases, got the one text 'yes, no'"):
            KwsPairDataset(utterances(), vocabulary="yes, no")

    def test_of_a_tokenizer_without_phonemes(self):
        words = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
        for make in (lambda: KwsPairDataset(utterances(), words), lambda: PhoneticIndex(["yes"], words)):
            with pytest.raises(TypeError, match=r"`tokenizer` must be a PhonemeTokenizer, .*, got BertTokenizer"):
                make()

    def test_of_batches(self):
        collate, pair = KwsDataCollator(KwsProcessor()), KwsPairDataset(utterances())[0]
        with pytest.raises(ValueError, match=r"lack \['kind', 'label', 'phrase', 'sampling_rate'\]"):
            collate(utterances())
        with pytest.raises(ValueError, match=r"the kinds \['easy'\]"):
            collate([pair, {**pair, "kind": "easy"}])


class TestAudioOfRows:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({}, "The row has no `audio`"),
            ({"audio": None}, "The row has no `audio`"),
            ({"audio": np.zeros(9)}, "an array as `audio`, without its rate"),
            ({"audio": {"path": None, "bytes": None}}, "neither `path` nor `bytes`"),
            ({"audio": {"array": np.zeros(9)}}, "`sampling_rate` is not given"),
            ({"audio": {"array": np.zeros((2, 900)), "sampling_rate": 16000}}, r"the shape \(2, 900\): transpose"),
            ({"start": -0.5}, "`start` must be in seconds from the beginning of the clip on, got -0.5"),
            ({"start": "soon"}, "`start` must be in seconds .*, got 'soon'"),
            ({"end": float("nan")}, "`end` must be in seconds .*, got nan"),
            ({"start": 0.5, "end": 0.25}, "is empty"),
        ],
    )
    def test_what_is_none_is_named(self, row, message):
        if "audio" not in row and row:
            row = {"audio": {"array": np.zeros(16000), "sampling_rate": 16000}, **row}
        with pytest.raises(ValueError, match=message):
            read_audio(row)


class TestFoldersOfClips:
    def test_rows_of_any_length_and_the_mark_of_a_spreadsheet(self, tmp_path):
        text = "\ufefffile_name,text,speaker\na.wav,yes\nb.wav\nc.wav,no,ann,more\n"
        (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
        assert load_utterances(tmp_path) == [
            {"audio": str(tmp_path / "a.wav"), "text": "yes", "speaker": None},
            {"audio": str(tmp_path / "c.wav"), "text": "no", "speaker": "ann"},
        ]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"file_name,text\n,yes\n", "the text 'yes' without a file_name"),
            (b"file_name,text\na.wav,caf\xe9\n", "UTF-8"),
        ],
    )
    def test_what_is_none_is_named(self, content, message, tmp_path):
        (tmp_path / "metadata.csv").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_utterances(tmp_path)
