"""Routers that learn from the loss of the routed model: the choice stays hard, and its gradient is that of its chance."""

import pytest
import torch

from dynamoe.models import WIDTHS, random_ids, tiny_moe
from hf_ext.dynamoe.routing import chosen_experts, straight_through


def noise_for(moe, ids, std=0.0, seed=1):
    shape = (len(moe.nested_mlps()), *ids.shape, len(WIDTHS) - 1)
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", ["llama-bias", "phi3", "gpt_neox"])
@pytest.mark.parametrize("sensitivity", [0.0, 0.5, 1.0, torch.tensor([0.3, 1.0])])
def test_forward_it_is_the_hard_choice(shape, sensitivity):
    """Without noise: the same experts and the same logits as ever, at a sensitivity for all rows and at one for each."""
    moe, ids = tiny_moe(shape).train(), random_ids(2, 9)
    options = {"sensitivity": sensitivity, "output_router_logits": True}
    expected, found = moe(ids, **options), moe(ids, router_noise=noise_for(moe, ids), **options)
    assert torch.equal(found.expert_index, expected.expert_index)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_noise_is_part_of_the_choice():
    """The logits that are returned are those of the router, without it."""
    moe, ids = tiny_moe(), random_ids(2, 9)
    noise = noise_for(moe, ids, std=5.0)
    out = moe(ids, sensitivity=0.5, router_noise=noise, output_router_logits=True)
    for layer, (logits, experts) in enumerate(zip(out.router_logits, out.expert_index, strict=True)):
        assert torch.equal(experts, chosen_experts(logits + noise[layer], "ordinal", 0.5))
    assert torch.equal(out.router_logits[0], moe(ids, sensitivity=0.5, output_router_logits=True).router_logits[0])


def test_labels_that_are_followed_still_decide():
    """Forward; backward the router hears what these experts did."""
    moe, ids = tiny_moe().train(), random_ids(2, 9)
    options = {"sensitivity": 0.6, "output_nearness": True, "forcing_mask": torch.ones_like(ids, dtype=torch.bool)}
    expected, found = moe(ids, **options), moe(ids, router_noise=noise_for(moe, ids, 3.0), **options)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    found.logits.sum().backward()
    assert all(mlp.router.out.weight.grad.any() for mlp in moe.nested_mlps())


def test_the_gradient_is_that_of_the_chance_of_each_chunk():
    """A chunk is used where every smaller expert fails to reach the sensitivity; each fails with a logistic chance."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64).float().requires_grad_()
    effect = torch.randn(5, 4, generator=generator)
    sensitivity = torch.tensor([0.2, 0.5, 0.9, 0.99, 1.0])
    expert = chosen_experts(logits.detach(), "ordinal", sensitivity)
    chunks = straight_through(logits, sensitivity, expert)
    assert torch.equal(chunks, (torch.arange(4) <= expert[:, None]).float())
    (chunks * effect).sum().backward()
    found, logits.grad = logits.grad.clone(), None
    fails = 1 - torch.sigmoid(logits - torch.log(sensitivity / (1 - sensitivity))[:, None])
    chances = [fails[:, :count].prod(-1) for count in (1, 2, 3)]
    sum((chance * effect[:, chunk + 1]).sum() for chunk, chance in enumerate(chances)).backward()
    torch.testing.assert_close(found, logits.grad)
    # At full sensitivity there is nothing to choose.
    assert not found[-1].any()


def test_the_loss_of_the_routed_model_reaches_every_router():
    """And through the inputs of routers the layers below, whether or not the routers' own loss does."""
    moe, ids = tiny_moe().train(), random_ids(2, 9)
    assert moe.config.detach_router_input
    noise = noise_for(moe, ids)
    moe(ids, labels=ids, sensitivity=0.5).loss.backward()
    assert not any(parameter.grad is not None for mlp in moe.nested_mlps() for parameter in mlp.router.parameters())
    hard = moe.get_input_embeddings().weight.grad.clone()
    moe.zero_grad()
    moe(ids, labels=ids, sensitivity=0.5, router_noise=noise).loss.backward()
    assert all(parameter.grad.any() for mlp in moe.nested_mlps() for parameter in mlp.router.parameters())
    assert not torch.allclose(moe.get_input_embeddings().weight.grad, hard, rtol=0.01, atol=1e-6)


def test_a_router_learns_which_tokens_need_more():
    """With the rest frozen, a few steps of the model's own loss find cheaper errors than chance at the same compute."""
    moe, ids = tiny_moe(), random_ids(8, 16)
    routers = [p for name, p in moe.named_parameters() if ".router." in name]
    with torch.no_grad():
        dense = moe(ids, sensitivity=1.0).logits.log_softmax(-1)
    widths = torch.tensor(WIDTHS) / WIDTHS[-1]

    def divergence(logits):
        return torch.nn.functional.kl_div(logits.log_softmax(-1), dense, log_target=True, reduction="batchmean") / 16

    def of_hard_choice():
        with torch.no_grad():
            out = moe(ids, sensitivity=0.5, output_router_logits=True)
        return divergence(out.logits).item(), widths[out.expert_index].mean().item()

    before, share = of_hard_choice()
    optimiser = torch.optim.Adam(routers, lr=2e-2)
    chunk_shares = widths.diff(prepend=torch.zeros(1))
    for step in range(80):
        noise = noise_for(moe, ids, std=1.0, seed=step)
        out = moe(ids, sensitivity=0.5, router_noise=noise, output_router_logits=True)
        chunks = [straight_through(r, 0.5, moe.choices(r, 0.5)) for r in out.router_logits]
        used = (torch.stack(chunks) * chunk_shares).sum(-1).mean()
        (divergence(out.logits) + 10 * (used - share).square()).backward()
        optimiser.step()
        moe.zero_grad()
    after, share_after = of_hard_choice()
    assert share_after == pytest.approx(share, abs=0.05)
    assert after < 0.8 * before


@pytest.mark.parametrize("form", ["compiled", "checkpointed", "autocast"])
def test_each_form_of_training_computes_the_same(form):
    moe, ids = tiny_moe().train(), random_ids(2, 9)
    options = {"labels": ids, "sensitivity": 0.5, "router_noise": noise_for(moe, ids, std=1.0), "use_cache": False}
    loss = moe(ids, **options).loss
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in moe.named_parameters()}
    moe.zero_grad()
    run, precision = moe, 1e-4
    if form == "compiled":
        torch._dynamo.reset()
        run = torch.compile(moe, fullgraph=True, backend="aot_eager")
    elif form == "checkpointed":
        moe.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        precision = 0.05
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        again = run(ids, **options).loss
    again.backward()
    assert again.item() == pytest.approx(loss.item(), rel=precision)
    if form != "autocast":  # which decides some choices otherwise
        for name, parameter in moe.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_noise_that_doesn_t_fit_is_refused():
    """With the shape that does, and the kind of router that it is for."""
    moe, ids = tiny_moe(), random_ids(2, 9)
    with pytest.raises(ValueError, match=r"`router_noise` must have shape \(2, 2, 9, 2\), got \(2, 9, 2\)"):
        moe(ids, router_noise=noise_for(moe, ids)[0])
    with pytest.raises(ValueError, match=r"`router_noise` must be a tensor of shape \(2, 2, 9, 2\), got 0\.5"):
        moe(ids, router_noise=0.5)
    with pytest.raises(ValueError, match="`router_noise` is for ordinal routers"):
        classifier = tiny_moe(router_type="classifier")
        classifier(ids, router_noise=noise_for(moe, ids))
