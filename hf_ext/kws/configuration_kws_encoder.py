"""What the dimensions of the keyword spotting encoder have to be, whichever model it is in."""

import math

from transformers import PreTrainedConfig


# The two convolutions of the encoder's entrance need so many channels.
_LEAST_MEL_BINS = 7


def check_sizes(config: PreTrainedConfig, *names: str) -> None:
    """Raises a `ValueError` for the first of these fields that is not at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(config, name)}.")


def check_weights(config: PreTrainedConfig, *names: str) -> None:
    """Raises a `ValueError` for the first of these fields that is negative or no number."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"`{name}` must be finite and not negative, got {getattr(config, name)}.")


def check_encoder(config: PreTrainedConfig) -> None:
    """
    Args:
        config (`PreTrainedConfig`):
            With `num_mel_bins`, `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `intermediate_size`,
            `conv_kernel_size` and `vocab_size`.

    Raises:
        ValueError: if a size is not positive, heads don't divide the width, the kernel is even, or there are too few channels.
    """
    check_sizes(
        config, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_kernel_size"
    )
    check_sizes(config, "vocab_size")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"`num_attention_heads` ({config.num_attention_heads}) does not divide `hidden_size` ({config.hidden_size})."
        )
    if config.conv_kernel_size % 2 == 0:
        raise ValueError(f"`conv_kernel_size` must be odd, got {config.conv_kernel_size}.")
    if config.num_mel_bins < _LEAST_MEL_BINS:
        raise ValueError(
            f"`num_mel_bins` must be at least {_LEAST_MEL_BINS} for the encoder's convolutions, got {config.num_mel_bins}."
        )
