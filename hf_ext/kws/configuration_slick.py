"""Configuration of [`SlickForKeywordSpotting`]."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_kws_encoder import check_encoder, check_sizes, check_weights


@strict
class SlickConfig(PreTrainedConfig):
    r"""
    Configuration of [`SlickForKeywordSpotting`], after [SLiCK](https://huggingface.co/papers/2409.09067).

    The paper gives a size, 596 K weights, and not all of the dimensions. The defaults come to that size with its 80 mel
    channels and 25 phonemes.

    Args:
        vocab_size (`int`, *optional*, defaults to `74`):
            Phoneme symbols; the first is the padding of phrases and the blank of the CTC loss.
        num_mel_bins (`int`, *optional*, defaults to `80`):
            Channels of the features.
        hidden_size (`int`, *optional*, defaults to `72`):
            Width of the encoder and of the phoneme vectors.
        num_hidden_layers (`int`, *optional*, defaults to `5`):
            Conformer blocks.
        num_attention_heads (`int`, *optional*, defaults to `4`):
            Heads of their self-attention.
        intermediate_size (`int`, *optional*, defaults to `144`):
            Width of their feed-forward layers.
        conv_kernel_size (`int`, *optional*, defaults to `3`):
            Frames that their convolutions see, an odd number.
        hidden_dropout (`float`, *optional*, defaults to `0.1`):
            Dropout in training. The paper doesn't say.
        max_phonemes (`int`, *optional*, defaults to `25`):
            Phonemes that every phrase is padded to, and the most that it may have with `head_type="flatten"`.
        num_matcher_heads (`int`, *optional*, defaults to `1`):
            Heads of the attention of phonemes over frames. The paper's formula has one.
        matcher_positions (`bool`, *optional*, defaults to `True`):
            Whether phonemes know their place in the phrase. The paper's don't: two that are alike give the same query.
        head_type (`str`, *optional*, defaults to `"flatten"`):
            `"flatten"`: weights of its own for each place in the phrase, and for each prefix, as in the paper. `"shared"`: the
            mean of one score per phoneme. It has no bound on the length, and does not hear the beginning more than the
            rest ([No Word Left Behind](https://huggingface.co/papers/2602.08930)).
        matcher_score_weight (`float`, *optional*, defaults to `1.0`), ctc_score_weight (`float`, *optional*, defaults to
        `0.0`), score_bias (`float`, *optional*, defaults to `0.0`):
            The log odds are the matcher's times the first weight, and, if the second isn't 0, the cost per phoneme of
            reading the phrase in the output of the CTC layer ([`ctc_phrase_scores`]) times the second, and the bias. The
            paper leaves the CTC layer out at inference; on recordings unlike the training data it knows more than the
            matcher. The weights change no loss: they are set after training.
        matcher_score_floor (`float`, *optional*):
            The least that the matcher's log odds count. One that hears a voice or a microphone unlike those of its training
            denies everything at any height.
        matcher_max_surplus (`int`, *optional*):
            How many phonemes the CTC layer may hear in a clip beyond as many as the phrase has, for the matcher to count. It
            is trained on clips that hold the phrase alone; what it says of a phrase inside a sentence is noise.
        cohort_size (`int`, *optional*, defaults to `0`), cohort_score_weight (`float`, *optional*, defaults to `0.45`):
            How many phrases that nobody asks for are read as well ([`~SlickForKeywordSpotting.set_cohort`]), and how much of
            what the best quarter of them reaches is subtracted from a phrase's own reading. In a noisy clip anything can be
            read a little; this is the T-norm of speaker verification ([Auckenthaler et al.,
            2000](https://doi.org/10.1006/dspr.1999.0360)).
        utterance_loss_weight (`float`, *optional*, defaults to `2.0`), prefix_loss_weight (`float`, *optional*, defaults to
        `1.0`), ctc_loss_weight (`float`, *optional*, defaults to `5.0`):
            Weights of the three losses.

    Raises:
        ValueError: if a size is not positive, heads don't divide the width, the kernel is even, there are too few channels, or
            the weight of a loss, `cohort_size` or `matcher_max_surplus` is negative.

    Example:

    ```python
    >>> from hf_ext import SlickConfig, SlickForKeywordSpotting

    >>> model = SlickForKeywordSpotting(SlickConfig(num_hidden_layers=2))
    >>> model.config.max_phonemes
    25
    ```
    """

    model_type = "slick"
    # `Trainer.evaluate` collects what is left: the logits of the phrases.
    keys_to_ignore_at_inference = [
        "prefix_logits",
        "ctc_logits",
        "utterance_loss",
        "prefix_loss",
        "ctc_loss",
        "audio_features",
    ]

    vocab_size: int = 74
    num_mel_bins: int = 80
    hidden_size: int = 72
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    intermediate_size: int = 144
    conv_kernel_size: int = 3
    hidden_dropout: float | int = 0.1
    max_phonemes: int = 25
    num_matcher_heads: int = 1
    matcher_positions: bool = True
    head_type: Literal["flatten", "shared"] = "flatten"
    matcher_score_weight: float | int = 1.0
    ctc_score_weight: float | int = 0.0
    score_bias: float | int = 0.0
    matcher_score_floor: float | int | None = None
    matcher_max_surplus: int | None = None
    cohort_size: int = 0
    cohort_score_weight: float | int = 0.45
    utterance_loss_weight: float | int = 2.0
    prefix_loss_weight: float | int = 1.0
    ctc_loss_weight: float | int = 5.0
    # Those of [`PhonemeTokenizer`], which the Trainer would set otherwise, with a warning.
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | None = 3

    def __post_init__(self, **kwargs: Any) -> None:
        check_encoder(self)
        check_sizes(self, "max_phonemes", "num_matcher_heads")
        check_weights(self, "utterance_loss_weight", "prefix_loss_weight", "ctc_loss_weight", "cohort_size")
        if self.matcher_max_surplus is not None:
            check_weights(self, "matcher_max_surplus")
        if self.hidden_size % self.num_matcher_heads:
            raise ValueError(
                f"`num_matcher_heads` ({self.num_matcher_heads}) does not divide `hidden_size` ({self.hidden_size})."
            )
        super().__post_init__(**kwargs)

    @property
    def longest_phrase(self) -> int | None:
        """Phonemes of the longest phrase that the model takes; `None` where any will do. Only this model has a longest."""
        return self.max_phonemes if self.head_type == "flatten" else None
