"""What can't be trained is refused before the first step, by name and with the way out."""

from __future__ import annotations

from typing import Any

import torch

from .modeling_dynamoe import DynaMoeForCausalLM
from .trainer_config import DynaMoeTrainingConfig


# What transformers would call with the logits of a batch, and the way out.
FUNCTIONS_OF_LOGITS = {
    "compute_metrics": "add figures to the metrics that `evaluate` returns, in a subclass's `evaluation_loop`",
    "preprocess_logits_for_metrics": "leave it out together with `compute_metrics`",
    "compute_loss_func": "set the weights of the losses in `DynaMoeTrainingConfig` or override `compute_loss`",
}


def check_rows(name: str, rows: Any, args: DynaMoeTrainingConfig, formatting_func: Any = None) -> None:
    """
    Refuses rows that TRL would look for text in, and end in a bare `KeyError` where it finds none.

    Args:
        name (`str`):
            What the caller calls them.
        rows ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            The rows; of a `dict` each value.
        args ([`DynaMoeTrainingConfig`]):
            Settings, with the name of the column of text.
        formatting_func (`Callable`, *optional*):
            What makes text of a row, whatever its columns.

    Raises:
        TypeError: for anything but datasets.
        ValueError: for a dataset without rows, and one without a column that is trained on.
    """
    if rows is None or isinstance(rows, str) or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return  # a string stands for a dataset that was looked at before
    if isinstance(rows, dict) and name == "train_dataset":
        raise TypeError(f"`{name}` holds the splits {sorted(rows)}: give one of them.")
    if isinstance(rows, dict):
        for key, part in rows.items():
            check_rows(f"{name}[{key!r}]", part, args, formatting_func)
        return
    if not hasattr(rows, "column_names"):
        raise TypeError(
            f"`{name}` must be a dataset, got {type(rows).__name__}: make one with `datasets.Dataset.from_list` of rows such as "
            f"{{'{args.dataset_text_field}': '...'}}, or load one with `datasets.load_dataset(..., split='train')`."
        )
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"`{name}` has no rows: look at what was selected or filtered.")
    # Of a prompt with its completion no other column is asked.
    wanted = {"completion"} if "prompt" in first else {args.dataset_text_field, "messages", "conversations"}
    if formatting_func is None and not first.keys() & {"input_ids", *wanted}:
        raise ValueError(
            f"`{name}` has none of the columns that are trained on (`{args.dataset_text_field}`, `messages`, `input_ids`, or "
            f"`prompt` with `completion`), only {list(first)}: name the column of text in `dataset_text_field`, rename one, or "
            "give a `formatting_func` that makes text of a row."
        )


def check_prepared(rows: Any, args: DynaMoeTrainingConfig) -> None:
    """
    Refuses a dataset of which nothing is left: TRL drops rows without a token that is trained on.

    Args:
        rows ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The tokenized rows to train on; those that are streamed are unknown yet.
        args ([`DynaMoeTrainingConfig`]):
            Settings.

    Raises:
        ValueError: with the length that they were cut to.
    """
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise ValueError(
            f"`train_dataset` has no row with a token that is trained on: all are empty, or `max_length`={args.max_length} cuts "
            "their completions off. Raise it, or shorten the prompts."
        )


def check_settings(args: DynaMoeTrainingConfig, routed: DynaMoeForCausalLM) -> None:
    """
    Refuses settings that don't fit the routers.

    Args:
        args ([`DynaMoeTrainingConfig`]):
            Settings.
        routed ([`DynaMoeForCausalLM`]):
            The model that is trained.

    Raises:
        ValueError: for classifiers without a sensitivity, a budget that they can't keep or that is below the smallest expert,
            and for routers alone on a trunk that they reach.
    """
    if routed.config.router_type == "classifier" and args.sensitivity in (None, 1):
        raise ValueError(
            "`sensitivity` is needed: the routers are classifiers, whose labels are made with one, below 1, got "
            f"{args.sensitivity}."
        )
    if args.active_fraction is not None:
        least = routed.config.expert_widths[0] / routed.config.expert_widths[-1]
        if routed.config.router_type == "classifier" or args.active_fraction < least:
            raise ValueError(
                f"`active_fraction`={args.active_fraction} is for ordinal routers, and at least the share of the smallest expert, "
                f"{least:.3g}, got {routed.config.router_type} routers: convert with `router_type='ordinal'` or smaller experts."
            )
    if args.router_steps and not routed.config.detach_router_input:
        raise ValueError(
            f"`router_steps`={args.router_steps} trains routers alone, but with `detach_router_input=False` their loss "
            "moves the whole model: use 0, or detach."
        )


def check_functions(options: dict[str, Any]) -> None:
    """
    Refuses functions of logits, of which an evaluation has one set for each sensitivity.

    Args:
        options (`dict[str, Any]`):
            The trainer's further arguments.

    Raises:
        ValueError: naming the function.
    """
    for name, way_out in FUNCTIONS_OF_LOGITS.items():
        if (function := options.get(name)) is not None:
            raise ValueError(
                f"`{name}={getattr(function, '__name__', function)}` would never be called: a batch has other logits for each "
                f"sensitivity, and the losses are the trainer's own. Instead, {way_out}."
            )


def check_teacher(teacher: Any, args: DynaMoeTrainingConfig, routed: DynaMoeForCausalLM) -> None:
    """
    Refuses a teacher that the routed model can't be compared with.

    Args:
        teacher ([`~transformers.PreTrainedModel`], *optional*):
            The dense model.
        args ([`DynaMoeTrainingConfig`]):
            Settings.
        routed ([`DynaMoeForCausalLM`]):
            The model that is trained.

    Raises:
        TypeError: for anything but a model.
        ValueError: for one of another vocabulary, or one whose distribution has no weight.
    """
    if teacher is None:
        return
    if not isinstance(teacher, torch.nn.Module):
        raise TypeError(
            f"`teacher_model` must be a model, got {teacher!r}: load it first with `AutoModelForCausalLM.from_pretrained`."
        )
    if not args.distillation_weight:
        raise ValueError(
            "`teacher_model` is given, but with `distillation_weight=0.0` it would run at every step for nothing: set a "
            "weight such as 1.0, or leave the teacher out."
        )
    models: tuple[Any, ...] = (teacher, routed)
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in models]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`teacher_model` has a vocabulary of {sizes[0]} and the model one of {sizes[1]}: distributions over different "
            "tokens can't be compared. Take the dense model that it was converted from."
        )


def check_routers(args: DynaMoeTrainingConfig, model: torch.nn.Module) -> None:
    """
    Refuses routers that alone are to be trained and are frozen, which shows once adapters are there.

    Args:
        args ([`DynaMoeTrainingConfig`]):
            Settings.
        model (`nn.Module`):
            The model, with its adapter if it has one.

    Raises:
        ValueError: naming the ways to train them and to leave them.
    """
    routers = [parameter for name, parameter in model.named_parameters() if ".router." in name]
    if args.router_steps and not any(parameter.requires_grad for parameter in routers):
        raise ValueError(
            f"`router_steps`={args.router_steps} trains routers alone, but all of them are frozen: give "
            '`modules_to_save=["router"]` in `peft_config`, or keep the routers as they are with `router_steps=0`.'
        )
