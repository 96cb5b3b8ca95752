"""What `generate` has to know of a nested model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor


class DynaMoeGenerationMixin(GenerationMixin):
    """`generate`, with the arguments of [`DynaMoeForCausalLM.forward`] for the call: `sensitivity`, `expert_index`."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        given = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if attention_mask is not None and attention_mask.dim() == 2 and given.shape[1] > 1:
            # Caches of fixed size get a mask of four dimensions, which doesn't tell padding.
            inputs["token_mask"] = attention_mask[:, -given.shape[1] :]
        return inputs

    def _get_logits_processor(self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        own = {name: value for name, value in (model_kwargs or {}).items() if name in ("sensitivity", "expert_index")}
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is self:
                # Guidance runs the model once more, by itself.
                processor.model = partial(self, **own)
        return processors

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # Else the assistant would get them too: it may be dense, or nested with a sensitivity of its own.
        own = ("sensitivity", "expert_index", "output_router_logits", "output_nearness")
        shared = {name: value for name, value in model_kwargs.items() if name not in own}
        return super()._get_candidate_generator(*args, model_kwargs=shared, **kwargs)
