"""Configuration of [`DspForKeywordSpotting`]."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_kws_encoder import check_encoder, check_sizes, check_weights


@strict
class DspKwsConfig(PreTrainedConfig):
    r"""
    Configuration of [`DspForKeywordSpotting`], after [dynamic sequence
    partitioning](https://huggingface.co/papers/2306.05245).

    The paper's model is reported to have 3.7 M weights beside the text encoder. The defaults come to that size: 3,598,560 of
    the encoder and 116,992 of the two projections with DistilBERT's 768 channels. Where the text encoder is of phonemes, it
    has 0.5 M of its own, which are not needed after enrolment. Where a default is called chosen here, it is not known to be the
    paper's.

    Args:
        text_config (`dict` or [`~transformers.PreTrainedConfig`], *optional*):
            Configuration of any text encoder among transformers' models. The units are then words, as in the paper with
            DistilBERT: [`~DspForKeywordSpotting.from_text_pretrained`]. By default the units are phonemes, and a small encoder
            of them is trained with the rest.
        freeze_text_encoder (`bool`, *optional*, defaults to `True`):
            Whether the model of `text_config` stays as it is. An encoder of phonemes is always trained.
        num_text_layers (`int`, *optional*, defaults to `1`):
            Conformer blocks of the encoder of phonemes.
        vocab_size (`int`, *optional*, defaults to `74`):
            Phoneme symbols; the first is the padding of phrases and the blank of the CTC loss.
        num_mel_bins (`int`, *optional*, defaults to `80`):
            Channels of the features.
        hidden_size (`int`, *optional*, defaults to `144`):
            Width of the encoder.
        num_hidden_layers (`int`, *optional*, defaults to `6`):
            Conformer blocks.
        num_attention_heads (`int`, *optional*, defaults to `4`):
            Heads of their self-attention.
        intermediate_size (`int`, *optional*, defaults to `576`):
            Width of their feed-forward layers.
        conv_kernel_size (`int`, *optional*, defaults to `3`):
            Frames that their convolutions see, an odd number.
        hidden_dropout (`float`, *optional*, defaults to `0.1`):
            Dropout in training, chosen here.
        projection_size (`int`, *optional*, defaults to `128`):
            Width of the space that frames and units are compared in.
        partitioning (`str`, *optional*, defaults to `"dynamic"`):
            Which frames are compared with which unit. `"dynamic"`: consecutive ones, so that the sum of the similarities of
            frames and their units is the greatest there is. `"dynamic_mean"`: the same for the similarities of units and the
            means of their frames. `"equal"`: equally many for each unit. `"attention"`: all, weighted by their similarity.
            The last two are there to compare with.
        attention_temperature (`float`, *optional*, defaults to `0.1`):
            Of the weights of `"attention"`, chosen here.
        initial_temperature (`float`, *optional*, defaults to `0.07`):
            Where the temperature of the contrastive loss begins; it is trained. Chosen here.
        utterance_loss_weight (`float`, *optional*, defaults to `1.0`), contrastive_loss_weight (`float`, *optional*, defaults
        to `1.0`), ctc_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weights of the losses: whether a clip holds its phrase, which of the batch's phrases it holds, and which phonemes
            were spoken. The paper has a contrastive loss; that the others stand beside it is chosen here, and so are the
            weights. `ctc_steps` of [`KwsTrainingConfig`] train the encoder to recognise speech before the rest.

    Raises:
        ValueError: if a number is out of range, heads don't divide the width, or `text_config` is of no text encoder.

    Example:

    ```python
    >>> from transformers import DistilBertConfig
    >>> from hf_ext import DspKwsConfig

    >>> DspKwsConfig().unit, DspKwsConfig(text_config=DistilBertConfig()).unit
    ('phoneme', 'word')
    ```
    """

    model_type = "dsp_kws"
    sub_configs = {"text_config": AutoConfig}
    # `Trainer.evaluate` collects what is left: the logits of the phrases.
    keys_to_ignore_at_inference = [
        "ctc_logits",
        "utterance_loss",
        "ctc_loss",
        "contrastive_loss",
        "audio_features",
    ]

    # Of the types in the docstring on the way in, a configuration or `None` from then on.
    text_config: Any = None
    freeze_text_encoder: bool = True
    num_text_layers: int = 1
    vocab_size: int = 74
    num_mel_bins: int = 80
    hidden_size: int = 144
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 576
    conv_kernel_size: int = 3
    hidden_dropout: float | int = 0.1
    projection_size: int = 128
    partitioning: Literal["dynamic", "dynamic_mean", "equal", "attention"] = "dynamic"
    attention_temperature: float | int = 0.1
    initial_temperature: float | int = 0.07
    utterance_loss_weight: float | int = 1.0
    contrastive_loss_weight: float | int = 1.0
    ctc_loss_weight: float | int = 1.0
    # Those of [`PhonemeTokenizer`], which the Trainer would set otherwise, with a warning.
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | None = 3

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            if "model_type" not in self.text_config:
                raise ValueError("`text_config` has no `model_type`: give the text encoder's own configuration.")
            self.text_config = AutoConfig.for_model(**self.text_config)
        if self.text_config is not None and (
            self.text_config.is_encoder_decoder or not isinstance(getattr(self.text_config, "hidden_size", None), int)
        ):
            raise ValueError(
                f"`text_config` is of the type '{self.text_config.model_type}', which is no text encoder with one "
                "`hidden_size`: take one such as DistilBERT."
            )
        check_encoder(self)
        check_sizes(self, "projection_size", "num_text_layers")
        check_weights(self, "utterance_loss_weight", "contrastive_loss_weight", "ctc_loss_weight")
        for name in ("attention_temperature", "initial_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        super().__post_init__(**kwargs)

    @property
    def unit(self) -> str:
        """What phrases are made of, `"phoneme"` or `"word"`."""
        return "phoneme" if self.text_config is None else "word"

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if output.get("text_config"):
            output["text_config"].pop("_name_or_path", None)  # often a folder on somebody's machine
        return output
