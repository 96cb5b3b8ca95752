"""The PEFT method: LoRA layers of PEFT's own that act on mask positions only."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from .adapter_weights import check_adapter_weights
from .checks import check_base
from .configuration import GatedLoraConfig
from .generation import add_mtp_generation, remove_mtp_generation
from .sampler import Gate, MtpHead
from .two_pass import MtpForwardOutput, two_pass_forward


MERGE_REFUSED = (
    "A gated LoRA can't be merged: it acts on mask tokens only, and merged weights would act on every token and change "
    "what the base model says. Keep the adapter beside the model; it costs nothing while no masks are in the input."
)


class GatedLoraVariant(LoraVariant):
    """
    Adds the LoRA output on the positions where the gate is open (paper, section 2.2).

    It plugs into any of PEFT's LoRA layers, so that layers over quantised weights (bitsandbytes, GPTQ, HQQ) work as they
    do with ordinary LoRA.

    Args:
        gate ([`Gate`]):
            The gate shared by all layers of the model.
    """

    def __init__(self, gate: Gate):
        self.gate = gate

    @staticmethod
    def init(module: nn.Module, adapter_name: str, config: GatedLoraConfig, **kwargs: Any) -> None:
        pass

    @staticmethod
    def merge_safe(module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(MERGE_REFUSED)

    @staticmethod
    def merge_unsafe(module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> None:
        raise NotImplementedError(MERGE_REFUSED)

    @staticmethod
    def unmerge(module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(MERGE_REFUSED)

    def forward(
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            module (`~peft.tuners.lora.LoraLayer`):
                The adapted layer.
            active_adapter (`str`):
                Name of the adapter.
            x (`torch.Tensor` of shape `(batch_size, sequence_length, in_features)` or `(batch_size * sequence_length, in_features)`):
                Input of the layer, in the dtype of the LoRA weights.
            result (`torch.Tensor` of the shape of `x`, with `out_features`):
                Output of the base layer.

        Returns:
            `torch.Tensor` of the shape of `result`; rows of ordinary tokens are those of `result`, bit for bit.
        """
        positions = self.gate.positions
        if isinstance(positions, int) and positions == 0:
            return result
        shape, x, result = result.shape, self.gate.sequences(x), self.gate.sequences(result)
        return self._add(module, active_adapter, positions, x, result).reshape(shape)

    @staticmethod
    def _add(
        module: Any, active_adapter: str, positions: int | torch.Tensor, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        if isinstance(positions, torch.Tensor):
            delta = lora_B(lora_A(dropout(x))) * scaling
            return torch.where(positions[..., None], result + delta.to(result.dtype), result)
        first = result.shape[1] - positions
        if torch.is_grad_enabled():
            delta = (lora_B(lora_A(dropout(x[:, first:]))) * scaling).to(result.dtype)
            return result + delta if first == 0 else torch.cat([result[:, :first], result[:, first:] + delta], dim=1)
        result[:, first:] += (lora_B(lora_A(x[:, first:])) * scaling).to(result.dtype)
        return result


class GatedLoraModel(LoraModel):
    """
    Adds gated LoRA, mask vectors and a sampler head to a causal language model and teaches its `generate` to speculate
    with them (https://huggingface.co/papers/2507.11851).

    Made through [`~peft.get_peft_model`], [`~peft.PeftModel.from_pretrained`] or the `load_adapter` of transformers, as any
    PEFT method. While no masks are in the input the model computes what the base model computes, bit for bit.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A decoder-only model with a language-modelling head.
        config ([`GatedLoraConfig`]):
            Its configuration.
        adapter_name (`str`):
            Name of the adapter.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Creates the adapter's weights on the meta device.

    Raises:
        ValueError: for a model that can't be given masks, for a base of another shape than the adapter's, and for
            targets that are not linear layers.
        NotImplementedError: when merging, and when combining adapters.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from transformers import AutoModelForCausalLM
    >>> from hf_ext import GatedLoraConfig, shipped_model

    >>> base = AutoModelForCausalLM.from_pretrained(shipped_model("tiny-lm"))
    >>> model = get_peft_model(base, GatedLoraConfig(num_masks=4))
    >>> model.base_model.mtp_head.lora_mask_vectors["default"].shape
    torch.Size([4, 96])
    ```
    """

    # PEFT only ever uses this with isinstance: the head takes part in switching, disabling and deleting.
    tuner_layer_cls: Any = (LoraLayer, MtpHead)

    @property
    def mtp_head(self) -> MtpHead:
        return self.model.mtp_head

    def inject_adapter(
        self,
        model: Any,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        config = self.peft_config[adapter_name]
        check_base(model)
        config.check_base(model.config.get_text_config(decoder=True))
        head: MtpHead | None = getattr(model, "mtp_head", None)
        if head is None:
            head = MtpHead(config.base_hidden_size)
        self._gate = head.gate
        decoder = model.get_decoder()
        self._decoder_key = next(name for name, module in model.named_modules() if module is decoder)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        # Attached after PEFT froze the base model, which it takes for adapted before if it finds a tuner layer.
        model.mtp_head = head
        embeddings = model.get_input_embeddings()
        with torch.device("meta" if low_cpu_mem_usage else embeddings.weight.device):
            head.add_adapter(adapter_name, config, embeddings)
        head.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # type: ignore[operator]
        add_mtp_generation(model)

    def _create_and_replace(
        self,
        lora_config: GatedLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if target in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            raise ValueError(
                f"`target_modules={lora_config.target_modules!r}` matches an embedding of the model, {current_key}, which "
                "ordinary tokens and the sampler share. Leave it out, or use 'all-linear'."
            )
        if self._decoder_key and not current_key.startswith(f"{self._decoder_key}."):
            return  # the head's own layers (bert) or those for images, where no mask comes
        if isinstance(target, (nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)):
            raise ValueError(
                f"`target_modules` matches {current_key}, a {type(target).__name__}; gated LoRA adapts linear layers."
            )
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        getattr(parent, target_name).lora_variant[adapter_name] = GatedLoraVariant(self._gate)

    def train(self, mode: bool = True) -> GatedLoraModel:
        """
        The frozen base model stays in evaluation mode, whatever `mode` is: its dropout would change the states that the
        masks learn from, and its layers' own gradient checkpointing would drop the key-value cache.
        """
        super().train(False)
        self.training = mode
        for module in self.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout.train(mode)
        return self

    def forward(self, *args: Any, mtp_anchors: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """
        The base model's forward pass, or with `mtp_anchors` the training pass over masks ([`two_pass_forward`]).

        Args:
            mtp_anchors (`torch.LongTensor` of shape `(batch_size, num_anchors)`, *optional*):
                Tokens behind which masks are placed, -1 for none.

        Returns:
            [`MtpForwardOutput`] with `mtp_anchors`, otherwise what the base model returns.
        """
        if mtp_anchors is None:
            return self.model(*args, **kwargs)
        return self._mtp_forward(*args, anchors=mtp_anchors, **kwargs)

    def _mtp_forward(self, **kwargs: Any) -> MtpForwardOutput:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        return two_pass_forward(self.model, self.active_adapters[0], **kwargs)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_REFUSED)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "`add_weighted_adapter` would combine the LoRA matrices of adapters and leave mask vectors and sampler random: "
            "the text would be right and hardly a guess. Train one adapter on the data of both."
        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        del model.mtp_head
        remove_mtp_generation(model)
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: GatedLoraConfig, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        # What is saved belongs to the base as it is now: its vocabulary may have been resized since the adapter was made.
        config.base_vocab_size = model.config.get_text_config(decoder=True).vocab_size
        return super()._get_adapter_state_dict(model, config, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: GatedLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = {key for key in model.state_dict() if ".lora_" in key and f".{adapter_name}" in key}
        check_adapter_weights(remapped, expected)
        return remapped
