"""Word lists become folders of spoken clips."""

import csv
import os
import subprocess

import numpy as np
import pytest
import soundfile

from hf_ext import PhonemeTokenizer
from hf_ext.kws.training import synthesis, synthesizers
from hf_ext.kws.training.synthesis import ENGINES, SpokenClip, installed_engines, plan_clips, synthesize_phrases


def needs(engine):
    program, package = ENGINES[engine]
    return pytest.mark.skipif(
        engine not in installed_engines(), reason=f"{program} is not installed: apt-get install -y {package}"
    )


needs_any = pytest.mark.skipif(
    not installed_engines(), reason="no speech synthesiser is installed: apt-get install -y espeak-ng flite festival"
)


def rows_of(folder):
    with (folder / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@needs_any
def test_folder_has_every_clip_and_datasets_reads_it(tmp_path):
    folder = synthesize_phrases(
        ["hey computer", "lights, on"], tmp_path / "clips", clips_per_phrase=3, num_proc=2, disable_tqdm=True
    )
    rows = rows_of(folder)
    assert sorted(row["text"] for row in rows) == ["hey computer"] * 3 + ["lights, on"] * 3
    for row in rows:
        samples, rate = soundfile.read(folder / row["file_name"])
        assert rate == 16000 and samples.ndim == 1 and np.abs(samples).max() > 0.05
        assert len(samples) / rate == pytest.approx(float(row["duration_s"]), abs=1e-3)
    assert not list(folder.rglob("*.partial"))

    datasets = pytest.importorskip("datasets")
    # The `audiofolder` loader of `datasets` itself asks for torchcodec, even for audio that stays undecoded.
    loaded = datasets.load_dataset(
        "csv", data_files=str(folder / "metadata.csv"), split="train", cache_dir=str(tmp_path / "cache")
    )
    loaded = loaded.map(lambda row: {"audio": str(folder / row["file_name"])}, keep_in_memory=True)
    loaded = loaded.cast_column("audio", datasets.Audio(decode=False))
    assert len(loaded) == 6
    assert soundfile.info(loaded[0]["audio"]["path"]).samplerate == 16000


@pytest.mark.parametrize("engine", [pytest.param(engine, marks=needs(engine)) for engine in ENGINES])
def test_speed_and_pitch_reach_each_engine(engine, tmp_path):
    voice = next(voice for voice in synthesizers.voices_of(engine) if not voice.endswith("_hts"))
    clips = {}
    for speed, pitch in [(0.75, 1.0), (1.3, 1.0), (0.75, 1.3)]:
        clip = SpokenClip("hey computer", engine, voice, speed, pitch)
        synthesis._speak(clip, tmp_path, 16000)
        clips[speed, pitch], _ = soundfile.read(tmp_path / clip.file_name)
    slow, fast, high = clips.values()
    assert len(fast) < 0.85 * len(slow)
    length = min(len(slow), len(high))
    assert not np.allclose(slow[:length], high[:length], atol=1e-3)


FESTIVAL_WITHOUT_VOICES = """
"Could not find any of these voices:"
(nitech_us_slt_arctic_hts kal_diphone ked_diphone)

WARNING
No default voice found in ("/usr/share/festival/voices/")
either no voices unpacked or voice-path is wrong
Scheme interpreter will work, but there is no voice to speak with.
WARNING
"""


@pytest.mark.parametrize(
    ("answer", "voices"),
    [("nil", []), ("(kal_diphone)", ["kal_diphone"]), ("(us_slt kal_diphone)", ["kal_diphone", "us_slt"])],
)
def test_engine_without_a_voice_is_none(answer, voices, monkeypatch, tmp_path):
    """As Debian installs festival without what it recommends. What it printed is festival 2.5's."""
    for name in ("festival", "text2wave"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{FESTIVAL_WITHOUT_VOICES}voices: {answer}\nEND\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(synthesizers, "_festival_voices", synthesizers._festival_voices.__wrapped__)
    assert synthesizers.voices_of("festival") == voices
    assert ("festival" in installed_engines()) == bool(voices)


@needs("festival")
def test_speed_reaches_voices_that_keep_their_pitch(tmp_path):
    voice = next((voice for voice in synthesizers.voices_of("festival") if voice.endswith("_hts")), None)
    if voice is None:
        pytest.skip("festival has no HTS voice: apt-get install -y festvox-us-slt-hts")
    lengths = []
    for speed in (0.75, 1.3):
        clip = SpokenClip("hey computer", "festival", voice, speed, 1.0)
        synthesis._speak(clip, tmp_path, 16000)
        lengths.append(len(soundfile.read(tmp_path / clip.file_name)[0]))
    assert lengths[0] / lengths[1] == pytest.approx(1.3 / 0.75, rel=0.1)


@needs("espeak-ng")
def test_phonemes_in_braces_are_spoken_as_such(tmp_path):
    made = [
        synthesize_phrases([text], tmp_path / str(i), engines=["espeak-ng"], clips_per_phrase=1, disable_tqdm=True)
        for i, text in enumerate(["{HH EY1} computer", "{B AA1 B AA1 B AA1 B AA1} computer"])
    ]
    assert all(len(rows_of(folder)) == 1 for folder in made)
    clip = SpokenClip("{HH EY1} you", "espeak-ng", "en-us+f1", 1.0, 1.0)
    assert synthesizers.command_for(clip, "x.wav")[1] == " [[h|'eI]]  you"


@needs("espeak-ng")
@pytest.mark.parametrize(
    "word", ["judge", "measure", "church", "father", "boy", "yellow", "shower", "either", "singing"]
)
def test_phonemes_are_what_the_engine_itself_says(word):
    phonemes = synthesizers._espeak_phonemes(" ".join(PhonemeTokenizer().tokenize(word)))
    said = [
        subprocess.run(["espeak-ng", "-v", "en-us", "-q", "-x", text], capture_output=True, text=True).stdout.strip()
        for text in (word, phonemes)
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("phrase", "said"),
    [
        ("Lights, on!", "Lights, on!"),
        ("radio 1999", "radio nineteen ninety-nine"),
        ("don’t go to the café at 20°", "don't go to the cafe at twenty degrees"),
    ],
)
def test_numbers_and_signs_are_said_as_their_phonemes_are(phrase, said, engine):
    command, text = synthesizers.command_for(SpokenClip(phrase, engine, "slt", 1.0, 1.0), "x.wav")
    handed = text or command[-1]
    assert said in handed and (phrase == said or phrase not in handed)
    assert PhonemeTokenizer().tokenize(said) == PhonemeTokenizer().tokenize(phrase)


@needs_any
def test_interrupted_run_goes_on_and_a_folder_grows(tmp_path, monkeypatch):
    spoken = []
    speak = synthesis._speak

    def failing(clip, folder, rate):
        if len(spoken) == 2:
            raise RuntimeError("power cut")
        speak(clip, folder, rate)
        spoken.append(clip)

    settings = {"clips_per_phrase": 2, "engines": installed_engines()[:1], "disable_tqdm": True}
    monkeypatch.setattr(synthesis, "_speak", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        synthesize_phrases(["one", "two"], tmp_path, **settings)
    monkeypatch.setattr(synthesis, "_speak", lambda *arguments: (spoken.append(arguments[0]), speak(*arguments)))
    synthesize_phrases(["one", "two"], tmp_path, **settings)
    assert len(spoken) == len(set(spoken)) == 4
    synthesize_phrases(["three"], tmp_path, **settings)
    with pytest.raises(ValueError, match="has clips of 16000 Hz"):
        synthesize_phrases(["three"], tmp_path, sampling_rate=8000, **settings)
    assert sorted(row["text"] for row in rows_of(tmp_path)) == ["one", "one", "three", "three", "two", "two"]


@needs_any
def test_a_folder_with_recordings_of_its_own_keeps_them_and_their_columns(tmp_path):
    # As a spreadsheet saves it.
    (tmp_path / "metadata.csv").write_text("file_name,text,licence\nown.wav,stop,CC0\n", encoding="utf-8-sig")
    synthesize_phrases(["yes"], tmp_path, clips_per_phrase=1, disable_tqdm=True)
    own, spoken = rows_of(tmp_path)
    assert (own["file_name"], own["text"], own["licence"], own["engine"]) == ("own.wav", "stop", "CC0", "")
    assert (spoken["text"], spoken["licence"]) == ("yes", "")


def test_a_metadata_of_something_else_is_refused_before_anything_is_spoken(monkeypatch, tmp_path):
    monkeypatch.setattr(synthesis, "installed_engines", lambda: ["flite"])
    monkeypatch.setattr(synthesis, "_speak", lambda *arguments: pytest.fail("spoken"))
    (tmp_path / "metadata.csv").write_text("path,transcript\nown.wav,stop\n")
    with pytest.raises(ValueError, match=r"metadata\.csv.* has no column file_name"):
        synthesize_phrases(["yes"], tmp_path, disable_tqdm=True)


def test_plan_is_seeded_and_varied(monkeypatch):
    monkeypatch.setattr(synthesis, "installed_engines", lambda: ["espeak-ng", "flite"])
    plan = plan_clips(["yes", "no"], clips_per_phrase=30)
    assert plan == plan_clips(["yes", "no"], clips_per_phrase=30)
    assert plan != plan_clips(["yes", "no"], clips_per_phrase=30, seed=1)
    # What else is in the list changes nothing.
    assert plan[30:] == plan_clips(["no"], clips_per_phrase=30)
    assert {clip.engine for clip in plan} == {"espeak-ng", "flite"}
    assert len({clip.voice for clip in plan}) > 15
    assert all(0.75 <= clip.speed <= 1.35 and 0.75 <= clip.pitch <= 1.35 for clip in plan)


def test_half_of_the_clips_are_by_american_voices(monkeypatch):
    """As the lexicon is; only one of espeak-ng's seven accents is theirs."""
    monkeypatch.setattr(synthesis, "installed_engines", lambda: ["espeak-ng"])
    plan = plan_clips(["yes", "no"], clips_per_phrase=200)
    american = sum(clip.voice.startswith("en-us+") for clip in plan)
    assert 160 < american < 240
    assert len({clip.voice.split("+")[0] for clip in plan}) == 7


def test_missing_engine_names_its_package(monkeypatch):
    monkeypatch.setattr(synthesis, "installed_engines", lambda: ["flite"])
    with pytest.raises(FileNotFoundError, match="apt-get install -y festival festvox-kallpc16k"):
        plan_clips(["yes"], engines=["flite", "festival"])
    monkeypatch.setattr(synthesis, "installed_engines", lambda: [])
    with pytest.raises(FileNotFoundError, match="espeak-ng or mbrola or pico or rhvoice or flite or festival"):
        plan_clips(["yes"])


def test_bad_input_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(synthesis, "installed_engines", lambda: ["flite", "espeak-ng"])
    monkeypatch.setattr(synthesis, "_speak", lambda *arguments: pytest.fail("spoken"))
    with pytest.raises(ValueError, match="`phrases` is empty"):
        plan_clips([])
    with pytest.raises(TypeError, match="must be a list of phrases, got the one text 'yes'"):
        synthesize_phrases("yes", tmp_path / "clips")
    with pytest.raises(ValueError, match="`engines` has"):
        plan_clips(["yes"], engines=["sam"])
    with pytest.raises(ValueError, match="`speeds` must be a range"):
        plan_clips(["yes"], speeds=(0.1, 1.0))
    with pytest.raises(ValueError, match="espeak-ng and mbrola alone"):
        plan_clips(["{HH EY1}"], engines=["flite"])
    with pytest.raises(ValueError, match="`clips_per_phrase` must be at least 1"):
        plan_clips(["yes"], clips_per_phrase=0)
    for phrase, problem in [
        ("!?", "Nothing in the phrase '!\\?' can be spoken"),
        ("___", "Nothing in the phrase '___' can be spoken"),
        ("привет", "not Latin"),
        ("{XX} on", "unknown symbols"),
    ]:
        with pytest.raises(ValueError, match=problem):
            synthesize_phrases(["yes", phrase], tmp_path, engines=["espeak-ng"])
    with pytest.raises(TypeError, match="`phrases` must be strings, got 5"):
        synthesize_phrases(["yes", 5], tmp_path)
    with pytest.raises(ValueError, match="`num_proc` must be at least 1"):
        synthesize_phrases(["yes"], tmp_path, num_proc=0)


@pytest.mark.parametrize(("command", "problem"), [("exit 3", "exit status 3"), ("sleep 9", "no answer within")])
def test_failing_engine_is_reported_with_its_phrase(command, problem, monkeypatch, tmp_path):
    monkeypatch.setattr(synthesis, "installed_engines", lambda: ["flite"])
    monkeypatch.setattr(synthesis, "command_for", lambda clip, output: (["sh", "-c", command], ""))
    monkeypatch.setattr(synthesis, "_SECONDS_PER_CLIP", 0.2)
    with pytest.raises(RuntimeError, match=f"for the phrase 'yes'.*{problem}"):
        synthesize_phrases(["yes"], tmp_path, disable_tqdm=True)
    assert not list(tmp_path.rglob("*.flac"))
