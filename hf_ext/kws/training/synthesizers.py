"""The free synthesisers among Debian's packages: their voices, and how each is told what to say."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from xml.sax.saxutils import escape

from hf_ext.kws.g2p import check_phonemes
from hf_ext.kws.spelling import spell_out


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
PHONEME_ENGINES = ("espeak-ng", "mbrola")
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
    """The synthesisers that this machine has with a voice, of those in `ENGINES`."""
    return [engine for engine, (program, _) in ENGINES.items() if shutil.which(program) and voices_of(engine)]


def draw_voice(engine: str, generator: Random) -> str:
    """One of the engine's voices: half of the draws are American, where there is a choice."""
    voices = voices_of(engine)
    american = [voice for voice in voices if _AMERICAN.fullmatch(voice)]
    others = [voice for voice in voices if voice not in american]
    return generator.choice(generator.choice([group for group in (american, others) if group]))


def voices_of(engine: str) -> list[str]:
    """Those that this machine has of it."""
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
    return [voice for voice in _MBROLA_VOICES if (_MBROLA_FOLDER / voice.removesuffix("-en")).exists()]


@lru_cache(maxsize=1)
def _rhvoice_voices() -> list[str]:
    infos = {info.parent.name: info.read_text("utf-8") for info in sorted(_RHVOICE_FOLDER.glob("*/voice.info"))}
    return [name for name, info in infos.items() if "language=English" in info.splitlines()]


@lru_cache(maxsize=1)
def _festival_voices() -> list[str]:
    # Without a voice festival prints a warning beside what it is asked, and names voices that there could be.
    asked = '(format t "voices: %l\n" (voice.list))'
    printed = subprocess.run(["festival", "--pipe"], input=asked, capture_output=True, text=True).stdout
    listed = re.search(r"^voices: \((.*)\)$", printed, re.MULTILINE)
    return sorted(listed[1].split()) if listed else []


def command_for(clip: SpokenClip, output: str) -> tuple[list[str], str]:
    """What to run, and the text for its standard input."""
    said = _in_words(clip.text)
    if clip.engine in PHONEME_ENGINES:
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
        rate, tone = f"{100 * clip.speed:.0f}", f"{100 * clip.pitch:.0f}"
        return ["RHVoice-test", "-p", clip.voice, "-r", rate, "-t", tone, "-o", output], said
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
