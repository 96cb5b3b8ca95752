"""Configuration of [`CedForKeywordSpotting`]."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_kws_encoder import check_encoder, check_sizes, check_weights


@strict
class CedConfig(PreTrainedConfig):
    r"""
    Configuration of [`CedForKeywordSpotting`], after the [common embedding based
    detector](https://huggingface.co/papers/2308.06472).

    The encoder has the dimensions of the paper, 3,598,560 weights. Of the verifier the paper gives the kinds of layers alone, and 3.8 M weights in all:
    with the defaults there are 3,830,497, beside 10,656 numbers of the table of phonemes and 10,730 weights of the CTC head,
    which training and building the table need.

    Args:
        vocab_size (`int`, *optional*, defaults to `74`):
            Phoneme symbols; the first is the padding of phrases and the blank of the CTC loss.
        num_mel_bins (`int`, *optional*, defaults to `80`):
            Channels of the features.
        hidden_size (`int`, *optional*, defaults to `144`):
            Width of the encoder and of the phoneme vectors.
        num_hidden_layers (`int`, *optional*, defaults to `6`):
            Conformer blocks.
        num_attention_heads (`int`, *optional*, defaults to `4`):
            Heads of their self-attention.
        intermediate_size (`int`, *optional*, defaults to `576`):
            Width of their feed-forward layers.
        conv_kernel_size (`int`, *optional*, defaults to `3`):
            Frames that their convolutions see, an odd number.
        hidden_dropout (`float`, *optional*, defaults to `0.1`):
            Dropout of the encoder in training. The paper doesn't say.
        verifier_size (`int`, *optional*, defaults to `192`):
            Width of the verifier's GRU and of the layer behind it. The paper doesn't say: this one gives its size.
        agreement (`str`, *optional*, defaults to `"sum"`):
            What a phoneme and its frames make the verifier's input with: the `"sum"` of the frames, each times its cosine with
            the phoneme, as in the paper; or their `"mean"`, which doesn't grow with the length of the phoneme.
        freeze_encoder (`bool`, *optional*, defaults to `False`):
            Whether encoder and CTC head stay as they are, also without dropout. [`~CedForKeywordSpotting.freeze_encoder`] and
            [`~CedForKeywordSpotting.build_phoneme_table`] set it.
        utterance_loss_weight (`float`, *optional*, defaults to `1.0`), ctc_loss_weight (`float`, *optional*, defaults to
        `1.0`):
            Weights of the two losses. The paper has one of them at a time, the other would be 0.

    Raises:
        ValueError: if a size is not positive, heads don't divide the width, the kernel is even, there are too few channels, or
            the weight of a loss is negative.

    Example:

    ```python
    >>> from hf_ext import CedConfig, CedForKeywordSpotting

    >>> model = CedForKeywordSpotting(CedConfig(num_hidden_layers=2))
    >>> model.config.hidden_size
    144
    ```
    """

    model_type = "ced_kws"
    # `Trainer.evaluate` collects what is left: the logits of the phrases.
    keys_to_ignore_at_inference = ["ctc_logits", "utterance_loss", "ctc_loss", "audio_features"]

    vocab_size: int = 74
    num_mel_bins: int = 80
    hidden_size: int = 144
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 576
    conv_kernel_size: int = 3
    hidden_dropout: float | int = 0.1
    verifier_size: int = 192
    agreement: Literal["sum", "mean"] = "sum"
    freeze_encoder: bool = False
    utterance_loss_weight: float | int = 1.0
    ctc_loss_weight: float | int = 1.0
    # Those of [`PhonemeTokenizer`], which the Trainer would set otherwise, with a warning.
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | None = 3

    def __post_init__(self, **kwargs: Any) -> None:
        check_encoder(self)
        check_sizes(self, "verifier_size")
        check_weights(self, "utterance_loss_weight", "ctc_loss_weight")
        super().__post_init__(**kwargs)
