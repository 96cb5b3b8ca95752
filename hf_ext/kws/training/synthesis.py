"""Word lists, spoken by the free synthesisers among Debian's packages."""

import csv
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from random import Random
from typing import Any

from tqdm.auto import tqdm

from hf_ext._extras import missing_extra
from hf_ext.kws.audio_input import check_sampling_rate, resample, to_mono_float
from hf_ext.kws.g2p import pronunciations
from hf_ext.kws.training.synthesizers import (
    ENGINES,
    PHONEME_ENGINES,
    SpokenClip,
    command_for,
    draw_voice,
    installed_engines,
)
from hf_ext.kws.training.utterances import read_table


_COLUMNS = ("file_name", "text", "speaker", "engine", "speed", "pitch", "duration_s")
_SECONDS_PER_CLIP = 60


def plan_clips(
    phrases: Iterable[str],
    clips_per_phrase: int = 4,
    engines: Sequence[str] | None = None,
    speeds: tuple[float, float] = (0.75, 1.35),
    pitches: tuple[float, float] = (0.75, 1.35),
    seed: int = 0,
) -> list[SpokenClip]:
    """
    Draws voice, speed and pitch for each clip. The arguments are those of [`synthesize_phrases`].

    Returns:
        `list[SpokenClip]`: What is drawn for a phrase does not depend on the other phrases.
    """
    if isinstance(phrases, str):
        raise TypeError(f"`phrases` must be a list of phrases, got the one text {phrases!r}.")
    phrases = list(dict.fromkeys(phrases))
    if not phrases:
        raise ValueError("`phrases` is empty: there is nothing to say.")
    for phrase in phrases:
        if not isinstance(phrase, str):
            raise TypeError(f"`phrases` must be strings, got {phrase!r}.")
    if clips_per_phrase < 1:
        raise ValueError(f"`clips_per_phrase` must be at least 1, got {clips_per_phrase}.")
    for name, (least, most) in {"speeds": speeds, "pitches": pitches}.items():
        if not 0.5 <= least <= most <= 2:
            raise ValueError(f"`{name}` must be a range within 0.5 and 2, got {(least, most)}.")
    available = _checked_engines(engines)
    clips = []
    for phrase in phrases:
        able = [engine for engine in available if engine in PHONEME_ENGINES or "{" not in phrase]
        if not able:
            raise ValueError(
                f"The phonemes in {phrase!r} can be spoken by espeak-ng and mbrola alone: add one to `engines`."
            )
        for i in range(clips_per_phrase):
            generator = Random(f"{seed} {i} {phrase}")
            engine = generator.choice(able)
            speed, pitch = (round(generator.uniform(*limits), 2) for limits in (speeds, pitches))
            clips.append(SpokenClip(phrase, engine, draw_voice(engine, generator), speed, pitch))
    return clips


def synthesize_phrases(
    phrases: Iterable[str],
    output_dir: str | os.PathLike[str],
    clips_per_phrase: int = 4,
    engines: Sequence[str] | None = None,
    speeds: tuple[float, float] = (0.75, 1.35),
    pitches: tuple[float, float] = (0.75, 1.35),
    sampling_rate: int = 16000,
    seed: int = 0,
    num_proc: int = 1,
    disable_tqdm: bool = False,
) -> Path:
    """
    Speaks each phrase with several voices, and writes an `audiofolder`: FLAC clips and a `metadata.csv` with the columns
    `file_name`, `text`, `speaker`, `engine`, `speed`, `pitch` and `duration_s`.

    Interrupted, it goes on where it was: clips that are there are not made again. A folder grows with further calls.

    Args:
        phrases (`Iterable[str]`):
            What to say. Phonemes in braces, `"{HH EY1} computer"`, are spoken by espeak-ng and mbrola.
        output_dir (`str` or `os.PathLike`):
            The folder.
        clips_per_phrase (`int`, *optional*, defaults to `4`):
            Clips of each phrase.
        engines (`Sequence[str]`, *optional*):
            Of `"espeak-ng"`, `"mbrola"`, `"pico"`, `"rhvoice"`, `"flite"` and `"festival"`, drawn alike; by default those
            that are installed. Half of an engine's clips are by its American voices, where it has them, as the lexicon is.
        speeds (`tuple[float, float]`, *optional*, defaults to `(0.75, 1.35)`), pitches (`tuple[float, float]`, *optional*,
        defaults to `(0.75, 1.35)`):
            Ranges to draw from, relative to the voice's own. Festival's HTS voices keep their pitch.
        sampling_rate (`int`, *optional*, defaults to `16000`):
            Rate of the clips in hertz.
        seed (`int`, *optional*, defaults to `0`):
            With the same engines the same clips are made.
        num_proc (`int`, *optional*, defaults to `1`):
            Synthesisers that run at a time.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to leave out the progress bar.

    Returns:
        `Path`: The folder, for [`load_utterances`].

    Raises:
        FileNotFoundError: if an engine is not installed or has no voice; it names the package.
        ValueError: if there is no phrase, one has no pronounceable character or one that is not Latin, an argument is out of
            its range, or the folder has a `metadata.csv` of something else.
        TypeError: for one text in place of a list.
        RuntimeError: if a synthesiser fails; clips that are done stay.

    Example:

    ```python
    >>> from hf_ext import synthesize_phrases

    >>> folder = synthesize_phrases(["hey computer", "lights on"], "clips", num_proc=2)  # doctest: +SKIP
    >>> from hf_ext.kws.training.synthesis import SpokenClip

    >>> SpokenClip("lights on", "flite", "slt", speed=1.1, pitch=0.9).file_name
    'clips/88/lights-on-88d174206acd899d.flac'
    ```
    """
    rate = check_sampling_rate(sampling_rate)
    if num_proc < 1:
        raise ValueError(f"`num_proc` must be at least 1, got {num_proc}.")
    clips = list(dict.fromkeys(plan_clips(phrases, clips_per_phrase, engines, speeds, pitches, seed)))
    # Synthesisers say something of anything, or nothing: what no model could be asked for is refused before they begin.
    for phrase in dict.fromkeys(clip.text for clip in clips):
        if not pronunciations(phrase, {}, limit=1):
            raise ValueError(f"Nothing in the phrase {phrase!r} can be spoken: write it in letters or digits.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _read_metadata(folder)
    missing = [clip for clip in clips if not (folder / clip.file_name).exists()]
    left = set(missing)
    there = next((folder / clip.file_name for clip in clips if clip not in left), None)
    if there and (there_rate := _soundfile().info(str(there)).samplerate) != rate:
        raise ValueError(
            f"`output_dir` ({folder}) has clips of {there_rate} Hz and `sampling_rate` is {rate}: choose another folder."
        )
    # Each synthesiser is a process of its own: threads are enough to keep `num_proc` of them busy.
    with ThreadPoolExecutor(num_proc) as pool:
        waiting = [pool.submit(_speak, clip, folder, rate) for clip in missing]
        bar = tqdm(total=len(clips), initial=len(clips) - len(missing), desc="Speaking", disable=disable_tqdm)
        try:
            for done in as_completed(waiting):
                done.result()
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            bar.close()
    _write_metadata(folder, clips)
    return folder


def _checked_engines(engines: Sequence[str] | None) -> list[str]:
    unknown = sorted(set(engines or ()) - set(ENGINES))
    if unknown:
        raise ValueError(f"`engines` has {unknown}; there are {sorted(ENGINES)}.")
    here = installed_engines()
    wanted = here if engines is None else list(dict.fromkeys(engines))
    absent = [engine for engine in wanted if engine not in here] if wanted else list(ENGINES)
    if absent:
        packages = " ".join(ENGINES[engine][1] for engine in absent)
        raise FileNotFoundError(
            f"Speech synthesis needs {' or '.join(absent) if not wanted else ' and '.join(absent)}, which is not installed "
            f"or has no voice. On Debian and Ubuntu: apt-get install -y {packages}"
        )
    return wanted


def _speak(clip: SpokenClip, folder: Path, rate: int) -> None:
    soundfile = _soundfile()
    target = folder / clip.file_name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wave = str(Path(scratch) / "clip.wav")
        command, text = command_for(clip, wave)
        problem = f"no answer within {_SECONDS_PER_CLIP} s"
        try:
            ran = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_SECONDS_PER_CLIP)
            problem = f"exit status {ran.returncode}: {ran.stderr.strip() or 'no message'}"
            samples, own_rate = soundfile.read(wave, dtype="float32")
            mono = to_mono_float(samples, None, name=clip.text)
        except (soundfile.LibsndfileError, ValueError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(
                f"{clip.engine} (voice {clip.voice}) wrote no audio for the phrase {clip.text!r}: {problem}"
            ) from error
        # What is interrupted leaves no half of a clip.
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        soundfile.write(partial, resample(mono, own_rate, rate).clamp(-1, 1).numpy(), rate, format="FLAC")
        os.replace(partial, target)


def _read_metadata(folder: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The columns of the folder, those of others too, and its rows by their files."""
    path = folder / "metadata.csv"
    if not path.exists():
        return list(_COLUMNS), {}
    columns, rows = read_table(path)
    if "file_name" not in columns:
        raise ValueError(f"`output_dir`: {path} is there and has no column file_name: choose another folder.")
    return list(dict.fromkeys([*_COLUMNS, *columns])), {row["file_name"]: row for row in rows}


def _write_metadata(folder: Path, clips: list[SpokenClip]) -> None:
    soundfile = _soundfile()
    path = folder / "metadata.csv"
    columns, rows = _read_metadata(folder)
    for clip in clips:
        rows[clip.file_name] = {
            "file_name": clip.file_name,
            "text": clip.text,
            "speaker": f"{clip.engine} {clip.voice}",
            "engine": clip.engine,
            "speed": clip.speed,
            "pitch": clip.pitch,
            "duration_s": round(soundfile.info(str(folder / clip.file_name)).duration, 3),
        }
    partial = path.with_name("metadata.csv.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        # A row that is too long has a column `None`.
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows.values())
    os.replace(partial, path)


def _soundfile() -> Any:
    try:
        import soundfile
    except ModuleNotFoundError as error:
        raise missing_extra(error, needed_by="Reading and writing audio files") or error from error
    return soundfile
