"""Text as phonemes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizer

from hf_ext.kws.g2p import PHONEMES, SYMBOLS, Pronunciation, check_phonemes, is_known, pronunciations


class PhonemeTokenizer(PreTrainedTokenizer):
    """
    Turns English text into phonemes: ARPAbet with stress digits, in the 74 symbols of g2p_en.

    Words are looked up in the CMU pronouncing dictionary; those it lacks are guessed by g2p_en's network. Numbers and
    symbols are read aloud, punctuation is left out and so are the boundaries between words. Nothing is downloaded.

    What stands between braces is taken as phonemes, so that a word can be given its pronunciation wherever a text is
    expected: `"{HH EY1} computer"`.

    What a CTC model hears by frame is read with `tokenizer.decode(ids, group_tokens=True)`: repeated symbols are one, and
    blanks are left out. Without it every symbol counts, as in a phrase that has the same phoneme twice.

    Args:
        lexicon (`dict[str, str | list[str]]`, *optional*):
            Pronunciations of words that the packaged lexicon lacks or has otherwise, the usual one first:
            `{"snowboy": "S N OW1 B OY2"}`. Saved with the tokenizer.
        **kwargs:
            Passed to `PreTrainedTokenizer`.

    Raises:
        ValueError: if a text has nothing that can be pronounced, letters that are not Latin, or unknown phonemes between
            braces.

    Example:

    ```python
    >>> from hf_ext import PhonemeTokenizer

    >>> tokenizer = PhonemeTokenizer(lexicon={"snowboy": "S N OW1 B OY2"})
    >>> tokenizer.tokenize("Hey, snowboy!")
    ['HH', 'EY1', 'S', 'N', 'OW1', 'B', 'OY2']
    >>> tokenizer("hey")["input_ids"]
    [37, 33]
    >>> tokenizer.decode([37, 33])
    'HH EY1'
    >>> tokenizer.pronunciations("zero")
    [['Z', 'IH1', 'R', 'OW0'], ['Z', 'IY1', 'R', 'OW0']]
    ```
    """

    # The inventory is part of the class: there is no vocabulary file.
    vocab_files_names: dict[str, str] = {}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"

    def __init__(self, lexicon: Mapping[str, str | Sequence[str]] | None = None, **kwargs: Any) -> None:
        if lexicon is not None and not isinstance(lexicon, Mapping):
            raise TypeError(
                f"`lexicon` must be a dict of words and their pronunciations, got {type(lexicon).__name__}."
            )
        lexicon = dict(lexicon or {})
        self._lexicon = {_headword(word): _checked(word, entry) for word, entry in lexicon.items()}
        self._ids = {symbol: i for i, symbol in enumerate(SYMBOLS)}
        defaults = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        # "<unk>" in a transcript is no phoneme: a text is read as it stands.
        super().__init__(lexicon=lexicon, **{**defaults, "split_special_tokens": True, **kwargs})

    @property
    def vocab_size(self) -> int:
        return len(SYMBOLS)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def pronunciations(self, text: str, max_pronunciations: int = 8) -> list[list[str]]:
        """
        The ways to pronounce a text, the one that tokenizing it gives first.

        Args:
            text (`str`):
                English text, with phonemes between braces where wanted.
            max_pronunciations (`int`, *optional*, defaults to `8`):
                At most this many.

        Returns:
            `list[list[str]]`: Phonemes.
        """
        if not isinstance(max_pronunciations, int) or max_pronunciations < 1:
            raise ValueError(f"`max_pronunciations` must be an integer of at least 1, got {max_pronunciations!r}.")
        _check_text(text)
        found = pronunciations(text, self._lexicon, limit=max_pronunciations)
        if not found:
            raise _unpronounceable(text)
        return [list(phonemes) for phonemes in found]

    def in_lexicon(self, word: str) -> bool:
        """
        Whether a word's pronunciation is known, from the lexicon given or the packaged one, and need not be guessed.

        Args:
            word (`str`):
                One word.

        Returns:
            `bool`
        """
        headword = word.casefold().replace("’", "'")
        return headword in self._lexicon or is_known(headword)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        _check_text(text)
        tokens = super().tokenize(text, **kwargs)
        if not tokens:
            raise _unpronounceable(text)
        return tokens

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        # With `split_special_tokens=False` a part of the text between special tokens, which may be a blank.
        return list(itertools.chain(*pronunciations(text, self._lexicon, limit=1)))

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return SYMBOLS[index] if 0 <= index < len(SYMBOLS) else "<unk>"

    def _decode(self, token_ids: int | list[int], *args: Any, group_tokens: bool = False, **kwargs: Any) -> str:
        if group_tokens:
            token_ids = [token_ids] if isinstance(token_ids, int) else token_ids
            # A CTC model hears a phoneme over several frames, and the blank between two that are alike.
            token_ids = [token for token, _ in itertools.groupby(token_ids) if token != self.pad_token_id]
        return super()._decode(token_ids, *args, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return token_ids_0 + (token_ids_1 or [])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"`text` must be a string, got {text!r}.")


def _headword(word: str) -> str:
    word = word.casefold().replace("’", "'") if isinstance(word, str) else word
    if not word or not isinstance(word, str) or any(not ("a" <= char <= "z" or char in "'.-") for char in word):
        raise ValueError(
            f"`lexicon` has the entry {word!r}: its entries are single words in Latin letters, numbers and symbols spelled out."
        )
    return word


def _checked(word: str, entry: str | Sequence[str]) -> list[Pronunciation]:
    spoken = [entry] if isinstance(entry, str) else entry
    if not isinstance(spoken, Sequence) or not spoken or not all(isinstance(each, (str, Sequence)) for each in spoken):
        raise ValueError(
            f"`lexicon` gives no pronunciation for {word!r}, got {entry!r}: write it as 'HH EY1', several as a list."
        )
    if len(spoken) > 1 and all(each in PHONEMES for each in spoken) and any(each[-1] not in "012" for each in spoken):
        raise ValueError(
            f"`lexicon` gives {word!r} {len(spoken)} pronunciations of one phoneme each, {list(spoken)}: if they are one, write "
            f"it as one text, {' '.join(map(str, spoken))!r}."
        )
    return [check_phonemes(phonemes) for phonemes in spoken]


def _unpronounceable(text: str) -> ValueError:
    return ValueError(
        f"Nothing in the text {text!r} can be pronounced: write a phrase in Latin letters or digits, or phonemes in "
        "braces, as in '{HH EY1} computer'."
    )
