"""Training of routers, and of a model that has to serve slices of itself."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F
from trl import SFTTrainer

from hf_ext.hub.model_card import dynamoe_model_card
from hf_ext.row_generators import row_generator

from .modeling_dynamoe import DynaMoeForCausalLM
from .routing import smallest_sufficient, straight_through
from .trainer_checks import check_functions, check_prepared, check_routers, check_rows, check_settings, check_teacher
from .trainer_config import DynaMoeTrainingConfig
from .trainer_figures import confusion_counts, routing_figures


IGNORE_INDEX = -100
# Losses at each token; the others are at each label.
OF_TOKENS = ("router_loss", "budget_loss")


class DynaMoeTrainer(SFTTrainer):
    """
    Trains a [`DynaMoeForCausalLM`] (https://huggingface.co/papers/2502.12325, section 2): next-token loss of the routed model,
    the routers' loss, optionally the divergence from the dense model.

    Data, collation, distribution, checkpoints and logging are [`~trl.SFTTrainer`]'s. With `peft_config` (LoRA, with
    `modules_to_save=["router"]`) only adapters and routers are trained.

    It logs the losses, `active_fraction`, the share of MLP neurons that tokens used, and `router_accuracy`, the share of
    tokens whose router says what their label says; with `log_layers` also layer by layer. An evaluation logs loss and active
    fraction for each sensitivity, and leaves the counts of labels against choices, layer by layer, in `confusion`.

    Args:
        model (`str` or [`DynaMoeForCausalLM`]):
            The converted model, or its folder or name on the Hub.
        args ([`DynaMoeTrainingConfig`], *optional*):
            Settings.
        teacher_model ([`~transformers.PreTrainedModel`], *optional*):
            The dense model to stay near, with `distillation_weight`. By default a copy of `model` at full sensitivity.
        train_dataset, eval_dataset, processing_class, callbacks, optimizers, peft_config and the rest:
            As in [`~trl.SFTTrainer`], except for functions of logits, which differ with the sensitivity: `compute_metrics`,
            `preprocess_logits_for_metrics` and `compute_loss_func`.

    Raises:
        TypeError: for a model that is not converted, another kind of `args`, a teacher that is no model, rows that are no dataset.
        ValueError: for rows without text; for classifiers without a sensitivity; for routers alone on a trunk that they reach, or
            that are frozen; for functions of logits, and a teacher of another vocabulary or without weight.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from hf_ext import DynaMoeTrainer, DynaMoeTrainingConfig, convert_to_dynamoe, shipped_model

    >>> tokenizer = AutoTokenizer.from_pretrained(shipped_model("tiny-lm"))
    >>> texts = Dataset.from_dict({"text": ["Once upon a time there was a cat."]})
    >>> moe = convert_to_dynamoe(shipped_model("tiny-lm"), calibration_dataset=texts, disable_tqdm=True)
    >>> trainer = DynaMoeTrainer(
    ...     model=moe,
    ...     args=DynaMoeTrainingConfig(output_dir="moe", max_steps=1, report_to="none", bf16=False),
    ...     train_dataset=texts,
    ...     processing_class=tokenizer,
    ... )
    >>> output = trainer.train()  # doctest: +SKIP
    ```
    """

    _tag_names = ["trl", "dynamoe", "hf-ext"]
    _name = "DynaMoE"
    # The losses are sums divided by the counts of the whole step, on all processes.
    loss_is_scaled_for_ga = True

    args: DynaMoeTrainingConfig

    def __init__(
        self,
        model: Any,
        args: DynaMoeTrainingConfig | None = None,
        teacher_model: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        if args is None:
            args = DynaMoeTrainingConfig("dynamoe")
        if not isinstance(args, DynaMoeTrainingConfig):
            raise TypeError(f"`args` must be a DynaMoeTrainingConfig, got {type(args).__name__}.")
        if isinstance(model, (str, os.PathLike)):
            # As SFT does: updates at usual rates vanish in weights of 16 bits.
            options = {"dtype": "float32", "quantization_config": kwargs.pop("quantization_config", None)}
            model = DynaMoeForCausalLM.from_pretrained(model, **{**options, **(args.model_init_kwargs or {})})
        routed = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(routed, DynaMoeForCausalLM):
            raise TypeError(
                f"`model` must be a DynaMoeForCausalLM, got {type(routed).__name__}: see `convert_to_dynamoe`."
            )
        check_settings(args, routed)
        check_functions(kwargs)
        check_teacher(teacher_model, args, routed)
        for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_rows(name, rows, args, kwargs.get("formatting_func"))
        if args.distillation_weight and teacher_model is None:
            teacher_model = copy.deepcopy(routed).requires_grad_(False)
            teacher_model.config.sensitivity = 1.0
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        check_routers(args, self.model)
        check_prepared(self.train_dataset, args)
        if args.sensitivity is not None and routed.config.router_type == "classifier":
            self.routed.config.sensitivity = args.sensitivity
            self.routed.routing.rest(args.sensitivity)
        self.teacher = None
        if teacher_model is not None:
            self.teacher = self.accelerator.prepare_model(teacher_model.eval(), evaluation_mode=True)
        # Of every figure since the last log: the sum, and what it is over.
        self._totals: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        self.confusion: dict[float, torch.Tensor] = {}

    @property
    def routed(self) -> DynaMoeForCausalLM:
        """The model, without what trains and distributes it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if is_given:  # with rates of its own
            return optimizer
        named = (self.model if model is None else model).named_parameters()
        routers = {id(parameter) for name, parameter in named if ".router." in name}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in routers]
            if own and len(own) < len(group["params"]):
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in routers]
                optimizer.add_param_group({**group, "params": own, "lr": self.args.router_learning_rate})
            elif own:
                group["lr"] = self.args.router_learning_rate
        return optimizer

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> torch.Tensor | None:
        """Counts the labels and the tokens of the step, over all micro-batches and processes."""
        counts = torch.zeros(2, device=device)
        for batch in batch_samples:
            labels = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
            counts += torch.stack([labels, batch["attention_mask"].sum()]).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        for batch in batch_samples:
            batch["dynamoe_num_tokens"] = counts[1]
        return counts[0]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        mask, labels = inputs["attention_mask"], inputs["labels"][:, 1:]
        sensitivity, drawn = self._draw(inputs["input_ids"], mask)
        routers_alone = self._routers_alone()
        used = torch.ones_like(sensitivity) if routers_alone else sensitivity
        by_row, outputs = self._losses(model, inputs, used, drawn, sensitivity)
        losses = {name: values.sum() for name, values in by_row.items()}
        num_tokens = inputs.get("dynamoe_num_tokens", mask.sum()).clamp(min=1)
        num_labels = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        if "budget_loss" in losses:
            loss = self.args.budget_weight * losses["budget_loss"] / num_tokens
        else:
            loss = self.args.router_loss_weight * losses["router_loss"] / num_tokens
        if not routers_alone:
            of_labels = self.args.lm_loss_weight * losses["lm_loss"]
            if self.teacher is not None:
                of_labels = of_labels + self.args.distillation_weight * losses["distillation_loss"]
            loss = loss + of_labels / torch.as_tensor(num_labels).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages gradients over processes, and the counts are those of all of them.
            loss = loss * self.accelerator.num_processes
        self._record("train", inputs, outputs, by_row, sensitivity)
        return (loss, outputs) if return_outputs else loss

    def _routers_alone(self) -> bool:
        return self.state.global_step < self.args.router_steps

    def _draw(self, input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A sensitivity for each row, and what the model is told beside: the tokens that follow their labels, and noise."""
        args, step, config = self.args, self.state.global_step, self.routed.config
        span = args.label_forcing_ratio * max(self.state.max_steps - args.router_steps, 1)
        progress = min(1.0, max(0, step - args.router_steps) / span) if span else 1.0
        forced = 1 + (args.label_forcing - 1) * progress
        sensitivities, follow = [], torch.zeros(input_ids.shape, dtype=torch.bool)
        straight = args.straight_through and config.router_type == "ordinal" and not self._routers_alone()
        noise = torch.zeros(config.base_config.num_hidden_layers, *input_ids.shape, config.num_experts - 1)
        for row, (ids, seen) in enumerate(zip(input_ids.cpu(), mask.cpu().bool(), strict=True)):
            generator = row_generator(ids[seen], step, args.seed)
            value = args.min_sensitivity + (1 - args.min_sensitivity) * torch.rand((), generator=generator)
            sensitivities.append(float(value) if args.sensitivity is None else args.sensitivity)
            follow[row, seen] = torch.rand(int(seen.sum()), generator=generator) < forced
            if straight:
                noise[:, row, seen] = torch.randn(noise[:, row, seen].shape, generator=generator)
        drawn = {"forcing_mask": follow.to(input_ids.device)}
        if straight:
            drawn["router_noise"] = args.router_noise * noise.to(input_ids.device)
        return torch.tensor(sensitivities, device=input_ids.device), drawn

    def _losses(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        sensitivity: Any,
        drawn: dict[str, torch.Tensor],
        label_sensitivity: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """For each row the sums over its tokens, and the model's outputs."""
        mask, labels = inputs["attention_mask"], inputs["labels"][:, 1:]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            use_cache=False,
            sensitivity=sensitivity,
            output_router_logits=True,
            output_nearness=True,
            **drawn,
        )
        logits = outputs.logits[:, :-1].float()
        of_labels = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        losses = {
            "router_loss": (self.routed.router_losses(outputs, label_sensitivity[:, None]) * mask).sum(1),
            "lm_loss": of_labels.view_as(labels).sum(1),
        }
        if "router_noise" in drawn:
            losses["budget_loss"] = self._budget_loss(outputs, label_sensitivity[:, None], mask)
        if self.teacher is not None and self.model.training:
            with torch.no_grad():
                said = self.teacher(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False).logits
            divergence = F.kl_div(
                logits.log_softmax(-1), said[:, :-1].float().log_softmax(-1), reduction="none", log_target=True
            )
            losses["distillation_loss"] = (divergence.sum(-1) * (labels != IGNORE_INDEX)).sum(1)
        return losses, outputs

    def _budget_loss(self, outputs: Any, sensitivity: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The squared difference between the shares of the MLPs that a row uses and may use, for each token."""
        widths = (
            torch.tensor(self.routed.config.expert_widths, device=mask.device) / self.routed.config.expert_widths[-1]
        )
        choices = [
            straight_through(logits, sensitivity, self.routed.choices(logits, sensitivity)).to(mask.device)
            for logits in outputs.router_logits
        ]
        used = (torch.stack(choices) * widths.diff(prepend=widths.new_zeros(1))).sum(-1).mean(0)
        wanted = self.args.active_fraction
        if wanted is None:
            wanted = widths[smallest_sufficient(outputs.nearness, sensitivity)].mean(0)
        num_tokens = mask.sum(1)
        return ((used - wanted) * mask).sum(1).square() / num_tokens.clamp(min=1)

    @torch.no_grad()
    def _record(
        self,
        mode: str,
        inputs: dict[str, torch.Tensor],
        outputs: Any,
        losses: dict[str, torch.Tensor],
        sensitivity: torch.Tensor,
        prefix: str = "",
    ) -> None:
        config, mask = self.routed.config, inputs["attention_mask"].bool()
        num_tokens, num_labels = mask.sum(1), (inputs["labels"][:, 1:] != IGNORE_INDEX).sum(1)
        pairs = {
            name: torch.stack([values.detach().float(), num_tokens if name in OF_TOKENS else num_labels], -1)
            for name, values in losses.items()
        }
        widths = torch.tensor(config.expert_widths, device=mask.device) / config.expert_widths[-1]
        # Of the routers' own choices: while they train alone the model runs dense.
        chosen = torch.stack([self.routed.choices(logits, sensitivity[:, None]) for logits in outputs.router_logits])
        wanted = smallest_sufficient(outputs.nearness, sensitivity[:, None])
        for name, values in routing_figures(chosen, wanted, widths, self.args.log_layers).items():
            pairs[name] = torch.stack([(values * mask).sum(1), num_tokens], -1)
        for name, pair in zip(pairs, self._over_rows(mode, torch.stack(list(pairs.values()), 1)), strict=True):
            self._totals[mode][prefix + name] = self._totals[mode].get(prefix + name, 0) + pair
        if mode == "train":
            self._total_train_tokens += self._over_rows(mode, num_tokens).item()
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
            return
        counts = self._over_rows(mode, confusion_counts(wanted, chosen, mask, config.num_experts)).cpu()
        self.confusion[float(sensitivity[0])] = self.confusion.get(float(sensitivity[0]), 0) + counts

    def _over_rows(self, mode: str, rows: torch.Tensor) -> torch.Tensor:
        """The sum over the rows of a batch on all processes; an evaluation leaves out those that only fill it up."""
        if mode == "train":  # which learns from them too
            return self.accelerator.gather(rows.sum(0, keepdim=True)).sum(0)
        return self.accelerator.gather_for_metrics(rows).sum(0)

    def _figures(self, mode: str) -> dict[str, float]:
        """Averages since the last call, over all tokens, however these were spread over batches."""
        totals, self._totals[mode] = self._totals[mode], {}
        pairs = {name: pair.tolist() for name, pair in totals.items()}
        return {name: total / count for name, (total, count) in pairs.items() if count > 0}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(self._figures("train"))
        super().log(logs, start_time)

    @property
    def _evaluated(self) -> list[float]:
        config = self.routed.config
        return (
            sorted({config.sensitivity, 1.0}) if config.router_type == "classifier" else self.args.eval_sensitivities
        )

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        rows = inputs["input_ids"].shape[0]
        with torch.no_grad(), self.compute_loss_context_manager():
            for value in self._evaluated:
                sensitivity = torch.full((rows,), value, device=inputs["input_ids"].device)
                losses, outputs = self._losses(model, inputs, sensitivity, {}, sensitivity)
                self._record("eval", inputs, outputs, losses, sensitivity, prefix=f"{value:g}_")
        return losses["lm_loss"].sum().detach(), None, None

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the model's card, with what it was trained on and what it reached, into the output folder."""
        if isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            super().create_model_card(model_name, dataset_name, tags)
            return
        if not self.is_world_process_zero():
            return
        facts: dict[str, Any] = {
            "trained with": f"{type(self).__name__}, hf_ext, TRL, transformers",
            "training text": dataset_name,
            "steps": self.state.global_step,
        }
        last: dict[str, float] = next(
            (entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), {}
        )
        for value in self._evaluated:
            # A resumed run may evaluate others than the entry of before; and a loss without bounds still has to be saved.
            if (loss := last.get(f"eval_{value:g}_lm_loss")) is not None:
                facts[f"perplexity on the evaluation set at sensitivity {value:g}"] = (
                    f"{math.exp(min(loss, 700)):.3f} with {last[f'eval_{value:g}_active_fraction']:.0%} of the MLPs' neurons"
                )
        card = dynamoe_model_card(
            self.routed,
            self.args.hub_model_id or model_name or Path(self.args.output_dir).name,
            facts={name: value for name, value in facts.items() if value},
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        )
        card.save(Path(self.args.output_dir) / "README.md")

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        check_rows("eval_dataset", eval_dataset, self.args, self._formatting_func)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self.confusion = {}
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        figures = self._figures("eval")
        if not any(name.endswith("_lm_loss") for name in figures):
            raise ValueError(
                "`eval_dataset` has no token to predict: every row is a single token, or its labels are all ignored. Give longer "
                "rows, or raise `max_length` if it cuts completions off."
            )
        by_sensitivity = [figures[f"{value:g}_lm_loss"] for value in self._evaluated]
        # In place of a mean over batches: the mean over sensitivities of the losses over all tokens.
        figures["loss"] = sum(by_sensitivity) / len(by_sensitivity)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output
