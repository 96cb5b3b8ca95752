"""What `hf-ext demo` is asked for, as every section gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


# Beginnings of stories for small children, which is what the shipped model writes. None is from its training text.
PROMPTS = (
    "Once upon a time, there was a little dog named Max.",
    "Lily found a shiny red stone in the garden.",
    "The old bear was hungry and could not find any honey.",
    "Tom wanted to build a boat out of wood.",
    "One day, a small bird fell out of its nest.",
    "Mia and her mom went to the big market.",
    "It was a very cold night and the moon was bright.",
    "Ben had a blue kite that could fly very high.",
)


@dataclass
class DemoOptions:
    """What the command line was asked for."""

    model: str | None = None
    adapter: str | None = None
    draft_model: str | None = None
    prompts: Sequence[str] = PROMPTS
    max_new_tokens: int = 200
    k: int | None = None
    repeats: int = 3
    device: str | None = None
    dtype: str = "auto"
    threads: int | None = None
    training_steps: int = 120
    speech: bool = True
    phrases: Sequence[str] = ()
    kws_model: str | None = None
