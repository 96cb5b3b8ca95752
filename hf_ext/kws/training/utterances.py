"""Clips with their text: the rows of folders, and what is in their files."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_ext._extras import missing_extra
from hf_ext.kws.audio_input import MOST_CHANNELS, check_sampling_rate, resample, to_mono_float


def load_utterances(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """
    The rows of an `audiofolder`, such as [`synthesize_phrases`] writes, with the paths of their clips.

    Args:
        folder (`str` or `os.PathLike`):
            A folder with clips and a `metadata.csv` that has `file_name` and `text`.

    Returns:
        `list[dict]`: `audio`, the path of a clip, and the other columns as text. Rows without text are left out.

    Raises:
        FileNotFoundError: if there is no `metadata.csv`.
        ValueError: if it lacks a column or the name of a clip, or is no UTF-8.
    """
    path = Path(folder) / "metadata.csv"
    if not path.exists():
        raise FileNotFoundError(f"`folder` ({folder}) has no metadata.csv with the columns file_name and text.")
    _, rows = read_table(path)
    missing = {"file_name", "text"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path} has no rows or lacks the columns {sorted(missing)}.")
    # A short row has `None` in its last columns, and a long one has a column `None`.
    rows = [row for row in rows if (row["text"] or "").strip()]
    for row in rows:
        if not row["file_name"]:
            raise ValueError(f"{path} has the text {row['text']!r} without a file_name.")
    return [
        {
            "audio": str(path.parent / row["file_name"]),
            **{name: value for name, value in row.items() if name not in ("file_name", None)},
        }
        for row in rows
    ]


def read_table(path: str | os.PathLike[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns and the rows of a CSV file; raises a `ValueError` that names it if it is no text in UTF-8, or no CSV."""
    try:
        # Spreadsheets put a mark before the first column.
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            return list(reader.fieldnames or ()), rows
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is no text in UTF-8: save it as such ({error}).") from error
    except csv.Error as error:
        raise ValueError(f"{os.fspath(path)} is no CSV file: {error}.") from error


def read_audio(row: Mapping[str, Any], sampling_rate: int = 16000) -> torch.Tensor:
    """
    The clip of a row.

    Args:
        row (`Mapping`):
            `audio` is a path, what `datasets.Audio(decode=False)` holds (`path` and `bytes`), or what decoded audio is
            (`array` of shape `(num_samples,)` or `(num_samples, num_channels)`, and `sampling_rate`). `start` and `end`, in
            seconds, cut a piece out.
        sampling_rate (`int`, *optional*, defaults to `16000`):
            Rate to return, in hertz. Channels are averaged.

    Returns:
        `torch.Tensor` of shape `(num_samples,)`: floats within -1 and 1.

    Raises:
        ValueError: if there is no audio, it can't be read, or the piece is none of it.
    """
    audio = row.get("audio")
    start, end = seconds_of(row, "start"), seconds_of(row, "end")
    if audio is None or isinstance(audio, np.ndarray):
        given = "no `audio`" if audio is None else "an array as `audio`, without its rate"
        raise ValueError(
            f"The row has {given}: it is a path, or a dict of `path` or `bytes`, or of `array` and `sampling_rate`."
        )
    # What `datasets` decodes with torchcodec has the samples under the same names, without being a mapping.
    decoded = "array" in audio if isinstance(audio, Mapping) else not isinstance(audio, (str, os.PathLike))
    if decoded:
        its_rate = audio.get("sampling_rate") if isinstance(audio, Mapping) else audio["sampling_rate"]
        rate, name = check_sampling_rate(its_rate), "array"
        whole = np.asarray(audio["array"])
        if whole.ndim == 2 and whole.shape[1] > MOST_CHANNELS:
            raise ValueError(f"`array` has the shape {whole.shape}: transpose it, to have the channels last.")
        samples = whole[int((start or 0) * rate) : None if end is None else int(end * rate)]
    else:
        soundfile = _soundfile()
        content = audio.get("bytes") if isinstance(audio, Mapping) else None
        path = audio.get("path") if isinstance(audio, Mapping) else os.fspath(audio)
        name = "bytes" if path is None else str(path)
        if not content and path is None:
            raise ValueError("The `audio` of the row has neither `path` nor `bytes`.")
        try:
            with soundfile.SoundFile(io.BytesIO(content) if content else path) as file:
                rate = file.samplerate
                file.seek(min(int((start or 0) * rate), file.frames))
                count = -1 if end is None else max(int(end * rate) - file.tell(), 0)
                samples = file.read(count, dtype="float32")
        except soundfile.LibsndfileError as error:
            raise ValueError(f"The audio {name} can't be read: {error}") from error
    if start or end is not None:
        name = f"{name} from {start or 0} s to {'its end' if end is None else f'{end} s'}"
    mono = to_mono_float(samples, -1 if samples.ndim == 2 else None, name=name)
    return resample(mono, rate, sampling_rate)


def seconds_of(row: Mapping[str, Any], name: str) -> float | None:
    """`start` or `end` of a row; `None` where it has none."""
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"`{name}` must be in seconds from the beginning of the clip on, got {value!r}.")
    return seconds


def duration_of(row: Mapping[str, Any]) -> float:
    """Seconds of the clip of a row, from its columns if they tell, else from its file."""
    if row.get("start") not in (None, "") and row.get("end") not in (None, ""):
        return float(row["end"]) - float(row["start"])
    if row.get("duration_s") not in (None, ""):
        return float(row["duration_s"])
    if isinstance(row["audio"], (str, os.PathLike)):
        return float(_soundfile().info(os.fspath(row["audio"])).duration)
    return len(read_audio(row)) / 16000


def column(rows: Any, name: str) -> list[Any]:
    """One column of a list of rows or of a `datasets.Dataset`."""
    # A datasets.Dataset gives a column without reading the audio of its rows.
    if hasattr(rows, "column_names"):
        return list(rows[name])
    return [row[name] for row in rows]


def are_at_hand(rows: Any) -> bool:
    """Whether columns are read without making each row, and its audio."""
    return isinstance(rows, (list, tuple)) or hasattr(rows, "column_names")


def check_columns(argument: str, rows: Any, names: Sequence[str]) -> None:
    """Raises an error that names the argument for what are no rows, and for the first that lacks a column or has no text."""
    if hasattr(rows, "iloc"):
        # Asked for rows, it gives the names of its columns.
        raise TypeError(f"`{argument}` is a table of pandas: make it a list of rows, with `to_dict('records')`.")
    if isinstance(rows, (str, Mapping)) or not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
        raise TypeError(f"`{argument}` must be a list of rows or a split of a dataset, got {type(rows).__name__}.")
    if not are_at_hand(rows):
        return
    for i, present in enumerate([rows.column_names] if hasattr(rows, "column_names") else rows):
        if lacking := [name for name in names if name not in present]:
            raise ValueError(f"`{argument}` lacks {lacking} in row {i}: each row has {list(names)}.")
    for i, text in enumerate(column(rows, "text")):
        if not isinstance(text, str):
            raise TypeError(f"`{argument}` has in row {i} the text {text!r}: write what is said as a string.")


def undecoded(rows: Any) -> Any:
    """Rows whose clips stay files where they are a dataset's: it decodes with torchcodec alone, and these soundfile reads."""
    features = rows.features if hasattr(rows, "cast_column") else None
    for name, feature in (features or {}).items():
        if getattr(feature, "decode", False) and type(feature).__name__ == "Audio":
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def _soundfile() -> Any:
    try:
        import soundfile
    except ModuleNotFoundError as error:
        raise missing_extra(error, needed_by="Reading audio files") or error from error
    return soundfile
