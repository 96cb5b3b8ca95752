"""The options of speculative decoding: what there is, and what a configuration chooses."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import GenerationConfig


STRATEGIES = ("quadratic", "linear", "adaptive")
OPTIONS = ("num_speculative_tokens", "speculation_strategy", "speculation_threshold", "use_sampler")


@dataclass(frozen=True)
class SpeculationOptions:
    """
    How to speculate.

    Args:
        num_speculative_tokens (`int`):
            Guesses per step.
        speculation_strategy (`str`):
            `"quadratic"`, `"linear"` or `"adaptive"`.
        speculation_threshold (`float`):
            Least probability, in adaptive decoding, that a guess is right with all before it, for more to be made, and that
            verification ends at a place, for masks to be placed there.
        use_sampler (`bool`):
            Whether the sampler head makes the guesses, or the output embedding alone.
    """

    num_speculative_tokens: int
    speculation_strategy: str = "quadratic"
    speculation_threshold: float = 0.25
    use_sampler: bool = True

    @classmethod
    def resolve(cls, num_masks: int, generation_config: GenerationConfig) -> SpeculationOptions:
        """
        Options in `generation_config`, else the defaults.

        Raises:
            ValueError: naming the option, its value and what is possible.
        """
        options = cls(**{"num_speculative_tokens": num_masks, **options_in(generation_config)})
        count = options.num_speculative_tokens
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= num_masks:
            raise ValueError(
                f"`num_speculative_tokens` must be an integer from 1 to the adapter's `num_masks` of {num_masks}, got "
                f"{count!r}. For plain decoding generate inside `with model.disable_adapter():`."
            )
        if options.speculation_strategy not in STRATEGIES:
            raise ValueError(
                f"`speculation_strategy` must be one of {list(STRATEGIES)}, got {options.speculation_strategy!r}."
            )
        threshold = options.speculation_threshold
        if not isinstance(threshold, numbers.Real) or isinstance(threshold, bool) or not 0 <= threshold <= 1:
            raise ValueError(f"`speculation_threshold` must be a number from 0 to 1, got {threshold!r}.")
        if not isinstance(options.use_sampler, bool):
            raise ValueError(f"`use_sampler` must be True or False, got {options.use_sampler!r}.")
        return options


def options_in(generation_config: GenerationConfig | None) -> dict[str, Any]:
    """What is set of the options in a configuration, which keeps attributes that it doesn't know."""
    values = {name: getattr(generation_config, name, None) for name in OPTIONS}
    return {name: value for name, value in values.items() if value is not None}
