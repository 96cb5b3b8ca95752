"""What multi-token decoding and training refuse before they begin, since the result would be another than promised."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import has_offloaded_params
from transformers import PreTrainedModel
from transformers.generation import GenerationMode

from .decoding import attention_patterns


if TYPE_CHECKING:
    from transformers import GenerationConfig


# What a pass over tokens and masks takes, each with what it is needed for.
NEEDED_ARGUMENTS = {
    "inputs_embeds": "masks are vectors that belong to no token",
    "attention_mask": "no token may see a mask",
    "position_ids": "masks stand where later tokens will stand",
    "past_key_values": "wrong guesses are taken out of the cache again",
    "logits_to_keep": "masks need no logits",
}
# What `generate` hands to a decoding method of a text model; the steps make their own from it.
KNOWN_ARGUMENTS = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
    "output_attentions", "output_hidden_states", "tokenizer", "assistant_tokenizer",
}  # fmt: skip
# What makes `generate` decode in another way, which knows nothing of masks.
ARGUMENTS_OF_OTHER_MODES = (
    "num_beams", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "penalty_alpha",
    "dola_layers", "constraints", "force_words_ids",
)  # fmt: skip


def check_base(model: Any) -> None:
    """
    Refuses models that can't be given masks, or whose output would be another than the base model's.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model that is to get an adapter.

    Raises:
        ValueError: saying what the model lacks.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(
            f"Gated LoRA needs a transformers model with a language-modelling head, got {name}: load it with "
            "AutoModelForCausalLM."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; multi-token prediction needs a decoder-only one.")
    config = model.config.get_text_config(decoder=True)
    arguments = inspect.signature(type(model).forward).parameters
    missing = [f"`{argument}` ({why})" for argument, why in NEEDED_ARGUMENTS.items() if argument not in arguments]
    if missing:
        raise ValueError(
            f"{name} can't be used for multi-token prediction: its `forward` doesn't take {', '.join(missing)}."
        )
    if getattr(config, "alibi", False):
        raise ValueError(
            f"{name} can't be used for multi-token prediction with `alibi=True`, where positions are counted and can't be "
            "given: masks stand where later tokens will stand."
        )
    if model._is_stateful:
        raise ValueError(
            f"{name} can't be used for multi-token prediction: it keeps a state of what it has read, and wrong guesses "
            "can't be taken out of it again."
        )
    attention_patterns(config)
    setting = _setting_for_causal_attention(model, config)
    if setting is not None:
        raise ValueError(
            f"{name} reads its text in both directions here, so that what it says of a token changes with those behind "
            f"it. If it was trained to read from left to right, load it with `{setting}`: "
            f"`AutoModelForCausalLM.from_pretrained(..., {setting})`."
        )
    if any(has_offloaded_params(module) for module in model.modules()):
        raise ValueError(
            f"Layers of this {name} are offloaded, and PEFT would put the weights of an adapter nowhere. Add or load the "
            "adapter first, and offload the model then (`dispatch_model` or `cpu_offload` of accelerate)."
        )
    width = model.get_input_embeddings().weight.shape[-1]
    if width != config.hidden_size:
        raise ValueError(
            f"{name} can't be used for multi-token prediction: its embeddings have {width} values and its states "
            f"{config.hidden_size}, and the sampler takes them for one another."
        )


def _setting_for_causal_attention(model: PreTrainedModel, config: Any) -> str | None:
    """What a configuration must say for attention to be causal, or None if it is."""
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "use_bidirectional_attention=None"
    if not getattr(config, "is_causal", True):
        return "is_causal=True"
    # Every configuration has `is_decoder`, and causal models don't heed it; layers that do note it.
    if any(getattr(module, "is_decoder", None) is False for module in model.get_decoder().modules()):
        return "is_decoder=True"
    return None


def check_mode(
    given: dict[str, Any], mode: GenerationMode, generation_config: GenerationConfig, mode_kwargs: dict[str, Any]
) -> None:
    """Refuses options of multi-token decoding, given in a call, beside arguments that ask for another way to decode."""
    if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return
    values = {name: mode_kwargs.get(name, getattr(generation_config, name, None)) for name in ARGUMENTS_OF_OTHER_MODES}
    others = {name: value for name, value in values.items() if value and not (name == "num_beams" and value == 1)}
    raise ValueError(
        f"{_arguments(given)} asks for multi-token decoding, and {_arguments(others)} for "
        f"{mode.value.replace('_', ' ')}, where there is none. Leave one of the two out."
    )


def _arguments(values: dict[str, Any]) -> str:
    shown = [f"`{name}={v!r}`" if isinstance(v, (int, float, str)) else f"`{name}`" for name, v in values.items()]
    return ", ".join(shown)


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
        raise ValueError(
            "Multi-token decoding is greedy so far, got `do_sample=True`, which a checkpoint's generation configuration or a "
            f"pipeline may set too: pass `do_sample=False`. {plain}"
        )
    if input_ids.shape[1] == 0 or model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "The prompt must be at least one token id: `input_ids` is empty or `inputs_embeds` was given."
        )
    if synced_gpus:
        raise ValueError(f"Multi-token decoding can't run with `synced_gpus=True` (ZeRO-3 or FSDP). {plain}")
    if model_kwargs.get("past_key_values") is None:
        cause = "the model makes none of the common kind" if generation_config.use_cache else "got `use_cache=False`"
        raise ValueError(f"Multi-token decoding needs a cache, {cause}. {plain}")
    # An empty dictionary is what `generate` itself gives to models that take images, where there is none.
    given = {name for name, value in model_kwargs.items() if value is not None and value != {}}
    unknown = sorted(given - KNOWN_ARGUMENTS)
    if unknown:
        raise ValueError(
            f"`{'`, `'.join(unknown)}` would not reach the model, since multi-token decoding takes token ids and their "
            f"mask alone: leave out token types, images and the like. {plain}"
        )
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


def num_left_padding(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None = None) -> int:
    """The number of padding tokens before the prompt; refuses other masks, and positions that don't follow from it."""
    num_padding = 0 if attention_mask is None else _num_left_zeros(attention_mask[0].bool())
    if position_ids is not None:
        positions = position_ids[..., num_padding:]
        if (positions != torch.arange(positions.shape[-1], device=positions.device)).any():
            raise ValueError(
                "`position_ids` must count the tokens of the prompt from 0, since those of guesses and masks go on from "
                "there: leave them out, or generate inside `with model.disable_adapter():`."
            )
    return num_padding


def _num_left_zeros(row: torch.Tensor) -> int:
    num_padding = int((~row).sum())
    if num_padding == len(row):
        raise ValueError(
            "`attention_mask` is 0 everywhere, so there is no prompt: give ones for its tokens. Where no mask was given, "
            "`generate` took every padding token for padding."
        )
    if row[:num_padding].any():
        raise ValueError(
            "`attention_mask` has zeros behind the start of the prompt: pad on the left (`tokenizer.padding_side = "
            "'left'`), since the first new token continues the last position. Where no mask was given, `generate` took "
            "every padding token for padding: give a mask of ones if that token is part of the text."
        )
    return num_padding
