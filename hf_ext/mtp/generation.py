"""Speculative decoding with mask tokens, as a strategy of transformers' `generate`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from hf_ext.hub.model_card import write_unless_written

from .adapter_weights import check_loaded_adapter
from .checks import check_call, check_mode, check_positions, num_left_padding
from .decoding import Emitter, SpeculativeForward
from .lean_lora import lean_lora
from .options import OPTIONS, SpeculationOptions, options_in
from .sampler import highest_probability
from .unembedding import unembedding


if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation import BaseStreamer, GenerationMode

    from .sampler import MtpHead


# Up to this length the first step takes the whole prompt, which saves a forward pass; a longer prompt goes through the
# model's own causal attention, which needs no mask of prompt length squared.
LONGEST_PROMPT_IN_FIRST_STEP = 512


@dataclass
class MtpGenerateOutput(GenerateDecoderOnlyOutput):
    """
    What plain `generate` returns, and how it came about.

    Args:
        num_steps (`torch.LongTensor` of shape `(batch_size,)`):
            Forward passes of the model that emitted tokens.
        tokens_per_step (`torch.FloatTensor` of shape `(batch_size,)`):
            New tokens divided by `num_steps`: between 1 and `num_speculative_tokens + 1`, the paper's acceptance rate.
        step_lengths (`list[list[int]]`):
            For each sequence, the number of tokens that each step emitted.
    """

    num_steps: torch.Tensor | None = None
    tokens_per_step: torch.Tensor | None = None
    step_lengths: list[list[int]] | None = None


class MtpGenerationMixin(GenerationMixin):
    """
    `generate` with multi-token prediction (https://huggingface.co/papers/2507.11851, section 2.4).

    Injecting a gated LoRA adapter gives its base model this mixin, so `model.generate(...)` speculates by itself and
    greedy output stays the base model's, token for token. While no such adapter is active, or adapters are disabled, it
    is plain `generate`; so are beam search and transformers' own assisted decoding.

    Four arguments are added to `generate`, and are read from `model.generation_config` where a call doesn't give them. A
    call that gives them beside another way to decode (`num_beams=4`, `prompt_lookup_num_tokens`) is refused.

    Args:
        num_speculative_tokens (`int`, *optional*, defaults to the adapter's `num_masks`):
            Guesses per step.
        speculation_strategy (`str`, *optional*, defaults to `"quadratic"`):
            Where masks are placed. `"quadratic"`: behind every guess, so that the next step always has its guesses; the
            most tokens per step, over up to `(num_speculative_tokens + 1) ** 2` positions. `"linear"`: behind the last
            guess only, over `2 * num_speculative_tokens + 1` positions; a wrong guess leaves the next step without
            guesses. `"adaptive"` (not in the paper): behind the guesses where verification is likely to end by the
            sampler's own probabilities; between the two in tokens per step and in cost, and seldom without guesses. Where
            a pass over many positions costs as much as one over a few, as on a large GPU, quadratic is fastest; on a CPU
            the others are.
        speculation_threshold (`float`, *optional*, defaults to `0.25`):
            What is worth its cost in adaptive decoding: drafting ends with the first guess that is less likely to be right with
            all before it, and masks stand where verification ends with at least this probability. 0 is quadratic decoding.
        use_sampler (`bool`, *optional*, defaults to `True`):
            Whether the sampler head makes the guesses, or the output embedding alone.

    Example:

    ```python
    >>> import hf_ext
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained(hf_ext.shipped_model("tiny-lm"))
    >>> tokenizer = AutoTokenizer.from_pretrained(hf_ext.shipped_model("tiny-lm"))
    >>> loading_info = model.load_adapter(hf_ext.shipped_model("tiny-lm-mtp"))
    >>> inputs = tokenizer("Once upon a time", return_tensors="pt")
    >>> out = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)
    >>> float(out.tokens_per_step[0]) > 1
    True
    ```
    """

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        # The strategy as a callable would lose streamer and tokenizer on its way through `generate`; as this model's
        # own decoding method it keeps them.
        if kwargs.get("custom_generate") is mtp_generate:
            del kwargs["custom_generate"]
        return super().generate(*args, **kwargs)

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # `push_to_hub` has put a generic card there, which doesn't say how the adapter is loaded.
        adapter = active_mtp_adapter(self)
        if adapter is not None:
            write_unless_written(self.peft_config[adapter], working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        in_call = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        stored = options_in(self.generation_config)
        # A pipeline passes a copy of the stored configuration; what is in it was not asked for in this call.
        given = {name: v for name, v in options_in(generation_config).items() if v != stored.get(name)}
        given |= {name: value for name, value in in_call.items() if value is not None}
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        vars(prepared).update(given, given_speculation_options=given)
        return prepared, model_kwargs

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: GenerationConfig, generation_mode_kwargs: Any
    ) -> None:
        given = getattr(generation_config, "given_speculation_options", {})
        if given and active_mtp_adapter(self) is None:
            raise ValueError(f"{given} were given, but no multi-token adapter is active: enable one, or leave them.")
        if given:
            check_mode(given, generation_mode, generation_config, generation_mode_kwargs)
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    @staticmethod
    def _load_pretrained_model(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        # What `load_adapter` calls when it has injected the adapter, and with it this class.
        loaded = super()._load_pretrained_model(model, *args, **kwargs)
        check_loaded_adapter(model, loaded[0])
        return loaded

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        adapter = active_mtp_adapter(self)
        if adapter is None:
            return super()._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        num_masks = self.mtp_head.lora_mask_vectors[adapter].shape[0]
        options = SpeculationOptions.resolve(num_masks, generation_config)
        check_call(input_ids, generation_config, synced_gpus, model_kwargs)
        check_positions(self.config.get_text_config(decoder=True), generation_config, num_masks)
        emitter = Emitter(
            input_ids,
            logits_processor,
            stopping_criteria,
            streamer,
            keep_scores=bool(generation_config.return_dict_in_generate and generation_config.output_scores),
            keep_logits=bool(generation_config.return_dict_in_generate and generation_config.output_logits),
        )
        num_padding = num_left_padding(model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
        forward = SpeculativeForward(self, adapter, model_kwargs["past_key_values"], num_padding)
        step_lengths = _speculate(forward, emitter, options, generation_config.prefill_chunk_size)
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return emitter.sequences()
        return MtpGenerateOutput(
            sequences=emitter.sequences(),
            scores=emitter.scores,
            logits=emitter.logits,
            past_key_values=forward.cache,
            num_steps=torch.tensor([len(step_lengths)]),
            tokens_per_step=torch.tensor([len(emitter.tokens) / len(step_lengths)]),
            step_lengths=[step_lengths],
        )


def mtp_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_speculative_tokens: int | None = None,
    speculation_strategy: str | None = None,
    speculation_threshold: float | None = None,
    use_sampler: bool | None = None,
    **model_kwargs: Any,
) -> Any:
    """
    The strategy as a callable: `model.generate(**inputs, custom_generate=mtp_generate)` on a model with a gated LoRA
    adapter injected. See [`MtpGenerationMixin`] for the arguments; they are the same.

    Raises:
        ValueError: if the model carries no such adapter.
    """
    if not isinstance(model, MtpGenerationMixin):
        raise ValueError(
            f"{type(model).__name__} carries no multi-token adapter: load one with `model.load_adapter(...)` or "
            "`PeftModel.from_pretrained(model, ...)`."
        )
    options = (num_speculative_tokens, speculation_strategy, speculation_threshold, use_sampler)
    for name, value in zip(OPTIONS, options, strict=True):
        if value is not None:
            setattr(generation_config, name, value)
    return MtpGenerationMixin._sample(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **model_kwargs,
    )


@torch.inference_mode()
def _speculate(
    forward: SpeculativeForward, emitter: Emitter, options: SpeculationOptions, prefill_chunk_size: int | None
) -> list[int]:
    """
    The loop: lay out, run, accept, crop, draft. Returns the number of tokens that each step emitted.

    In inference mode, where a kernel of a small model takes a seventh less time than without gradients alone; what leaves the
    loop are ordinary tensors.
    """
    model, head, adapter = forward.model, forward.head, forward.adapter
    embeddings, unembed = model.get_input_embeddings(), unembedding(model)
    device = forward.device

    token_ids = emitter.prompt[0, forward.length :].to(device)
    if len(token_ids) > LONGEST_PROMPT_IN_FIRST_STEP or prefill_chunk_size is not None:
        forward.prefill(token_ids[None, :-1], prefill_chunk_size)
        token_ids = token_ids[-1:]
    guesses: list[int] = []
    probabilities: list[float] = []
    step_lengths: list[int] = []

    with forward.started(), head.onloaded(), lean_lora(model, adapter, head.gate):
        while not emitter.finished:
            num_verified = len(token_ids) - len(guesses)
            # A step emits at least one token, and the last one needs no guess: never draft past the limit.
            num_masks = options.num_speculative_tokens
            if emitter.remaining is not None:
                num_masks = max(0, min(num_masks, emitter.remaining - 2))
            places = _places_for_masks(len(guesses), probabilities, options) if num_masks else []
            logits, mask_states = forward(
                token_ids, len(guesses), num_masks, tuple(num_verified - 1 + place for place in places)
            )
            num_accepted = emitter.accept(logits, guesses)
            step_lengths.append(num_accepted + 1)
            forward.crop(len(guesses) - num_accepted + len(places) * num_masks)
            if emitter.finished:
                break

            token_ids = torch.tensor([emitter.tokens[-1]], device=device)
            guesses, probabilities = [], []
            room = None if emitter.remaining is None else emitter.remaining - 1
            if num_accepted in places and room != 0:
                states = mask_states[places.index(num_accepted)]
                drafted, probabilities = _draft(head, adapter, token_ids, states[:room], embeddings, unembed, options)
                guesses = drafted.tolist()
                token_ids = torch.cat([token_ids, drafted])
    return step_lengths


def _draft(
    head: MtpHead,
    adapter: str,
    last_token: torch.Tensor,
    mask_states: torch.Tensor,
    embeddings: torch.nn.Module,
    unembed: Callable[[torch.Tensor], torch.Tensor],
    options: SpeculationOptions,
) -> tuple[torch.Tensor, list[float]]:
    """
    The next guesses, and for adaptive decoding the probability that verification gets past each. There drafting ends where
    it is not worth its cost; the other strategies have as many guesses as were asked for.
    """
    least = options.speculation_threshold if options.speculation_strategy == "adaptive" else 0.0
    if options.use_sampler:
        return head.draft(adapter, last_token, mask_states, embeddings, unembed, least)
    logits = unembed(mask_states)
    drafted = logits.argmax(dim=-1)
    if not least:
        return drafted, []
    probabilities = highest_probability(logits).cumprod(0).tolist()
    count = 1 + sum(probability >= least for probability in probabilities)
    return drafted[:count], probabilities[:count]


def _places_for_masks(num_guesses: int, probabilities: list[float], options: SpeculationOptions) -> list[int]:
    """
    The numbers of accepted guesses for which the next step shall find masks: 0 stands for the last verified token.
    Quadratic decoding has them behind every guess, linear behind the last, adaptive where verification is likely to end.

    Verification ends behind `a` guesses with the probability that these are right less the probability that the next one
    is right too.
    """
    last = num_guesses
    if options.speculation_strategy == "linear":
        return [last]
    if options.speculation_strategy == "quadratic" or not options.speculation_threshold:
        return list(range(last + 1))
    reached = [1.0, *probabilities, 0.0]
    ends = [reached[a] - reached[a + 1] for a in range(last + 1)]
    likely = [a for a, probability in enumerate(ends) if probability >= options.speculation_threshold]
    return likely or [max(range(last + 1), key=ends.__getitem__)]


def active_mtp_adapter(model: PreTrainedModel) -> str | None:
    """Name of the gated LoRA adapter in use on `model`, or None if there is none or adapters are disabled."""
    head = getattr(model, "mtp_head", None)
    if head is None or head.disable_adapters:
        return None
    return next((name for name in head.active_adapters if name in head.lora_mask_vectors), None)


@functools.cache
def _with_mtp_generation(model_class: Any) -> type:
    # Under the same name, which `save_pretrained` writes into config.json.
    return type(
        model_class.__name__,
        (MtpGenerationMixin, model_class),
        {"__module__": model_class.__module__, "__doc__": model_class.__doc__},
    )


def add_mtp_generation(model: PreTrainedModel) -> None:
    """Gives a model [`MtpGenerationMixin`]: `generate` looks its decoding methods up in the class."""
    if not isinstance(model, MtpGenerationMixin):
        model.__class__ = _with_mtp_generation(type(model))  # type: ignore[arg-type]


def remove_mtp_generation(model: PreTrainedModel) -> None:
    """Takes it away again."""
    if isinstance(model, MtpGenerationMixin):
        model.__class__ = type(model).__mro__[2]
