"""Settings of [`KwsTrainer`]."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments


LOSSES = ("utterance_loss", "prefix_loss", "ctc_loss", "contrastive_loss")


@dataclass
class KwsTrainingConfig(TrainingArguments):
    """
    Configuration of [`KwsTrainer`]. Only what is special to keyword spotting is described here; the rest is
    [`~transformers.TrainingArguments`].

    Args:
        utterance_loss_weight (`float`, *optional*), prefix_loss_weight (`float`, *optional*), ctc_loss_weight (`float`,
        *optional*), contrastive_loss_weight (`float`, *optional*):
            Weights of the losses, of those that the model has; by default those of its configuration, for SLiCK 2, 1 and 5.
        ctc_steps (`int`, *optional*, defaults to `0`):
            First steps, in which phonemes alone are learned.
        hide_stripes (`bool`, *optional*, defaults to `False`):
            Whether to hide stripes of the features in training ([`spec_augment`]).
        learning_rate (`float`, *optional*, defaults to `1e-3`), lr_scheduler_type (`str`, *optional*, defaults to
        `"cosine"`), warmup_steps (`float`, *optional*, defaults to `0.05`):
            Of AdamW. The paper gives none; its re-implementation warms up over 5 % of the steps.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Pairs are made into the model's inputs by the collator.
        label_names (`list[str]`, *optional*, defaults to `["labels", "pair_kinds"]`):
            What evaluation sorts the pairs by.

    Raises:
        ValueError: for negative weights or steps, all weights 0, and options that pairs can't be trained with.
    """

    utterance_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss of whole phrases; the model's own by default."}
    )
    prefix_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss of prefixes; the model's own by default."}
    )
    ctc_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss of phonemes; the model's own by default."}
    )
    contrastive_loss_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the loss of each clip with every phrase; the model's own by default."},
    )
    ctc_steps: int = field(default=0, metadata={"help": "First steps, in which phonemes alone are learned."})
    hide_stripes: bool = field(default=False, metadata={"help": "Hide stripes of the features in training."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or their share below 1."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it off: the collator needs them all."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels", "pair_kinds"], metadata={"help": "What evaluation sorts the pairs by."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = {name: getattr(self, f"{name}_weight") for name in LOSSES}
        for name, weight in weights.items():
            if weight is not None and not 0 <= weight < math.inf:
                raise ValueError(f"`{name}_weight` must be finite and not negative, got {weight}.")
        # Not every model has the contrastive loss: it has to be asked for where nothing else is trained.
        if all(weights[name] == 0 for name in LOSSES[:3]) and not self.contrastive_loss_weight:
            raise ValueError(
                "`utterance_loss_weight`, `prefix_loss_weight` and `ctc_loss_weight` are all 0, and there is no "
                "`contrastive_loss_weight`."
            )
        if self.ctc_steps < 0:
            raise ValueError(f"`ctc_steps` must not be negative, got {self.ctc_steps}.")
        if self.ctc_steps and self.ctc_loss_weight == 0:
            raise ValueError(f"`ctc_steps`={self.ctc_steps} train with `ctc_loss_weight` alone, which is 0.")
        if self.label_smoothing_factor or self.use_liger_kernel:
            raise ValueError(
                "`label_smoothing_factor` and `use_liger_kernel` have no effect on the losses of keyword spotting; leave "
                "them at their defaults."
            )
        if self.dataloader_persistent_workers:
            raise ValueError(
                "`dataloader_persistent_workers=True` would draw the pairs of the first epoch again in every other: leave it "
                "off."
            )
