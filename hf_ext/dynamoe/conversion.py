"""From a dense model to nested experts: neurons in the order of their importance, routers that start at the full expert."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .calibration import calibration_batches, check_calibration
from .dense_model import beside, check_formula, dense_skeleton, nested_config
from .importance import neuron_importance
from .loading import files_named
from .modeling_dynamoe import DynaMoeForCausalLM
from .nested_mlp import mlp_places, projection_names


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class ConversionReceipt:
    """
    What a conversion did.

    Args:
        base_model (`str`, *optional*):
            Name of the dense model on the Hub.
        expert_widths (`list[int]`):
            Neurons of each expert.
        importance (`str`):
            How neurons were ranked.
        calibration_tokens (`int`):
            Tokens that they were ranked on.
        importance_shares (`list[list[float]]`):
            For each layer, the share of all importance that lies within each expert.
        largest_logit_difference (`float`):
            Between the dense model before and behind the reordering, on the first calibration text: float noise.
        router_parameters (`int`):
            Number of parameters that the routers add.
    """

    base_model: str | None
    expert_widths: list[int]
    importance: str
    calibration_tokens: int
    importance_shares: list[list[float]]
    largest_logit_difference: float
    router_parameters: int


def convert_to_dynamoe(
    model: str | os.PathLike[str] | PreTrainedModel,
    num_experts: int = 4,
    *,
    expert_widths: Iterable[int] | None = None,
    calibration_dataset: Any = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    importance: str = "activation_norm",
    calibration_tokens: int = 500_000,
    batch_size: int = 8,
    max_length: int = 1024,
    router_type: str = "ordinal",
    router_hidden_size: int = 256,
    similarity: str = "error",
    disable_tqdm: bool = False,
) -> DynaMoeForCausalLM:
    """
    Turns a dense causal language model into nested experts with routers (https://huggingface.co/papers/2502.12325).

    Neurons are ranked on calibration text and reordered, most important first, which leaves the dense function as it is;
    expert `e` then owns the first neurons. Routers start at the full expert, so the result computes what the dense model
    computes until [`DynaMoeTrainer`] has trained it. A model larger than memory: [`convert_checkpoint_to_dynamoe`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The dense model, or its folder or name on the Hub. A model is taken over, not copied.
        num_experts (`int`, *optional*, defaults to `4`):
            Number of experts, in equal steps of width.
        expert_widths (`Iterable[int]`, *optional*):
            Their widths instead, ascending to the whole MLP.
        calibration_dataset ([`~datasets.Dataset`] or `list`, *optional*):
            Rows with `text`, `messages` or `input_ids`, or plain strings. Needed unless `importance="none"`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer, needed for rows of text. By default the one beside `model` if that is a name.
        importance (`str`, *optional*, defaults to `"activation_norm"`):
            `"activation_norm"`: mean size of the neuron's activation times the norm of its output weights. `"activation"`: the
            size alone. `"taylor"`: mean size of activation times its gradient. `"none"`: neurons stay where they are.
        calibration_tokens (`int`, *optional*, defaults to `500_000`):
            The most tokens that are looked at.
        batch_size (`int`, *optional*, defaults to `8`), max_length (`int`, *optional*, defaults to `1024`):
            Rows at a time, and tokens of each.
        router_type (`str`, *optional*, defaults to `"ordinal"`), router_hidden_size (`int`, *optional*, defaults to `256`), similarity (`str`, *optional*, defaults to `"error"`):
            As in [`DynaMoeConfig`].
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Hides the progress bar.

    Returns:
        [`DynaMoeForCausalLM`] with the report of the conversion in `conversion_receipt`.

    Raises:
        TypeError: for anything but a model of transformers or its name.
        ValueError: for an architecture, widths or calibration text that can't be used, a model that is quantised, adapted,
            offloaded or nested already. The model is then as it was.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from hf_ext import convert_to_dynamoe, shipped_model

    >>> dense = AutoModelForCausalLM.from_pretrained(shipped_model("tiny-lm"))
    >>> tokenizer = AutoTokenizer.from_pretrained(shipped_model("tiny-lm"))
    >>> texts = ["Once upon a time there was a cat.", "The sun was warm and the bird was happy."]
    >>> moe = convert_to_dynamoe(dense, calibration_dataset=texts, processing_class=tokenizer, disable_tqdm=True)
    >>> moe.config.num_experts
    4
    >>> moe.conversion_receipt.largest_logit_difference < 1e-3
    True
    ```
    """
    check_calibration(importance, calibration_dataset, calibration_tokens, batch_size, max_length)
    settings = {"router_type": router_type, "router_hidden_size": router_hidden_size, "similarity": similarity}
    if isinstance(model, (str, os.PathLike)):
        expert_widths = nested_config(dense_skeleton(model), num_experts, expert_widths, **settings).expert_widths
        if processing_class is None:
            processing_class = beside(AutoTokenizer, model, "tokenizer_config.json")
        with files_named([f"those of '{model}'"]):
            model = AutoModelForCausalLM.from_pretrained(model)
    config = nested_config(model, num_experts, expert_widths, **settings)
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError(
            "Parts of the model are offloaded or have no weights: load all of it into memory, or convert its files with "
            "`convert_checkpoint_to_dynamoe`."
        )
    mlps = [getattr(parent, name) for parent, name in mlp_places(model, model.config)]
    batches: list[dict[str, torch.Tensor]] = []
    if calibration_dataset is not None:
        batches = calibration_batches(
            calibration_dataset, processing_class, calibration_tokens, batch_size, max_length, model.config
        )
    was_training = model.training
    try:
        model.eval()
        probe = probe_tokens(model, batches)
        check_formula(model, mlps, probe)
        calibration = neuron_importance(model, mlps, batches, importance, disable_tqdm)
        before = logits_of(model, probe)
        if importance != "none":
            for mlp, score in zip(mlps, calibration.scores, strict=True):
                reorder_neurons(mlp, score.argsort(descending=True, stable=True))
        difference = float((logits_of(model, probe) - before).abs().max())
    finally:
        model.train(was_training)

    config.output_norms = calibration.output_norms
    moe = DynaMoeForCausalLM(config, model)
    if model.generation_config is not None:
        moe.generation_config = copy.deepcopy(model.generation_config)
    moe.train(was_training)
    moe.conversion_receipt = receipt_of(moe, model.name_or_path, importance, batches, calibration.scores, difference)
    return moe


def receipt_of(
    moe: DynaMoeForCausalLM,
    base_model: str,
    importance: str,
    batches: list[dict[str, torch.Tensor]],
    scores: list[torch.Tensor],
    difference: float,
) -> ConversionReceipt:
    """The receipt of a conversion, put into the model's configuration too."""
    receipt = ConversionReceipt(
        # A folder on somebody's machine says nothing to others.
        base_model=None if os.path.isabs(base_model) or os.path.exists(base_model) else base_model or None,
        expert_widths=list(moe.config.expert_widths),
        importance=importance,
        calibration_tokens=0 if importance == "none" else int(sum(b["attention_mask"].sum() for b in batches)),
        importance_shares=[_shares(score, moe.config.expert_widths) for score in scores],
        largest_logit_difference=difference,
        router_parameters=sum(p.numel() for mlp in moe.nested_mlps() for p in mlp.router.parameters()),
    )
    moe.config.conversion = dataclasses.asdict(receipt)
    return receipt


@torch.no_grad()
def reorder_neurons(mlp: torch.nn.Module, order: torch.Tensor) -> None:
    """
    Puts the neurons of an MLP into another order, which doesn't change its function.

    Args:
        mlp (`nn.Module`):
            The dense MLP.
        order (`torch.LongTensor` of shape `(intermediate_size,)`):
            The old numbers of the neurons in their new order.
    """
    names = projection_names(mlp)
    assert names is not None, "the caller found it by them"
    for name in names[:-1]:
        layer = getattr(mlp, name)
        layer.weight.copy_(reordered_rows(layer.weight, order))
        if layer.bias is not None:
            layer.bias.copy_(reordered_rows(layer.bias, order))
    down = getattr(mlp, names[-1])
    down.weight.copy_(down.weight[:, order.to(down.weight.device)])


def reordered_rows(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of an input projection in another order; a fused one has the neurons several times."""
    parts = tensor.shape[0] // len(order)
    return tensor.unflatten(0, (parts, len(order)))[:, order.to(tensor.device)].flatten(0, 1)


def probe_tokens(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """A few tokens to compare the model with itself on."""
    if batches:
        ids = batches[0]["input_ids"][:1, : int(batches[0]["attention_mask"][0].sum())]
    else:
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def _shares(score: torch.Tensor, widths: Any) -> list[float]:
    """Share of the importance within each expert, for neurons in descending order of it."""
    ordered = score.double().sort(descending=True).values.cumsum(0)
    return [float(ordered[width - 1] / ordered[-1].clamp(min=1e-30)) for width in widths]
