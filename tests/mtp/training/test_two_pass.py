"""Two-pass training against the paper's interleaved single pass, written out naively."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_ext.mtp import layout
from hf_ext.mtp.losses import IGNORE_INDEX
from hf_ext.mtp.two_pass import MtpForwardOutput, two_pass_forward
from hf_ext.mtp.unembedding import unembedding
from mtp.models import SHAPES_AND_ATTENTION, VOCAB_SIZE, randomise, tiny_model
from mtp.training.setting import NUM_MASKS, gated


WINDOW = 4
# The longer row is several times as long as the sliding window; each row has its own anchors, the first and the last
# token among them, and the shorter row one less.
ROWS = ((11, (0, 2, 5, 8, 10)), (7, (0, 2, 3, 6)))
UNLABELLED = 2
LOSSES = ("base_loss", "sampler_loss", "consistency_loss", "token_sampler_loss")


def adapted(shape: str = "llama", attention: str = "sdpa", **changes: Any) -> PeftModel:
    """
    With random weights everywhere in the adapter. In double precision, save where attention is eager: that takes its
    softmax in single precision whatever it is given, where the mask of a padding token in double overflows.
    """
    windowed = {"sliding_window": WINDOW} if shape in ("mistral", "gemma2", "gemma3") else {}
    model = get_peft_model(tiny_model(shape, attention, **windowed), gated(**changes))
    randomise(model, std=0.3)
    return model.to(torch.float32 if attention == "eager" else torch.float64).train()


def row_of(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a text and their labels, the first of which carry no loss."""
    ids = torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length))
    labels = ids.clone()
    labels[:UNLABELLED] = IGNORE_INDEX
    return ids, labels


def batch_of(side: str) -> dict[str, torch.Tensor]:
    """All rows, padded."""
    longest, most = max(length for length, _ in ROWS), max(len(anchors) for _, anchors in ROWS)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": [], "anchors": []}
    for length, anchors in ROWS:
        missing, (ids, labels) = longest - length, row_of(length)
        shift = missing if side == "left" else 0
        for name, values, filler in (
            ("input_ids", ids.tolist(), 7),
            ("labels", labels.tolist(), IGNORE_INDEX),
            ("attention_mask", [1] * length, 0),
        ):
            padding = [filler] * missing
            batch[name].append(padding + values if side == "left" else values + padding)
        batch["anchors"].append([anchor + shift for anchor in anchors] + [-1] * (most - len(anchors)))
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def interleaved_states(base: PreTrainedModel, ids: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    """One pass over x0 m1..mk x1 m1..mk ...; the final state of every (block, slot)."""
    head, embed = base.mtp_head, base.get_input_embeddings()
    slots = layout.interleaved(len(ids), NUM_MASKS)
    order = list(zip(slots.block.tolist(), slots.slot.tolist(), strict=True))
    vectors = head.lora_mask_vectors["default"]
    inputs = torch.stack([embed(ids[block]) if slot == 0 else vectors[slot - 1] for block, slot in order])

    def bias(window: int | None) -> torch.Tensor:
        allowed = layout.visible(slots, slots, window)
        return torch.zeros(allowed.shape, dtype=inputs.dtype).masked_fill(~allowed, -1e9)[None, None]

    config = base.config
    if getattr(config, "layer_types", None) and len(set(config.layer_types)) > 1:
        attention: Any = {"full_attention": bias(None), "sliding_attention": bias(config.sliding_window)}
    else:
        attention = bias(getattr(config, "sliding_window", None))
    with head.gate.open(slots.is_mask[None], (1, len(order))):
        states = base.get_decoder()(
            inputs_embeds=inputs[None],
            attention_mask=attention,
            position_ids=slots.position[None],
            use_cache=False,
        ).last_hidden_state[0]
    return dict(zip(order, states, strict=True))


def interleaved_losses(model: PeftModel, soft_target_weight: float = 0.0) -> dict[str, list[torch.Tensor]]:
    """The paper's losses, one by one in the order of rows, anchors and slots; those without a label are left out."""
    base = model.base_model.model
    head, embed, unembed = base.mtp_head, base.get_input_embeddings(), unembedding(base)
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in LOSSES}
    for length, anchors in ROWS:
        ids, labels = row_of(length)
        states = interleaved_states(base, ids)

        def cross_entropy(state: torch.Tensor, target: int, ids=ids, states=states) -> torch.Tensor:
            soft = unembed(states[target - 1, 0]).detach().softmax(-1)
            goal = (1 - soft_target_weight) * F.one_hot(ids[target], VOCAB_SIZE) + soft_target_weight * soft
            return -(goal * unembed(state).log_softmax(-1)).sum()

        for anchor in anchors:
            for slot in range(NUM_MASKS + 1):
                target = anchor + slot + 1
                if target >= length or labels[target] == IGNORE_INDEX:
                    continue
                # The token with the same position and the same label as this slot.
                token_state, token_embedding = states[target - 1, 0].detach(), embed(ids[target - 1]).detach()
                state = token_state if slot == 0 else states[anchor, slot]
                sampled = cross_entropy(head.sample_states("default", token_embedding, state), target)
                if slot == 0:
                    losses["token_sampler_loss"].append(sampled)
                else:
                    losses["sampler_loss"].append(sampled)
                    losses["base_loss"].append(cross_entropy(state, target))
                    losses["consistency_loss"].append((token_state - state).square().mean())
    return losses


def present(output: MtpForwardOutput) -> dict[str, torch.Tensor]:
    """The same list out of the tensors of the two passes."""
    anchors_with_label = output.token_sampler_loss != 0
    return {
        name: output[name][anchors_with_label if name == "token_sampler_loss" else output.valid] for name in LOSSES
    }


def weighted(losses: dict[str, Any]) -> torch.Tensor:
    """One scalar in which no two terms have the same weight."""
    return sum(weight * sum(losses[name]) for weight, name in enumerate(LOSSES, start=1))


def gradients(model: PeftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_two_passes_are_one(model: PeftModel, side: str, soft_target_weight: float = 0.0) -> None:
    """In every loss of every slot, and in the gradient of every trainable parameter; whole and in chunks."""
    tolerance = {"rtol": 1e-8, "atol": 1e-11} if model.dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    expected = interleaved_losses(model, soft_target_weight)
    expected_gradients = gradients(model, weighted(expected))
    assert all(gradient.any() for gradient in expected_gradients.values())
    for chunk in (None, 2):
        output = two_pass_forward(
            model.base_model.model,
            "default",
            **batch_of(side),
            soft_target_weight=soft_target_weight,
            anchors_per_chunk=chunk,
        )
        found = present(output)
        for name in LOSSES:
            torch.testing.assert_close(found[name], torch.stack(expected[name]), **tolerance, msg=name)
        found_gradients = gradients(model, weighted({name: output[name].flatten() for name in LOSSES}))
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, **tolerance, msg=name)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("shape", "attention"),
    [
        (shape, attention)
        for shape, attention in SHAPES_AND_ATTENTION
        if shape in ("llama", "mistral", "gemma", "gemma2", "gemma3", "gpt_neox", "qwen3", "gpt2", "opt")
    ],
)
def test_two_passes_equal_the_interleaved_pass(shape, attention, side):
    """In value and gradient, with padding, a window shorter than the text, mixed layers and scaled embeddings."""
    assert_two_passes_are_one(adapted(shape, attention), side)


def losses_at_full_length(base: PreTrainedModel, length: int) -> dict[str, torch.Tensor]:
    """Those of anchors up to the last token that has a successor, whose masks but the first lack a label."""
    ids = row_of(length)[0][None]
    output = two_pass_forward(base, "default", ids, ids, torch.tensor([[3, length - 4, length - 2]]))
    assert 0 < output.valid.sum() < output.valid.numel()
    return {name: output[name] for name in LOSSES}


def test_a_text_as_long_as_the_table_of_positions_trains():
    """Masks that would stand behind its last entry have no label; the others learn as with a longer table."""
    model, length = adapted("gpt2"), 16
    base = model.base_model.model
    expected = losses_at_full_length(base, length)
    base.transformer.wpe = torch.nn.Embedding.from_pretrained(base.transformer.wpe.weight.detach()[:length])
    torch.testing.assert_close(losses_at_full_length(base, length), expected)


def test_a_text_of_full_length_does_not_stretch_dynamic_rope():
    """Nothing with a label stands beyond the model's length, so frequencies are those of ordinary rope."""
    stretching = tiny_model("llama-dynamic-rope", max_position_embeddings=16)
    models = [get_peft_model(model, gated()).train() for model in (stretching, tiny_model("llama"))]
    for model in models:
        randomise(model, std=0.3)
    found, expected = (losses_at_full_length(model.base_model.model, 16) for model in models)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_soft_targets_are_the_base_models_words(weight):
    """With them too the two passes equal the interleaved one."""
    assert_two_passes_are_one(adapted("gemma3"), "left", soft_target_weight=weight)


@pytest.mark.parametrize("changes", [{"sampler_residual": False}, {"sampler_residual": True}, {"frozen_masks": True}])
def test_every_kind_of_sampler_and_mask_trains_alike(changes):
    """With and without the residual, and with masks that stay as they are."""
    assert_two_passes_are_one(adapted(**changes), "right")


def test_ordinary_tokens_do_not_hear_of_the_adapter():
    """In the interleaved pass their states are bit-equal for any masks and any LoRA; those of masks are not."""
    model = adapted()
    ids, _ = row_of(9)
    one = interleaved_states(model.base_model.model, ids)
    randomise(model, std=0.5, seed=7)
    other = interleaved_states(model.base_model.model, ids)
    for (block, slot), state in one.items():
        assert torch.equal(state, other[block, slot]) == (slot == 0)


@pytest.mark.parametrize("shape", ["llama", "gemma3", "gpt_neox"])
def test_ordinary_tokens_compute_what_the_base_model_computes(shape):
    """Among masks up to rounding, as a matrix of other shape is multiplied in another order; without masks bit for bit."""
    model, ids = adapted(shape), row_of(9)[0]
    base = model.base_model.model
    untouched = tiny_model(shape, **({"sliding_window": WINDOW} if shape == "gemma3" else {})).double()
    expected = untouched.get_decoder()(input_ids=ids[None]).last_hidden_state
    assert torch.equal(base.get_decoder()(input_ids=ids[None]).last_hidden_state, expected)
    states = interleaved_states(base, ids)
    found = torch.stack([states[block, 0] for block in range(len(ids))])
    torch.testing.assert_close(found, expected[0], rtol=1e-10, atol=1e-12)


def test_the_base_model_gets_no_gradient():
    """Its parameters are frozen and have none behind a backward pass."""
    model = adapted()
    output = two_pass_forward(model.base_model.model, "default", **batch_of("right"))
    weighted({name: output[name].flatten() for name in LOSSES}).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("lora_" not in name), name


def test_ordinary_tokens_give_lora_and_masks_no_gradient():
    """That of their own base cross-entropy in the interleaved pass is exactly zero: two passes leave nothing out."""
    model = adapted()
    base = model.base_model.model
    ids, _ = row_of(9)
    states = interleaved_states(base, ids)
    logits = base.get_output_embeddings()(torch.stack([states[block, 0] for block in range(len(ids))]))
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    loss = F.cross_entropy(logits[:-1], ids[1:])
    for gradient in torch.autograd.grad(loss, trained, allow_unused=True):
        assert gradient is None or not gradient.any()


def test_states_that_are_drawn_together_share_position_and_label():
    """Slot j of block i goes with the ordinary token of block i + j."""
    slots = layout.interleaved(num_tokens=12, num_masks=NUM_MASKS)
    place = {pair: i for i, pair in enumerate(zip(slots.block.tolist(), slots.slot.tolist(), strict=True))}
    for (block, slot), index in place.items():
        twin = place.get((block + slot, 0))
        if twin is not None:
            assert slots.position[index] == slots.position[twin]
            assert slots.label_position[index] == slots.label_position[twin]


def test_an_anchor_does_not_hear_of_other_anchors():
    """Its losses are those that it has alone."""
    base = adapted("mistral").base_model.model
    batch = batch_of("right")
    together = two_pass_forward(base, "default", **batch)
    for index in range(batch["anchors"].shape[1]):
        alone = two_pass_forward(base, "default", **{**batch, "anchors": batch["anchors"][:, index : index + 1]})
        for name in LOSSES:
            torch.testing.assert_close(alone[name], together[name][:, index : index + 1])


@pytest.mark.parametrize("soft_target_weight", [0.0, 1.0])
def test_no_anchor_means_no_loss(soft_target_weight):
    """A row without anchors has losses of zero and adds nothing to the gradient."""
    model = adapted()
    batch = {**batch_of("left"), "anchors": torch.full((2, 2), -1)}
    output = two_pass_forward(model.base_model.model, "default", **batch, soft_target_weight=soft_target_weight)
    assert not output.valid.any()
    assert all(not output[name].any() for name in LOSSES)
    found = gradients(model, weighted({name: output[name].flatten() for name in LOSSES}))
    assert all(not gradient.any() for gradient in found.values())


def test_agreement_is_with_the_base_models_own_words():
    """Each mask, unembedded or through the sampler, against what the base model says with all the text in sight."""
    model = adapted()
    base = model.base_model.model
    unembed, embed, head = base.get_output_embeddings(), base.get_input_embeddings(), base.mtp_head
    output = two_pass_forward(base, "default", **batch_of("right"), measure_agreement=True)
    for row, (length, anchors) in enumerate(ROWS):
        ids, labels = row_of(length)
        states = interleaved_states(base, ids)
        for column, anchor in enumerate(anchors):
            for slot in range(1, NUM_MASKS + 1):
                target = anchor + slot + 1
                valid = target < length and labels[target] != IGNORE_INDEX
                base_agrees = sampler_agrees = False
                if valid:
                    said = unembed(states[target - 1, 0]).argmax()
                    state = states[anchor, slot]
                    sampled = head.sample_states("default", embed(ids[target - 1]), state)
                    base_agrees, sampler_agrees = unembed(state).argmax() == said, unembed(sampled).argmax() == said
                assert output.valid[row, column, slot - 1] == valid
                assert output.base_agrees[row, column, slot - 1] == base_agrees
                assert output.sampler_agrees[row, column, slot - 1] == sampler_agrees


def test_chunks_of_any_size_say_the_same():
    """Also one that divides nothing, and with the agreement measured."""
    model = adapted()
    batch = batch_of("right")
    whole = two_pass_forward(model.base_model.model, "default", **batch, measure_agreement=True)
    for chunk in (1, 3, 50):
        parts = two_pass_forward(
            model.base_model.model, "default", **batch, measure_agreement=True, anchors_per_chunk=chunk
        )
        assert parts.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name])


def test_dropout_is_drawn_again_alike_in_a_chunk():
    """Recomputing a chunk sees the dropout of its first computation: the gradient is that of the loss that came out."""
    model = adapted(lora_dropout=0.5)
    base, batch = model.base_model.model, batch_of("right")
    losses, found = [], []
    for chunk in (None, 50):
        torch.manual_seed(3)
        output = two_pass_forward(base, "default", **batch, anchors_per_chunk=chunk)
        losses.append(weighted({name: output[name].flatten() for name in LOSSES}))
        found.append(gradients(model, losses[-1]))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_that_of_lora_in_training(training):
    """Two passes differ then and only then; the base model's own dropout is never drawn, so token losses are the same."""
    model = get_peft_model(tiny_model(attention_dropout=0.5), gated(lora_dropout=0.5))
    randomise(model)
    base = model.train(training).base_model.model
    one, other = (two_pass_forward(base, "default", **batch_of("right")) for _ in range(2))
    assert torch.equal(one.token_sampler_loss, other.token_sampler_loss)
    assert torch.equal(one.base_loss, other.base_loss) != training


def test_an_attention_without_masks_is_refused():
    """By its name, with what to do."""
    model = adapted()
    model.base_model.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*sdpa"):
        two_pass_forward(model.base_model.model, "default", **batch_of("right"))
