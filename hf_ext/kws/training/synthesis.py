"""Word lists, spoken by the free synthesisers among Debian's packages."""

import csv
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any
from xml.sax.saxutils import escape

from tqdm.auto import tqdm

from hf_ext._extras import missing_extra
from hf_ext.kws.audio_input import check_sampling_rate, resample, to_mono_float
from hf_ext.kws.g2p import check_phonemes, pronunciations
from hf_ext.kws.spelling import spell_out
from hf_ext.kws.training.utterances import read_table


# The program that has to be there, and the Debian packages that bring it and its voices.
ENGINES = {
    "espeak-ng": ("espeak-ng", "espeak-ng"),
    "mbrola": ("mbrola", "espeak-ng mbrola mbrola-us1 mbrola-us2 mbrola-us3 mbrola-en1"),
    "pico": ("pico2wave", "libttspico-utils"),
    "rhvoice": ("RHVoice-test", "rhvoice rhvoice-english"),
    "flite": ("flite", "flite"),
    "festival": ("text2wave", "festival festvox-kallpc16k"),
}
_ESPEAK_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
# Those of its voices that sound like people.
_ESPEAK_VARIANTS = [
    "f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "Alex", "Alicia", "Andrea",
    "Andy", "Annie", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario",
    "Michael", "Mike", "adam", "anika", "antonio", "aunty", "belinda", "benjamin", "boris", "caleb", "david",
    "ed", "edward", "grandma", "grandpa", "gustave", "iven", "john", "linda", "marcelo", "max", "michel",
    "miguel", "norbert", "pablo", "paul", "pedro", "quincy", "rob", "robert", "sandro", "steph", "travis",
    "victor", "zac",
]  # fmt: skip
# Recorded voices that espeak-ng speaks English with: four of English, and others with the accent of their own language.
_MBROLA_VOICES = [
    "us1", "us2", "us3", "en1", "af1-en", "de1-en", "de2-en", "de3-en", "de4-en", "de5-en", "de6-en", "fr1-en",
    "fr4-en", "gr2-en", "hu1-en", "nl2-en", "pl1-en", "ro1-en", "sw1-en", "sw2-en",
]  # fmt: skip
_MBROLA_FOLDER = Path("/usr/share/mbrola")
_PICO_VOICES = ("en-US", "en-GB")
_RHVOICE_FOLDER = Path("/usr/share/RHVoice/voices")
# The lexicon's phonemes are General American, and what others say in their place would be learned as if it were these.
_AMERICAN = re.compile(r"en-us\b.*|us\d|en-US|kal.*|ked.*|rms|bdl|clb|slt|cmu_us_(?!awb).*")
# Those that speak phonemes.
_PHONEME_ENGINES = ("espeak-ng", "mbrola")
# Mean pitch in hertz of the voices that are told theirs; the others are told a factor.
_FLITE_VOICES = {"kal16": 105.0, "awb": None, "rms": None, "slt": None}
_ESPEAK_WORDS_PER_MINUTE = 160
_FESTIVAL_PITCH = 105.0
_ESPEAK_PHONEMES = {
    "AA": "A:", "AE": "a", "AH": "V", "AO": "O:", "AW": "aU", "AY": "aI", "EH": "E", "ER": "3:", "EY": "eI", "IH": "I",
    "IY": "i:", "OW": "oU", "OY": "OI", "UH": "U", "UW": "u:", "CH": "tS", "DH": "D", "HH": "h", "JH": "dZ", "NG": "N",
    "R": "r", "SH": "S", "TH": "T", "Y": "j", "ZH": "Z",
}  # fmt: skip
# What each engine reads as its phonemes are, and better with its punctuation.
_PLAIN = re.compile(r"[A-Za-z\s.,;:!?'\"-]*")
_COLUMNS = ("file_name", "text", "speaker", "engine", "speed", "pitch", "duration_s")
_SECONDS_PER_CLIP = 60


@dataclass(frozen=True)
class SpokenClip:
    """
    A clip to make: what is said, by whom and how.

    Args:
        text (`str`):
            The phrase.
        engine (`str`), voice (`str`):
            A synthesiser and one of its voices.
        speed (`float`), pitch (`float`):
            Relative to the voice's own.
    """

    text: str
    engine: str
    voice: str
    speed: float
    pitch: float

    @property
    def file_name(self) -> str:
        """Path in the folder. It depends on nothing but the clip, so that a clip that is there is the right one."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        slug = re.sub(r"[^a-z0-9]+", "-", self.text.lower()).strip("-")[:40]
        return f"clips/{digest[:2]}/{slug}-{digest}.flac"


def installed_engines() -> list[str]:
    """The synthesisers that this machine has, of those in `ENGINES`."""
    return [engine for engine, (program, _) in ENGINES.items() if shutil.which(program)]


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
        able = [engine for engine in available if engine in _PHONEME_ENGINES or "{" not in phrase]
        if not able:
            raise ValueError(
                f"The phonemes in {phrase!r} can be spoken by espeak-ng and mbrola alone: add one to `engines`."
            )
        for i in range(clips_per_phrase):
            generator = Random(f"{seed} {i} {phrase}")
            engine = generator.choice(able)
            speed, pitch = (round(generator.uniform(*limits), 2) for limits in (speeds, pitches))
            clips.append(SpokenClip(phrase, engine, _draw_voice(engine, generator), speed, pitch))
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
        FileNotFoundError: if an engine is not installed; it names the package.
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
            f"Speech synthesis needs {' or '.join(absent) if not wanted else ' and '.join(absent)}, which is not installed. "
            f"On Debian and Ubuntu: apt-get install -y {packages}"
        )
    return wanted


def _draw_voice(engine: str, generator: Random) -> str:
    voices = _voices(engine)
    american = [voice for voice in voices if _AMERICAN.fullmatch(voice)]
    others = [voice for voice in voices if voice not in american]
    return generator.choice(generator.choice([group for group in (american, others) if group]))


def _voices(engine: str) -> list[str]:
    if engine == "espeak-ng":
        return [f"{accent}+{variant}" for accent in _ESPEAK_ACCENTS for variant in _ESPEAK_VARIANTS]
    voices: dict[str, Callable[[], list[str]]] = {
        "mbrola": _mbrola_voices,
        "rhvoice": _rhvoice_voices,
        "festival": _festival_voices,
        "flite": lambda: list(_FLITE_VOICES),
    }
    return voices[engine]() if engine in voices else list(_PICO_VOICES)


@lru_cache(maxsize=1)
def _mbrola_voices() -> list[str]:
    voices = [voice for voice in _MBROLA_VOICES if (_MBROLA_FOLDER / voice.removesuffix("-en")).exists()]
    if not voices:
        raise FileNotFoundError(
            f"mbrola has no voice. On Debian and Ubuntu: apt-get install -y {ENGINES['mbrola'][1]}"
        )
    return voices


@lru_cache(maxsize=1)
def _rhvoice_voices() -> list[str]:
    infos = {info.parent.name: info.read_text("utf-8") for info in sorted(_RHVOICE_FOLDER.glob("*/voice.info"))}
    voices = [name for name, info in infos.items() if "language=English" in info.splitlines()]
    if not voices:
        raise FileNotFoundError(
            f"RHVoice has no English voice. On Debian and Ubuntu: apt-get install -y {ENGINES['rhvoice'][1]}"
        )
    return voices


@lru_cache(maxsize=1)
def _festival_voices() -> list[str]:
    listed = subprocess.run(["festival", "--pipe"], input="(print (voice.list))", capture_output=True, text=True)
    voices = sorted(re.findall(r"[a-z]\w+", listed.stdout))
    if not voices:
        raise FileNotFoundError("festival has no voice. On Debian and Ubuntu: apt-get install -y festvox-kallpc16k")
    return voices


def _command(clip: SpokenClip, output: str) -> tuple[list[str], str]:
    """What to run, and the text for its standard input."""
    said = _in_words(clip.text)
    if clip.engine in _PHONEME_ENGINES:
        speed, pitch = round(_ESPEAK_WORDS_PER_MINUTE * clip.speed), min(round(50 * clip.pitch), 99)
        voice = f"mb-{clip.voice}" if clip.engine == "mbrola" else clip.voice
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", output, "--stdin"]
        return command, re.sub(r"\{([^{}]*)\}", lambda match: _espeak_phonemes(match[1]), said)
    if clip.engine == "flite":
        hertz = _FLITE_VOICES[clip.voice]
        pitched = f"int_f0_target_mean={hertz * clip.pitch:g}" if hertz else f"f0_shift={clip.pitch:g}"
        stretch = f"duration_stretch={1 / clip.speed:g}"
        return ["flite", "-voice", clip.voice, "--setf", stretch, "--setf", pitched, "-o", output, "-t", said], ""
    if clip.engine == "pico":
        levels = f'<speed level="{100 * clip.speed:.0f}"><pitch level="{100 * clip.pitch:.0f}">'
        return ["pico2wave", "-l", clip.voice, "-w", output, f"{levels}{escape(said)}</pitch></speed>"], ""
    if clip.engine == "rhvoice":
        levels = ["-r", f"{100 * clip.speed:.0f}", "-t", f"{100 * clip.pitch:.0f}"]
        return ["RHVoice-test", "-p", clip.voice, *levels, "-o", output], said
    hertz = _FESTIVAL_PITCH * clip.pitch
    settings = (
        f"(Parameter.set 'Duration_Stretch {1 / clip.speed:g}) (set! int_lr_params "
        f"'((target_f0_mean {hertz:g}) (target_f0_std 14) (model_f0_mean 170) (model_f0_std 34)))"
    )
    if clip.voice.endswith("_hts"):
        # These go by none of the above.
        settings = f'(set! hts_engine_params (append hts_engine_params \'(("-r" {clip.speed:g}))))'
    return ["text2wave", "-o", output, "-eval", f"(begin (voice_{clip.voice}) {settings})"], said


def _in_words(text: str) -> str:
    """With numbers, signs and accents as the tokenizer reads them: engines read them otherwise, or leave them out."""
    pieces = re.split(r"(\{[^{}]*\})", text)
    return "".join(
        piece if i % 2 or _PLAIN.fullmatch(piece) else " ".join(spell_out(piece)) for i, piece in enumerate(pieces)
    )


def _espeak_phonemes(arpabet: str) -> str:
    spoken = []
    for phoneme in check_phonemes(arpabet):
        bare, stress = phoneme.rstrip("012"), phoneme[-1]
        mark = {"1": "'", "2": ","}.get(stress, "")
        # An unstressed AH or ER is a schwa.
        schwa = {"AH0": "@", "ER0": "3"}.get(phoneme)
        spoken.append(mark + (schwa or _ESPEAK_PHONEMES.get(bare, bare.lower())))
    # With bars between them a T and an SH stay two sounds.
    return f" [[{'|'.join(spoken)}]] "


def _speak(clip: SpokenClip, folder: Path, rate: int) -> None:
    soundfile = _soundfile()
    target = folder / clip.file_name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wave = str(Path(scratch) / "clip.wav")
        command, text = _command(clip, wave)
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
