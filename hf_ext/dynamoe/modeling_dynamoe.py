"""A dense causal language model whose MLPs are nested experts, one chosen for each token by its difficulty."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_dynamoe import DynaMoeConfig, checked_sensitivity
from .generation_dynamoe import DynaMoeGenerationMixin
from .loading import CheckedLoading
from .nested_mlp import NestedMlp, RoutedCheckpointing, Routing, nest_mlps, num_weights
from .outputs import DynaMoeCausalLMOutputWithPast, ExpertUsage
from .routing import (
    check_expert_index,
    check_forcing_mask,
    check_router_noise,
    chosen_experts,
    mean_over_tokens,
    router_loss,
    smallest_sufficient,
)


class DynaMoePreTrainedModel(CheckedLoading, RoutedCheckpointing, PreTrainedModel):
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


class DynaMoeForCausalLM(DynaMoePreTrainedModel, DynaMoeGenerationMixin):
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

    # Every saved model carries these files (40 kB), not only on request: whoever pulls it may not have this package, and
    # without the code its weights are of no use. Where the package is installed, its own code runs and none is trusted.
    _auto_class = "AutoModelForCausalLM"
    # Writes README.md into a folder, for a repository; the package sets it.
    card_writer: ClassVar[Callable[..., None] | None] = None

    def __init__(self, config: DynaMoeConfig, model: PreTrainedModel | None = None):
        super().__init__(config)
        if model is None:
            model = AutoModelForCausalLM.from_config(config.base_config)
        else:
            for module in model.modules():  # else those that transformers didn't make would get fresh weights below
                module._is_hf_initialized = True
        self.model = model
        self.routing = Routing(config.sensitivity)
        # The device by name: `from_pretrained` makes the model on `meta`.
        shape = (config.base_config.num_hidden_layers, config.num_experts)
        self._usage = torch.zeros(shape, dtype=torch.long, device="cpu")
        nest_mlps(self.model, config, self.routing)
        self.base_model.register_forward_pre_hook(self.routing.rest_outside_a_pass)
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.card_writer is not None and kwargs.get("is_main_process", True):
            self.card_writer(self, save_directory)

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # `push_to_hub` has put a generic card there.
        if self.card_writer is not None:
            self.card_writer(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @property
    def base_model(self) -> nn.Module:
        """The decoder, which returns hidden states: losses that are fused with the output embedding run it alone."""
        return self.model.base_model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.set_output_embeddings(new_embeddings)

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
        self._check_serves([sensitivity])
        if self.config.router_type == "classifier" and self.config.sensitivity < 1:
            self.config.label_sensitivity = self.config.sensitivity
        self.config.sensitivity = sensitivity
        self.routing.rest(sensitivity)

    def _check_serves(self, sensitivities: list[float]) -> None:
        config = self.config
        trained = config.sensitivity if config.sensitivity < 1 else config.label_sensitivity
        if config.router_type != "classifier" or trained is None:
            return
        # As near as float32 tells two of them apart.
        wrong = [value for value in sensitivities if value < 1 and abs(value - trained) > 1e-6]
        if wrong:
            raise ValueError(
                f"`sensitivity`={wrong[0]:g}, but the routers of this model are classifiers for {trained}: they serve that and "
                "1. Train another, or convert with `router_type='ordinal'`, which serves every sensitivity."
            )

    def _checked_sensitivity(self, sensitivity: float | torch.Tensor | None, num_rows: int) -> float | torch.Tensor:
        """One number, or one for each row that broadcasts over its tokens; rows that all ask for the dense model get it."""
        if isinstance(sensitivity, torch.Tensor):
            if sensitivity.shape != (num_rows,):
                raise ValueError(
                    f"`sensitivity` must be a number or a tensor of shape ({num_rows},), one for each row, got shape "
                    f"{tuple(sensitivity.shape)}."
                )
            if not torch.compiler.is_compiling():  # a graph can't ask for values
                values = [checked_sensitivity(value) for value in sensitivity.tolist()]
                self._check_serves(values)
                # Its own modules, bit for bit. Training has the neurons at hand already, to measure nearness.
                if not self.training and min(values, default=0.0) == 1:
                    return 1.0
            return sensitivity[:, None]
        sensitivity = checked_sensitivity(self.config.sensitivity if sensitivity is None else sensitivity)
        self._check_serves([sensitivity])
        return sensitivity

    @can_return_tuple
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
        forcing_mask: torch.BoolTensor | None = None,
        router_noise: torch.FloatTensor | None = None,
        output_router_logits: bool | None = None,
        output_nearness: bool | None = None,
        token_mask: torch.Tensor | None = None,
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
            forcing_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Tokens that take the expert which their measured nearness asks for instead of the router's choice: how
                training keeps fresh routers from deciding. Needs `output_nearness=True`.
            router_noise (`torch.FloatTensor` of shape `(num_layers, batch_size, sequence_length, num_experts - 1)`, *optional*):
                What is added to the logits of ordinal routers before they choose; it may be zero. With it the routers learn
                from the loss of the routed model: forward the choice is hard as ever, backward it is its chance.
            output_router_logits (`bool`, *optional*):
                Adds `router_logits`, `expert_index` and `active_parameters` to the output, and with `labels` also `aux_loss`,
                which is then a part of `loss`. By default the configuration's.
            output_nearness (`bool`, *optional*):
                Measures how near each expert comes to the whole MLP, at the cost of the dense model, and adds `nearness`. By
                default where `aux_loss` needs it.
            token_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 at padding, which is routed like all tokens but neither counted nor part of `aux_loss`. By default the end
                of `attention_mask`.

        Returns:
            [`DynaMoeCausalLMOutputWithPast`]

        Raises:
            ValueError: for a sensitivity, experts, labels to follow or noise of another shape or outside their range.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError("Neither `input_ids` nor `inputs_embeds` is given: the model needs one of them.")
        shape = tuple(given.shape[:2])
        wants_routing = self.config.output_router_logits if output_router_logits is None else output_router_logits
        measures = (wants_routing and labels is not None) if output_nearness is None else output_nearness
        if token_mask is None and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -shape[1] :]
        sensitivity = self._checked_sensitivity(sensitivity, shape[0])
        num_layers, num_experts = self.config.base_config.num_hidden_layers, self.config.num_experts
        check_expert_index(expert_index, num_layers, shape, num_experts)
        check_forcing_mask(forcing_mask, measures, shape)
        check_router_noise(router_noise, self.config.router_type, (num_layers, *shape, num_experts - 1))
        with self.routing.alone():
            self.routing.begin(sensitivity, expert_index, forcing_mask, router_noise, wants_routing, measures)
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
            layers = self.routing.end(num_layers)
            experts = _stacked([layer.expert_index for layer in layers])
            if not self.training and not torch.compiler.is_compiling():
                self._count(experts, token_mask)
        result = DynaMoeCausalLMOutputWithPast(**outputs)
        if measures:
            result.nearness = _stacked([layer.nearness for layer in layers])
        if not wants_routing:
            return result
        result.router_logits = tuple(layer.router_logits for layer in layers)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.nested_mlps()[0].router.parameters())
        if trains and not result.router_logits[0].requires_grad:
            raise ValueError(
                "Reentrant checkpointing cuts the routers off from their loss: use "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        result.expert_index = experts
        result.active_parameters = self.count_active_parameters(experts)
        if measures and labels is not None:
            result.aux_loss = mean_over_tokens(self.router_losses(result, sensitivity), token_mask)
            if result.loss is not None:
                result.loss = result.loss + self.config.router_aux_loss_coef * result.aux_loss.to(result.loss.device)
        return result

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

        Raises:
            ValueError: for outputs of another call.
        """
        sensitivity = self.config.sensitivity if sensitivity is None else sensitivity
        if outputs.router_logits is None or outputs.nearness is None:
            raise ValueError(
                "`outputs` lack `router_logits` or `nearness`: call the model with `output_router_logits=True` "
                "and `output_nearness=True`."
            )
        pairs = zip(outputs.router_logits, outputs.nearness, strict=True)
        return _stacked([router_loss(r, n.to(r.device), self.config.router_type, sensitivity) for r, n in pairs]).mean(
            0
        )

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

    def labels(self, nearness: torch.Tensor, sensitivity: float | torch.Tensor) -> torch.Tensor:
        """
        The difficulty labels of tokens: the smallest expert that is near enough.

        Args:
            nearness (`torch.Tensor` of shape `(..., num_experts - 1)`):
                The `nearness` of a call.
            sensitivity (`float` or `torch.Tensor` that broadcasts to `(...)`):
                Nearness demanded; 0 is met by every expert, and 1 by the whole MLP alone.

        Returns:
            `torch.LongTensor` of shape `(...)`.
        """
        return smallest_sufficient(nearness, sensitivity)

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
        # PEFT keeps the originals of modules that it trains in full beside those that run.
        running = (num_weights(p) for name, p in self.named_parameters() if ".original_module." not in name)
        return sum(running) - idle.sum(0)

    def _count(self, expert_index: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        if len(expert_index) != len(self._usage):  # the first layers alone, which only guess what all of them will say
            return
        # Where the tokens are: a look at the sums is the first thing that waits for them.
        taken = expert_index[..., None] == torch.arange(self.config.num_experts, device=expert_index.device)
        if token_mask is not None:
            taken = taken & token_mask.to(taken)[..., None]
        self._usage = self._usage.to(expert_index.device) + taken.sum((1, 2))

    def expert_usage(self, reset: bool = False) -> ExpertUsage:
        """
        Where the tokens went since the model was made or the count was reset, outside training and compiled graphs.

        Args:
            reset (`bool`, *optional*, defaults to `False`):
                Starts a new count.

        Returns:
            [`ExpertUsage`]

        Raises:
            ValueError: if no token was counted.
        """
        counts = self._usage.cpu()
        if not counts.any():
            raise ValueError("No token was routed yet: call the model or `generate` in evaluation mode first.")
        if reset:
            self._usage = torch.zeros_like(counts)
        smallest = self.count_active_parameters(torch.zeros(len(counts), 1, dtype=torch.long)).item()
        per_neuron = [mlp.parameters_per_neuron for mlp in self.nested_mlps()]
        return ExpertUsage.from_counts(counts, self.config.expert_widths, per_neuron, smallest)


def _stacked(tensors: list[Any]) -> torch.Tensor:
    """Of all layers, which may lie on several devices."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])


__all__ = ["DynaMoeCausalLMOutputWithPast", "DynaMoeForCausalLM", "DynaMoePreTrainedModel", "ExpertUsage"]
