"""One step of speculative decoding: the forward pass over verified tokens, guesses and masks, and its acceptance."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from . import layout
from .layout import Slots


if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel
    from transformers.generation import BaseStreamer

    from .sampler import MtpHead


SUPPORTED_ATTENTION = ("sdpa", "eager")
# Shapes of steps whose masks are kept for a call; each is some tens of rows of the length of the text.
MOST_PLANS = 128
# Those whose layouts are kept for all calls; each is some tens of rows of some tens of columns.
MOST_LAYOUTS = 1024


@dataclass(frozen=True)
class _StepLayout:
    """What depends on the shape of a step only, the same for every text and every call."""

    slots: Slots
    position: torch.Tensor
    last_position: int
    logits_to_keep: torch.Tensor
    within: dict[str | None, torch.Tensor]


@functools.lru_cache(maxsize=MOST_LAYOUTS)
def _step_layout(
    num_tokens: int,
    num_guesses: int,
    num_masks: int,
    blocks: tuple[int, ...],
    patterns: tuple[tuple[str | None, int | None], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> _StepLayout:
    # Ordinary tensors, since later calls use them outside of inference mode too.
    with torch.inference_mode(False):
        slots = layout.tokens(0, num_tokens, device)
        slots += layout.masks_behind(torch.tensor(blocks, dtype=torch.long, device=device), num_masks)
        return _StepLayout(
            slots=slots,
            position=slots.position[None],
            last_position=int(slots.position.max()),
            logits_to_keep=torch.arange(num_tokens - num_guesses - 1, num_tokens, device=device),
            within={
                pattern: additive_mask(layout.visible(slots, slots, window), dtype) for pattern, window in patterns
            },
        )


@dataclass
class _Plan:
    """A step's layout in one call: with the adapter's masks, and as much text before it as the cache may hold."""

    layout: _StepLayout
    mask_embeddings: torch.Tensor
    attention: dict[str | None, torch.Tensor]
    capacity: int


class SpeculativeForward:
    """
    Runs the model over `[tokens | masks]` for one sequence and keeps its key-value cache.

    Ordinary tokens come first, so that what is accepted lies contiguous in the cache and one crop removes the rest; the
    gate is a count of trailing positions; logits are computed for the tokens to verify only.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model with the adapter injected.
        adapter (`str`):
            Name of the active adapter.
        cache ([`~transformers.DynamicCache`]):
            Its cache, empty or holding a part of the prompt.
        num_padding (`int`):
            Number of padding tokens at the left of the prompt.
    """

    def __init__(self, model: PreTrainedModel, adapter: str, cache: Cache, num_padding: int):
        config = model.config.get_text_config(decoder=True)
        self.model, self.adapter, self.cache, self.num_padding = model, adapter, cache, num_padding
        self.head: MtpHead = model.mtp_head
        self.embeddings = model.get_input_embeddings()
        # Weights that accelerate offloads are on the meta device until their module is called.
        hook = getattr(self.embeddings, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        self.device = self.embeddings.weight.device if device is None else torch.device(device)
        self.patterns = attention_patterns(config)
        self.max_position = getattr(config, "max_position_embeddings", None)
        self.plans: dict[tuple[int, int, int, tuple[int, ...]], _Plan] = {}
        self.states: torch.Tensor | None = None
        _check_supported(config, cache)

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return self.cache.get_seq_length()

    def prefill(self, token_ids: torch.Tensor, chunk_size: int | None = None) -> None:
        """
        Puts tokens into the cache by the model's own causal pass, whose attention needs no explicit mask.

        Args:
            token_ids (`torch.LongTensor` of shape `(1, length)`):
                The tokens that follow those in the cache.
            chunk_size (`int`, *optional*):
                Runs them this many at a time.
        """
        for chunk in token_ids.split(chunk_size or token_ids.shape[1], dim=1):
            seen = self.length + chunk.shape[1]
            indices = torch.arange(seen, device=chunk.device)[None]
            attention_mask = (indices >= self.num_padding).long() if self.num_padding else None
            positions = indices[:, self.length :] - self.num_padding
            self.model(
                input_ids=chunk,
                attention_mask=attention_mask,
                position_ids=positions.clamp(min=0),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )

    def __call__(
        self, token_ids: torch.Tensor, num_guesses: int, num_masks: int, blocks: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            token_ids (`torch.LongTensor` of shape `(num_tokens,)`):
                Tokens not yet in the cache; the last `num_guesses` are guesses.
            num_guesses (`int`):
                How many are to be verified.
            num_masks (`int`):
                Masks per block.
            blocks (`tuple[int, ...]`):
                Which of `token_ids` have a block of masks behind them, in ascending order; possibly none.

        Returns:
            `tuple`: logits `(num_guesses + 1, vocab_size)` that follow the last verified token and each guess, and states
            `(len(blocks), num_masks, hidden_size)` of the masks.
        """
        num_tokens, past = token_ids.shape[0], self.length
        plan = self._plan(num_tokens, num_guesses, num_masks, blocks, past)
        total_masks = len(blocks) * num_masks
        embeddings = self.embeddings(token_ids[None])
        if total_masks:
            embeddings = torch.cat([embeddings, plan.mask_embeddings.to(embeddings.dtype)], dim=1)
        with self.head.gate.open(total_masks, (1, num_tokens + total_masks)):
            outputs = self.model(
                inputs_embeds=embeddings,
                position_ids=self._positions(plan, past),
                attention_mask=self._attention(plan),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=plan.layout.logits_to_keep,
            )
        states, self.states = self.states, None
        assert states is not None, "`started` keeps them"
        return outputs.logits[0], states[0, num_tokens:].view(len(blocks), num_masks, states.shape[-1])

    def crop(self, num_tokens: int) -> None:
        """Removes this many entries from the end of the cache."""
        self.cache.crop(-num_tokens)

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Entered behind prefill: from here on the cache can be cropped and every pass leaves its final states."""

        def keep_states(module: torch.nn.Module, args: Any, output: Any) -> None:
            self.states = output[0] if isinstance(output, tuple) else output.last_hidden_state

        self.cache.activate_past_recording()
        # The hook gets the states behind the final norm, which the output embedding consumes, of all positions; the
        # model's own forward gives logits of some positions, with all that it does to them.
        handle = self.model.get_decoder().register_forward_hook(keep_states)
        try:
            yield
        finally:
            handle.remove()
            self._leave_inference_mode()

    def _leave_inference_mode(self) -> None:
        # The caller may go on with the cache in any mode, and tensors of inference mode can't be learned from.
        with torch.inference_mode(False):
            for layer in self.cache.layers:
                if layer.is_initialized and layer.keys.is_inference():
                    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    def _plan(self, num_tokens: int, num_guesses: int, num_masks: int, blocks: tuple[int, ...], past: int) -> _Plan:
        key = (num_tokens, num_guesses, num_masks, blocks)
        plan = self.plans.get(key)
        if plan is None or plan.capacity < past:
            if len(self.plans) == MOST_PLANS:
                self.plans.clear()
            plan = self.plans[key] = self._make_plan(num_tokens, num_guesses, num_masks, blocks, past)
        return plan

    def _make_plan(
        self, num_tokens: int, num_guesses: int, num_masks: int, blocks: tuple[int, ...], past: int
    ) -> _Plan:
        device, dtype = self.device, self.model.dtype
        if torch.is_autocast_enabled(device.type):
            # Attention casts the mask with all else, and the lowest value of a wider dtype would be minus infinity.
            dtype = torch.get_autocast_dtype(device.type)
        patterns = tuple(self.patterns.items())
        step = _step_layout(num_tokens, num_guesses, num_masks, blocks, patterns, dtype, device)
        capacity = max(2 * past, 256) if past else 0
        attention = {}
        for pattern, window in patterns:
            within = step.within[pattern]
            if window is None:  # everyone sees all of the text before
                before = within.new_zeros(within.shape[0], capacity)
            else:
                seen = layout.visible(step.slots, layout.tokens(-capacity, 0, device), window)
                before = additive_mask(seen, dtype)
            attention[pattern] = torch.cat([before, within], dim=-1)[None, None]
        masks = self.head.lora_mask_vectors[self.adapter][:num_masks].repeat(len(blocks), 1)[None]
        return _Plan(step, masks, attention, capacity)

    def _attention(self, plan: _Plan) -> torch.Tensor | dict[str | None, torch.Tensor]:
        """The last columns of the plan's masks, one for each key that the cache layer will hand to attention."""
        masks = {}
        for pattern, mask in plan.attention.items():
            layer = 0 if pattern is None else self.layer_types.index(pattern)
            num_keys, offset = self.cache.get_mask_sizes(mask.shape[-2], layer)
            mask = mask[..., mask.shape[-1] - num_keys :]
            hidden = self.num_padding - offset
            if hidden > 0:
                mask = mask.clone()
                mask[..., :hidden] = torch.finfo(mask.dtype).min
            masks[pattern] = mask
        # A model with one kind of layers takes the mask itself, a mixed one a mask for each kind.
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @property
    def layer_types(self) -> list[str]:
        return self.model.config.get_text_config(decoder=True).layer_types

    def _positions(self, plan: _Plan, past: int) -> torch.Tensor:
        start = past - self.num_padding
        positions = plan.layout.position + start
        if start < 0:
            # Padding tokens: nobody sees them, but a learned table has to have an entry for them.
            positions = positions.clamp(min=0)
        if self.max_position is not None and start + plan.layout.last_position >= self.max_position:
            # Tokens keep their positions, as in plain decoding. Masks that would stand behind the last position share
            # it: a learned table has no entry there, and dynamic rope would change its frequencies for everyone.
            limit = max(self.max_position - 1, start + int(plan.layout.slots.block.max()))
            positions = torch.where(plan.layout.slots.is_mask[None], positions.clamp(max=limit), positions)
        return positions


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    What is added to attention scores: 0 where allowed. Eager attention takes a boolean mask for zeros and ones, silently;
    scaled-dot-product attention takes either and would convert a boolean one in every layer.
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def attention_patterns(config: Any) -> dict[str | None, int | None]:
    """Kinds of attention layers, each with its window; the key is None where a model has one kind without a name."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return {None: getattr(config, "sliding_window", None)}
    windows = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
    unknown = sorted(set(layer_types) - windows.keys())
    if unknown:
        raise ValueError(
            f"Multi-token prediction needs layers of full or sliding attention; {config.model_type} has {unknown}."
        )
    return {kind: windows[kind] for kind in sorted(set(layer_types))}


def _check_supported(config: Any, cache: Cache) -> None:
    if config._attn_implementation not in SUPPORTED_ATTENTION:
        raise ValueError(
            f"Multi-token decoding needs an attention that takes any mask; the model uses "
            f"'{config._attn_implementation}'. Load it with attn_implementation='sdpa' or 'eager'."
        )
    if not isinstance(cache, DynamicCache) or not cache.is_croppable:
        raise ValueError(
            f"Multi-token decoding needs a cache that can be cropped, got {type(cache).__name__}. Leave "
            "`cache_implementation` at its default, or pass a DynamicCache."
        )


class Emitter:
    """
    Turns logits and guesses into output, token by token, exactly as plain greedy decoding would: processors, stopping
    criteria, scores and streamer see every token once and in order, and nothing behind the token that stops.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, prompt_length)`):
            The prompt.
        logits_processor ([`~transformers.LogitsProcessorList`]), stopping_criteria ([`~transformers.StoppingCriteriaList`]):
            As prepared by `generate`.
        streamer ([`~transformers.generation.BaseStreamer`], *optional*):
            Receives each token.
        keep_scores (`bool`), keep_logits (`bool`):
            Whether to collect processed and raw logits.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        keep_scores: bool,
        keep_logits: bool,
    ):
        self.prompt = input_ids
        self.tokens: list[int] = []
        self.processor, self.streamer = logits_processor, streamer
        self.scores: tuple[torch.Tensor, ...] | None = () if keep_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if keep_logits else None
        self.finished = False
        self.ends = {
            token for c in stopping_criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id.tolist()
        }
        lengths = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        self.max_new_tokens = min(lengths) - input_ids.shape[1] if lengths else None
        self.criteria = StoppingCriteriaList(
            c for c in stopping_criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))
        )
        # Most calls need neither processors nor scores nor criteria of their own: one argmax serves the whole step.
        self.needs_rows = bool(len(logits_processor)) or keep_scores or keep_logits
        self.sequence = input_ids if self.needs_rows or len(self.criteria) else None

    @property
    def remaining(self) -> int | None:
        """How many tokens may still be emitted."""
        return None if self.max_new_tokens is None else self.max_new_tokens - len(self.tokens)

    def accept(self, logits: torch.Tensor, guesses: list[int]) -> int:
        """
        Emits the guesses that the model confirms and the token that it says itself behind them.

        Args:
            logits (`torch.Tensor` of shape `(len(guesses) + 1, vocab_size)`):
                What the model says behind the last verified token and behind each guess.
            guesses (`list[int]`):
                The guesses.

        Returns:
            `int`: the number of guesses emitted; one more token was emitted behind them.
        """
        choices = None if self.needs_rows else logits.argmax(dim=-1).tolist()
        # Others' code, and what the caller keeps: as in plain decoding these are tensors without gradients, no more.
        with torch.inference_mode(False), torch.no_grad():
            for index in range(len(guesses) + 1):
                token = self._choose(logits[index : index + 1]) if choices is None else choices[index]
                self._emit(token)
                if self.finished or index == len(guesses) or guesses[index] != token:
                    break
        return index

    def _choose(self, row: torch.Tensor) -> int:
        raw = row.to(copy=True, dtype=torch.float32, device=self.prompt.device)
        processed = self.processor(self.sequence, raw)
        if self.scores is not None:
            self.scores += (processed,)
        if self.logits is not None:
            self.logits += (raw,)
        return int(processed.argmax(dim=-1))

    def _emit(self, token: int) -> None:
        self.tokens.append(token)
        self.finished = token in self.ends or self.remaining == 0
        if self.sequence is not None:
            self.sequence = torch.cat([self.sequence, self.sequence.new_tensor([[token]])], dim=-1)
            if len(self.criteria):
                self.finished |= bool(self.criteria(self.sequence, self.scores).all())
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))

    def sequences(self) -> torch.Tensor:
        """Prompt and output, `(1, length)`."""
        return torch.cat([self.prompt, self.prompt.new_tensor([self.tokens])], dim=-1)
