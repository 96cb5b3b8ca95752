"""Configuration of [`DynaMoeForCausalLM`]."""

import itertools
import operator
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


# Fields of which more than the type is checked.
_CHECKED = ("expert_widths", "router_hidden_size", "sensitivity", "label_sensitivity")


@strict
class DynaMoeConfig(PreTrainedConfig):
    r"""
    Configuration of [`DynaMoeForCausalLM`]: a dense model and how its MLPs are nested and routed.

    Args:
        base_config (`dict` or [`~transformers.PreTrainedConfig`], *optional*):
            The dense model's own configuration. By default that of a llama.
        expert_widths (`list[int]`, *optional*):
            Number of MLP neurons that each expert owns, ascending; the last is the whole MLP. By default quarters of it
            (the paper, section 2.1, has `H_e = (e + 1) / E * H`).
        router_type (`str`, *optional*, defaults to `"ordinal"`):
            `"ordinal"`: the router predicts how near each smaller expert comes to the whole MLP, and the sensitivity is
            chosen at inference. `"classifier"`: the router predicts the label of one fixed sensitivity, as in the
            paper's table.
        router_hidden_size (`int`, *optional*, defaults to `256`):
            Width of the router's hidden layer.
        detach_router_input (`bool`, *optional*, defaults to `True`):
            Keeps the routers' own loss from reaching the model's weights. Of a loss of the routed model, which routers learn
            from with `router_noise`, they are a part like any other.
        similarity (`str`, *optional*, defaults to `"error"`):
            What nearness is, which the paper doesn't say: `"error"`, by which tokens to which the MLP adds little demand
            little; `"projection"`, the share of the whole MLP's output that an expert has produced; or `"cosine"`.
        output_norms (`list[float]`, *optional*):
            Typical size of each layer's MLP output, which `"error"` is measured against; conversion finds it.
        sensitivity (`float`, *optional*, defaults to `1.0`):
            Nearness that a token demands, from 0 to 1. 1 is the dense model. For a `"classifier"` it is the one that its labels
            were made with.
        label_sensitivity (`float`, *optional*):
            What a `"classifier"` was trained for, while `sensitivity` is 1.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether outputs carry what the routers said; with `labels`, also the routers' loss.
        router_aux_loss_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the routers' loss, a mean over layers and tokens.
        conversion (`dict`, *optional*):
            What the conversion reported, see [`ConversionReceipt`].

    Raises:
        TypeError: for a `base_config` that is no configuration.
        ValueError: for widths that don't ascend to the width of the base model's MLP, for a sensitivity outside 0 to 1; when
            read, also for the configuration of another type of model.

    Example:

    ```python
    >>> from hf_ext import DynaMoeConfig, DynaMoeForCausalLM
    >>> from transformers import LlamaConfig

    >>> base = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    >>> config = DynaMoeConfig(base_config=base, expert_widths=[16, 32, 64])
    >>> model = DynaMoeForCausalLM(config)
    >>> model.config.num_experts
    3
    ```
    """

    model_type = "dynamoe"
    # Saving copies the code, see the model.
    _auto_class = "AutoConfig"
    sub_configs = {"base_config": AutoConfig}
    has_no_defaults_at_init = False
    # What an evaluation doesn't gather: no tensors, or none with the rows first.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "aux_loss",
        "router_logits",
        "nearness",
        "expert_index",
        "active_parameters",
    ]

    # Of the types in the docstring on the way in, a configuration and a list of integers from then on.
    base_config: Any = None
    expert_widths: Any = None
    router_type: Literal["ordinal", "classifier"] = "ordinal"
    router_hidden_size: int = 256
    detach_router_input: bool = True
    similarity: Literal["error", "projection", "cosine"] = "error"
    output_norms: list[float] | None = None
    sensitivity: float | int = 1.0
    label_sensitivity: float | int | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 1.0
    conversion: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.base_config is None:
            self.base_config = AutoConfig.for_model("llama")
        elif isinstance(self.base_config, dict):
            if "model_type" not in self.base_config:
                raise ValueError("`base_config` has no `model_type`: give the dense model's own configuration.")
            self.base_config = AutoConfig.for_model(**self.base_config)
        elif not isinstance(self.base_config, PreTrainedConfig):
            raise TypeError(
                f"`base_config` must be the dense model's configuration or a dict of it, got {self.base_config!r}: read it with "
                "`AutoConfig.from_pretrained`."
            )
        self.tie_word_embeddings = self.base_config.tie_word_embeddings
        width = mlp_width(self.base_config)
        if self.expert_widths is None:
            self.expert_widths = equal_widths(width, 4)
        self.expert_widths = checked_widths(self.expert_widths, width)
        self.sensitivity = checked_sensitivity(self.sensitivity)
        if self.label_sensitivity is not None:
            self.label_sensitivity = checked_sensitivity(self.label_sensitivity, "label_sensitivity")
        if self.router_hidden_size < 1:
            raise ValueError(f"`router_hidden_size` must be at least 1, got {self.router_hidden_size}.")
        # A live model reads the attention that it runs from its configuration, which this constructor would clear.
        kwargs.setdefault("attn_implementation", self.base_config._attn_implementation)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"The configuration is that of a '{found}' model, which has no nested experts: make them with "
                "`convert_to_dynamoe`, or load the model with `AutoModelForCausalLM`."
            )
        # transformers sets what the caller gives beside the file when the checks above are done.
        given = {name: kwargs.pop(name) for name in _CHECKED if name in kwargs}
        return super().from_dict({**config_dict, **given}, **kwargs)

    @property
    def num_experts(self) -> int:
        return len(self.expert_widths)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["base_config"].pop("_name_or_path", None)  # often a folder on somebody's machine
        return output

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The dense model's configuration: what caches, generation and tools ask for sizes."""
        return self.base_config


def mlp_width(config: PreTrainedConfig) -> int:
    """Number of MLP neurons per layer of a dense model."""
    width = getattr(config, "intermediate_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"`base_config` of type '{config.model_type}' has `intermediate_size`={width!r}: nested experts need one MLP "
            "width for all layers."
        )
    return width


def equal_widths(width: int, num_experts: int) -> list[int]:
    """
    Widths of `num_experts` experts in equal steps.

    Raises:
        ValueError: for fewer than two experts, or a number that doesn't divide the width.
    """
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 2:
        raise ValueError(f"`num_experts` must be an integer of at least 2, got {num_experts!r}.")
    if width % num_experts:
        raise ValueError(
            f"`num_experts`={num_experts} doesn't divide the MLP's {width} neurons. Give `expert_widths` instead, such as "
            f"{tuple(round(width * (e + 1) / num_experts) for e in range(num_experts))}."
        )
    return [width * (e + 1) // num_experts for e in range(num_experts)]


def checked_widths(widths: Any, width: int) -> list[int]:
    """The widths as a list, if they ascend from at least 1 to the whole MLP."""
    given = list(widths) if isinstance(widths, Iterable) else [widths]
    widths = [_integer(value) for value in given]
    if len(widths) < 2 or any(w is None or w < 1 for w in widths):
        raise ValueError(f"`expert_widths` must be at least two integers of at least 1, got {given}.")
    if any(a >= b for a, b in itertools.pairwise(widths)):
        raise ValueError(f"`expert_widths` must ascend, since each expert contains the one before; got {widths}.")
    if widths[-1] != width:
        raise ValueError(
            f"The last of `expert_widths` must be the whole MLP of {width} neurons, got {widths[-1]}: at full sensitivity "
            "the model is the dense one."
        )
    return widths


def _integer(value: Any) -> int | None:
    """As Python's own, also of those in arrays and tensors; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def checked_sensitivity(sensitivity: Any, name: str = "sensitivity") -> float:
    """The sensitivity as a float, if it lies between 0 and 1; `name` is what the caller calls it."""
    if isinstance(sensitivity, bool) or not isinstance(sensitivity, (int, float)):
        raise ValueError(f"`{name}` must be a number from 0 to 1, got {sensitivity!r}.")
    # Of NaN neither holds, and a compiled graph can ask this of a number that it keeps open.
    if not 0 <= sensitivity <= 1:
        raise ValueError(f"`{name}` must lie between 0 (smallest expert) and 1 (dense model), got {sensitivity}.")
    return float(sensitivity)


__all__ = ["DynaMoeConfig"]
