"""Phrases that sound alike: how far apart two are, which of a vocabulary are nearest, and new ones that are near."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np

from hf_ext.kws.g2p import PHONEMES, Pronunciation, check_phonemes
from hf_ext.kws.tokenization_phoneme import PhonemeTokenizer


# Place from the lips (0) to the glottis (1), openness from a stop (0) to a glide (1), voice.
_CONSONANTS = {
    "P": (0.0, 0.0, 0), "B": (0.0, 0.0, 1), "M": (0.0, 0.5, 1), "F": (0.1, 0.25, 0), "V": (0.1, 0.25, 1),
    "TH": (0.2, 0.25, 0), "DH": (0.2, 0.25, 1), "T": (0.3, 0.0, 0), "D": (0.3, 0.0, 1), "S": (0.3, 0.3, 0),
    "Z": (0.3, 0.3, 1), "N": (0.3, 0.5, 1), "L": (0.3, 0.8, 1), "R": (0.45, 0.9, 1), "SH": (0.45, 0.3, 0),
    "ZH": (0.45, 0.3, 1), "CH": (0.45, 0.15, 0), "JH": (0.45, 0.15, 1), "Y": (0.6, 1.0, 1), "K": (0.8, 0.0, 0),
    "G": (0.8, 0.0, 1), "NG": (0.8, 0.5, 1), "W": (0.5, 1.0, 1), "HH": (1.0, 0.4, 0),
}  # fmt: skip
# Height and backness where the vowel begins, the same where it ends, rounding.
_VOWELS = {
    "IY": (1.0, 0.0, 1.0, 0.0, 0), "IH": (0.8, 0.15, 0.8, 0.15, 0), "EH": (0.45, 0.15, 0.45, 0.15, 0),
    "AE": (0.15, 0.15, 0.15, 0.15, 0), "AH": (0.4, 0.5, 0.4, 0.5, 0), "ER": (0.5, 0.5, 0.5, 0.6, 0.5),
    "AA": (0.0, 0.8, 0.0, 0.8, 0), "AO": (0.3, 1.0, 0.3, 1.0, 0.5), "UH": (0.8, 0.85, 0.8, 0.85, 0.5),
    "UW": (1.0, 1.0, 1.0, 1.0, 1), "EY": (0.5, 0.1, 0.9, 0.1, 0), "AY": (0.0, 0.5, 0.9, 0.1, 0),
    "OY": (0.4, 1.0, 0.9, 0.1, 0.5), "AW": (0.0, 0.5, 0.9, 0.9, 0.5), "OW": (0.5, 0.8, 0.9, 0.9, 1),
}  # fmt: skip
_GLIDES = {("W", "UW"), ("Y", "IY"), ("R", "ER")}
_BARE = (*_CONSONANTS, *_VOWELS)
_INDEX = {phoneme: i for i, phoneme in enumerate(_BARE)}
# Pairs that differ only in these are in dictionaries, and nobody can hear them apart.
_MERGED = {"IH": "AH", "UH": "AH", "AO": "AA"}
# A substitution is never free, however near the phonemes: stress is.
_LEAST_COST = 0.2

Kind = Literal["substitute", "insert", "delete", "prefix", "suffix"]


class Neighbour(NamedTuple):
    """A phrase of a vocabulary and its phonetic distance."""

    phrase: str
    distance: float


def phonetic_distance(
    first: str | Iterable[str], second: str | Iterable[str], weighted: bool = True, indel_cost: float = 1.0
) -> float:
    """
    Edit distance of two pronunciations, blind to stress.

    Args:
        first (`str` or `Iterable[str]`), second (`str` or `Iterable[str]`):
            Phonemes: `"HH EY1"` or `["HH", "EY1"]`.
        weighted (`bool`, *optional*, defaults to `True`):
            Whether a substitution costs what separates the two phonemes in place, openness and voice (consonants) or
            height, backness, glide and rounding (vowels), from 0.2 to 1. A vowel for a consonant costs 1, or 0.5 for the
            glide of the same place. Otherwise each substitution costs 1.
        indel_cost (`float`, *optional*, defaults to `1.0`):
            Cost of an insertion or deletion, wherever it is.

    Returns:
        `float`: 0 for pronunciations that differ in stress alone.

    Raises:
        ValueError: for unknown phonemes, an empty pronunciation, or a cost that is not positive.

    Example:

    ```python
    >>> from hf_ext.kws.training.mining import phonetic_distance

    >>> phonetic_distance("L AY1 T", "N AY1 T", weighted=False)
    1.0
    >>> phonetic_distance("B AE1 T", "P AE1 T") < phonetic_distance("B AE1 T", "S AE1 T")
    True
    ```
    """
    _check_indel_cost(indel_cost)
    codes = _codes(check_phonemes(second))[None]
    return float(_distances(_codes(check_phonemes(first)), codes, _costs(weighted), indel_cost)[0])


def phoneme_tokenizer(tokenizer: Any = None) -> PhonemeTokenizer:
    """The tokenizer, or one with the packaged lexicon alone; raises a `TypeError` for one that knows no phonemes."""
    # One that came by remote code is of a class of its own.
    if tokenizer is not None and not hasattr(tokenizer, "pronunciations"):
        raise TypeError(
            f"`tokenizer` must be a PhonemeTokenizer, which tells how phrases sound, got {type(tokenizer).__name__}."
        )
    return tokenizer or PhonemeTokenizer()


def sound_alike(first: Sequence[str], second: Sequence[str]) -> bool:
    """
    Whether nobody can tell two pronunciations apart: homophones, and pairs that differ in AH/IH/UH or AA/AO alone.

    Args:
        first (`Sequence[str]`), second (`Sequence[str]`):
            Phonemes.

    Returns:
        `bool`
    """
    return _merged(first) == _merged(second)


class PhoneticIndex:
    """
    A vocabulary that is asked for its nearest phrases.

    Phrases are sorted by length, and only those are compared that could still be among the nearest: ten thousand phrases
    take some milliseconds a query.

    Args:
        phrases (`Iterable[str]`):
            The vocabulary. Each phrase has its alternative pronunciations, and the nearest counts.
        tokenizer ([`PhonemeTokenizer`], *optional*):
            What turns text into phonemes; by default one with the packaged lexicon alone.
        weighted (`bool`, *optional*, defaults to `True`), indel_cost (`float`, *optional*, defaults to `1.0`):
            As in [`phonetic_distance`].
        max_pronunciations (`int`, *optional*, defaults to `2`):
            Pronunciations per phrase.

    Raises:
        ValueError: if there is no phrase, or one can't be pronounced.
        TypeError: for one text in place of a list.

    Example:

    ```python
    >>> from hf_ext import PhoneticIndex

    >>> index = PhoneticIndex(["lights on", "lights off", "nights on", "play music"])
    >>> [neighbour.phrase for neighbour in index.nearest("lights on", num_phrases=2)]
    ['nights on', 'lights off']
    ```
    """

    def __init__(
        self,
        phrases: Iterable[str],
        tokenizer: PhonemeTokenizer | None = None,
        weighted: bool = True,
        indel_cost: float = 1.0,
        max_pronunciations: int = 2,
    ) -> None:
        _check_indel_cost(indel_cost)
        if isinstance(phrases, str):
            raise TypeError(f"`phrases` must be a list of phrases, got the one text {phrases!r}.")
        self.phrases = list(dict.fromkeys(phrases))
        if not self.phrases:
            raise ValueError("`phrases` is empty: a vocabulary has at least one phrase.")
        self.tokenizer = phoneme_tokenizer(tokenizer)
        self.indel_cost = indel_cost
        self.max_pronunciations = max_pronunciations
        self._cost = _costs(weighted)
        # For each length the pronunciations of this length, as codes, and the phrases that they belong to.
        by_length: dict[int, list[tuple[int, Pronunciation]]] = {}
        self._sounds: list[set[tuple[str, ...]]] = []
        for i, phrase in enumerate(self.phrases):
            spoken = self._pronunciations(phrase)
            self._sounds.append({_merged(phonemes) for phonemes in spoken})
            for phonemes in spoken:
                by_length.setdefault(len(phonemes), []).append((i, phonemes))
        self._owners = {length: np.array([i for i, _ in rows]) for length, rows in by_length.items()}
        self._rows = {length: np.stack([_codes(row) for _, row in rows]) for length, rows in by_length.items()}

    def __len__(self) -> int:
        return len(self.phrases)

    def nearest(self, phrase: str, num_phrases: int = 10, max_distance: float = float("inf")) -> list[Neighbour]:
        """
        The nearest phrases that can be told apart from the phrase.

        Args:
            phrase (`str`):
                Text, of the vocabulary or not; phonemes in braces where wanted.
            num_phrases (`int`, *optional*, defaults to `10`):
                At most this many.
            max_distance (`float`, *optional*, defaults to infinity):
                At most this far.

        Returns:
            `list[Neighbour]`: The nearest first. Itself and what sounds like it are left out.
        """
        if num_phrases < 1:
            raise ValueError(f"`num_phrases` must be at least 1, got {num_phrases}.")
        spoken = self._pronunciations(phrase)
        sounds = {_merged(phonemes) for phonemes in spoken}
        found: dict[int, float] = {}
        # From the phrases of the same length outwards: a difference in length is a lower bound of the distance.
        gaps = {length: min(abs(length - len(phonemes)) for phonemes in spoken) for length in self._rows}
        for length in sorted(gaps, key=lambda length: (gaps[length], length)):
            best = sorted(found.values())[:num_phrases]
            bound = min(max_distance, best[-1] if len(best) == num_phrases else float("inf"))
            if gaps[length] * self.indel_cost > bound:
                break
            distances = np.min(
                [_distances(_codes(row), self._rows[length], self._cost, self.indel_cost) for row in spoken], axis=0
            )
            for place in np.argsort(distances, kind="stable"):
                if distances[place] > bound:
                    break
                owner = int(self._owners[length][place])
                if not sounds & self._sounds[owner]:
                    found[owner] = min(found.get(owner, float("inf")), float(distances[place]))
                if len(found) >= num_phrases:
                    bound = min(bound, sorted(found.values())[num_phrases - 1])
        ranked = sorted(found.items(), key=lambda item: (item[1], item[0]))[:num_phrases]
        return [Neighbour(self.phrases[i], distance) for i, distance in ranked]

    def apart(self, phrase: str) -> list[str]:
        """The phrases that can be told apart from this one, in the order of the vocabulary."""
        sounds = {_merged(phonemes) for phonemes in self._pronunciations(phrase)}
        return [other for other, own in zip(self.phrases, self._sounds, strict=True) if not sounds & own]

    def sharing(self, phrase: str, end: Literal["prefix", "suffix"], min_phonemes: int = 3) -> list[str]:
        """
        Phrases that begin or end like the phrase, which a distance alone puts far away: "volume up" and "volume down".

        Args:
            phrase (`str`):
                Text.
            end (`"prefix"` or `"suffix"`):
                Which end is shared.
            min_phonemes (`int`, *optional*, defaults to `3`):
                Phonemes, without stress, that have to be shared.

        Returns:
            `list[str]`: Those that share most come first.
        """
        if end not in ("prefix", "suffix"):
            raise ValueError(f"`end` must be 'prefix' or 'suffix', got {end!r}.")
        step = 1 if end == "prefix" else -1
        shared: dict[int, int] = {}
        spoken = self._pronunciations(phrase)
        sounds = {_merged(phonemes) for phonemes in spoken}
        for query in (_codes(phonemes)[::step] for phonemes in spoken):
            for length, rows in self._rows.items():
                most = min(length, len(query))
                counts = (rows[:, ::step][:, :most] == query[:most]).cumprod(axis=1).sum(axis=1)
                for place in np.flatnonzero(counts >= min_phonemes):
                    owner = int(self._owners[length][place])
                    if not sounds & self._sounds[owner]:
                        shared[owner] = max(shared.get(owner, 0), int(counts[place]))
        return [self.phrases[i] for i in sorted(shared, key=lambda i: (-shared[i], i))]

    def _pronunciations(self, phrase: str) -> list[Pronunciation]:
        spoken = self.tokenizer.pronunciations(phrase, max_pronunciations=self.max_pronunciations)
        return [tuple(phonemes) for phonemes in spoken]


def confusable_phonemes(
    phonemes: str | Iterable[str],
    generator: Random,
    kinds: Sequence[Kind] = ("substitute", "insert"),
    max_edits: int = 3,
    max_phonemes: int = 25,
) -> Pronunciation:
    """
    A pronunciation that is easily taken for another, made up at random.

    The defaults are the generator of [CED](https://huggingface.co/papers/2308.06472): one to `max_edits` places, at each a
    phoneme that differs from those around it. Deletions, and the two kinds that keep one end of the phrase, are what a
    model needs that reads the beginning alone.

    Args:
        phonemes (`str` or `Iterable[str]`):
            The pronunciation to stay near.
        generator (`random.Random`):
            What is drawn from.
        kinds (`Sequence[str]`, *optional*, defaults to `("substitute", "insert")`):
            Drawn from for each place: `"substitute"`, `"insert"`, `"delete"`. If the first kind drawn is `"prefix"` or
            `"suffix"`, that end of the phrase, a third of it or more, is kept and the rest is replaced or lengthened.
        max_edits (`int`, *optional*, defaults to `3`):
            Most edits.
        max_phonemes (`int`, *optional*, defaults to `25`):
            Longest result.

    Returns:
        `tuple[str, ...]`: Phonemes that can be told apart from the given ones. Between braces they are a phrase for
        [`KwsProcessor`].

    Raises:
        ValueError: for unknown phonemes or kinds, or if there is no such pronunciation.

    Example:

    ```python
    >>> from random import Random
    >>> from hf_ext.kws.training.mining import confusable_phonemes

    >>> other = confusable_phonemes("K AH0 M P Y UW1 T ER0", Random(0), kinds=("prefix",))
    >>> other[:2], other != ("K", "AH0", "M", "P", "Y", "UW1", "T", "ER0")
    (('K', 'AH0'), True)
    ```
    """
    original = check_phonemes(phonemes)
    unknown = sorted(set(kinds) - {"substitute", "insert", "delete", "prefix", "suffix"})
    if unknown or not kinds:
        raise ValueError(f"`kinds` must name some of substitute, insert, delete, prefix, suffix, got {list(kinds)}.")
    if max_edits < 1 or max_phonemes < 1:
        raise ValueError(f"`max_edits` ({max_edits}) and `max_phonemes` ({max_phonemes}) must be at least 1.")
    edits = [kind for kind in kinds if kind not in ("prefix", "suffix")]
    for _ in range(100):
        kind = generator.choice(list(kinds))
        if kind in ("prefix", "suffix"):
            changed = _other_end(list(original), kind, generator)
        else:
            changed = _edited(list(original), edits, generator.randint(1, max_edits), generator)
        if changed and len(changed) <= max_phonemes and not sound_alike(changed, original):
            return tuple(changed)
    raise ValueError(
        f"No confusable of {' '.join(original)!r} with `kinds`={list(kinds)} has 1 to {max_phonemes} phonemes "
        "(`max_phonemes`): allow other kinds or more phonemes."
    )


def _edited(phonemes: list[str], kinds: list[Kind], num_edits: int, generator: Random) -> list[str]:
    places = generator.sample(range(len(phonemes)), min(num_edits, len(phonemes)))
    # From the back, so that the places before keep their numbers.
    for place in sorted(places, reverse=True):
        around = {_bare(phoneme) for phoneme in phonemes[max(place - 1, 0) : place + 2]}
        kind = generator.choice(kinds)
        if kind == "delete":
            del phonemes[place]
            continue
        new = _draw(generator, around)
        phonemes[place : place + (kind == "substitute")] = [new]
    return phonemes


def _other_end(phonemes: list[str], end: str, generator: Random) -> list[str]:
    ordered = phonemes if end == "prefix" else phonemes[::-1]
    kept = generator.randint(max(1, len(ordered) // 3), len(ordered))
    # All of it kept is a longer phrase, none of the rest replaced a shorter one.
    fewest = 1 if kept == len(ordered) else 0
    changed = ordered[:kept]
    for _ in range(generator.randint(fewest, max(fewest, len(ordered) - kept) + 2)):
        around = {_bare(changed[-1])} | ({_bare(ordered[len(changed)])} if len(changed) < len(ordered) else set())
        changed.append(_draw(generator, around))
    return changed if end == "prefix" else changed[::-1]


def _draw(generator: Random, around: set[str]) -> str:
    return generator.choice([phoneme for phoneme in PHONEMES if _bare(phoneme) not in around])


def _bare(phoneme: str) -> str:
    return phoneme.rstrip("012")


def _merged(phonemes: Iterable[str]) -> tuple[str, ...]:
    return tuple(_MERGED.get(_bare(phoneme), _bare(phoneme)) for phoneme in phonemes)


def _codes(phonemes: Sequence[str]) -> np.ndarray:
    return np.array([_INDEX[_bare(phoneme)] for phoneme in phonemes], dtype=np.int8)


def _check_indel_cost(indel_cost: float) -> None:
    if not indel_cost > 0:
        raise ValueError(f"`indel_cost` must be positive, got {indel_cost}.")


@lru_cache(maxsize=2)
def _costs(weighted: bool) -> np.ndarray:
    """What each phoneme costs in the place of each other."""
    costs = np.ones((len(_BARE), len(_BARE)), dtype=np.float32)
    if weighted:
        tables: list[tuple[Any, Any]] = [
            (_CONSONANTS, (0.8, 0.9, 0.3)),
            (_VOWELS, (0.35, 0.35, 0.35, 0.35, 0.15)),
        ]
        for table, weights in tables:
            places = [_INDEX[phoneme] for phoneme in table]
            features = np.array(list(table.values()), dtype=np.float32)
            apart = (np.abs(features[:, None] - features) * weights).sum(-1)
            costs[np.ix_(places, places)] = apart.clip(_LEAST_COST, 1)
        for glide, vowel in _GLIDES:
            costs[_INDEX[glide], _INDEX[vowel]] = costs[_INDEX[vowel], _INDEX[glide]] = 0.5
    np.fill_diagonal(costs, 0)
    return costs


def _distances(query: np.ndarray, rows: np.ndarray, cost: np.ndarray, indel: float) -> np.ndarray:
    """From one sequence of codes to each row of an array of them."""
    ahead = indel * np.arange(rows.shape[1] + 1, dtype=np.float32)
    table = np.broadcast_to(ahead, (len(rows), len(ahead)))
    for phoneme in query:
        step = table + indel
        step[:, 1:] = np.minimum(step[:, 1:], table[:, :-1] + cost[phoneme][rows])
        # Insertions run along the row: the least so far, each step at the same cost.
        table = np.minimum.accumulate(step - ahead, axis=1) + ahead
    return table[:, -1]
