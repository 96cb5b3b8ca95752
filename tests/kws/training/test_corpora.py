"""Alignments, LibriPhrase and Speech Commands."""

import csv
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import soundfile

from hf_ext.kws.training.corpora import (
    AlignedWord,
    build_libriphrase,
    libriphrase_trials,
    load_speech_commands,
    phrases_of_words,
    read_alignment,
)
from hf_ext.kws.training.datasets import KwsPairDataset
from hf_ext.kws.training.utterances import read_audio


WORDS = [("", 0.0, 0.2), ("mister", 0.2, 0.6), ('"john"', 0.6, 1.0), ("", 1.0, 1.25), ("2", 1.25, 1.5)]
EXPECTED = [AlignedWord(*word) for word in WORDS]

LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.5
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.5
        intervals: size = {count}
{intervals}
    item [2]:
        class = "TextTier"
        name = "events"
        xmin = 0
        xmax = 1.5
        points: size = 1
        points [1]:
            number = 0.5
            mark = "click"
"""


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def long_textgrid():
    intervals = [
        f"        intervals [{i}]:\n            xmin = {start}\n            xmax = {end}\n            text = {quoted(text)}"
        for i, (text, start, end) in enumerate(WORDS, 1)
    ]
    return LONG.format(count=len(WORDS), intervals="\n".join(intervals))


def short_textgrid():
    intervals = "\n".join(f"{start}\n{end}\n{quoted(text)}" for text, start, end in WORDS)
    head = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n1.5\n<exists>\n1\n'
    return f'{head}"IntervalTier"\n"words"\n0\n1.5\n{len(WORDS)}\n{intervals}\n'


def older_short_textgrid():
    # Praat's own, before it named the form by the content alone.
    return short_textgrid().replace('"ooTextFile"\nObject class = ', '"ooTextFile short"\n')


def montreal():
    return json.dumps({"tiers": {"words": {"entries": [[start, end, text] for text, start, end in WORDS]}}})


def pocketsphinx():
    said = [
        {"b": start, "d": end - start, "p": 1.0, "t": (text and f"{text}(2)") or "<sil>"} for text, start, end in WORDS
    ]
    return json.dumps({"b": 0, "d": 1.5, "t": "", "w": said})


def plain_list():
    return json.dumps([{"word": text, "start": start, "end": end} for text, start, end in WORDS])


@pytest.mark.parametrize(
    "form", [long_textgrid, short_textgrid, older_short_textgrid, montreal, pocketsphinx, plain_list]
)
def test_alignments_of_every_form_are_the_same(form, tmp_path):
    (tmp_path / "file").write_text(form())
    assert read_alignment(tmp_path / "file") == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_alignments_of_every_encoding_that_praat_writes(encoding, tmp_path):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "file").write_text(mark + long_textgrid().replace("mister", "café"), encoding=encoding)
    assert read_alignment(tmp_path / "file")[1].text == "café"


TIER = '"{kind}"\n"{name}"\n0\n1\n2\n{entries}\n'
WHOLE = TIER.format(kind="IntervalTier", name="words", entries='0\n0.5\n"hi"\n0.5\n1\n"you"')


@pytest.mark.parametrize(
    ("tiers", "problem"),
    [
        # An interval less than there are said to be.
        ([WHOLE.removesuffix('0.5\n1\n"you"\n')], "was cut off: the tier 'words' has 2 entries"),
        ([WHOLE, WHOLE], "there are 2 tiers 'words'"),
        ([TIER.format(kind="TextTier", name="words", entries='0\n"hi"\n1\n"you"')], "'words' has points of time"),
    ],
)
def test_textgrids_that_words_would_be_lost_of_are_refused(tiers, problem, tmp_path):
    head = f'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n1\n<exists>\n{len(tiers)}\n'
    (tmp_path / "file").write_text(head + "".join(tiers))
    with pytest.raises(ValueError, match=f"`path`.*{problem}"):
        read_alignment(tmp_path / "file")


def test_alignment_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"`path` \(.*file\)"):
        read_alignment(tmp_path / "file")
    word = '[{"word": %s, "start": %s, "end": %s}]'
    times = [word % ('"x"', *each) for each in ((2, 1), (-1, 1), ("NaN", 1), (0, "Infinity"))]
    for content in ("hello", '{"a": 1}', "[1, 2]", "{", "", word % ("null", 0, 1), *times):
        (tmp_path / "file").write_text(content)
        with pytest.raises(ValueError, match="`path`"):
            read_alignment(tmp_path / "file")
    (tmp_path / "file").write_text(montreal())
    with pytest.raises(ValueError, match="no tier 'phones', only"):
        read_alignment(tmp_path / "file", tier="phones")


def test_runs_of_words_by_libriphrases_rule():
    rows = phrases_of_words(EXPECTED, "a.wav", speaker="s")
    assert [(row["text"], row["start"], row["end"]) for row in rows] == [('mister "john"', 0.2, 1.0)]
    rows = phrases_of_words(EXPECTED, "a.wav", min_duration=0.25, max_duration=0.4)
    assert [row["text"] for row in rows] == ["mister", '"john"', "2"]
    with pytest.raises(ValueError, match="`max_words`"):
        phrases_of_words(EXPECTED, "a.wav", max_words=0)


def test_aligned_sentences_become_phrases(shared_data):
    folder = shared_data / "speech" / "sentences"
    rows = []
    for path in sorted((folder / "alignments").glob("*[0-9].json")):
        rows += phrases_of_words(read_alignment(path), str(folder / f"{path.stem}.ogg"), speaker="reader")
    assert len(rows) > 100 and "selfish" in {row["text"] for row in rows}
    assert not any("<" in row["text"] or "(" in row["text"] for row in rows)
    for row in rows[::20]:
        clip = read_audio(row)
        assert len(clip) / 16000 == pytest.approx(row["end"] - row["start"], abs=1e-3)
        assert clip.abs().max() > 0.01
    pair = KwsPairDataset(rows, every_kind=True)[2]
    assert pair["kind"] == "hard" and pair["phrase"] != pair["text"]


def test_libriphrase_is_built_by_its_recipe():
    texts = ["friend", "trend", "friends", "rent", "mother"]
    rows = [
        {"audio": f"{text}-{speaker}-{i}.wav", "text": text, "speaker": str(speaker)}
        for text in texts
        for speaker in range(5)
        for i in range(6 if speaker == 0 else 1)
    ]
    trials = build_libriphrase(rows)
    assert len(trials) == len(texts) * 27
    assert Counter(trial["kind"] for trial in trials) == {kind: 45 for kind in ("positive", "random", "hard")}
    for trial in trials:
        assert (trial["phrase"] == trial["text"]) == trial["label"] == (trial["kind"] == "positive")
        assert trial["kind"] != "positive" or trial["speaker"] != "0"
    hard = {trial["text"] for trial in trials if trial["phrase"] == "friend" and trial["kind"] == "hard"}
    assert hard == {"trend", "friends", "rent"}
    assert trials == build_libriphrase(rows) != build_libriphrase(rows, seed=1)
    assert len(build_libriphrase(rows, max_episodes=2)) == 54
    with pytest.raises(ValueError, match="`num_clips`"):
        build_libriphrase(rows, num_clips=4)
    for numbers in ({"num_clips": 0}, {"max_episodes": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            build_libriphrase(rows, **numbers)
    with pytest.raises(ValueError, match=r"`phrases` lacks \['audio', 'speaker'\] in row 0"):
        build_libriphrase([{"text": "friend"}])


def test_homophones_are_no_mismatches():
    texts = ["their", "there", "They're", "mother"]
    rows = [{"audio": f"{text}-{i}", "text": text, "speaker": str(i)} for text in texts for i in range(2)] * 2
    trials = build_libriphrase(rows, num_clips=1)
    told_apart = {frozenset((trial["phrase"], trial["text"])) for trial in trials if not trial["label"]}
    assert told_apart == {frozenset((text, "mother")) for text in texts[:3]}


def test_official_lists_expand_both_ways(tmp_path):
    columns = "anchor,anchor_spk,anchor_text,anchor_dur,comparison,comparison_spk,comparison_text,comparison_dur,type,target,class"
    lines = [
        "a.wav,1,friend,0.6,b.wav,2,friend,0.6,diffspk_positive,1,1",
        "a.wav,1,friend,0.6,c.wav,2,mother,0.6,diffspk_easyneg,0,1",
        "a.wav,1,friend,0.6,d.wav,2,trend,0.6,diffspk_hardneg,0,1",
    ]
    (tmp_path / "list.csv").write_text("\n".join([columns, *lines]))

    def short(**options):
        trials = libriphrase_trials([tmp_path / "list.csv"], "/x", **options)
        return [(trial["audio"][-5], trial["phrase"], trial["label"]) for trial in trials]

    assert short() == [("a", "friend", 1), ("a", "trend", 0), ("d", "trend", 1), ("d", "friend", 0)]
    assert short(subset="easy", expansion="two") == [
        ("a", "friend", 1), ("b", "friend", 1), ("a", "mother", 0), ("c", "friend", 0),
    ]  # fmt: skip
    # One list, saved by a spreadsheet.
    (tmp_path / "own.csv").write_text("\ufeff" + "\n".join([columns, *lines]), encoding="utf-8")
    for path in (tmp_path / "own.csv", str(tmp_path / "own.csv")):
        assert libriphrase_trials(path, "/x") == libriphrase_trials([tmp_path / "list.csv"], "/x")
    with pytest.raises(ValueError, match="`subset` must be"):
        short(subset="all")
    (tmp_path / "easy.csv").write_text("\n".join([columns, lines[1]]))
    with pytest.raises(ValueError, match="no rows of the type 'diffspk_hardneg', which `subset`='hard' is made of"):
        libriphrase_trials(tmp_path / "easy.csv", "/x")
    with (tmp_path / "list.csv").open("w") as file:
        csv.writer(file).writerow(["anchor", "target"])
    with pytest.raises(ValueError, match="lacks the columns"):
        short()


def commands(folder):
    for name in ("yes/ab_nohash_0.wav", "yes/cd_nohash_0.wav", "no/ab_nohash_1.wav", "_background_noise_/tap.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "testing_list.txt").write_text("yes/cd_nohash_0.wav\n")
    (folder / "validation_list.txt").write_text("no/ab_nohash_1.wav\n")


def test_speech_commands_from_folder_and_archive(tmp_path):
    commands(tmp_path / "folder")
    rows = load_speech_commands(tmp_path / "folder")
    assert [(row["text"], row["speaker"]) for row in rows] == [("no", "ab"), ("yes", "ab"), ("yes", "cd")]
    for split, speakers in {"train": ["ab"], "test": ["cd"], "validation": []}.items():
        rows = load_speech_commands(tmp_path / "folder", words=["yes"], split=split)
        assert [row["speaker"] for row in rows] == speakers

    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "folder", arcname=".")
    for _ in range(2):
        rows = load_speech_commands(tmp_path / "a.tar.gz", extract_to=tmp_path / "unpacked")
    assert len(rows) == 3 and rows[0]["audio"] == str(tmp_path / "unpacked" / "no" / "ab_nohash_1.wav")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("a.wav,hi,b.wav,ho,diffspk_hardneg", " no target in row 2"),
        ("a.wav,hi", " no comparison in row 2"),
        ("a.wav,hi,b.wav,ho,diffspk_hardneg,x", "in row 2 the target 'x'"),
        ("a.wav,hi,b.wav,ho,diffspk_hardneg,2", "in row 2 the target '2'"),
    ],
)
def test_rows_of_official_lists_that_are_none_are_named(tmp_path, row, problem):
    path = tmp_path / "list.csv"
    path.write_text(
        f"anchor,anchor_text,comparison,comparison_text,type,target\na.wav,hi,b.wav,ho,diffspk_hardneg,0\n{row}\n"
    )
    with pytest.raises(ValueError, match=f"{path}.*{problem}"):
        libriphrase_trials(path, tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [("anchor,anchor_text\na.wav,café\n".encode("latin-1"), "no text in UTF-8"), (b'a\n"' + b"x" * 200_000, "no CSV")],
)
def test_official_lists_that_cannot_be_read_are_named(content, problem, tmp_path):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"list.csv is {problem}"):
        libriphrase_trials(tmp_path / "list.csv", tmp_path)


def speech_commands_of_the_hub(tmp_path):
    """The columns of google/speech_commands."""
    datasets = pytest.importorskip("datasets")
    soundfile.write(tmp_path / "clip.wav", np.full(1600, 0.5), 16000)
    rows = [
        {"file": f"{label}/{i}.wav", "audio": str(tmp_path / "clip.wav"), "label": label, "speaker_id": speaker}
        for i, (label, speaker) in enumerate([("yes", "ab"), ("no", "cd"), ("_silence_", None), ("yes", "ef")])
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(16000))
    return datasets, dataset.cast_column("label", datasets.ClassLabel(names=["yes", "no", "_silence_"]))


def test_speech_commands_from_the_hub(tmp_path):
    datasets, dataset = speech_commands_of_the_hub(tmp_path)
    rows = load_speech_commands(dataset)
    assert list(rows["text"]) == ["yes", "no", "yes"] and list(rows["speaker"]) == ["ab", "cd", "ef"]
    assert read_audio(rows[0])[0] == 0.5 and KwsPairDataset(rows, every_kind=True)[0]["phrase"] == "yes"
    splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([0])})
    assert list(load_speech_commands(splits, ["yes"], split="train")["text"]) == ["yes", "yes"]
    assert len(load_speech_commands(splits, split="test")) == 1
    for source, settings, message in [
        (splits, {}, r"has the splits \['test', 'train'\]: name one with `split`"),
        (splits, {"split": "validation"}, r"has the splits \['test', 'train'\]"),
        (dataset, {"split": "train"}, "`split`='train' chooses among those of a `DatasetDict`"),
        (dataset, {"words": ["maybe"]}, r"has no clips of \['maybe'\]; it has \['no', 'yes'\]"),
        (dataset.remove_columns("label"), {}, r"lacks the columns \['label'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_speech_commands(source, **settings)


def test_speech_commands_refuses_what_it_cannot_do(tmp_path):
    commands(tmp_path)
    with pytest.raises(ValueError, match=r"has no folders for \['maybe'\]"):
        load_speech_commands(tmp_path, words=["maybe"])
    with pytest.raises(ValueError, match="`split` must be"):
        load_speech_commands(tmp_path, split="dev")
    (tmp_path / "testing_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs testing_list\.txt"):
        load_speech_commands(tmp_path, split="train")
    with pytest.raises(FileNotFoundError, match="neither a folder nor an archive"):
        load_speech_commands(tmp_path / "none")
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(ValueError, match="`extract_to`"):
        load_speech_commands(tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "yes", arcname="yes")
    (tmp_path / "b.tar.gz").write_bytes((tmp_path / "b.tar.gz").read_bytes()[:-60])
    for name in ("a.tar.gz", "b.tar.gz"):
        with pytest.raises(ValueError, match="is no archive, or was cut off"):
            load_speech_commands(tmp_path / name, extract_to=tmp_path / "unpacked")


def test_archive_cannot_write_outside_its_folder(tmp_path):
    (tmp_path / "evil.txt").write_text("x")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "evil.txt", arcname="../outside.txt")
    with pytest.raises(tarfile.FilterError):
        load_speech_commands(tmp_path / "a.tar", extract_to=tmp_path / "in" / "side")
    assert not (tmp_path / "in" / "outside.txt").exists()
