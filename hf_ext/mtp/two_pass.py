"""
The training forward pass over masks, in two passes (not in the paper, and equal to its single interleaved pass).

Ordinary tokens depend neither on LoRA nor on masks. So they run once, without gradients, and leave their keys, values and
final states; then only the masks run, with gradients, against those. The base model's predictions at every position, which
serve as soft targets and to measure agreement, come free from the first pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.utils import ModelOutput

from . import layout
from .checks import check_text_length
from .decoding import SUPPORTED_ATTENTION, additive_mask, attention_patterns
from .losses import IGNORE_INDEX, latent_consistency, token_cross_entropy
from .unembedding import unembedding


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class MtpForwardOutput(ModelOutput):
    """
    What every mask says, and the losses of it. `A` anchors per sequence, `K` masks per anchor.

    Args:
        valid (`torch.BoolTensor` of shape `(batch_size, A, K)`):
            Whether the mask has a label.
        base_loss (`torch.FloatTensor` of shape `(batch_size, A, K)`):
            Cross-entropy of the unembedded mask states; 0 where not valid, as in all that follow.
        sampler_loss (`torch.FloatTensor` of shape `(batch_size, A, K)`):
            Cross-entropy of the sampler head on masks, fed with the true previous token.
        consistency_loss (`torch.FloatTensor` of shape `(batch_size, A, K)`):
            Squared distance to the base model's state, averaged over the hidden dimension.
        token_sampler_loss (`torch.FloatTensor` of shape `(batch_size, A)`):
            Cross-entropy of the sampler head on the anchors' own ordinary tokens.
        base_agrees (`torch.BoolTensor` of shape `(batch_size, A, K)`, *optional*):
            Whether the unembedded mask state and the base model have the same most likely token.
        sampler_agrees (`torch.BoolTensor` of shape `(batch_size, A, K)`, *optional*):
            The same for the sampler head.
    """

    valid: torch.Tensor | None = None
    base_loss: torch.Tensor | None = None
    sampler_loss: torch.Tensor | None = None
    consistency_loss: torch.Tensor | None = None
    token_sampler_loss: torch.Tensor | None = None
    base_agrees: torch.Tensor | None = None
    sampler_agrees: torch.Tensor | None = None


class FixedPrefixCache(DynamicCache):
    """Keys and values of the ordinary tokens, which any number of passes over masks see and none changes."""

    @classmethod
    def of(cls, cache: DynamicCache) -> FixedPrefixCache:
        fixed = cls()
        fixed.layers = cache.layers
        return fixed

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


def mask_labels(labels: torch.Tensor, anchors: torch.Tensor, num_masks: int) -> torch.Tensor:
    """
    Args:
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The tokens themselves, [`IGNORE_INDEX`] where they carry no loss.
        anchors (`torch.LongTensor` of shape `(batch_size, A)`):
            Tokens with masks behind them, -1 for none.
        num_masks (`int`):
            Masks behind each.

    Returns:
        `torch.LongTensor` of shape `(batch_size, A, num_masks + 1)`: the label of each anchor's own token and of its masks.
    """
    targets = anchors[..., None] + torch.arange(1, num_masks + 2, device=anchors.device)
    exists = (anchors[..., None] >= 0) & (targets < labels.shape[1])
    rows = torch.arange(labels.shape[0], device=labels.device)[:, None, None]
    return torch.where(exists, labels[rows, targets.clamp(0, labels.shape[1] - 1)], IGNORE_INDEX)


def two_pass_forward(
    model: PreTrainedModel,
    adapter: str,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    anchors: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    soft_target_weight: float = 0.0,
    measure_agreement: bool = False,
    anchors_per_chunk: int | None = None,
) -> MtpForwardOutput:
    """
    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base model with the adapter injected.
        adapter (`str`):
            Name of the adapter.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The text.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The text again, [`IGNORE_INDEX`] where it carries no loss.
        anchors (`torch.LongTensor` of shape `(batch_size, A)`):
            Different tokens behind which masks are placed, -1 for none.
        attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            0 on padding.
        soft_target_weight (`float`, *optional*, defaults to `0.0`):
            Share of the base model's distribution in the targets.
        measure_agreement (`bool`, *optional*, defaults to `False`):
            Whether to compare with the base model's most likely tokens.
        anchors_per_chunk (`int`, *optional*):
            Runs the masks of this many anchors at a time and recomputes them in the backward pass. Masks of different
            anchors don't see one another, so this bounds the memory and changes nothing else.

    Returns:
        [`MtpForwardOutput`]
    """
    if model.config._attn_implementation not in SUPPORTED_ATTENTION:
        raise ValueError(
            f"Training masks needs an attention that takes any mask; the model uses "
            f"'{model.config._attn_implementation}'. Load it with attn_implementation='sdpa' or 'eager'."
        )
    check_text_length(model.config.get_text_config(decoder=True), input_ids.shape[1], _num_masks(model, adapter))
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    with torch.no_grad():
        # Without a configuration the cache keeps all keys of windowed layers too; the masks of masks apply the window.
        outputs = model.get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=DynamicCache(),
            use_cache=True,
        )
    cache = FixedPrefixCache.of(outputs.past_key_values)
    token_states = outputs.last_hidden_state.detach()

    def of_anchors(chunk: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _mask_pass(
            model, adapter, input_ids, labels, chunk, attention_mask, positions, cache, token_states,
            soft_target_weight, measure_agreement,
        )  # fmt: skip

    if anchors_per_chunk is None or not torch.is_grad_enabled():
        chunks = [of_anchors(anchors)]
    else:
        chunks = [checkpoint(of_anchors, chunk, use_reentrant=False) for chunk in anchors.split(anchors_per_chunk, 1)]
    return MtpForwardOutput(*(torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True)))


def _num_masks(model: PreTrainedModel, adapter: str) -> int:
    return model.mtp_head.lora_mask_vectors[adapter].shape[0]


def _mask_pass(
    model: PreTrainedModel,
    adapter: str,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    anchors: torch.Tensor,
    attention_mask: torch.Tensor,
    positions: torch.Tensor,
    cache: FixedPrefixCache,
    token_states: torch.Tensor,
    soft_target_weight: float,
    measure_agreement: bool,
) -> tuple[torch.Tensor, ...]:
    """The second pass over the masks of some anchors; the fields of [`MtpForwardOutput`] in their order."""
    head, embeddings, unembed = model.mtp_head, model.get_input_embeddings(), unembedding(model)
    vectors = head.lora_mask_vectors[adapter]
    (batch_size, length), num_masks, num_anchors = input_ids.shape, vectors.shape[0], anchors.shape[1]
    rows = torch.arange(batch_size, device=anchors.device)[:, None]

    # An anchor that is none has a block of its own before the text, where its masks see themselves and are seen by no
    # other; its labels are ignored.
    blocks = torch.where(anchors < 0, -1 - torch.arange(num_anchors, device=anchors.device), anchors)
    masks = layout.masks_behind(blocks, num_masks)
    keys = layout.tokens(0, length, anchors.device) + masks
    seen = torch.cat([attention_mask.bool(), attention_mask.new_ones(batch_size, masks.slot.shape[1]).bool()], dim=1)
    allowed = {
        kind: additive_mask(layout.visible(masks, keys, window) & seen[:, None, :], token_states.dtype)[:, None]
        for kind, window in attention_patterns(model.config.get_text_config(decoder=True)).items()
    }

    # Masks behind the last position of the text have no label. They share that position: a learned table may have no
    # entry beyond it, and dynamic rope would change its frequencies for everyone.
    mask_positions = positions[rows, masks.block.clamp(min=0)] + masks.slot
    mask_positions = mask_positions.minimum(positions.amax(dim=-1, keepdim=True))

    with head.gate.open(masks.slot.shape[1], (batch_size, masks.slot.shape[1])):
        mask_states = (
            model.get_decoder()(
                inputs_embeds=vectors.to(token_states.dtype).repeat(num_anchors, 1).expand(batch_size, -1, -1),
                attention_mask=allowed if len(allowed) > 1 else next(iter(allowed.values())),
                position_ids=mask_positions,
                past_key_values=cache,
                use_cache=True,
            )
            .last_hidden_state.unflatten(1, (num_anchors, num_masks))
        )  # fmt: skip

    slot_labels = mask_labels(labels, anchors, num_masks)
    # The ordinary token with the position of slot j is x_(i+j): it precedes the label, and its state predicts it too.
    twins = (blocks[..., None] + torch.arange(num_masks + 1, device=blocks.device)).clamp(0, length - 1)
    twin_states = token_states[rows[..., None], twins]
    twin_embeddings = embeddings(input_ids[rows[..., None], twins]).detach()

    teacher: Any = None
    if soft_target_weight > 0 or measure_agreement:
        with torch.no_grad():
            teacher = unembed(twin_states)
    base_logits = unembed(mask_states)
    # Slot 0 is the ordinary token itself, on which the paper trains the sampler too.
    sampler_inputs = torch.cat([twin_states[:, :, :1], mask_states], dim=2)
    sampler_logits = unembed(head.sample_states(adapter, twin_embeddings, sampler_inputs))

    mask_teacher = None if teacher is None else teacher[:, :, 1:]
    valid = slot_labels[..., 1:] != IGNORE_INDEX
    sampler_loss = token_cross_entropy(sampler_logits, slot_labels, teacher, soft_target_weight)
    fields: tuple[torch.Tensor, ...] = (
        valid,
        token_cross_entropy(base_logits, slot_labels[..., 1:], mask_teacher, soft_target_weight),
        sampler_loss[..., 1:],
        latent_consistency(mask_states, twin_states[:, :, 1:]) * valid,
        sampler_loss[..., 0],
    )
    if measure_agreement:
        said = teacher[:, :, 1:].argmax(-1)
        fields += ((base_logits.argmax(-1) == said) & valid, (sampler_logits[:, :, 1:].argmax(-1) == said) & valid)
    return fields
