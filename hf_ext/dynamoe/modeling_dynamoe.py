"""A dense causal language model whose MLPs are nested experts, one chosen for each token by its difficulty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .configuration_dynamoe import DynaMoeConfig, checked_sensitivity
from .nested_mlp import NestedMlp, Routing, nest_mlps
from .routing import chosen_experts, router_loss


@dataclass
class DynaMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """
    What transformers' mixtures return, and where each token went.

    Args:
        aux_loss (`torch.Tensor`, *optional*):
            The routers' loss, a mean over layers and tokens, with `output_router_logits=True` and `labels`.
        router_logits (`tuple[torch.Tensor]`, *optional*):
            One of shape `(batch_size, sequence_length, outputs)` for each layer, with `output_router_logits=True`.
        nearness (`torch.Tensor` of shape `(num_layers, batch_size, sequence_length, num_experts - 1)`, *optional*):
            How near each smaller expert comes to the whole MLP, with `output_nearness=True`.
        expert_index (`torch.LongTensor` of shape `(num_layers, batch_size, sequence_length)`, *optional*):
            The expert that each token took, with `output_router_logits=True`.
        active_parameters (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Number of parameters that each token used, embeddings and routers included, with `output_router_logits=True`.
    """

    nearness: torch.Tensor | None = None
    expert_index: torch.Tensor | None = None
    active_parameters: torch.Tensor | None = None


@dataclass
class ExpertUsage:
    """
    Where the tokens of the last calls went.

    Args:
        shares (`torch.Tensor` of shape `(num_layers, num_experts)`):
            Share of tokens that took each expert; each row sums to 1.
        active_fraction (`float`):
            Mean share of the MLPs' neurons that a token used.
        active_parameters (`float`):
            Mean number of parameters that a token used, embeddings and routers included.
        num_tokens (`int`):
            Number of tokens, padding not counted.
    """

    shares: torch.Tensor
    active_fraction: float
    active_parameters: float
    num_tokens: int


class DynaMoePreTrainedModel(PreTrainedModel):
    config: DynaMoeConfig
    config_class = DynaMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class DynaMoeForCausalLM(DynaMoePreTrainedModel, GenerationMixin):
    """
    DynaMoE (https://huggingface.co/papers/2502.12325): the MLP of each layer becomes nested experts, slices of its own
    weights, and a router sends each token to as much of it as the token's difficulty needs. Attention, embeddings and
    caches are the dense model's.

    Make one of a dense model with [`convert_to_dynamoe`], train its routers with [`DynaMoeTrainer`], and choose between
    speed and quality with [`~DynaMoeForCausalLM.set_sensitivity`].

    Args:
        config ([`DynaMoeConfig`]):
            The dense model's configuration and how it is nested.
        model ([`~transformers.PreTrainedModel`], *optional*):
            The dense model, which is taken over and not copied. By default one with random weights.

    Raises:
        ValueError: for an architecture whose MLPs can't be nested.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext import DynaMoeConfig, DynaMoeForCausalLM
    >>> from transformers import LlamaConfig

    >>> base = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    >>> model = DynaMoeForCausalLM(DynaMoeConfig(base_config=base)).eval()
    >>> outputs = model(torch.tensor([[1, 2, 3]]), sensitivity=0.0, output_router_logits=True)
    >>> outputs.expert_index.tolist()  # two layers, one row, three tokens: the smallest expert everywhere
    [[[0, 0, 0]], [[0, 0, 0]]]
    ```
    """

    def __init__(self, config: DynaMoeConfig, model: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = AutoModelForCausalLM.from_config(config.base_config) if model is None else model
        self.routing = Routing(config.sensitivity)
        self._usage = torch.zeros(config.base_config.num_hidden_layers, config.num_experts, dtype=torch.long)
        nest_mlps(self.model, config, self.routing)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> Any:
        return self.model.get_decoder()

    def set_decoder(self, decoder: Any) -> None:
        self.model.set_decoder(decoder)

    def nested_mlps(self) -> list[NestedMlp]:
        """The MLPs, layer by layer."""
        return [module for module in self.model.modules() if isinstance(module, NestedMlp)]

    def set_sensitivity(self, sensitivity: float) -> None:
        """
        Chooses how much of the MLPs tokens get from now on; saved with the model.

        Args:
            sensitivity (`float`):
                From 0, the smallest expert for every token, to 1, the dense model bit for bit.

        Raises:
            ValueError: for a value outside 0 to 1, and for one between that a classifier's labels were not made with.
        """
        sensitivity = checked_sensitivity(sensitivity)
        self._check_serves(sensitivity)
        self.config.sensitivity = sensitivity

    def _check_serves(self, sensitivity: float) -> None:
        trained = self.config.sensitivity
        if self.config.router_type == "classifier" and sensitivity < 1 and trained < 1 and sensitivity != trained:
            raise ValueError(
                f"`sensitivity`={sensitivity}, but the routers of this model are classifiers for {trained}: they serve that "
                "and 1. Train another, or convert with `router_type='ordinal'`, which serves every sensitivity."
            )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        sensitivity: float | torch.Tensor | None = None,
        expert_index: int | torch.LongTensor | None = None,
        follow_labels: torch.BoolTensor | None = None,
        output_router_logits: bool | None = None,
        output_nearness: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> DynaMoeCausalLMOutputWithPast:
        r"""
        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache, logits_to_keep:
                As in every causal language model; further keywords go to the dense model.
            sensitivity (`float` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                Nearness that tokens demand in this call, one for all rows or one for each. By default the model's.
            expert_index (`int` or `torch.LongTensor` of shape `(batch_size, sequence_length)` or with `num_layers` in front, *optional*):
                The expert to take instead of the routers' choice: one for all tokens, or one for each.
            follow_labels (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Tokens that take the expert which their measured nearness asks for instead of the router's choice: how
                training keeps fresh routers from deciding. Needs `output_nearness=True`.
            output_router_logits (`bool`, *optional*):
                Adds `router_logits`, `expert_index` and `active_parameters` to the output, and with `labels` also `aux_loss`,
                which is then a part of `loss`. By default the configuration's.
            output_nearness (`bool`, *optional*):
                Measures how near each expert comes to the whole MLP, at the cost of the dense model, and adds `nearness`. By
                default where `aux_loss` needs it.

        Returns:
            [`DynaMoeCausalLMOutputWithPast`]
        """
        wants_routing = self.config.output_router_logits if output_router_logits is None else output_router_logits
        measures = (wants_routing and labels is not None) if output_nearness is None else output_nearness
        if follow_labels is not None and not measures:
            raise ValueError("`follow_labels` needs `output_nearness=True`: a token's label is measured then.")
        if isinstance(sensitivity, torch.Tensor):
            sensitivity = sensitivity[:, None]
        else:
            sensitivity = self.config.sensitivity if sensitivity is None else checked_sensitivity(sensitivity)
            self._check_serves(sensitivity)
        routing = self.routing
        routing.begin(sensitivity, self._checked_expert(expert_index), follow_labels, wants_routing, measures)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{**kwargs, "return_dict": True},
        )
        layers = routing.end()
        if not self.training and not torch.compiler.is_compiling():
            self._count(layers, attention_mask)
        result = DynaMoeCausalLMOutputWithPast(**outputs)
        if measures:
            result.nearness = torch.stack([layer.nearness for layer in layers])
        if not wants_routing:
            return result
        result.router_logits = tuple(layer.router_logits for layer in layers)
        result.expert_index = torch.stack([layer.expert_index for layer in layers])
        result.active_parameters = self.count_active_parameters(result.expert_index)
        if measures and labels is not None:
            result.aux_loss = self._aux_loss(result, sensitivity, attention_mask)
            if result.loss is not None:
                result.loss = result.loss + self.config.router_aux_loss_coef * result.aux_loss.to(result.loss.device)
        return result

    def _checked_expert(self, expert_index: int | torch.Tensor | None) -> int | torch.Tensor | None:
        if isinstance(expert_index, int) and not 0 <= expert_index < self.config.num_experts:
            raise ValueError(f"`expert_index` must be from 0 to {self.config.num_experts - 1}, got {expert_index}.")
        return expert_index

    def _aux_loss(
        self,
        result: DynaMoeCausalLMOutputWithPast,
        sensitivity: float | torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        losses = self.router_losses(result, sensitivity)
        if attention_mask is None or attention_mask.dim() != 2:
            return losses.mean()
        weights = attention_mask[:, -losses.shape[1] :].to(losses.dtype)
        return (losses * weights).sum() / weights.sum().clamp(min=1)

    def router_losses(
        self, outputs: DynaMoeCausalLMOutputWithPast, sensitivity: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        The routers' loss at each token, the mean over layers.

        Args:
            outputs ([`DynaMoeCausalLMOutputWithPast`]):
                Of a call with `output_router_logits=True` and `output_nearness=True`.
            sensitivity (`float` or `torch.Tensor` of shape `(batch_size, 1)`, *optional*):
                What the labels of a classifier are made with. By default the model's.

        Returns:
            `torch.Tensor` of shape `(batch_size, sequence_length)`.
        """
        sensitivity = self.config.sensitivity if sensitivity is None else sensitivity
        pairs = zip(outputs.router_logits, outputs.nearness, strict=True)
        return torch.stack([router_loss(r, n, self.config.router_type, sensitivity) for r, n in pairs]).mean(0)

    def choices(self, router_logits: torch.Tensor, sensitivity: float | torch.Tensor | None = None) -> torch.Tensor:
        """
        The experts that a layer's router chooses.

        Args:
            router_logits (`torch.Tensor` of shape `(batch_size, sequence_length, outputs)`):
                One of the `router_logits` of a call.
            sensitivity (`float` or `torch.Tensor` of shape `(batch_size, 1)`, *optional*):
                By default the model's.

        Returns:
            `torch.LongTensor` of shape `(batch_size, sequence_length)`.
        """
        sensitivity = self.config.sensitivity if sensitivity is None else sensitivity
        return chosen_experts(router_logits, self.config.router_type, sensitivity)

    def count_active_parameters(self, expert_index: torch.Tensor) -> torch.Tensor:
        """
        Number of parameters that tokens use, embeddings and routers included (the paper's measure).

        Args:
            expert_index (`torch.LongTensor` of shape `(num_layers, ...)`):
                The experts that they take.

        Returns:
            `torch.LongTensor` of shape `(...)`.
        """
        per_neuron = torch.tensor(
            [mlp.parameters_per_neuron for mlp in self.nested_mlps()], device=expert_index.device
        )
        widths = torch.tensor(self.config.expert_widths, device=expert_index.device)
        idle = (widths[-1] - widths)[expert_index] * per_neuron.view(-1, *[1] * (expert_index.dim() - 1))
        return sum(parameter.numel() for parameter in self.parameters()) - idle.sum(0)

    def _count(self, layers: list[Any], attention_mask: torch.Tensor | None) -> None:
        num_experts = self.config.num_experts
        for counts, layer in zip(self._usage, layers, strict=True):
            experts = layer.expert_index
            if attention_mask is not None and attention_mask.dim() == 2:
                experts = experts[attention_mask[:, -experts.shape[1] :].bool().to(experts.device)]
            counts += torch.bincount(experts.flatten(), minlength=num_experts).cpu()

    def expert_usage(self, reset: bool = False) -> ExpertUsage:
        """
        Where the tokens went since the model was made or the count was reset, outside training.

        Args:
            reset (`bool`, *optional*, defaults to `False`):
                Starts a new count.

        Returns:
            [`ExpertUsage`]

        Raises:
            ValueError: if no token was counted.
        """
        usage = self._usage.clone()
        num_tokens = int(usage[0].sum())
        if num_tokens == 0:
            raise ValueError("No token was routed yet: call the model or `generate` in evaluation mode first.")
        if reset:
            self._usage.zero_()
        shares = usage / num_tokens
        widths = torch.tensor(self.config.expert_widths)
        per_layer = (shares * widths).sum(-1)
        active = self.count_active_parameters(torch.zeros(len(usage), 1, dtype=torch.long)).item()
        per_neuron = torch.tensor([mlp.parameters_per_neuron for mlp in self.nested_mlps()])
        return ExpertUsage(
            shares=shares,
            active_fraction=float((per_layer / widths[-1]).mean()),
            active_parameters=float(active + ((per_layer - widths[0]) * per_neuron).sum()),
            num_tokens=num_tokens,
        )


__all__ = ["DynaMoeCausalLMOutputWithPast", "DynaMoeForCausalLM", "DynaMoePreTrainedModel", "ExpertUsage"]
