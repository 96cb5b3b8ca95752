"""Settings of [`MtpTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import SFTConfig


@dataclass
class MtpConfig(SFTConfig):
    """
    Configuration of [`MtpTrainer`]. Only what is special to multi-token prediction is described here; the rest is
    [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Args:
        base_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the cross-entropy of the unembedded mask states.
        sampler_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the cross-entropy of the sampler head, on masks and on the anchors' own tokens.
        consistency_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the latent consistency loss, a mean over the hidden dimension. The paper's weights are all 1.
        soft_target_weight (`float`, *optional*, defaults to `0.0`):
            Share of the base model's own distribution in the targets of both cross-entropies. 0 trains on the labels, as
            the paper does; on text that the model didn't write itself, soft targets say what it would have written.
        anchors_per_sequence (`int`, *optional*, defaults to `128`):
            Masks are placed behind this many tokens of each sequence, drawn anew at every step, instead of behind all of
            them. The gradient stays unbiased and a step's cost no longer grows with the square of the length.
        anchors_per_chunk (`int`, *optional*, defaults to `32`):
            With `activation_checkpointing=True` (`gradient_checkpointing` before transformers 5.23) the masks of this many
            anchors run at a time and are recomputed in the backward pass, which bounds the memory and changes nothing else.
        eval_decoding_prompts (`int`, *optional*, defaults to `8`):
            Prompts of the evaluation set that are really decoded at every evaluation; 0 for none.
        eval_decoding_tokens (`int`, *optional*, defaults to `128`):
            New tokens for each.
        eval_prompt_length (`int`, *optional*, defaults to `32`):
            Tokens of a row that serve as prompt where the row has no prompt of its own.
        learning_rate (`float`, *optional*, defaults to `2e-4`):
            The paper's.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant_with_warmup"`):
            The paper's.
        gradient_checkpointing (`bool`, *optional*):
            Off by default, unlike in SFT: only masks carry gradients. `activation_checkpointing=True` turns it on.

    Raises:
        ValueError: for negative weights, counts below 1, and options of SFT that masks can't be trained with.
    """

    base_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the unembedded masks' cross-entropy."})
    sampler_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the sampler head's cross-entropy."})
    consistency_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the latent consistency loss."})
    soft_target_weight: float = field(
        default=0.0, metadata={"help": "Share of the base model's own distribution in the targets, from 0 to 1."}
    )
    anchors_per_sequence: int = field(default=128, metadata={"help": "Tokens per sequence with masks behind them."})
    anchors_per_chunk: int = field(
        default=32, metadata={"help": "Anchors that run at a time with activation checkpointing."}
    )
    eval_decoding_prompts: int = field(default=8, metadata={"help": "Prompts that are decoded at every evaluation."})
    eval_decoding_tokens: int = field(default=128, metadata={"help": "New tokens for each of these prompts."})
    eval_prompt_length: int = field(
        default=32, metadata={"help": "Tokens of a row that serve as prompt where it has no prompt of its own."}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Learning rate schedule."})
    # Not False: transformers takes a value for the use of a deprecated name.
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute mask activations in the backward pass, in chunks of anchors."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("base_loss_weight", "sampler_loss_weight", "consistency_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.soft_target_weight <= 1:
            raise ValueError(f"`soft_target_weight` must be from 0 to 1, got {self.soft_target_weight}.")
        for name in ("anchors_per_sequence", "anchors_per_chunk", "eval_decoding_tokens", "eval_prompt_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.eval_decoding_prompts < 0:
            raise ValueError(f"`eval_decoding_prompts` must not be negative, got {self.eval_decoding_prompts}.")
        if self.packing or self.padding_free or self.eval_packing:
            raise ValueError(
                "`packing` and `padding_free` put several texts into one row, where a mask could be asked for the first "
                "words of the next text. Leave them off: with `anchors_per_sequence` the length of a row is no longer "
                "what a step costs."
            )
        if self.loss_type != "nll" or self.label_smoothing_factor or self.use_liger_kernel:
            raise ValueError(
                "`loss_type`, `label_smoothing_factor` and `use_liger_kernel` have no effect on the losses over masks; "
                "leave them at their defaults."
            )
