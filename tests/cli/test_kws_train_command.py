import pytest

from cli.kws_command import QUICK, TINY, invoke, says, without_its_end
from hf_ext import (
    AutoModelForKeywordSpotting,
    KwsProcessor,
    KwsTrainer,
)
from hf_ext.cli import kws_train
from hf_ext.kws.training import synthesis


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


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_shows_an_example(command):
    outcome = invoke("kws", command, "--help")
    assert outcome.exit_code == 0 and f"Example: hf-ext kws {command}" in outcome.output
