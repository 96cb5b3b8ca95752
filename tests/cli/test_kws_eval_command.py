import json

import numpy as np
import pytest
import soundfile
import torch

from cli.kws_command import QUICK, TINY, WORDS, invoke, says, with_another_config, without_its_end
from hf_ext import (
    AutoModelForKeywordSpotting,
    GatedConformerConfig,
    GatedConformerForKeywordDetection,
    KwsFeatureExtractor,
    KwsProcessor,
    SlickConfig,
    SlickForKeywordSpotting,
)
from hf_ext.cli import demo_kws


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
        other = with_another_config(spotter_folder, tmp_path, hidden_size="wide")
        says(invoke("kws", "eval", "--model", other, "--data", recordings), "can't load", "expected int, got str")
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


LONG = "this is a sentence of many more sounds than any phrase that a spotter takes"


class TestLongTexts:
    @pytest.fixture
    def sentences(self, recordings, tmp_path):
        rows = [
            f"{recordings / name}-ann.wav,{text}" for name, text in [("stop", "stop"), ("yes", "yes"), ("no", LONG)]
        ]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
        return tmp_path

    def test_clips_that_are_left_out_are_told(self, sentences, spotter_folder):
        pytest.importorskip("matplotlib")
        outcome = invoke(
            *("kws", "eval", "--model", spotter_folder, "--data", sentences, "--output-dir", sentences / "out"),
            *("--device", "cpu", "--resamples", 0),
        )
        assert outcome.exit_code == 0, outcome.output
        told = "1 of 3 clips are left out: their texts have more than 25 phonemes"
        assert told in " ".join(outcome.output.split())
        assert told in (sentences / "out" / "index.html").read_text()

    def test_those_that_nothing_is_trained_on_too(self, sentences):
        outcome = invoke(
            *("kws", "train", "--data", sentences, "--output-dir", sentences / "out", *TINY, *QUICK, "--eval-clips", 0)
        )
        assert outcome.exit_code == 0, outcome.output
        assert "1 of 3 clips are left out" in " ".join(outcome.output.split())

    def test_a_model_is_tried_with_phrases_that_it_takes(self, recordings, tmp_path):
        pytest.importorskip("matplotlib")
        config = SlickConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=16, max_phonemes=5)
        SlickForKeywordSpotting(config).save_pretrained(tmp_path / "short")
        KwsProcessor().save_pretrained(tmp_path / "short")
        outcome = invoke(
            *("kws", "eval", "--model", tmp_path / "short", "--data", recordings, "--output-dir", tmp_path / "out"),
            *("--device", "cpu", "--resamples", 0),
        )
        assert outcome.exit_code == 0, outcome.output
        assert "10 of 20 clips are left out: their texts have more than 5" in " ".join(outcome.output.split())


@pytest.mark.parametrize(
    "command", [("eval", "--data"), ("train", "--data"), ("train", "--words", "yes", "--eval-data")]
)
def test_clips_without_any_text_are_told(command, recordings, tmp_path):
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{recordings / 'yes-ann.wav'},\n")
    says(invoke("kws", *command, tmp_path, "--output-dir", tmp_path / "x"), "none of the clips in", "has a text")
    assert not (tmp_path / "x" / "synthesised").exists()


@pytest.mark.parametrize("command", ["eval", "train"])
def test_weights_of_other_sizes_than_the_config_gives_are_told(command, recordings, spotter_folder, tmp_path):
    other = with_another_config(spotter_folder, tmp_path, hidden_size=32)
    outcome = invoke("kws", command, "--model", other, "--data", recordings, "--output-dir", tmp_path / "x")
    says(outcome, "can't load a keyword spotting model", "tiny-other", "have other sizes than its config.json gives")


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
