"""Configuration of the gated LoRA method."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig
from peft.utils import PeftType

from hf_ext.hub.model_card import write_unless_written


@dataclass
class GatedLoraConfig(LoraConfig):
    """
    Configuration of [`GatedLoraModel`]: a LoRA that acts on mask tokens only, the mask vectors, and a sampler head.

    Ordinary tokens pass the base model unchanged, so the adapted model's next-token predictions are the base model's
    (https://huggingface.co/papers/2507.11851, sections 2.2 and 2.3). All fields of [`~peft.LoraConfig`] that do not touch
    the base model keep their meaning; those that do are refused.

    Args:
        num_masks (`int`, *optional*, defaults to `8`):
            Number of mask tokens, hence the most tokens that can be guessed ahead. The paper trains with 8; fewer can be
            used at generation time with the same weights.
        r (`int`, *optional*, defaults to `16`):
            Rank. The paper's table is within 3 % of its best from rank 16 on (figure 8).
        lora_alpha (`int`, *optional*, defaults to `32`):
            The LoRA output is scaled by `lora_alpha / r`.
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`):
            The paper adapts all seven projections of every layer. The output embedding can't be a target. Layers outside of
            the decoder, where no mask comes, stay as they are.
        frozen_masks (`bool`, *optional*, defaults to `False`):
            Keeps the mask vectors at their random initial values, which is the literal reading of the paper; by default
            they are trained, which costs `num_masks * hidden_size` values.
        sampler_residual (`bool`, *optional*, defaults to `True`):
            Adds the hidden state of the mask to the sampler's output, so that the sampler starts as the plain
            unembedding and learns a correction. `False` is the paper's sampler, which learns the whole map.
        base_hidden_size (`int`, *optional*):
            Filled when the adapter is created; loading onto a base model of another width is refused.
        base_num_layers (`int`, *optional*):
            The same for the number of layers.
        base_vocab_size (`int`, *optional*):
            The same for the size of the vocabulary.

    Raises:
        ValueError: for `num_masks` below 1 and for every LoRA option that would change ordinary tokens or that has no
            gated form, each with the reason.

    Example:

    ```python
    >>> from hf_ext import GatedLoraConfig
    >>> config = GatedLoraConfig(r=16, lora_alpha=32, num_masks=8, task_type="CAUSAL_LM")
    >>> config.peft_type
    <PeftType.GATED_LORA: 'GATED_LORA'>
    ```
    """

    r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "The LoRA output is scaled by lora_alpha / r."})
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Modules to adapt; by default all linear layers but the output one."}
    )
    task_type: str | None = field(default="CAUSAL_LM", metadata={"help": "Only CAUSAL_LM makes sense."})
    num_masks: int = field(default=8, metadata={"help": "Number of mask tokens: the most tokens guessed ahead."})
    frozen_masks: bool = field(default=False, metadata={"help": "Keep the mask vectors at their random values."})
    sampler_residual: bool = field(
        default=True, metadata={"help": "Let the sampler learn a correction of the mask's hidden state."}
    )
    base_hidden_size: int | None = field(default=None, metadata={"help": "Width of the base model; filled in."})
    base_num_layers: int | None = field(default=None, metadata={"help": "Depth of the base model; filled in."})
    base_vocab_size: int | None = field(default=None, metadata={"help": "Vocabulary of the base model; filled in."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.GATED_LORA
        if self.num_masks < 1:
            raise ValueError(f"`num_masks` must be at least 1, got {self.num_masks}.")
        if self.task_type != "CAUSAL_LM":
            raise ValueError(f"`task_type` must be 'CAUSAL_LM' for multi-token prediction, got {self.task_type!r}.")
        for name, reason in _refused_options(self).items():
            raise ValueError(f"`{name}={getattr(self, name)!r}` can't be used with gated LoRA: {reason}")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As [`~peft.PeftConfig.save_pretrained`], with a model card where there is none or a generic one."""
        super().save_pretrained(save_directory, **kwargs)
        write_unless_written(self, save_directory)

    def check_base(self, base_config: Any) -> None:
        """
        Notes the shape of the base model, or refuses one that differs from the shape noted before.

        Args:
            base_config ([`~transformers.PreTrainedConfig`]):
                The text configuration of the base model.

        Raises:
            ValueError: naming the field, the adapter's value and the model's.
        """
        found = {
            "base_hidden_size": base_config.hidden_size,
            "base_num_layers": base_config.num_hidden_layers,
            "base_vocab_size": base_config.vocab_size,
        }
        for name, value in found.items():
            expected = getattr(self, name)
            if expected is not None and expected != value:
                raise ValueError(
                    f"This adapter was made for another base model: `{name}` is {expected} in the adapter and {value} in "
                    f"the model ({base_config.model_type}). Load it onto {self.base_model_name_or_path or 'its own base'}."
                )
            setattr(self, name, value)


_CHANGES_BASE = "it changes what ordinary tokens compute, and then the output is no longer the base model's."
_NO_GATE = "it has no form that acts on mask tokens only."


def _refused_options(config: GatedLoraConfig) -> dict[str, str]:
    """The options set in `config` that gated LoRA can't honour, each with the reason."""
    refused: dict[str, str] = {}
    if config.bias != "none":
        refused["bias"] = _CHANGES_BASE
    if config.lora_bias:
        refused["lora_bias"] = _NO_GATE
    targets = config.target_modules
    if targets is not None and any(_names_head(t) for t in ([targets] if isinstance(targets, str) else targets)):
        refused["target_modules"] = (
            "the output embedding and the input embedding are shared by ordinary tokens and by the sampler head."
        )
    for name in ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"):
        if getattr(config, name):
            refused[name] = _NO_GATE if name == "target_parameters" else _CHANGES_BASE
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "orthogonal"):
        refused["init_lora_weights"] = "it rewrites base weights; use True, 'gaussian' or 'orthogonal'."
    for option in fields(config):
        if option.metadata.get("is_lora_variant") and getattr(config, option.name):
            refused[option.name] = _NO_GATE
    return refused


def _names_head(target: str) -> bool:
    return target.split(".")[-1] in {"lm_head", "embed_out", "embed_tokens", "embed_in", "wte"}
