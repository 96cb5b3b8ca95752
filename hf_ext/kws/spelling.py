"""Written English as words: numbers, symbols, accents and punctuation become what a person would say."""

import re
import unicodedata
from functools import lru_cache
from typing import Any

from hf_ext._extras import missing_extra


_SYMBOLS = {
    "&": " and ", "%": " percent ", "@": " at ", "+": " plus ", "=": " equals ", "×": " times ", "÷": " divided by ",
    "°": " degrees ", "¢": " cents ",
}  # fmt: skip
# Signs that Unicode takes apart into letters that nobody says.
_SIGNS = {"™": "", "℠": "", "№": " number "}
_POWERS = {"²": " squared ", "³": " cubed "}
_PARTS = {"2": "half", "4": "quarter"}
# Latin letters that Unicode does not take apart into a letter and a mark.
_LATIN = {"æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ı": "i"}
# What is written for an apostrophe; the last three also for a quotation mark, where they don't stand inside a word.
_APOSTROPHE = re.compile(r"[’ʼ＇]|(?<=[^\W\d_])[‘´`](?=[^\W\d_])")
# Where a word may be broken or must not be, and the mark of the order of bytes: nobody sees them in a text from the web.
_INVISIBLE = re.compile("[\u00ad\u200c\u200d\u2060\ufeff]")
_ABBREVIATIONS = {"i.e.": "that is", "e.g.": "for example"}
# One and several, and their hundredths.
_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "sen", "sen"),
    "₹": ("rupee", "rupees", "paisa", "paise"),
}
_CURRENCY = f"[{''.join(_CURRENCIES)}]"
# Digits of the largest amount that is read as one.
_LONGEST_NUMBER = 12
_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def spell_out(text: str) -> list[str]:
    """
    The words of a text, as they are spoken.

    Numbers are read as g2p_en reads them; decimals digit by digit. Words keep their apostrophes, and the dots and hyphens
    inside them, for the lexicon to be asked first.

    Args:
        text (`str`):
            English text.

    Returns:
        `list[str]`: Words in lower case. Punctuation and pictures are left out.

    Raises:
        ValueError: if the text has letters that are not Latin.

    Example:

    ```python
    >>> from hf_ext.kws.spelling import spell_out

    >>> spell_out("Set 2 alarms, 7:05 & 10%!")
    ['set', 'two', 'alarms', 'seven', 'oh', 'five', 'and', 'ten', 'percent']
    ```
    """
    original = text
    for sign, name in _SIGNS.items():
        text = text.replace(sign, name)
    # Unicode takes these apart into digits like any: "10²" would be 102, and "2½" 21 and 2.
    text = re.sub("[²³¹⁰⁴-⁹]+", lambda match: _POWERS.get(match[0], f" to the power of {match[0]} "), text)
    text = re.sub(r"(\d ?)?([¼-¾⅐-⅞])", _fraction, text)
    # What Unicode takes apart may be in upper case, as the C of "℃".
    text = unicodedata.normalize("NFKD", _INVISIBLE.sub("", _APOSTROPHE.sub("'", text))).casefold()
    text = "".join(_LATIN.get(char, char) for char in text if unicodedata.category(char) != "Mn")
    for short, long in _ABBREVIATIONS.items():
        text = text.replace(short, long)
    text = _numbers_as_words(text)
    for symbol, word in _SYMBOLS.items():
        text = text.replace(symbol, word)
    foreign = sorted({char for char in text if char.isalpha() and not "a" <= char <= "z"})
    if foreign:
        raise ValueError(
            f"The letters {foreign} of {original!r} are not Latin and can't be pronounced: write the words as they sound "
            "in English, or their phonemes in braces, as in '{HH EY1} computer'."
        )
    words = re.findall(r"[a-z'.\-]+", text)
    return [word for word in words if any("a" <= char <= "z" for char in word)]


def _numbers_as_words(text: str) -> str:
    if not re.search(r"\d", text):
        return text
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(rf"(?<!{_CURRENCY})(?<![\d.])(\d+(?:\.\d\d)?) ?({_CURRENCY})(?! ?\d)", r"\2\1", text)
    text = re.sub(rf"({_CURRENCY}) ?(\d+)(?:\.(\d\d))?(?![\d.]*\d)", _money, text)
    # Letter by letter: "am" by itself is a word.
    text = re.sub(r"(?<=\d)(?::00)? ?([ap])(?:m\b|\.m\.)", r" \1.m. ", text)
    text = re.sub(r"\b(\d{1,2}):([0-5]\d)\b", _time_of_day, text)
    text = re.sub(r"(?<![\w.])-(?=\d)", " minus ", text)
    text = re.sub(r"(\d+)((?:st|nd|rd|th)\b)", _ordinal, text)
    text = re.sub(r"(?<![\d.])(\d+)'?s\b", lambda match: f" {_several(_cardinal(match[1]))} ", text)
    text = re.sub(r"(?<!\d)(?=\.\d)", "0", text)
    text = re.sub(r"\.(\d+)", lambda match: f" point {' '.join(_digits(match[1]))} ", text)
    return re.sub(r"\d+", lambda match: f" {_cardinal(match[0])} ", text)


def _fraction(match: re.Match[str]) -> str:
    above, below = unicodedata.normalize("NFKD", match[2]).split("⁄")
    part = _PARTS.get(below) or _inflect().number_to_words(_inflect().ordinal(below))
    whole = f"{match[1]} and" if match[1] else ""
    return f"{whole} {above} {part}{'' if above == '1' else 's'} "


def _money(match: re.Match[str]) -> str:
    unit, units, cent, cents = _CURRENCIES[match[1]]
    whole, part = int(match[2]), int(match[3] or 0)
    amounts = [f"{match[2]} {unit if whole == 1 else units}"] if whole or not part else []
    if part:
        amounts.append(f"{part} {cent if part == 1 else cents}")
    return f" {' '.join(amounts)} "


def _time_of_day(match: re.Match[str]) -> str:
    hours, minutes = match.groups()
    if minutes == "00":
        return f" {int(hours)} o'clock "
    return f" {int(hours)} oh {minutes[1]} " if minutes[0] == "0" else f" {int(hours)} {minutes} "


def _ordinal(match: re.Match[str]) -> str:
    digits, ending = match.groups()
    # As a cardinal number of this length is read, but for the last digit.
    first, last = (digits[:-1], digits[-1]) if len(digits) > _LONGEST_NUMBER else ("", digits)
    return f" {' '.join([*_digits(first), _inflect().number_to_words(last + ending)])} "


def _cardinal(digits: str) -> str:
    # What begins with a zero or is longer than any amount is a code or a telephone number.
    if (digits[0] == "0" and len(digits) > 1) or len(digits) > _LONGEST_NUMBER:
        return " ".join(_digits(digits))
    number, words = int(digits), _inflect().number_to_words
    if 1000 < number < 3000 and number != 2000:
        # As years are read.
        if 2000 < number < 2010:
            return f"two thousand {words(number % 100)}"
        if number % 100 == 0:
            return f"{words(number // 100)} hundred"
        return words(number, andword="", zero="oh", group=2).replace(", ", " ")
    return words(number, andword="").replace(",", "")


def _several(number: str) -> str:
    """The plural, as of decades: nineteen nineties."""
    if number.endswith("y"):
        return f"{number[:-1]}ies"
    return f"{number}es" if number.endswith("x") else f"{number}s"


def _digits(digits: str) -> list[str]:
    return [_DIGIT_NAMES[int(digit)] for digit in digits]


@lru_cache(maxsize=1)
def _inflect() -> Any:
    try:
        import inflect
    except ModuleNotFoundError as error:
        raise missing_extra(error, needed_by="Reading numbers aloud") or error from error
    return inflect.engine()
