"""Public corpora as rows of audio and text: LibriPhrase from any word alignment or from its lists, and Speech Commands."""

import math
import os
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from hf_ext.kws.tokenization_phoneme import PhonemeTokenizer
from hf_ext.kws.training.aligner_files import read_words
from hf_ext.kws.training.mining import PhoneticIndex
from hf_ext.kws.training.utterances import read_table


# What aligners write where nothing, or nothing known, is said.
_SILENCES = {"", "<sil>", "sil", "sp", "spn", "<s>", "</s>", "<eps>", "<unk>", "[noise]", "[speech]", "++noise++"}
_LIBRIPHRASE_KINDS = {
    "diffspk_positive": "positive",
    "diffspk_easyneg": "random",
    "diffspk_hardneg": "hard",
}
_CSV_COLUMNS = ("anchor", "anchor_text", "comparison", "comparison_text", "type", "target")


class AlignedWord(NamedTuple):
    """A word and when it is said, in seconds. Silence has no text."""

    text: str
    start: float
    end: float


def read_alignment(path: str | os.PathLike[str], tier: str = "words") -> list[AlignedWord]:
    """
    Words and their times from the file of an aligner.

    Args:
        path (`str` or `os.PathLike`):
            A Praat TextGrid, long or short, or JSON: of the Montreal Forced Aligner, of PocketSphinx, or a list of objects
            with `word` (or `text`), `start` and `end`.
        tier (`str`, *optional*, defaults to `"words"`):
            The tier of words, where there are several.

    Returns:
        `list[AlignedWord]`: in order. Silence has an empty text.

    Raises:
        ValueError: if the file is none of these or was cut off, has no such tier or several, or times that are none.

    Example:

    ```python
    >>> import json
    >>> from pathlib import Path
    >>> from hf_ext import phrases_of_words, read_alignment

    >>> words = [{"word": "lights", "start": 0.1, "end": 0.6}, {"word": "on", "start": 0.6, "end": 0.9}]
    >>> _ = Path("clip.json").write_text(json.dumps(words))
    >>> [row["text"] for row in phrases_of_words(read_alignment("clip.json"), "clip.wav")]
    ['lights', 'lights on']
    ```
    """
    words = read_words(Path(path), tier)
    for word, start, end in words:
        if not 0 <= start <= end < math.inf:
            raise ValueError(f"`path` ({path}) has the word {word!r} from {start} s to {end} s, which is no time.")
    return [AlignedWord("" if word.lower() in _SILENCES else word, start, end) for word, start, end in words]


def phrases_of_words(
    words: Sequence[AlignedWord],
    audio: str,
    speaker: str = "",
    max_words: int = 4,
    min_duration: float = 0.5,
    max_duration: float = 2.0,
) -> list[dict[str, Any]]:
    """
    All runs of words in an utterance, by the rule of LibriPhrase: no silence among them, and together as long as wanted.

    Args:
        words (`Sequence[AlignedWord]`):
            What [`read_alignment`] gives.
        audio (`str`):
            Path of the recording.
        speaker (`str`, *optional*, defaults to `""`):
            Who speaks.
        max_words (`int`, *optional*, defaults to `4`):
            Longest run.
        min_duration (`float`, *optional*, defaults to `0.5`), max_duration (`float`, *optional*, defaults to `2.0`):
            Bounds of the sum of the words' durations, in seconds.

    Returns:
        `list[dict]`: rows for [`KwsPairDataset`], with `audio`, `start` and `end` in seconds, `text` and `speaker`.
    """
    if max_words < 1 or not 0 <= min_duration <= max_duration:
        raise ValueError(
            f"`max_words` ({max_words}) must be at least 1, and `min_duration` ({min_duration}) and `max_duration` "
            f"({max_duration}) a range of seconds."
        )
    rows = []
    for first in range(len(words)):
        for run in (words[first : first + count] for count in range(1, min(max_words, len(words) - first) + 1)):
            if not all(word.text for word in run):
                break
            # Rounded: sums of hundredths are no exact floats.
            if min_duration <= round(sum(word.end - word.start for word in run), 6) <= max_duration:
                text = " ".join(word.text for word in run)
                times = {"start": run[0].start, "end": run[-1].end}
                rows.append({"audio": audio, **times, "text": text, "speaker": speaker})
    return rows


def build_libriphrase(
    phrases: Sequence[Mapping[str, Any]],
    num_clips: int = 3,
    max_episodes: int | None = None,
    tokenizer: PhonemeTokenizer | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    Trials by the recipe of LibriPhrase: for a phrase of a speaker, clips of other speakers who say it, of any other phrases
    that can be told apart, and of the phrases that sound nearest, all of as many words.

    The nearest are those of [`PhoneticIndex`]. The original's distance lets longer and shorter phrases hardly pass, and its
    draws have no seed: compare with others on the official lists, see [`libriphrase_trials`].

    Args:
        phrases (`Sequence[Mapping]`):
            Rows of [`phrases_of_words`], with `speaker`.
        num_clips (`int`, *optional*, defaults to `3`):
            Clips of the speaker, of others who say the phrase, and phrases of each kind of negative. A speaker counts who
            says it twice as often, as in the original.
        max_episodes (`int`, *optional*):
            At most so many pairs of speaker and phrase.
        tokenizer ([`PhonemeTokenizer`], *optional*):
            By default one with the packaged lexicon alone.
        seed (`int`, *optional*, defaults to `0`):
            For the draws.

    Returns:
        `list[dict]`: trials for [`KwsTrialDataset`]: the phrase of the anchor in the other clip.

    Raises:
        ValueError: if no phrase is said often enough, a row lacks a column, or a number is not positive.
    """
    if num_clips < 1 or (max_episodes is not None and max_episodes < 1):
        raise ValueError(f"`num_clips` ({num_clips}) and `max_episodes` ({max_episodes}) must be at least 1.")
    for i, row in enumerate(phrases):
        if lacking := [name for name in ("audio", "text", "speaker") if name not in row]:
            raise ValueError(f"`phrases` lacks {lacking} in row {i}: make them with `phrases_of_words`.")
    said: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in phrases:
        said[row["text"]][row["speaker"]].append(row)
    episodes = [
        (text, speaker)
        for text, speakers in sorted(said.items())
        for speaker, rows in sorted(speakers.items())
        if len(rows) >= 2 * num_clips and len(speakers) > num_clips
    ]
    if not episodes:
        raise ValueError(
            f"`phrases` has none that a speaker says {2 * num_clips} times and {num_clips} others too: use more recordings or "
            f"a smaller `num_clips` ({num_clips})."
        )
    drawn_from = Random(seed)
    if max_episodes is not None:
        episodes = sorted(drawn_from.sample(episodes, min(max_episodes, len(episodes))))
    by_count: dict[int, list[str]] = defaultdict(list)
    for text in said:
        by_count[len(text.split())].append(text)
    indices = {
        count: PhoneticIndex(by_count[count], tokenizer) for count in {len(text.split()) for text, _ in episodes}
    }
    trials = []
    for text, speaker in episodes:
        index = indices[len(text.split())]
        near = [neighbour.phrase for neighbour in index.nearest(text, num_clips)]
        # A homophone is no mismatch that anybody could hear.
        others = index.apart(text)
        for _ in range(num_clips):
            speakers = drawn_from.sample(sorted(set(said[text]) - {speaker}), num_clips)
            chosen = [("positive", drawn_from.choice(said[text][other])) for other in speakers]
            for kind, texts in (("random", drawn_from.sample(others, min(num_clips, len(others)))), ("hard", near)):
                for other in texts:
                    clips = said[other][drawn_from.choice(sorted(said[other]))]
                    chosen.append((kind, drawn_from.choice(clips)))
            trials += [{**row, "phrase": text, "label": int(kind == "positive"), "kind": kind} for kind, row in chosen]
    return trials


def libriphrase_trials(
    csv_files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    audio_dir: str | os.PathLike[str],
    subset: Literal["easy", "hard"] = "hard",
    expansion: Literal["four", "two"] = "four",
) -> list[dict[str, Any]]:
    """
    The trials of the official lists, in either of the two ways that papers expand them; both give as many.

    Args:
        csv_files (`str`, `os.PathLike` or `Iterable[str | os.PathLike]`):
            `libriphrase_diffspk_all_1word.csv` and so on, one or several.
        audio_dir (`str` or `os.PathLike`):
            What the paths in the lists are relative to.
        subset (`"easy"` or `"hard"`, *optional*, defaults to `"hard"`):
            Random negatives or those that sound alike.
        expansion (`"four"` or `"two"`, *optional*, defaults to `"four"`):
            `"four"` (PhonMatchNet): of each negative row both clips with their own text and with the other's. `"two"`
            (MM-KWS, DS-KWS): of negative and positive rows each text with the clip of the other.

    Returns:
        `list[dict]`: trials for [`KwsTrialDataset`].

    Raises:
        ValueError: for another subset or expansion, if a list is no CSV in UTF-8 or lacks a column or a value, and if none has
            trials of the subset.
    """
    if subset not in ("easy", "hard") or expansion not in ("four", "two"):
        raise ValueError(
            f"`subset` must be 'easy' or 'hard' and `expansion` 'four' or 'two', got {subset!r} and {expansion!r}."
        )
    wanted = "random" if subset == "easy" else "hard"
    trials = []
    for path in [csv_files] if isinstance(csv_files, (str, os.PathLike)) else csv_files:
        columns, rows = read_table(path)
        missing = sorted(set(_CSV_COLUMNS) - set(columns))
        if missing:
            raise ValueError(f"The list {path} lacks the columns {missing}.")
        for number, row in enumerate(rows, start=1):
            if lacking := [name for name in _CSV_COLUMNS if not row[name]]:
                raise ValueError(f"The list {path} has no {lacking[0]} in row {number}.")
            if row["target"] not in ("0", "1", "0.0", "1.0"):
                raise ValueError(f"The list {path} has in row {number} the target {row['target']!r}, no 0 or 1.")
            kind = _LIBRIPHRASE_KINDS.get(row["type"], row["type"])
            sides = [(str(Path(audio_dir) / row[side]), row[f"{side}_text"]) for side in ("anchor", "comparison")]
            if kind == wanted or (kind == "positive" and expansion == "two"):
                label = int(float(row["target"]))
                for (audio, text), (_, phrase) in (sides, sides[::-1]):
                    if expansion == "four":
                        trials.append(_trial(audio, text, text, 1, "positive"))
                    trials.append(_trial(audio, text, phrase, label, kind))
    if not trials:
        kinds = {kind: name for name, kind in _LIBRIPHRASE_KINDS.items()}
        raise ValueError(
            f"`csv_files` have no rows of the type {kinds[wanted]!r}, which `subset`={subset!r} is made of."
        )
    return trials


def load_speech_commands(
    source: Any,
    words: Sequence[str] | None = None,
    split: Literal["all", "train", "validation", "test"] = "all",
    extract_to: str | os.PathLike[str] | None = None,
) -> Any:
    """
    Google Speech Commands, from its folder, its archive or the Hub.

    Args:
        source (`str`, `os.PathLike`, `datasets.Dataset` or `datasets.DatasetDict`):
            A folder with one folder per word, `speech_commands_v0.01.tar.gz` (or v0.02), or what `datasets.load_dataset`
            made of `google/speech_commands`.
        words (`Sequence[str]`, *optional*):
            Only these.
        split (`str`, *optional*, defaults to `"all"`):
            `"train"`, `"validation"` or `"test"` by the lists in the folder, or of a `datasets.DatasetDict`.
        extract_to (`str` or `os.PathLike`, *optional*):
            Where to unpack an archive, once.

    Returns:
        `list[dict]` or `datasets.Dataset`: rows for [`KwsPairDataset`], with `audio`, `text` and `speaker`. Background noise
        is left out.

    Raises:
        FileNotFoundError: if there is no such folder or archive, or no list of the split.
        ValueError: if an archive has nowhere to go or is damaged, or a word, split or column is not there.
    """
    if split not in ("all", "train", "validation", "test"):
        raise ValueError(f"`split` must be 'all', 'train', 'validation' or 'test', got {split!r}.")
    if hasattr(source, "cast_column"):
        return _speech_commands_of_the_hub(source, words, split)
    folder = Path(source)
    if folder.is_file():
        if extract_to is None:
            raise ValueError(f"`source` ({folder}) is an archive: say where to unpack it, with `extract_to`.")
        folder = Path(extract_to)
        done = folder / ".unpacked"
        if not done.exists():
            try:
                with tarfile.open(source) as archive:
                    # The filter keeps files inside the folder, whatever their names are.
                    archive.extractall(folder, filter="data")
            except (tarfile.ReadError, EOFError, zlib.error) as error:
                raise ValueError(f"`source` ({source}) is no archive, or was cut off: download it again.") from error
            done.touch()
    if not folder.is_dir():
        raise FileNotFoundError(f"`source` ({folder}) is neither a folder nor an archive.")
    spoken = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(("_", ".")))
    absent = sorted(set(words or ()) - set(spoken))
    if absent or not spoken:
        raise ValueError(f"`source` ({folder}) has no folders for {absent or 'any word'}; it has {spoken}.")
    lists = {"test": "testing_list.txt", "validation": "validation_list.txt"}
    held_out = {which: _listed(folder / name) for which, name in lists.items()}
    if split != "all" and None in held_out.values():
        raise FileNotFoundError(f"`split`={split!r} needs testing_list.txt and validation_list.txt in {folder}.")
    rows = []
    for word in sorted(set(words)) if words else spoken:
        for path in sorted((folder / word).iterdir()):
            if path.suffix.lower() not in (".wav", ".ogg", ".flac"):
                continue
            name = f"{word}/{path.name}"
            own = next((which for which, names in held_out.items() if names and name in names), "train")
            if split in ("all", own):
                rows.append({"audio": str(path), "text": word, "speaker": path.stem.partition("_nohash_")[0]})
    return rows


def _speech_commands_of_the_hub(dataset: Any, words: Sequence[str] | None, split: str) -> Any:
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise ValueError(f"`source` has the splits {sorted(dataset)}: name one with `split`, got {split!r}.")
        dataset = dataset[split]
    elif split != "all":
        raise ValueError(f"`split`={split!r} chooses among those of a `DatasetDict`, and `source` is one split.")
    if missing := sorted({"audio", "label", "speaker_id"} - set(dataset.column_names)):
        raise ValueError(f"`source` lacks the columns {missing} of google/speech_commands.")
    texts = [dataset.features["label"].int2str(label) for label in dataset["label"]]
    spoken = sorted(text for text in set(texts) if not text.startswith("_"))
    if absent := sorted(set(words or ()) - set(spoken)):
        raise ValueError(f"`source` has no clips of {absent}; it has {spoken}.")
    wanted = [i for i, text in enumerate(texts) if text in (words or spoken)]
    # `datasets` decodes with torchcodec alone; what is not decoded soundfile reads.
    dataset = dataset.cast_column("audio", type(dataset.features["audio"])(decode=False))
    return dataset.add_column("text", texts).rename_column("speaker_id", "speaker").select(wanted)


def _trial(audio: str, text: str, phrase: str, label: int, kind: str) -> dict[str, Any]:
    return {"audio": audio, "text": text, "phrase": phrase, "label": label, "kind": kind}


def _listed(path: Path) -> set[str] | None:
    return set(path.read_text(encoding="utf-8").split()) if path.exists() else None
