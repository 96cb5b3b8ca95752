"""Pairs of a clip and a phrase, drawn from utterances with their text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_ext.kws.processing_kws import KwsProcessor
from hf_ext.kws.tokenization_phoneme import PhonemeTokenizer
from hf_ext.kws.training.augmentation import KwsAugmenter, spec_augment
from hf_ext.kws.training.mining import Kind, PhoneticIndex, confusable_phonemes, phoneme_tokenizer, sound_alike
from hf_ext.kws.training.utterances import are_at_hand, check_columns, column, duration_of, read_audio, undecoded


# What a pair is: the phrase that was said; any other; one that sounds nearly so, of the vocabulary or made up.
PAIR_KINDS = ("positive", "random", "hard", "confusable")
_COLUMNS = ("audio", "text", "phrase", "label", "kind")
_HARD: tuple[Kind, ...] = ("substitute", "insert", "delete", "prefix", "suffix")


class KwsTrialDataset(Dataset):
    """
    Pairs that are given, such as an official list of trials.

    Args:
        trials (`Sequence[Mapping]`):
            Rows with `audio` as in [`read_audio`], `text` (what was said), `phrase` (what is asked for), `label` (1 if
            they are the same, else 0) and `kind` (one of `PAIR_KINDS`).
        sampling_rate (`int`, *optional*, defaults to `16000`):
            Rate of the clips in hertz.
        augmenter ([`KwsAugmenter`], *optional*):
            Changes each clip.
        seed (`int`, *optional*, defaults to `0`):
            What the changes are drawn with, together with the epoch and the place in the data alone.

    Raises:
        ValueError: if a row lacks a column or has a label or kind that is none, or the sampling rates differ.
        TypeError: for what are no rows, or a text that is none.
    """

    def __init__(
        self,
        trials: Sequence[Mapping[str, Any]],
        sampling_rate: int = 16000,
        augmenter: KwsAugmenter | None = None,
        seed: int = 0,
    ) -> None:
        self._check_rows(trials)
        if augmenter is not None and augmenter.sampling_rate != sampling_rate:
            raise ValueError(
                f"`augmenter` works at {augmenter.sampling_rate} Hz and `sampling_rate` is {sampling_rate}: make them equal."
            )
        self.trials = undecoded(trials)
        self.sampling_rate = sampling_rate
        self.augmenter = augmenter
        self.seed = seed
        self.epoch = 0

    def _check_rows(self, trials: Any) -> None:
        check_columns("trials", trials, _COLUMNS)
        # Rows that come from elsewhere, one at a time, are looked at by the collator.
        if not are_at_hand(trials):
            return
        for i, (label, kind) in enumerate(zip(column(trials, "label"), column(trials, "kind"), strict=True)):
            if not _is_label(label) or kind not in PAIR_KINDS:
                raise ValueError(
                    f"`trials` has in row {i} the label {label!r} and the kind {kind!r}: labels are 0 or 1, and kinds "
                    f"{list(PAIR_KINDS)}."
                )

    def __len__(self) -> int:
        return len(self.trials)

    def set_epoch(self, epoch: int) -> None:
        """Draws anew for this epoch; [`KwsTrainer`] calls it."""
        self.epoch = epoch

    def durations(self) -> list[float]:
        """Seconds of each item, before any change: `duration_s` of its row, or what the header of its file says."""
        return [duration_of(trial) for trial in self.trials]

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Iterating a sequence ends with this error.
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no pair {index}: the data has {len(self)}.")
        index %= len(self)
        drawn_from = Random(f"{self.seed} {self.epoch} {index}")
        trial = self._trial(index, drawn_from)
        try:
            clip = read_audio(trial, self.sampling_rate)
        except ValueError as error:
            # Samples have no name that a training could tell.
            raise ValueError(f"Item {index} of the data, of the text {trial['text']!r}: {error}") from error
        seed = drawn_from.getrandbits(63)
        if self.augmenter is not None:
            waveforms, lengths = self.augmenter(clip[None], None, torch.Generator().manual_seed(seed))
            clip = waveforms[0, : int(lengths[0])]
        return {
            "audio": clip.numpy(),
            "sampling_rate": self.sampling_rate,
            "seed": seed,
            **{name: trial[name] for name in ("text", "phrase", "label", "kind")},
        }

    def _trial(self, index: int, drawn_from: Random) -> Mapping[str, Any]:
        return self.trials[index]


class KwsPairDataset(KwsTrialDataset):
    """
    Pairs drawn from utterances: the phrase that was said, another one, and ones that are easily taken for it.

    What is drawn depends on `seed`, the epoch and the place in the data alone: it is the same in any number of workers,
    processes and micro-batches, and after resuming.

    Args:
        utterances (`Sequence[Mapping]`):
            Rows of a `datasets.Dataset` or a list, with `audio` as in [`read_audio`] and `text`. Long utterances are cut
            into phrases first, see [`phrases_of_words`].
        tokenizer ([`PhonemeTokenizer`], *optional*):
            By default one with the packaged lexicon alone.
        shares (`Mapping[str, float]`, *optional*, defaults to `{"positive": 0.5, "random": 0.2, "hard": 0.15,
        "confusable": 0.15}`):
            How often a clip gets which kind of phrase: what was said, any other of the vocabulary, one of the nearest of
            the vocabulary or one that shares its beginning or its end, one made up from its phonemes.
        every_kind (`bool`, *optional*, defaults to `False`):
            Whether each clip makes one pair of each kind with a share, as evaluation needs it, instead of one in all.
        vocabulary (`Sequence[str]`, *optional*):
            Further phrases for the negatives.
        num_neighbours (`int`, *optional*, defaults to `10`):
            Nearest phrases that a hard negative is drawn from.
        confusable_kinds (`Sequence[str]`, *optional*, defaults to all five kinds):
            What made-up phrases differ in, see [`confusable_phonemes`]; in CED `("substitute", "insert")`.
        max_phonemes (`int`, *optional*, defaults to `25`):
            Utterances and phrases with more are left out.
        contained_is_negative (`bool`, *optional*, defaults to `True`):
            Whether a phrase that is heard inside what was said, "volume up" in "turn the volume up", may be a negative, as
            the papers label it. What is to find phrases inside of running speech is better off without.
        sampling_rate (`int`, *optional*, defaults to `16000`), augmenter ([`KwsAugmenter`], *optional*), seed (`int`,
        *optional*, defaults to `0`):
            As in [`KwsTrialDataset`].

    Raises:
        ValueError: if a row lacks a column, there are fewer than two phrases that can be told apart, or the shares or kinds are
            none.
        TypeError: for what are no rows, or a text that is none.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_ext import KwsPairDataset

    >>> clip = {"array": np.zeros(16000, dtype=np.float32), "sampling_rate": 16000}
    >>> utterances = [{"audio": clip, "text": text} for text in ("lights on", "lights off", "play music")]
    >>> pairs = KwsPairDataset(utterances, every_kind=True, num_neighbours=1)
    >>> [(pair["phrase"], pair["label"], pair["kind"]) for pair in pairs][:3:2]
    [('lights on', 1, 'positive'), ('lights off', 0, 'hard')]
    ```
    """

    def __init__(
        self,
        utterances: Sequence[Mapping[str, Any]],
        tokenizer: PhonemeTokenizer | None = None,
        shares: Mapping[str, float] | None = None,
        every_kind: bool = False,
        vocabulary: Sequence[str] = (),
        num_neighbours: int = 10,
        confusable_kinds: Sequence[Kind] = _HARD,
        max_phonemes: int = 25,
        contained_is_negative: bool = True,
        sampling_rate: int = 16000,
        augmenter: KwsAugmenter | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(utterances, sampling_rate, augmenter, seed)
        shares = dict(shares or {"positive": 0.5, "random": 0.2, "hard": 0.15, "confusable": 0.15})
        unknown = sorted(set(shares) - set(PAIR_KINDS))
        if unknown or not all(0 <= share < math.inf for share in shares.values()) or not sum(shares.values()):
            raise ValueError(f"`shares` must give {list(PAIR_KINDS)} shares of 0 or more, not all 0, got {shares}.")
        if num_neighbours < 1:
            raise ValueError(f"`num_neighbours` must be at least 1, got {num_neighbours}.")
        if not confusable_kinds or set(confusable_kinds) - set(_HARD):
            raise ValueError(f"`confusable_kinds` must name some of {list(_HARD)}, got {list(confusable_kinds)}.")
        if isinstance(vocabulary, str):
            raise TypeError(f"`vocabulary` must be a list of phrases, got the one text {vocabulary!r}.")
        self.kinds = [kind for kind in PAIR_KINDS if shares.get(kind)]
        self.shares = [shares[kind] for kind in self.kinds]
        self.every_kind = every_kind
        self.num_neighbours = num_neighbours
        self.confusable_kinds = confusable_kinds
        self.max_phonemes = max_phonemes
        self.contained_is_negative = contained_is_negative
        self.tokenizer = phoneme_tokenizer(tokenizer)
        texts = column(utterances, "text")
        self._phonemes = {text: tuple(self.tokenizer.tokenize(text)) for text in dict.fromkeys([*texts, *vocabulary])}
        fitting = {text: spoken for text, spoken in self._phonemes.items() if len(spoken) <= max_phonemes}
        # Rows that are kept, by their place in the utterances.
        self.rows = [i for i, text in enumerate(texts) if text in fitting]
        self.phrases = list(fitting)
        if not self.rows or all(sound_alike(fitting[self.phrases[0]], spoken) for spoken in fitting.values()):
            raise ValueError(
                f"`utterances` and `vocabulary` have {len(self.phrases)} phrases of at most {max_phonemes} phonemes that can be "
                "told apart; negatives need two. Cut sentences into phrases with `phrases_of_words`, or add a `vocabulary`."
            )
        self._index: PhoneticIndex | None = None
        self._hard: dict[str, list[str]] = {}

    def _check_rows(self, trials: Any) -> None:
        check_columns("utterances", trials, _COLUMNS[:2])

    def __len__(self) -> int:
        return len(self.rows) * (len(self.kinds) if self.every_kind else 1)

    @property
    def num_left_out(self) -> int:
        """Utterances of more than `max_phonemes`, which no pair is made of."""
        return len(self.trials) - len(self.rows)

    @property
    def most_phonemes(self) -> int:
        """The most phonemes that a phrase may have."""
        # What is made up has up to three more than what it is taken for.
        spare = 3 if "confusable" in self.kinds else 0
        return min(max(len(self._phonemes[phrase]) for phrase in self.phrases) + spare, self.max_phonemes)

    def durations(self) -> list[float]:
        times = len(self.kinds) if self.every_kind else 1
        return [duration_of(self.trials[row]) for row in self.rows for _ in range(times)]

    def hard_negatives(self, text: str) -> list[str]:
        """The nearest phrases of the vocabulary, and some that share the beginning or the end of this one."""
        if text not in self._hard:
            self._index = self._index or PhoneticIndex(self.phrases, self.tokenizer)
            near = [neighbour.phrase for neighbour in self._index.nearest(text, self.num_neighbours)]
            ends: list[str] = []
            for end in ("prefix", "suffix"):
                ends += self._index.sharing(text, end)[: self.num_neighbours // 2]
            spoken = [self._phonemes[text]]
            self._hard[text] = [
                phrase for phrase in dict.fromkeys(near + ends) if self._differs(self._phonemes[phrase], spoken)
            ]
        return self._hard[text]

    def _trial(self, index: int, drawn_from: Random) -> Mapping[str, Any]:
        if self.every_kind:
            index, which = divmod(index, len(self.kinds))
            kind = self.kinds[which]
        else:
            kind = drawn_from.choices(self.kinds, self.shares)[0]
        utterance = self.trials[self.rows[index]]
        text = utterance["text"]
        return {
            **utterance,
            "phrase": self._phrase(text, kind, drawn_from),
            "label": int(kind == "positive"),
            "kind": kind,
        }

    def _phrase(self, text: str, kind: str, drawn_from: Random) -> str:
        if kind == "positive":
            return text
        spoken = self._phonemes[text]
        if kind == "confusable":
            right = self.tokenizer.pronunciations(text)
            kinds, longest = self.confusable_kinds, self.max_phonemes
            draws = (confusable_phonemes(spoken, drawn_from, kinds, max_phonemes=longest) for _ in range(100))
            try:
                # Another pronunciation of the same text is no confusable.
                made = next((draw for draw in draws if self._differs(draw, right)), None)
            except ValueError:
                # The longest phrase with nothing but insertions to draw from, or the shortest with deletions.
                made = None
            # A single phoneme, say, has others that can't be told apart from it alone.
            made = made or confusable_phonemes(spoken, drawn_from, ("substitute",), max_edits=1)
            return f"{{{' '.join(made)}}}"
        if kind == "hard" and (near := self.hard_negatives(text)):
            return drawn_from.choice(near)
        others = (drawn_from.choice(self.phrases) for _ in range(100))
        apart = (phrase for phrase in others if self._differs(self._phonemes[phrase], [spoken]))
        # Where nearly all of the vocabulary sounds the same, drawing may fail.
        return next(apart, None) or next(
            phrase for phrase in self.phrases if not sound_alike(self._phonemes[phrase], spoken)
        )

    def _differs(self, phrase: Sequence[str], spoken: Sequence[Sequence[str]]) -> bool:
        """Whether the phrase is a negative for what was said, in any of its pronunciations."""
        if self.contained_is_negative:
            return not any(sound_alike(phrase, other) for other in spoken)
        windows = (other[i : i + len(phrase)] for other in spoken for i in range(len(other)))
        return not any(sound_alike(phrase, window) for window in windows)


@dataclass
class KwsDataCollator:
    """
    Pairs of a clip and a phrase as a batch for the models, through their [`KwsProcessor`].

    Args:
        processor ([`KwsProcessor`]):
            The model's.
        hide_stripes (`bool`, *optional*, defaults to `False`):
            Whether to hide stripes of the features, see [`spec_augment`]; each row draws its own from the seed of its pair.
        phoneme_tokenizer ([`PhonemeTokenizer`], *optional*):
            What tells the phonemes that were spoken. By default the processor's, or one with the packaged lexicon alone where
            the processor takes words.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_ext import KwsDataCollator, KwsPairDataset, KwsProcessor

    >>> clip = {"array": np.zeros(16000, dtype=np.float32), "sampling_rate": 16000}
    >>> pairs = KwsPairDataset([{"audio": clip, "text": text} for text in ("yes", "no")], every_kind=True)
    >>> batch = KwsDataCollator(KwsProcessor())([pairs[0], pairs[1]])
    >>> batch["labels"], batch["phoneme_labels"].shape
    (tensor([1., 0.]), torch.Size([2, 3]))
    ```
    """

    processor: KwsProcessor
    hide_stripes: bool = False
    phoneme_tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.phoneme_tokenizer is None:
            self.phoneme_tokenizer = PhonemeTokenizer() if self.processor.takes_words else self.processor.tokenizer

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            pairs (`Sequence[Mapping]`):
                Items of [`KwsPairDataset`] or [`KwsTrialDataset`].

        Returns:
            `dict[str, torch.Tensor]`: what the models take, `labels` of shape `(batch,)`, `phoneme_labels` of shape `(batch,
            longest)` with -100 behind what was said, and `pair_kinds` of shape `(batch,)`, places in `PAIR_KINDS`.

        Raises:
            ValueError: if they are no such items, or of different sampling rates.
        """
        lacking = sorted({name for pair in pairs for name in ("sampling_rate", *_COLUMNS) if name not in pair})
        if lacking:
            raise ValueError(f"The pairs lack {lacking}: they are items of a KwsPairDataset or a KwsTrialDataset.")
        if kinds := sorted({str(pair["kind"]) for pair in pairs} - set(PAIR_KINDS)):
            raise ValueError(f"The pairs have the kinds {kinds}; there are {list(PAIR_KINDS)}.")
        rates = {pair["sampling_rate"] for pair in pairs}
        if len(rates) != 1:
            raise ValueError(f"The pairs have different sampling rates {sorted(rates)}: load them with one.")
        batch = dict(
            self.processor(
                audio=[pair["audio"] for pair in pairs],
                text=[pair["phrase"] for pair in pairs],
                sampling_rate=rates.pop(),
                return_tensors="pt",
            )
        )
        if self.hide_stripes:
            seeded = (torch.Generator().manual_seed(pair["seed"] + 1) for pair in pairs)
            rows = zip(batch["input_features"].split(1), batch["attention_mask"].split(1), seeded, strict=True)
            batch["input_features"] = torch.cat([spec_augment(*row) for row in rows])
        texts = [pair["text"] for pair in pairs]
        spoken = self.phoneme_tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        batch["phoneme_labels"] = spoken["input_ids"].masked_fill(spoken["attention_mask"] == 0, -100)
        batch["labels"] = torch.tensor([float(pair["label"]) for pair in pairs])
        batch["pair_kinds"] = torch.tensor([PAIR_KINDS.index(pair["kind"]) for pair in pairs])
        return batch


def _is_label(value: Any) -> bool:
    try:
        return float(value) in (0.0, 1.0)
    except (TypeError, ValueError):
        return False
