"""Configuration of [`KwsConformerForCTC`]."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_kws_encoder import check_encoder


@strict
class KwsConformerConfig(PreTrainedConfig):
    r"""
    Configuration of [`KwsConformerForCTC`], the encoder of the keyword spotting models with a layer that hears phonemes.

    Dimensions have the names and the defaults of [`SlickConfig`], so that an encoder moves over to a model of the same
    dimensions.

    Args:
        vocab_size (`int`, *optional*, defaults to `74`):
            Phoneme symbols; the first is the blank of the CTC loss and the padding of labels.
        num_mel_bins (`int`, *optional*, defaults to `80`):
            Channels of the features.
        hidden_size (`int`, *optional*, defaults to `72`):
            Width of the encoder.
        num_hidden_layers (`int`, *optional*, defaults to `5`):
            Conformer blocks.
        num_attention_heads (`int`, *optional*, defaults to `4`):
            Heads of their self-attention.
        intermediate_size (`int`, *optional*, defaults to `144`):
            Width of their feed-forward layers.
        conv_kernel_size (`int`, *optional*, defaults to `3`):
            Frames that their convolutions see, an odd number.
        hidden_dropout (`float`, *optional*, defaults to `0.1`):
            Dropout in training.

    Raises:
        ValueError: if a size is not positive, heads don't divide the width, the kernel is even, or there are too few channels.

    Example:

    ```python
    >>> from hf_ext import KwsConformerConfig, KwsConformerForCTC

    >>> model = KwsConformerForCTC(KwsConformerConfig(num_hidden_layers=2))
    >>> model.config.vocab_size
    74
    ```
    """

    model_type = "kws_conformer"

    vocab_size: int = 74
    num_mel_bins: int = 80
    hidden_size: int = 72
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    intermediate_size: int = 144
    conv_kernel_size: int = 3
    hidden_dropout: float | int = 0.1
    # Those of [`PhonemeTokenizer`], which the Trainer would set otherwise, with a warning.
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | None = 3

    def __post_init__(self, **kwargs: Any) -> None:
        check_encoder(self)
        super().__post_init__(**kwargs)
