"""What multi-token decoding and training refuse before they begin, since the result would be another than promised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from transformers import GenerationConfig


def check_call(
    input_ids: torch.Tensor, generation_config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]
) -> None:
    """Refuses what would give other output than plain decoding, or none."""
    plain = "For plain decoding generate inside `with model.disable_adapter():`."
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"Multi-token decoding takes one sequence per call so far, got a batch of {input_ids.shape[0]}. {plain}"
        )
    if generation_config.do_sample:
        raise ValueError(f"Multi-token decoding is greedy so far, got `do_sample=True`. {plain}")
    if input_ids.shape[1] == 0 or model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "The prompt must be at least one token id: `input_ids` is empty or `inputs_embeds` was given."
        )
    if synced_gpus:
        raise ValueError(f"Multi-token decoding can't run with `synced_gpus=True` (ZeRO-3 or FSDP). {plain}")
    if model_kwargs.get("past_key_values") is None:
        raise ValueError(f"Multi-token decoding needs a cache, got `use_cache=False`. {plain}")
    for name in ("output_attentions", "output_hidden_states"):
        if generation_config.return_dict_in_generate and getattr(generation_config, name):
            raise ValueError(f"`{name}=True`: a step has masks and rejected guesses in them. {plain}")


def check_positions(config: Any, generation_config: GenerationConfig, num_masks: int) -> None:
    """
    Rope types that stretch with the text rotate the keys of a token by the length of the pass that it is in, so tokens
    verified together get other states than one by one. Up to the length where they begin to stretch they are exact.
    """
    stretch = stretching_rope(config)
    if stretch is None:
        return
    limit, kind = stretch
    if generation_config.max_length + num_masks >= limit:
        raise ValueError(
            f"Rope of type '{kind}' changes with the length of the text from position {limit} on, so guesses "
            f"can't be verified exactly there; prompt, new tokens and masks reach {generation_config.max_length} + "
            f"{num_masks}. Lower `max_new_tokens`, or generate inside `with model.disable_adapter():`."
        )


def check_text_length(config: Any, length: int, num_masks: int) -> None:
    """The same in training: masks run apart from the text, whose keys a longer pass has rotated otherwise."""
    stretch = stretching_rope(config)
    # Masks behind the last position of the model share it.
    reached = max(length, min(length + num_masks, config.max_position_embeddings))
    if stretch is not None and reached > stretch[0]:
        raise ValueError(
            f"Rope of type '{stretch[1]}' changes with the length of the text from position {stretch[0]} on, where masks "
            f"can't be trained; a text and its masks reach {reached}. Lower `max_length` to {stretch[0] - num_masks}."
        )


def stretching_rope(config: Any) -> tuple[int, str] | None:
    """The position from which a model's rope changes with the length of the text, and its type; None if it doesn't."""
    rope = getattr(config, "rope_parameters", None) or {}
    # One rope for all layers, or one for each type of layer.
    ropes = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    stretching = [
        (r.get("original_max_position_embeddings") or config.max_position_embeddings, r["rope_type"])
        for r in ropes
        if r.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(stretching) if stretching else None


def num_left_padding(attention_mask: torch.Tensor | None) -> int:
    if attention_mask is None:
        return 0
    row = attention_mask[0].bool()
    num_padding = int((~row).sum())
    if row[:num_padding].any():
        raise ValueError(
            "`attention_mask` has zeros behind the start of the prompt: pad on the left (`tokenizer.padding_side = "
            "'left'`), since the first new token continues the last position. Where no mask was given, `generate` took "
            "every padding token for padding: give a mask of ones if that token is part of the text."
        )
    return num_padding
