import csv
import json
import shutil
import string

import numpy as np
import pytest
import soundfile
import torch
from transformers import BertTokenizer, DistilBertConfig
from typer.testing import CliRunner

from hf_ext import (
    AutoModelForKeywordSpotting,
    DspForKeywordSpotting,
    DspKwsConfig,
    GatedConformerConfig,
    GatedConformerForKeywordDetection,
    KwsFeatureExtractor,
    KwsProcessor,
    KwsTrainer,
    SlickConfig,
    SlickForKeywordSpotting,
)
from hf_ext.cli import app, demo_kws, kws_train
from hf_ext.kws.training import synthesis


WORDS = ["lights on", "lights off", "play music", "stop", "volume up", "volume down", "yes", "no", "open", "close"]
WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env=WIDE)


def says(outcome, *words):
    assert outcome.exit_code == 2, outcome.output
    flat = " ".join(outcome.output.replace("│", " ").split())
    for word in words:
        assert word in flat


def without_its_end(folder, parent):
    """The folder of a model whose download broke off."""
    damaged = shutil.copytree(folder, parent / f"{folder.name}-damaged", dirs_exist_ok=True)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return damaged


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A tone for each letter, two clips a word: an audiofolder."""
    folder = tmp_path_factory.mktemp("recordings")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "speaker"])
        for word in WORDS:
            for speaker, pitch in (("ann", 300), ("bob", 220)):
                time = np.arange(1600) / 16000
                tones = [0.3 * np.sin(2 * np.pi * (pitch + 120 * (ord(letter) % 26)) * time) for letter in word]
                name = f"{word.replace(' ', '-')}-{speaker}.wav"
                soundfile.write(folder / name, np.concatenate(tones), 16000)
                writer.writerow([name, word, speaker])
    return folder


@pytest.fixture(scope="module")
def spotter_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("spotter") / "tiny"
    config = SlickConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    SlickForKeywordSpotting(config).save_pretrained(folder)
    KwsProcessor().save_pretrained(folder)
    return folder


TINY = ("--set", "hidden_size=16", "--set", "num_hidden_layers=1", "--set", "intermediate_size=16")
QUICK = ("--steps", 2, "--batch-size", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory):
    """A model that takes words, in letters."""
    folder = tmp_path_factory.mktemp("words") / "tiny"
    letters = string.ascii_lowercase
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    text = DistilBertConfig(vocab_size=len(pieces), dim=8, hidden_dim=16, n_layers=1, n_heads=2)
    config = DspKwsConfig(text_config=text, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    DspForKeywordSpotting(config).save_pretrained(folder)
    KwsProcessor(tokenizer=BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})).save_pretrained(folder)
    return folder


class TestTrain:
    @pytest.mark.parametrize(("model_type", "fields"), [("slick", TINY), ("ced_kws", TINY[:4]), ("dsp_kws", TINY[:4])])
    def test_the_model_that_it_trains_is_saved_with_processor_and_card(self, recordings, tmp_path, model_type, fields):
        folder = tmp_path / "out"
        outcome = invoke(
            *("kws", "train", "--data", recordings, "--output-dir", folder, "--model_type", model_type, *fields),
            *(*QUICK, "--eval-clips", 4, "--no-augment"),
        )
        assert outcome.exit_code == 0, outcome.output
        for word in ("4 clips of 2 other phrases are kept apart", "random", "hard", "hf-ext kws eval --model"):
            assert word in " ".join(outcome.output.split())
        model = AutoModelForKeywordSpotting.from_pretrained(folder)
        assert model.config.model_type == model_type and model.config.hidden_size == 16
        # Features have the mean and the spread of the training clips.
        assert len(KwsProcessor.from_pretrained(folder).feature_extractor.mean) == model.config.num_mel_bins
        assert getattr(model.config, "freeze_encoder", None) in (None, True)
        card = (folder / "README.md").read_text()
        assert f"`{model_type}`" in card and "| hard |" in card

    @pytest.mark.skipif(not synthesis.installed_engines(), reason="no synthesiser is installed")
    def test_words_are_synthesised(self, tmp_path):
        (tmp_path / "words.txt").write_text("open\n\nclose\n")
        outcome = invoke(
            *("kws", "train", "--words", "yes, no", "--words_file", tmp_path / "words.txt", "--clips_per_word", 1),
            *("--output_dir", tmp_path / "out", *TINY, *QUICK, "--eval-clips", 0),
        )
        assert outcome.exit_code == 0, outcome.output
        assert "4 clips of 4 phrases" in outcome.output
        assert len(list((tmp_path / "out" / "synthesised").rglob("*.flac"))) == 4

    def test_it_goes_on_from_a_model(self, recordings, spotter_folder, tmp_path):
        outcome = invoke(
            *("kws", "train", "--data", recordings, "--model", spotter_folder, "--output-dir", tmp_path, *QUICK),
            *("--eval-data", recordings, "--noise", recordings),
        )
        assert outcome.exit_code == 0, outcome.output
        assert AutoModelForKeywordSpotting.from_pretrained(tmp_path).config.hidden_size == 16

    def test_it_goes_on_from_a_model_of_words(self, recordings, words_folder, tmp_path):
        outcome = invoke(
            *("kws", "train", "--data", recordings, "--model", words_folder, "--output-dir", tmp_path, *QUICK),
            *("--steps", 8, "--eval-clips", 4),
        )
        assert outcome.exit_code == 0, outcome.output
        assert KwsProcessor.from_pretrained(tmp_path).takes_words
        # There are no phonemes for its phrases to be made up from.
        assert "hard" in outcome.output and "confusable" not in outcome.output

    def test_errors_say_the_way_out(self, recordings, spotter_folder, tmp_path):
        train = ("kws", "train", "--output-dir", tmp_path / "x")
        says(invoke(*train), "nothing to train on", "--data", "--words")
        says(invoke(*train, "--data", tmp_path), "has no metadata.csv")
        says(invoke(*train, "--words", "yes, привет"), "are not Latin")
        assert not (tmp_path / "x" / "synthesised").exists()
        data = (*train, "--data", recordings)
        for name in ("slik", "llama", "gated_conformer"):
            says(invoke(*data, "--model-type", name), f"--model-type {name}: there are", "ced_kws", "slick")
        says(invoke(*data, "--set", "width=3"), "--set width: a slick model has no such field")
        says(invoke(*data, "--set", "hidden_size"), "must name a field and its value")
        says(invoke(*data, "--set", "hidden_size=6"), "`num_attention_heads` (4) does not divide")
        says(invoke(*data, "--model", spotter_folder, "--set", "hidden_size=8"), "is for a new model")
        says(
            invoke(*data, "--model-type", "ced_kws", "--ctc-steps", 0), "--ctc-steps 0 of --steps 2000", "first learns"
        )
        says(invoke(*data, "--noise", spotter_folder), "has no audio files")
        says(invoke(*data, "--set", "hidden_size=wide"), "expected int, got str")
        says(invoke(*data, *TINY, "--set", "vocab_size=10"), "has 74 phonemes and the model takes 10")
        says(invoke(*data, "--learning-rate", "nan"), "--learning-rate")
        says(invoke(*data, "--resume"), "--resume finds no checkpoint in", "leave it out")
        says(invoke(*data, "--model", without_its_end(spotter_folder, tmp_path)), "incomplete metadata")
        says(invoke("kws", "train", "--data", recordings, "--output-dir", recordings / "metadata.csv"), "is a file")
        assert not (tmp_path / "x" / "config.json").exists()

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (("--model-type", "slik"), "--model-type slik"),
            (("--set", "width=3"), "--set width"),
            (("--model", "no/such/model"), "no/such/model"),
            (("--noise", "."), "--noise . has no audio files"),
            (("--eval-data", "nowhere"), "has no metadata.csv"),
            (("--device", "abacus"), "--device abacus"),
            (("--model-type", "ced_kws", "--ctc-steps", 0), "--ctc-steps 0 of --steps 2000"),
            (("--push-to-hub", "a/b/c"), "a/b/c"),
        ],
    )
    def test_settings_are_looked_at_before_words_are_spoken(self, wrong, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(kws_train, "synthesize_phrases", lambda *arguments, **settings: pytest.fail("spoken"))
        says(invoke("kws", "train", "--words", "yes, no", *wrong), message)

    def test_a_push_that_fails_is_told_and_leaves_the_model(self, recordings, tmp_path, monkeypatch):
        def refused(trainer):
            raise ConnectionError("no way there")

        monkeypatch.setattr(KwsTrainer, "push_to_hub", refused)
        outcome = invoke(
            *("kws", "train", "--data", recordings, "--output-dir", tmp_path / "x", *TINY, *QUICK, "--eval-clips", 0),
            *("--push-to-hub", "somebody/spotter"),
        )
        assert outcome.exit_code == 1 and isinstance(outcome.exception, SystemExit)
        assert "can't push the model to somebody/spotter: no way there" in outcome.output
        assert f"The model is in {tmp_path / 'x'}" in outcome.output
        assert (tmp_path / "x" / "model.safetensors").exists()

    def test_clips_are_opened_before_anything_is_trained(self, recordings, tmp_path):
        # More than the features are normalised by.
        rows = [
            f"{recordings / 'stop-ann.wav'},stop" if i % 7 else f"{recordings / 'yes-bob.wav'},yes" for i in range(501)
        ]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows, "missing.wav,no"]))
        outcome = invoke(
            "kws", "train", "--data", tmp_path, "--output-dir", tmp_path / "x", *TINY, *QUICK, "--eval-clips", 0
        )
        says(outcome, "missing.wav can't be read")

    def test_training_that_diverges_is_told(self, recordings, tmp_path):
        outcome = invoke(
            *("kws", "train", "--data", recordings, "--output-dir", tmp_path / "x", *TINY, "--batch-size", 4),
            *("--steps", 4, "--device", "cpu", "--learning-rate", 1e30),
        )
        assert outcome.exit_code == 1 and "take a --learning-rate below 1e+30" in outcome.output
        assert not (tmp_path / "x" / "config.json").exists()

    def test_phrases_are_no_longer_than_the_model_takes(self, recordings, tmp_path):
        outcome = invoke(
            *("kws", "train", "--data", recordings, "--output-dir", tmp_path, *TINY, *QUICK, "--eval-clips", 0),
            *("--set", "max_phonemes=5"),
        )
        assert outcome.exit_code == 0, outcome.output
        # Stop, yes, no, open and close.
        assert "10 clips of" in outcome.output


class TestEval:
    def test_table_pictures_page_and_figures(self, recordings, spotter_folder, tmp_path):
        pytest.importorskip("matplotlib")
        folder = tmp_path / "eval"
        outcome = invoke(
            *(
                "kws",
                "eval",
                "--model",
                spotter_folder,
                "--data",
                recordings,
                "--output-dir",
                folder,
                "--device",
                "cpu",
            ),
            *("--resamples", 20, "--json", tmp_path / "own.json"),
        )
        assert outcome.exit_code == 0, outcome.output
        for word in ("tiny on recordings", "60 trials of 10 phrases", "20 / 20", "20 / 40", "whole speakers"):
            assert word in " ".join(outcome.output.split())
        for name in ("detection", "inside"):
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        page = (folder / "index.html").read_text()
        assert "data:image/png;base64," in page and str(folder.parent) not in page
        figures = json.loads((tmp_path / "own.json").read_text())
        assert figures == json.loads((folder / "results.json").read_text())
        assert [own["negatives"] for own in figures["figures"]] == ["all", "random", "hard"]
        for own in figures["figures"]:
            low, high = own["auc_interval"]
            assert 0 <= low <= own["auc"] <= high <= 1 and 0.5 <= own["duration_only_auc"] <= 1

    def test_a_model_of_words_has_no_confusables(self, recordings, words_folder, tmp_path):
        run = (
            "kws",
            "eval",
            "--data",
            recordings,
            "--model",
            words_folder,
            "--output-dir",
            tmp_path,
            "--resamples",
            0,
        )
        outcome = invoke(*run, "--device", "cpu", "--max-clips", 4)
        assert outcome.exit_code == 0, outcome.output
        says(invoke(*run, "--negative", "confusable"), "--negative confusable", "is of phonemes", "takes words")

    def test_trials_of_a_file_score_as_the_model_says(self, recordings, spotter_folder, tmp_path):
        pytest.importorskip("matplotlib")
        rows = ["audio,phrase,label,start,end"]
        rows += [f"{recordings}/stop-ann.wav,{phrase},{int(phrase == 'stop')},," for phrase in WORDS]
        rows += [f"{recordings}/yes-bob.wav,{phrase},{int(phrase == 'yes')},0.1,0.25" for phrase in WORDS]
        (tmp_path / "trials.csv").write_text("\n".join(rows))
        outcome = invoke(
            *("kws", "eval", "--model", spotter_folder, "--data", tmp_path / "trials.csv", "--output-dir", tmp_path),
            *("--device", "cpu", "--resamples", 0, "--max-pronunciations", 1),
        )
        assert outcome.exit_code == 0, outcome.output
        (figures,) = json.loads((tmp_path / "results.json").read_text())["figures"]
        assert (figures["num_positives"], figures["num_negatives"], figures["auc_interval"]) == (2, 18, None)
        model, processor = AutoModelForKeywordSpotting.from_pretrained(spotter_folder), KwsProcessor()
        scores = []
        for name, piece in (("stop-ann", slice(None)), ("yes-bob", slice(1600, 4000))):
            samples = soundfile.read(recordings / f"{name}.wav", dtype="float32")[0][piece]
            inputs = processor(audio=samples, text=WORDS, sampling_rate=16000, return_tensors="pt")
            with torch.no_grad():
                audio = model.eval().get_audio_features(inputs["input_features"], inputs["attention_mask"])
                text = model.get_text_features(inputs["keyword_ids"], inputs["keyword_attention_mask"])
                scores += model.score(audio, text)[0].tolist()
        own = (
            scores[WORDS.index("stop")],
            scores[10 + WORDS.index("yes")],
        )
        others = [
            score for place, score in enumerate(scores) if place not in (WORDS.index("stop"), 10 + WORDS.index("yes"))
        ]
        better = np.mean([(score > other) + 0.5 * (score == other) for score in own for other in others])
        assert figures["auc"] == pytest.approx(better, abs=1e-6)

    def test_a_model_of_a_closed_set_shows_its_gates(self, recordings, tmp_path):
        pytest.importorskip("matplotlib")
        torch.manual_seed(0)
        labels = {0: "stop", 1: "yes", 2: "No"}
        config = GatedConformerConfig(
            hidden_size=16, num_hidden_layers=1, intermediate_size=16, id2label=labels, gate_open_probability=0.5
        )
        GatedConformerForKeywordDetection(config).save_pretrained(tmp_path / "gated")
        KwsFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(tmp_path / "gated")
        evaluation = (
            "kws",
            "eval",
            "--model",
            tmp_path / "gated",
            "--output-dir",
            tmp_path / "out",
            "--device",
            "cpu",
        )
        outcome = invoke(*evaluation, "--data", recordings, "--resamples", 10)
        assert outcome.exit_code == 0, outcome.output
        for word in ("60 trials of 3 phrases", "6 / 54", "of the modules ran", "multiply-accumulates"):
            assert word in " ".join(outcome.output.split())
        assert (tmp_path / "out" / "gates.png").read_bytes().startswith(b"\x89PNG")
        assert "1 convolution" in (tmp_path / "out" / "index.html").read_text()
        (tmp_path / "metadata.csv").write_text(f"file_name,text\n{recordings}/open-ann.wav,open\n")
        says(invoke(*evaluation, "--data", tmp_path), "they are stop, yes, no")
        (tmp_path / "metadata.csv").write_text("file_name,text\nmissing.wav,stop\n")
        says(invoke(*evaluation, "--data", tmp_path), "missing.wav can't be read")
        damaged = without_its_end(tmp_path / "gated", tmp_path)
        says(
            invoke("kws", "eval", "--model", damaged, "--data", recordings),
            "can't load the keyword model",
            "incomplete metadata",
        )

    def test_errors_say_the_way_out(self, recordings, spotter_folder, base_folder, tmp_path):
        pytest.importorskip("matplotlib")
        model = ("kws", "eval", "--model", spotter_folder, "--output-dir", tmp_path / "x")
        says(invoke("kws", "eval", "--model", tmp_path / "no", "--data", recordings), "can't load a keyword spotting")
        says(invoke("kws", "eval", "--model", base_folder, "--data", recordings), "can't load a keyword spotting")
        says(invoke(*model, "--data", tmp_path / "missing"), "can't make trials", "metadata.csv")
        damaged = without_its_end(spotter_folder, tmp_path)
        says(invoke("kws", "eval", "--model", damaged, "--data", recordings), "can't load", "incomplete metadata")
        config = json.loads((damaged / "config.json").read_text())
        (damaged / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
        says(invoke("kws", "eval", "--model", damaged, "--data", recordings), "can't load", "expected int, got str")
        diverged = AutoModelForKeywordSpotting.from_pretrained(spotter_folder)
        diverged.head.utterance.bias.data.fill_(float("nan"))
        diverged.save_pretrained(tmp_path / "diverged")
        KwsProcessor().save_pretrained(tmp_path / "diverged")
        outcome = invoke(*model[:3], tmp_path / "diverged", *model[4:], "--data", recordings)
        says(outcome, "scores that are no numbers, to 60 of 60 trials")
        for option in ("--output-dir", "--json"):
            evaluation = (*model[:-1], tmp_path / "y", "--data", recordings)
            place = recordings / "metadata.csv" if option == "--output-dir" else tmp_path
            says(invoke(*evaluation, option, place), f"Invalid value for '{option}'")
        says(
            invoke(*model[:4], "--data", recordings, "--output-dir", recordings / "metadata.csv" / "x"),
            "can't make the folder",
        )
        file = tmp_path / "trials.csv"
        for content, words in [
            ("audio,phrase\nx,y\n", "lacks the columns ['label']"),
            ("audio,phrase,label\nx.wav,y,2\n", "`label` is '2' in line 2"),
            ("audio,phrase,label,kind\nx.wav,y,1,hard\n", "`kind` is 'hard' in line 2, with the label 1"),
            ("audio,phrase,label\nx.wav,y,1\n", "x.wav can't be read"),
            ("audio,phrase,label\n,y,1\n", "`audio` is empty in line 2"),
            (f"\ufeffaudio,phrase,label\n{recordings}/yes-ann.wav,yes,1\n", "one class only"),
            (f"audio,phrase,label\n{recordings}/yes-ann.wav,yes,1\n", "one class only"),
            (f"audio,phrase,label\n{recordings}/yes-ann.wav,?,1\n", "can be pronounced"),
        ]:
            file.write_text(content)
            says(invoke(*model, "--data", file), words)


class TestDemo:
    @pytest.fixture
    def small(self, base_folder, adapter_folder, tmp_path):
        pytest.importorskip("matplotlib")
        return (
            *("demo", "--model", base_folder, "--adapter", adapter_folder, "--device", "cpu", "--num-prompts", 1),
            *("--max-new-tokens", 4, "--repeats", 1, "--training-steps", 0, "--output-dir", tmp_path / "demo"),
        )

    def test_phrases_are_looked_for_in_the_clips_of_the_package(self, small, spotter_folder, tmp_path, monkeypatch):
        # No synthesiser is found.
        monkeypatch.setenv("PATH", "")
        outcome = invoke(*small, "--kws-model", spotter_folder, "--phrase", "{HH EY1} <computer>")
        assert outcome.exit_code == 0, outcome.output
        assert "typed phrases in 8 clips" in outcome.output
        assert (tmp_path / "demo" / "kws.png").read_bytes().startswith(b"\x89PNG")
        page = (tmp_path / "demo" / "index.html").read_text()
        assert "{HH EY1} &lt;computer&gt;" in page and str(spotter_folder.parent) not in page
        figures = json.loads((tmp_path / "demo" / "results.json").read_text())["kws"]
        assert [clip["said"] for clip in figures["clips"]][:2] == ["computer", "alexa"]
        assert all(set(clip["scores"]) == set(figures["phrases"]) for clip in figures["clips"])

    def test_every_clip_of_the_package_has_its_licence(self):
        rows = demo_kws.load_utterances(demo_kws._CLIPS)
        assert {row["licence"] for row in rows} == {"Apache-2.0", "CC-BY-4.0"}
        said = (demo_kws._CLIPS / "README.md").read_text()
        assert all(row["licence"] in said for row in rows)
        assert {path.name for path in demo_kws._CLIPS.glob("*.ogg")} == {
            row["audio"].rsplit("/", 1)[1] for row in rows
        }


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_shows_an_example(command):
    outcome = invoke("kws", command, "--help")
    assert outcome.exit_code == 0 and f"Example: hf-ext kws {command}" in outcome.output
