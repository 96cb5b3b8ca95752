"""Labels, choices, their losses, and what is counted of them."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import MistralConfig

from dynamoe.models import SHAPES, WIDTHS, random_ids, spread_routers, tiny_model, tiny_moe, unnested
from hf_ext import DynaMoeConfig, DynaMoeForCausalLM, convert_to_dynamoe


def watched(moe, ids, **options):
    """Inputs of the MLPs, and the outputs of a call."""
    inputs = []
    handles = [mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for mlp in moe.nested_mlps()]
    out = moe(ids, output_router_logits=True, output_nearness=True, **options)
    for handle in handles:
        handle.remove()
    return inputs, out


@pytest.mark.parametrize("similarity", ["projection", "cosine", "error"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nearness_is_that_of_each_sliced_expert(shape, similarity):
    """The one dense pass by cumulative chunks measures what running every expert would."""
    moe = tiny_moe(shape, similarity=similarity)
    with torch.no_grad():
        inputs, out = watched(moe, random_ids(2, 9), sensitivity=0.5)
        for mlp, x, nearness in zip(moe.nested_mlps(), inputs, out.nearness, strict=True):
            whole = mlp.dense(x)
            for expert in range(2):
                part = mlp._one_expert(x, expert, None)
                expected = (part * whole).sum(-1) / (whole * whole).sum(-1)
                if similarity == "cosine":
                    expected = F.cosine_similarity(part, whole, dim=-1)
                if similarity == "error":
                    norm = whole.norm(dim=-1)
                    expected = 1 - (whole - part).square().sum(-1) / (norm * (mlp_norm(moe, mlp) or norm))
                torch.testing.assert_close(nearness[..., expert], expected, rtol=1e-4, atol=1e-5)


def mlp_norm(moe, mlp):
    """The typical size of the MLP's output, where conversion saw text."""
    return moe.config.output_norms and moe.config.output_norms[mlp.layer]


def test_conversion_measures_the_size_of_outputs():
    """The root of the mean squared norm over the calibration tokens, padding not counted; saved with the model."""
    rows = [{"input_ids": row.tolist()} for row in (random_ids(1, 7)[0], random_ids(1, 12, seed=3)[0])]
    moe = convert_to_dynamoe(tiny_model(), expert_widths=WIDTHS, calibration_dataset=rows, disable_tqdm=True)
    squares, count = [0.0, 0.0], 0
    for row in rows:
        outputs = []
        handles = [
            m.dense.register_forward_hook(lambda _, args, out, kept=outputs: kept.append(out))
            for m in moe.nested_mlps()
        ]
        with torch.no_grad():
            moe(torch.tensor([row["input_ids"]]))
        for handle in handles:
            handle.remove()
        squares = [s + float(out.double().square().sum()) for s, out in zip(squares, outputs, strict=True)]
        count += len(row["input_ids"])
    assert moe.config.output_norms == pytest.approx([(s / count) ** 0.5 for s in squares], rel=1e-5)
    assert DynaMoeConfig.from_dict(moe.config.to_dict()).output_norms == moe.config.output_norms


def test_labels_grow_with_the_sensitivity():
    """Never smaller at a higher one, at 1 the whole MLP, and tokens that follow them take them."""
    moe, ids = tiny_moe(), random_ids(2, 20)
    everyone, last = torch.ones_like(ids, dtype=torch.bool), None
    _, reference = watched(moe, ids)
    for sensitivity in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
        out = watched(moe, ids, sensitivity=sensitivity, forcing_mask=everyone)[1]
        label = out.expert_index[0]
        near = reference.nearness[0]
        smallest = torch.where(near[..., 0] >= sensitivity, 0, torch.where(near[..., 1] >= sensitivity, 1, 2)) * (
            sensitivity > 0
        )
        assert torch.equal(label, smallest if sensitivity < 1 else torch.full_like(label, 2))
        assert last is None or (label >= last).all()
        last = label


@pytest.mark.parametrize("similarity", ["error", "projection", "cosine"])
def test_labels_at_no_sensitivity_are_the_smallest_expert(similarity):
    """Also where a slice of the neurons is farther from the whole MLP than nothing is."""
    moe, ids = tiny_moe(similarity=similarity), random_ids(2, 20)
    nearness = moe(ids, output_nearness=True).nearness
    assert (nearness < 0).any()
    for sensitivity in (0.0, torch.zeros(2, 1)):
        assert not moe.labels(nearness, sensitivity).any()


def test_choices_grow_with_the_sensitivity():
    """From the smallest expert for every token at 0 to the whole MLP at 1, for a number and for one per row alike."""
    moe, ids, last = tiny_moe(), random_ids(2, 20), None
    for sensitivity in (0.0, 0.25, 0.5, 0.75, 1.0):
        for form in (sensitivity, torch.full((2,), sensitivity)):
            chosen = moe(ids, sensitivity=form, output_router_logits=True).expert_index[0]
            assert last is None or (chosen >= last).all()
            last = chosen
        if sensitivity in (0.0, 1.0):
            assert (chosen == 2 * int(sensitivity)).all()


def test_a_router_that_is_certain_does_not_undo_full_sensitivity():
    """Predicted nearness rounds to 1, a classifier never hears of the sensitivity: a row at 1 is dense all the same."""
    for router_type in ("ordinal", "classifier"):
        moe, ids = tiny_moe(router_type=router_type), random_ids(2, 9)
        with torch.no_grad():
            for mlp in moe.nested_mlps():
                mlp.router.out.weight.zero_()
                mlp.router.out.bias.copy_(torch.tensor([50.0, -50.0, -50.0][: len(mlp.router.out.bias)]))
        if router_type == "classifier":
            moe.set_sensitivity(0.5)
        out = moe(ids, sensitivity=torch.tensor([0.5, 1.0]), output_router_logits=True)
        assert (out.expert_index[:, 0] == 0).all() and (out.expert_index[:, 1] == 2).all()
        torch.testing.assert_close(out.logits[1:], unnested(moe)(ids[1:]).logits, rtol=1e-4, atol=1e-4)


def test_rows_of_different_sensitivity_are_as_each_alone():
    moe, ids = tiny_moe(), random_ids(3, 12)
    with torch.no_grad():
        together = moe(ids, sensitivity=torch.tensor([0.2, 0.6, 1.0])).logits
        for row, sensitivity in enumerate((0.2, 0.6, 1.0)):
            alone = moe(ids[row : row + 1], sensitivity=sensitivity).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_expert_index_takes_the_place_of_the_routers():
    """A number, one expert for each token, or one for each token and layer."""
    moe, ids = tiny_moe(), random_ids(2, 6)
    per_layer = torch.stack([random_ids(2, 6, seed=1) % 3, random_ids(2, 6, seed=2) % 3])
    for given, expected in ((1, torch.ones_like(per_layer)), (per_layer, per_layer), (per_layer[0], None)):
        out = moe(ids, expert_index=given, sensitivity=0.5, output_router_logits=True)
        assert torch.equal(out.expert_index, per_layer[:1].expand(2, 2, 6) if expected is None else expected)


def test_a_setting_of_one_call_ends_with_it():
    moe, ids = tiny_moe(), random_ids(1, 9)
    with torch.no_grad():
        expected = moe(ids).logits
        moe(ids, sensitivity=0.3, expert_index=0)
        assert torch.equal(moe(ids).logits, expected)
        moe.set_sensitivity(0.5)
        assert torch.equal(moe(ids).logits, moe(ids, sensitivity=0.5).logits)
        assert not torch.equal(moe(ids).logits, expected)
        moe.set_sensitivity(1.0)
        hidden = moe.get_decoder()(ids).last_hidden_state  # what some trainers call
        assert torch.equal(moe.get_output_embeddings()(hidden), expected)
        moe(ids, sensitivity=0.3, expert_index=0)
        hidden = moe.base_model(ids).last_hidden_state
        assert torch.equal(moe.get_output_embeddings()(hidden), expected)


@pytest.mark.parametrize("learns", [False, True])
def test_the_decoder_alone_routes_as_the_model_does(learns):
    """Behind a pass that went backward, whose sensitivity and noise were its own: other trainers go on with the decoder."""
    moe, ids = tiny_moe(), random_ids(2, 5)
    moe.set_sensitivity(0.4)
    expected = moe(ids).logits
    for options in ({"sensitivity": 1.0}, {"router_noise": torch.full((2, 2, 7, 2), 9.0)}):
        given = random_ids(2, 7) if "router_noise" in options else ids
        moe(given, labels=given, **options).loss.backward()
        with torch.set_grad_enabled(learns):
            states = moe.base_model(ids).last_hidden_state
            torch.testing.assert_close(moe.get_output_embeddings()(states), expected)


@pytest.mark.parametrize("router_type", ["ordinal", "classifier"])
def test_the_routers_loss_is_what_it_is_said_to_be(router_type):
    """A mean over layers and over tokens that are no padding, added to the language model's with its weight."""
    moe, ids = tiny_moe(router_type=router_type), random_ids(2, 9)
    moe.set_sensitivity(0.6)
    moe.config.router_aux_loss_coef = 0.25
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    out = moe(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    losses = []
    for logits, nearness in zip(out.router_logits, out.nearness, strict=True):
        if router_type == "ordinal":
            target = nearness.clamp(0, 1)
            losses.append(-(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).mean(-1))
        else:
            label = (nearness >= 0.6).cumsum(-1).eq(0).sum(-1)
            losses.append(-logits.log_softmax(-1).gather(-1, label[..., None])[..., 0])
    expected = torch.stack(losses)[:, mask.bool()].mean()
    torch.testing.assert_close(out.aux_loss, expected)
    plain = moe(ids, attention_mask=mask, labels=labels)
    assert plain.aux_loss is None and plain.router_logits is None
    torch.testing.assert_close(out.loss, plain.loss + 0.25 * expected)


@pytest.mark.parametrize("detached", [True, False])
def test_the_routers_loss_reaches_the_trunk_only_if_it_may(detached):
    moe, ids = tiny_moe(), random_ids(2, 9)
    moe.config.detach_router_input = detached
    moe(ids, labels=ids, output_router_logits=True).aux_loss.backward()
    for name, parameter in moe.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        if ".router." in name:
            assert reached, name
        elif detached or name.endswith(("lm_head.weight", "model.norm.weight")) or ".layers.1.mlp" in name:
            assert not reached, name
        elif ".layers.0." in name and name.endswith("proj.weight"):
            assert reached, name


def test_usage_counts_what_was_routed_and_no_padding():
    """Over calls in evaluation mode, until it is reset; cached steps count their own tokens."""
    moe, ids = tiny_moe(), random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="No token was routed yet"):
        moe.expert_usage()
    with torch.no_grad():
        out = moe(ids, attention_mask=mask, sensitivity=0.5, output_router_logits=True)
    usage = moe.expert_usage()
    expected = torch.stack([layer[mask.bool()].bincount(minlength=3) for layer in out.expert_index])
    assert usage.num_tokens == 13
    torch.testing.assert_close(usage.shares, expected / 13)
    widths = torch.tensor(WIDTHS)[out.expert_index[:, mask.bool()]]
    assert usage.active_fraction == pytest.approx(float(widths.float().mean()) / WIDTHS[-1])
    assert usage.active_parameters == pytest.approx(float(out.active_parameters[mask.bool()].float().mean()))

    assert moe.expert_usage(reset=True).num_tokens == 13
    moe.train()(ids)  # training doesn't count
    moe.eval()
    with torch.no_grad():
        prefill = moe(ids[:, :7], attention_mask=mask[:, :7], sensitivity=0.5)
        moe(ids[:, 7:], attention_mask=mask, past_key_values=prefill.past_key_values, sensitivity=0.5)
    again = moe.expert_usage()
    assert again.num_tokens == 13
    torch.testing.assert_close(again.shares, usage.shares)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("shape", ["llama", "mistral"])
def test_usage_of_generation_counts_no_padding(shape, cache):
    """Also where `generate` lays the mask out itself, for a static cache."""
    moe, ids = tiny_moe(shape), random_ids(2, 8)
    moe.set_sensitivity(0.5)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    moe.generate(ids, attention_mask=mask, **options)
    assert moe.expert_usage().num_tokens == 13 + 2 * 3


def test_active_parameters_of_the_papers_model():
    """A 7-billion-parameter Mistral in quarters: 3.0, 4.4, 5.8 and 7.2 billion (and its routers)."""
    base = MistralConfig(intermediate_size=14336, num_key_value_heads=8, sliding_window=None, vocab_size=32000)
    with torch.device("meta"):
        moe = DynaMoeForCausalLM(DynaMoeConfig(base_config=base))
    routers = sum(p.numel() for mlp in moe.nested_mlps() for p in mlp.router.parameters())
    assert 33e6 < routers < 34e6
    counts = [int(moe.count_active_parameters(torch.full((32, 1), expert))) - routers for expert in range(4)]
    assert [round(count / 1e9, 1) for count in counts] == [3.0, 4.4, 5.8, 7.2]
    assert counts[3] == 7_241_732_096


@pytest.mark.parametrize("shape", SHAPES)
def test_active_parameters_are_those_of_the_cut_model(shape):
    from dynamoe.models import cut

    moe = tiny_moe(shape)
    routers = sum(p.numel() for mlp in moe.nested_mlps() for p in mlp.router.parameters())
    for expert in range(3):
        out = moe(random_ids(1, 3), expert_index=expert, output_router_logits=True)
        assert (out.active_parameters == sum(p.numel() for p in cut(moe, expert).parameters()) + routers).all()


def test_a_classifier_serves_what_it_was_trained_for_and_the_dense_model():
    """Also after it served the dense model, and after saving as such."""
    moe, ids = tiny_moe(router_type="classifier"), random_ids(2, 5)
    moe.set_sensitivity(0.8)
    moe.set_sensitivity(1.0)
    moe.set_sensitivity(0.8)
    moe.set_sensitivity(1.0)
    for refused in (0.5, torch.tensor([0.5, 1.0])):
        with pytest.raises(ValueError, match=r"classifiers for 0\.8.*router_type='ordinal'"):
            moe(ids, sensitivity=refused)
    with pytest.raises(ValueError, match=r"`sensitivity`=0\.5, but .* classifiers for 0\.8"):
        moe.set_sensitivity(0.5)
    moe(ids, sensitivity=torch.tensor([0.8, 1.0]))


def test_a_classifier_remembers_what_it_was_trained_for(tmp_path):
    moe = tiny_moe(router_type="classifier")
    moe.set_sensitivity(0.8)
    moe.set_sensitivity(1.0)
    moe.save_pretrained(tmp_path)
    loaded = DynaMoeForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifiers for 0\.8"):
        loaded.set_sensitivity(0.5)
    loaded.set_sensitivity(0.8)


def test_usage_follows_new_routers():
    moe, ids = tiny_moe(), random_ids(2, 8)
    with torch.no_grad():
        moe(ids, sensitivity=0.5)
        first = moe.expert_usage(reset=True)
        spread_routers(moe, seed=3)
        moe(ids, sensitivity=0.5)
    assert not torch.equal(first.shares, moe.expert_usage().shares)


def test_usage_counted_in_inference_mode_is_copied():
    moe = tiny_moe()
    with torch.inference_mode():
        moe(random_ids(1, 5), sensitivity=0.5)
    twin = copy.deepcopy(moe)
    moe(random_ids(1, 5), sensitivity=0.5)
    assert twin.expert_usage().num_tokens == 5 and moe.expert_usage().num_tokens == 10
