"""Settings of [`DynaMoeTrainer`]."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trl import SFTConfig

from .configuration_dynamoe import checked_sensitivity


@dataclass
class DynaMoeTrainingConfig(SFTConfig):
    """
    Configuration of [`DynaMoeTrainer`]. Only what is special to nested experts is described here; the rest is
    [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Args:
        lm_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the next-token loss of the routed model.
        router_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the routers' loss, a mean over layers and tokens.
        distillation_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the divergence from the dense model's distribution to the routed model's. Not in the paper; on text
            that the model might have written itself it says more than the next token does.
        sensitivity (`float`, *optional*):
            The sensitivity to train for. By default ordinal routers train for all: each row of each step draws its own
            between `min_sensitivity` and 1. Classifiers need one.
        min_sensitivity (`float`, *optional*, defaults to `0.3`):
            The least that is drawn.
        router_steps (`int`, *optional*, defaults to `200`):
            First steps in which the routers alone are trained, on the dense model (the paper's recipe leaves it open).
        label_forcing (`float`, *optional*, defaults to `0.0`):
            Share of tokens that take the expert of their label instead of the router's choice, reached from 1 by a straight
            line over `label_forcing_ratio` of the steps.
        label_forcing_ratio (`float`, *optional*, defaults to `0.1`):
            Share of the steps behind `router_steps` in which it falls.
        router_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Initial learning rate of the routers, with the same schedule.
        straight_through (`bool`, *optional*, defaults to `True`):
            Whether behind `router_steps` ordinal routers learn from the losses of the routed model, by a straight-through
            estimator, in place of the measured nearness, which then only says how much of the MLPs each text may use. Not in
            the paper: the same compute goes where it lowers the loss most. Classifiers always learn their labels.
        active_fraction (`float`, *optional*):
            Share of the MLPs that texts may use at `sensitivity`, which it needs, in place of what the labels of that
            sensitivity use. For a model of one budget that is known beforehand; not in the paper.
        budget_weight (`float`, *optional*, defaults to `10.0`):
            Weight of the squared difference between the share of the MLPs that a text uses and the one it may use.
        router_noise (`float`, *optional*, defaults to `1.0`):
            Standard deviation of the noise on the routers' logits in training, which lets them see what other choices do.
        eval_sensitivities (`list[float]`, *optional*, defaults to `[0.5, 0.7, 0.8, 0.9, 1.0]`):
            What is evaluated, each at the cost of a pass of its own; classifiers have their own and 1.
        log_layers (`bool`, *optional*, defaults to `False`):
            Whether the active fraction, the routers' accuracy and the share of tokens that each expert gets are also logged
            layer by layer, as in `layer_3_active_fraction` and `layer_3_expert_0`.
        learning_rate (`float`, *optional*, defaults to `1e-5`):
            Initial learning rate of everything else.
        gradient_checkpointing (`bool`, *optional*):
            Off by default, unlike in SFT; `activation_checkpointing=True` turns it on.

    Raises:
        ValueError: for weights, rates, steps and noise that are negative or no numbers, shares and sensitivities outside 0 to 1,
            none or the same twice to evaluate, a budget without a sensitivity or without routers that keep to it, and options of
            SFT that have no effect.
    """

    lm_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the routed model's next-token loss."})
    router_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the routers' loss."})
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Weight of the divergence from the dense model's distribution."}
    )
    sensitivity: float | None = field(
        default=None, metadata={"help": "Sensitivity to train for; by default all from `min_sensitivity` to 1."}
    )
    min_sensitivity: float = field(default=0.3, metadata={"help": "Least sensitivity that is drawn."})
    router_steps: int = field(default=200, metadata={"help": "First steps, which train the routers alone."})
    label_forcing: float = field(
        default=0.0, metadata={"help": "Share of tokens that follow their label instead of the router, at the end."}
    )
    label_forcing_ratio: float = field(
        default=0.1, metadata={"help": "Share of the steps in which it falls there from 1."}
    )
    router_learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate of the routers."})
    straight_through: bool = field(
        default=True, metadata={"help": "Ordinal routers learn from the losses of the routed model."}
    )
    active_fraction: float | None = field(
        default=None, metadata={"help": "Share of the MLPs to use at `sensitivity`; by default that of its labels."}
    )
    budget_weight: float = field(
        default=10.0, metadata={"help": "Weight of the squared difference from the share of the MLPs to use."}
    )
    router_noise: float = field(default=1.0, metadata={"help": "Standard deviation of noise on the routers' logits."})
    eval_sensitivities: list[float] = field(
        default_factory=lambda: [0.5, 0.7, 0.8, 0.9, 1.0], metadata={"help": "Sensitivities to evaluate."}
    )
    log_layers: bool = field(default=False, metadata={"help": "Log where tokens go layer by layer."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of everything else."})
    # Not False: transformers takes a value for the use of a deprecated name.
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("lm_loss_weight", "router_loss_weight", "distillation_weight", "budget_weight")
        for name in (*weights, "router_steps", "router_noise", "router_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a number of at least 0, got {getattr(self, name)}.")
        for name in ("label_forcing", "label_forcing_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be from 0 to 1, got {getattr(self, name)}.")
        values = self.eval_sensitivities
        if not isinstance(values, (list, tuple)) or not values or len(set(values)) < len(values):
            raise ValueError(
                f"`eval_sensitivities` must be a list of at least one sensitivity and none twice, got {values}."
            )
        for sensitivity in values:
            checked_sensitivity(sensitivity, "eval_sensitivities")
        checked_sensitivity(self.min_sensitivity, "min_sensitivity")
        if self.sensitivity is not None:
            checked_sensitivity(self.sensitivity)
        if self.active_fraction is not None:
            self._check_budget()
        for name in ("packing", "padding_free", "eval_packing"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}`={getattr(self, name)} puts several texts into one row, and a row draws one sensitivity for all: "
                    "leave it off."
                )
        for name, default in (("loss_type", "nll"), ("label_smoothing_factor", 0.0), ("use_liger_kernel", False)):
            if getattr(self, name) != default:
                raise ValueError(
                    f"`{name}`={getattr(self, name)!r} has no effect on the losses of routed tokens: leave it at {default!r}."
                )
        if self.router_steps and getattr(self, "ddp_find_unused_parameters", None) is None:
            # While routers train alone, nothing else gets a gradient.
            self.ddp_find_unused_parameters: bool | None = True

    def _check_budget(self) -> None:
        given = f"`active_fraction`={self.active_fraction}"
        if not 0 < self.active_fraction <= 1:  # type: ignore[operator]
            raise ValueError(f"{given} must be above 0 and at most 1: it is a share of the MLPs.")
        # At 0 and 1 the smallest and the whole expert are taken whatever routers say.
        if self.sensitivity in (None, 0, 1):
            raise ValueError(
                f"{given} is a budget at one `sensitivity` between 0 and 1, got {self.sensitivity}: give the one that it will be "
                "used at, such as 0.7."
            )
        if not self.straight_through or not self.budget_weight:
            raise ValueError(
                f"{given} is kept by routers that learn from the loss: it needs `straight_through=True` and a `budget_weight` "
                f"above 0, got {self.straight_through} and {self.budget_weight}."
            )
