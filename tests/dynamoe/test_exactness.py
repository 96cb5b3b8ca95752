"""What nested experts compute: the dense model at full sensitivity, exact slices of it below."""

import copy

import pytest
import torch

from dynamoe.models import (
    SHAPES,
    WIDTHS,
    calibration_rows,
    cut,
    random_ids,
    spread_routers,
    tiny_model,
    tiny_moe,
    unnested,
)
from hf_ext import DynaMoeConfig, DynaMoeForCausalLM, convert_to_dynamoe


SHAPES_AND_ATTENTION = [(shape, attention) for shape in SHAPES for attention in ("sdpa", "eager")]
IMPORTANCES = ("activation_norm", "activation", "taylor", "none")


@pytest.mark.parametrize(("shape", "attention"), SHAPES_AND_ATTENTION)
def test_full_sensitivity_is_the_dense_model_bit_for_bit(shape, attention):
    """With gradients and without, in one pass and token by token."""
    moe, ids = tiny_moe(shape, attention), random_ids(2, 12)
    dense = unnested(moe)
    assert type(dense) is type(tiny_model(shape)) and dense.config._attn_implementation == attention
    assert torch.equal(moe(ids).logits, dense(ids).logits)
    with torch.no_grad():
        assert torch.equal(moe(ids).logits, dense(ids).logits)
        ours, theirs = moe(ids[:, :5]), dense(ids[:, :5])
        for token in ids[:, 5:].split(1, dim=1):
            ours = moe(token, past_key_values=ours.past_key_values)
            theirs = dense(token, past_key_values=theirs.past_key_values)
            assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_all_ask_for_the_dense_model_get_it_bit_for_bit(shape):
    """A tensor of ones is full sensitivity, as the number is."""
    moe, ids = tiny_moe(shape), random_ids(2, 12)
    with torch.no_grad():
        assert torch.equal(moe(ids, sensitivity=torch.ones(2)).logits, unnested(moe)(ids).logits)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_reordering_changes_nothing_beyond_rounding(shape, importance):
    dense, ids = tiny_model(shape), random_ids(2, 12)
    before = copy.deepcopy(dense)
    moe = convert_to_dynamoe(
        dense, 3, calibration_dataset=calibration_rows(), importance=importance, disable_tqdm=True
    )
    with torch.no_grad():
        torch.testing.assert_close(moe(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-4)
    differs = [not torch.equal(a, b) for a, b in zip(unnested(moe).parameters(), before.parameters(), strict=True)]
    assert any(differs) == (importance != "none")
    assert moe.conversion_receipt.largest_logit_difference < 1e-3


def test_neurons_stand_in_the_order_of_their_importance():
    """The mean size of an activation times the norm of its output weights, over the calibration text and no padding."""
    rows = [{"input_ids": random_ids(length, seed=length).tolist()} for length in (5, 9, 20)]
    moe = convert_to_dynamoe(tiny_model(), 3, calibration_dataset=rows, batch_size=3, disable_tqdm=True)
    dense, sums = unnested(moe), {}
    mlps = [layer.mlp for layer in dense.model.layers]
    for number, mlp in enumerate(mlps):
        mlp.down_proj.register_forward_pre_hook(
            lambda _, args, n=number: sums.__setitem__(n, sums.get(n, 0) + args[0].abs().sum((0, 1)))
        )
    with torch.no_grad():
        for row in rows:
            dense(torch.tensor([row["input_ids"]]))
    for number, mlp in enumerate(mlps):
        scores = sums[number] * mlp.down_proj.weight.detach().norm(dim=0)
        assert (scores.diff() <= 1e-4 * scores.max()).all()
        shares = [float(scores[:width].sum() / scores.sum()) for width in moe.config.expert_widths]
        assert moe.conversion_receipt.importance_shares[number] == pytest.approx(shares, rel=1e-4)


def test_taylor_importance_is_the_size_of_activation_times_gradient():
    """Of the summed next-token loss, whatever the batches; the model's gradients and flags are left alone."""
    rows, dense = calibration_rows(), tiny_model()
    dense.lm_head.requires_grad_(False)
    reference, scores = copy.deepcopy(dense), 0
    kept = {}
    reference.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: (args[0].retain_grad(), kept.update(hidden=args[0]))[0]
    )
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        (reference(ids, labels=ids).loss * (ids.shape[1] - 1)).backward()
        scores = scores + (kept["hidden"].detach() * kept["hidden"].grad).abs().sum((0, 1))
    order = scores.argsort(descending=True, stable=True)
    expected = reference.model.layers[0].mlp.up_proj.weight[order]
    moe = convert_to_dynamoe(dense, 3, calibration_dataset=rows, importance="taylor", disable_tqdm=True)
    assert torch.equal(moe.nested_mlps()[0].dense.up_proj.weight, expected)
    assert all(parameter.grad is None for parameter in moe.parameters())
    assert not moe.model.lm_head.weight.requires_grad and moe.nested_mlps()[0].dense.up_proj.weight.requires_grad


@pytest.mark.parametrize(("shape", "attention"), SHAPES_AND_ATTENTION)
def test_an_expert_is_the_model_with_its_weights_cut(shape, attention):
    """Sliced (one expert for all), masked (where gradients flow) and chunked (an index for each token) alike."""
    moe, ids = tiny_moe(shape, attention), random_ids(2, 12)
    for expert in range(len(WIDTHS)):
        index = torch.full(ids.shape, expert)
        with torch.no_grad():
            expected = cut(moe, expert)(ids).logits
            torch.testing.assert_close(moe(ids, expert_index=expert).logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(moe(ids, expert_index=index).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moe(ids, expert_index=index).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_in_one_batch_get_what_each_gets_alone(shape):
    """Chunks over a shrinking set of tokens, the masked form and one expert at a time agree, layer by layer."""
    moe = tiny_moe(shape)
    mlp, x = moe.nested_mlps()[0], torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    for index in (random_ids(3, 7) % 3, random_ids(3, 7) % 2, torch.full((3, 7), 1)):
        moe.routing.begin(0.5, index, None, None, False, False)
        masked = mlp(x)
        with torch.no_grad():
            chunked = mlp(x)
            alone = torch.stack([mlp._one_expert(x, expert, None) for expert in range(3)])
        alone[2] = mlp.dense(x)
        expected = alone.gather(0, index[None, ..., None].expand(1, 3, 7, 32))[0]
        torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chunked, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sensitivity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_routed_output_is_the_same_with_gradients_and_without(shape, sensitivity):
    """The masked form that trains and the slices that serve are one function, tokens going to every expert."""
    moe, ids = tiny_moe(shape), random_ids(2, 20)
    masked = moe(ids, sensitivity=sensitivity, output_router_logits=True)
    with torch.no_grad():
        sliced = moe(ids, sensitivity=sensitivity, output_router_logits=True)
    assert set(masked.expert_index.unique().tolist()) == {0, 1, 2}
    assert torch.equal(masked.expert_index, sliced.expert_index)
    torch.testing.assert_close(sliced.logits, masked.logits, rtol=1e-4, atol=1e-4)


def test_weights_of_modules_that_transformers_did_not_make_are_kept():
    """A head put onto the dense model, a vocabulary resized."""
    dense, ids = tiny_model(), random_ids(1, 9)
    dense.resize_token_embeddings(48)
    dense.lm_head = torch.nn.Linear(32, 48)
    with torch.no_grad():
        expected = dense(ids).logits
        assert torch.equal(convert_to_dynamoe(dense, 3, importance="none")(ids).logits, expected)


def test_fresh_routers_choose_the_full_expert():
    """Until they are trained, whatever the sensitivity in use; at 0 alone everything goes to the smallest."""
    for router_type in ("ordinal", "classifier"):
        moe = convert_to_dynamoe(tiny_model(), 4, importance="none", router_type=router_type)
        out = moe(random_ids(1, 9), sensitivity=0.5, output_router_logits=True)
        assert (out.expert_index == 3).all()
    config = DynaMoeConfig(base_config=tiny_model().config, expert_widths=WIDTHS)
    out = DynaMoeForCausalLM(config)(random_ids(1, 9), sensitivity=0.5, output_router_logits=True)
    assert (out.expert_index == 2).all()


def test_a_deep_copy_routes_by_itself():
    """Settings of a call don't cross between a model and its copy."""
    moe, ids = tiny_moe(), random_ids(1, 9)
    twin = copy.deepcopy(moe)
    with torch.no_grad():
        expected = moe(ids, sensitivity=0.5).logits
        assert torch.equal(twin(ids, sensitivity=0.5).logits, expected)
        twin.set_sensitivity(0.0)
        spread_routers(twin, seed=5)
        assert torch.equal(moe(ids).logits, unnested(moe)(ids).logits)
        assert torch.equal(moe(ids, sensitivity=0.5).logits, expected)
    assert moe.config.sensitivity == 1.0
    assert all(mlp.routing is twin.routing and mlp.config is twin.config for mlp in twin.nested_mlps())
