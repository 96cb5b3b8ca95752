"""What the files of aligners say: words with their times, in the forms that Praat and others write."""

import codecs
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Praat's older files of the short form say so.
_FILE_TYPES = ("ooTextFile", "ooTextFile short")


def read_words(path: Path, tier: str) -> list[tuple[str, float, float]]:
    """
    Words and silences with their times, as they stand in a file.

    Args:
        path (`Path`), tier (`str`):
            As in [`read_alignment`].

    Returns:
        `list[tuple[str, float, float]]`: each with its start and its end, in seconds.

    Raises:
        ValueError: if the file is no alignment or was cut off, or has no such tier or several.
    """
    content = path.read_bytes()
    try:
        # Praat writes UTF-16 where a text has more than ASCII.
        text = content.decode("utf-16" if content[:2] in _UTF_16_MARKS else "utf-8-sig")
        words = _from_json(json.loads(text), tier) if text.lstrip()[:1] in ("{", "[") else _from_textgrid(text, tier)
        return [(_word(word), float(start), float(end)) for word, start, end in words]
    except (KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"`path` ({path}) is no word alignment as TextGrid or JSON: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"`path` ({path}): {error}") from error


def _word(text: str) -> str:
    # PocketSphinx and CMU's dictionary number the pronunciations of a word: "and(2)".
    return re.sub(r"\(\d+\)$", "", text.strip())


def _from_json(content: Any, tier: str) -> list[tuple[str, float, float]]:
    if isinstance(content, Mapping) and "w" in content:
        return [(word["t"], word["b"], round(word["b"] + word["d"], 6)) for word in content["w"]]
    if isinstance(content, Mapping) and "tiers" in content:
        if tier not in content["tiers"]:
            raise ValueError(f"there is no tier {tier!r}, only {sorted(content['tiers'])} (`tier`).")
        return [(text, float(start), float(end)) for start, end, text in content["tiers"][tier]["entries"]]
    words = content["words"] if isinstance(content, Mapping) else content
    return [
        (word["word"] if "word" in word else word["text"], float(word["start"]), float(word["end"])) for word in words
    ]


def _from_textgrid(text: str, tier: str) -> list[tuple[str, float, float]]:
    # Names in the long form only tell what the order says: numbers and quoted texts are the same in both.
    tokens = [
        string.replace('""', '"') if number == "" else float(number)
        for string, number in re.findall(
            r'"((?:[^"]|"")*)"|(?<![\w.\[])(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.\]])', text
        )
    ]
    if not (tokens[:1] and tokens[0] in _FILE_TYPES and tokens[1:2] == ["TextGrid"]):
        raise ValueError("this is neither JSON nor a TextGrid.")
    tiers: list[tuple[str, int, list[Any]]] = []
    place = 5
    while place < len(tokens):
        kind, name, count = tokens[place], str(tokens[place + 1]), int(tokens[place + 4])
        width = 3 if kind == "IntervalTier" else 2
        values = tokens[place + 5 : place + 5 + width * count]
        if len(values) < width * count:
            raise ValueError(
                f"the file was cut off: the tier {name!r} has {count} entries, and not all of them are there."
            )
        tiers.append((name, width, [values[i : i + width] for i in range(0, len(values), width)]))
        place += 5 + width * count
    found = [(width, entries) for name, width, entries in tiers if name == tier]
    if not found:
        raise ValueError(f"there is no tier {tier!r}, only {sorted(name for name, _, _ in tiers)} (`tier`).")
    if len(found) > 1:
        raise ValueError(f"there are {len(found)} tiers {tier!r}: give each a name of its own.")
    width, entries = found[0]
    if width != 3:
        raise ValueError(f"the tier {tier!r} has points of time and no intervals (`tier`).")
    return [(str(word), float(start), float(end)) for start, end, word in entries]
