"""Compilation, checkpointing and adapters change how a nested model is run or trained, never what it computes."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from dynamoe.models import WIDTHS, random_ids, spread_routers, tiny_model, tiny_moe
from dynamoe.training.setting import tiny_tokenizer
from hf_ext import DynaMoeForCausalLM, convert_to_dynamoe


GATED = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("shape", ["llama-bias", "phi3", "gpt_neox"])
def test_a_compiled_model_computes_the_same(shape):
    """As one graph, whichever way experts are chosen; a second call compiles nothing, whatever was called between."""
    moe, ids = tiny_moe(shape), random_ids(2, 9)
    for options in (
        {},
        {"sensitivity": 0.5},
        {"sensitivity": torch.tensor([0.2, 1.0])},
        {"expert_index": 1},
        {"expert_index": ids % 3, "output_router_logits": True},
        {"sensitivity": 0.5, "labels": ids, "output_router_logits": True},
    ):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(moe, fullgraph=True, backend=counter)
        with torch.no_grad():
            expected, out = moe(ids, **options), compiled(ids, **options)
            moe(ids[:1], sensitivity=0.7)
            again = compiled(ids, **options)
        assert counter.frame_count == 1
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(again.logits, out.logits)
        if "output_router_logits" in options:
            assert torch.equal(out.expert_index, expected.expert_index)


@pytest.mark.parametrize("by_call", [True, False])
def test_a_compiled_model_serves_every_sensitivity(by_call):
    """One graph for the first, one more for all others: the knob is a number that it keeps open."""
    moe, ids = tiny_moe(), random_ids(2, 9)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(moe, fullgraph=True, backend=counter)
    for step in range(1, 12):
        value = step / 12
        if not by_call:
            moe.set_sensitivity(value)
        call = {"sensitivity": value} if by_call else {}
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids, **call).logits, moe(ids, **call).logits, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("shape", ["llama-bias", "phi3", "gpt_neox"])
def test_autocast_changes_precision_alone(shape):
    """In each form, with gradients and without: as near to full precision as the dense model's autocast is."""
    moe, ids = tiny_moe(shape), random_ids(2, 9)
    for options in (
        {},
        {"expert_index": 1},
        {"expert_index": ids % 3},
        {"expert_index": ids % 3, "output_nearness": True},
    ):
        with torch.no_grad():
            expected = moe(ids, **options).logits
            with torch.autocast("cpu", torch.bfloat16):
                outputs = [moe(ids, **options).logits]
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(moe(ids, **options).logits)
        for logits in outputs:
            assert logits.dtype == torch.bfloat16
            assert (logits.float() - expected).norm() < 0.05 * expected.norm()


def test_a_compiled_model_has_the_same_gradients():
    moe, ids = tiny_moe(), random_ids(2, 9)
    options = {"sensitivity": 0.5, "labels": ids, "output_router_logits": True}
    torch._dynamo.reset()
    moe(ids, **options).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in moe.named_parameters()}
    moe.zero_grad()
    torch.compile(moe, fullgraph=True, backend="aot_eager")(ids, **options).loss.backward()
    for name, parameter in moe.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("router_type", ["ordinal", "classifier"])
@pytest.mark.parametrize("follow", [False, True])
def test_checkpointing_leaves_gradients_alone(router_type, follow):
    """The routers' loss included, whose tensors leave the layers that are run again."""
    moe, ids = tiny_moe(router_type=router_type).train(), random_ids(2, 9)
    moe.set_sensitivity(0.5)
    options = {"labels": ids, "output_router_logits": True, "use_cache": False}
    if follow:
        options |= {"forcing_mask": ids % 2 == 0}
    moe.config.detach_router_input = False
    loss = moe(ids, **options).loss
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in moe.named_parameters()}
    moe.zero_grad()
    moe.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    moe.nested_mlps()[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = moe(ids, **options).loss
    again.backward()
    assert len(calls) == 2
    assert torch.equal(again, loss)
    for name, parameter in moe.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize("enabled", ["before the conversion", "behind it"])
@pytest.mark.parametrize("between", ["a teacher's pass", "a pass that learns too", "a pass of a copy"])
def test_checkpointed_layers_route_as_their_own_pass_did(between, enabled):
    """Whatever passes come between it and its way back, as in distillation from itself or in losses of pairs."""
    ids, gradients = random_ids(2, 9), []
    for checkpointed in (False, True):
        dense, options = tiny_model(), {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        if checkpointed and enabled == "before the conversion":
            dense.gradient_checkpointing_enable(**options)
        moe = convert_to_dynamoe(dense, expert_widths=WIDTHS, importance="none").train()
        spread_routers(moe)
        if checkpointed and enabled == "behind it":
            moe.gradient_checkpointing_enable(**options)
        loss = moe(ids, sensitivity=0.4, labels=ids, use_cache=False).loss
        if between == "a teacher's pass":
            with torch.no_grad():
                moe(ids, sensitivity=1.0, use_cache=False)
        elif between == "a pass that learns too":
            loss = loss + moe(ids, sensitivity=0.9, labels=ids, use_cache=False).loss
        else:  # of its own settings, on the thread that goes back through both
            other = copy.deepcopy(moe)
            loss = other(ids, sensitivity=0.4, labels=ids, use_cache=False).loss
            moe(ids, sensitivity=0.9, use_cache=False)
            moe = other
        loss.backward()
        gradients.append({name: weight.grad for name, weight in moe.named_parameters() if weight.grad is not None})
    assert gradients[1].keys() == gradients[0].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_checkpointing_that_would_lose_the_routers_loss_is_refused():
    moe, ids = tiny_moe().train(), random_ids(2, 9)
    moe.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    moe.enable_input_require_grads()
    moe(ids, labels=ids, use_cache=False).loss.backward()
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        moe(ids, labels=ids, use_cache=False, output_router_logits=True)


def randomised(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        ("llama", GATED),
        ("llama-bias", ["q_proj", "v_proj", *GATED]),
        ("llama", ["q_proj", "v_proj"]),
        ("llama", ["down_proj"]),
        ("phi3", ["gate_up_proj", "down_proj"]),
        ("gpt_neox", ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"]),
    ],
)
def test_lora_on_a_nested_model_is_the_nested_model_of_merged_weights(shape, targets, tmp_path):
    """Each expert is a slice of the weights with the adapter in them; it is saved, loaded and merged."""
    moe, ids = tiny_moe(shape), random_ids(2, 9)
    bare = copy.deepcopy(moe)
    model = randomised(get_peft_model(moe, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")))
    calls = [{}, {"sensitivity": 0.5}, {"expert_index": 0}, {"expert_index": ids % 3}]
    with torch.no_grad():
        adapted = [model(ids, **options).logits for options in calls]
        before = [bare(ids, **options).logits for options in calls]
        assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(adapted, before, strict=True))
        with model.disable_adapter():
            for options, expected in zip(calls, before, strict=True):
                torch.testing.assert_close(model(ids, **options).logits, expected, rtol=1e-4, atol=1e-4)
        text = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, sensitivity=0.5)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(bare, tmp_path)
        for options, expected in zip(calls, adapted, strict=True):
            torch.testing.assert_close(loaded(ids, **options).logits, expected)
        merged = model.merge_and_unload()
        assert type(merged) is DynaMoeForCausalLM
        for options, expected in zip(calls, adapted, strict=True):
            torch.testing.assert_close(merged(ids, **options).logits, expected, rtol=1e-4, atol=1e-4)
        again = merged.generate(input_ids=ids, max_new_tokens=6, do_sample=False, sensitivity=0.5)
    assert torch.equal(again, text)


def test_routers_are_saved_with_an_adapter(tmp_path):
    """`modules_to_save=["router"]`: they are trained, saved, loaded and merged with LoRA."""
    moe, ids = tiny_moe(), random_ids(2, 9)
    bare = copy.deepcopy(moe)
    config = LoraConfig(r=2, target_modules=GATED, modules_to_save=["router"], task_type="CAUSAL_LM")
    model = randomised(get_peft_model(moe, config))
    model(input_ids=ids, labels=ids, output_router_logits=True, sensitivity=0.5).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("router" in name for name in with_gradient) == 2 * 4
    for mlp in model.get_base_model().nested_mlps():
        spread_routers_of(mlp.router.modules_to_save["default"])
    options = {"sensitivity": 0.5, "output_router_logits": True}
    with torch.no_grad():
        expected = model(input_ids=ids, **options)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(bare, tmp_path)
        for out in (loaded(input_ids=ids, **options), model.merge_and_unload()(ids, **options)):
            assert torch.equal(out.expert_index, expected.expert_index)
            torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_transformers_own_is_saved_and_loaded(tmp_path):
    """`add_adapter`, `save_pretrained` and `load_adapter`, and a folder of adapters alone by the Auto class."""
    bare, ids = tiny_moe(), random_ids(2, 9)
    bare.save_pretrained(tmp_path / "moe")
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    moe.add_adapter(LoraConfig(r=2, target_modules=GATED, task_type="CAUSAL_LM"))
    randomised(moe)
    moe.save_pretrained(tmp_path / "adapter")
    bare.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = moe(ids, sensitivity=0.5).logits
        for loaded in (bare, AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")):
            torch.testing.assert_close(loaded(ids, sensitivity=0.5).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of a size that is packed without a rest."""
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64, "expert_widths": [16, 32, 64]}
    tiny_moe(initializer_range=0.1, **sizes).save_pretrained(folder)
    return folder


def quantised(folder, **options):
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_routes_and_counts_alike(bits, saved):
    """Its routers stay as they are, and weights that are packed two into a byte are two parameters."""
    ids, moe = random_ids(2, 9), AutoModelForCausalLM.from_pretrained(saved)
    small = quantised(saved, **{f"load_in_{bits}bit": True})
    for mine, theirs in zip(small.nested_mlps(), moe.nested_mlps(), strict=True):
        assert all(map(torch.equal, mine.router.parameters(), theirs.router.parameters()))
    assert small.generate(ids, max_new_tokens=4, sensitivity=0.5).shape[1] > 9
    for expert in range(3):
        out, expected = (m(ids, expert_index=expert, output_router_logits=True) for m in (small, moe))
        assert (out.logits - expected.logits).norm() < 0.4 * expected.logits.norm()
        assert torch.equal(out.active_parameters, expected.active_parameters)


def test_routers_of_a_quantised_model_are_trained(saved):
    """They are not quantised; beside them adapters are trained."""
    moe = prepare_model_for_kbit_training(quantised(saved, load_in_4bit=True), use_gradient_checkpointing=False)
    config = LoraConfig(r=2, target_modules=GATED, modules_to_save=["router"], task_type="CAUSAL_LM")
    model, ids = get_peft_model(moe, config), random_ids(2, 9)
    model(input_ids=ids, labels=ids, output_router_logits=True, sensitivity=0.5).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_whole_mlps_cannot_be_trained_beside_their_originals():
    """PEFT would run copies, which no longer share how the model routes."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_moe(), config)
    with pytest.raises(ValueError, match=r"0 of the model's 2 nested MLPs.*`modules_to_save=\[\"router\"\]`"):
        model(input_ids=random_ids(2, 9))


def test_copies_that_adapters_keep_are_not_active():
    """Of routers that are trained in full, the originals stand aside."""
    moe, ids = tiny_moe(), random_ids(1, 3)
    alone = moe(ids, output_router_logits=True).active_parameters
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"], task_type="CAUSAL_LM")
    model = get_peft_model(moe, config)
    lora = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    assert torch.equal(model(input_ids=ids, output_router_logits=True).active_parameters, alone + lora)


def spread_routers_of(router):
    torch.nn.init.normal_(router.out.weight, std=3.0)


@pytest.mark.parametrize("routing", [False, True])
def test_an_ordinary_trainer_evaluates_it(routing, tmp_path):
    """It finds the labels by the names of arguments, and gathers nothing but logits, rows of all lengths."""
    moe = tiny_moe()
    moe.set_sensitivity(0.5)
    moe.config.output_router_logits = routing
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(5, 8)]
    trainer = Trainer(
        model=moe,
        args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=2),
        eval_dataset=rows,
        compute_metrics=lambda prediction: {"shape": list(prediction.predictions.shape)},
    )
    figures = trainer.evaluate()
    assert figures["eval_shape"] == [5, 8, 40]
    with torch.no_grad():
        losses = [moe(row["input_ids"][None], labels=row["labels"][None]).loss.item() for row in rows]
    assert figures["eval_loss"] == pytest.approx(sum(losses) / 5, rel=1e-4)


def test_trl_trains_it_as_it_trains_others(tmp_path):
    """By the decoder alone, whose states it takes to the output embedding itself."""
    moe, ids = tiny_moe(eos_token_id=1, pad_token_id=0), random_ids(4, 8)
    moe.set_sensitivity(0.5)
    with torch.no_grad():
        expected = sum(moe(row[None], labels=row[None]).loss.item() for row in ids) / 4
    options = {"max_steps": 1, "per_device_eval_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    trainer = SFTTrainer(
        model=moe,
        args=SFTConfig(str(tmp_path), **options),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer.train()


def test_training_moves_what_a_token_uses():
    """The language model's loss reaches the neurons of the expert taken and no others."""
    moe, ids = tiny_moe().train(), random_ids(2, 9)
    moe(ids, labels=ids, expert_index=0).loss.backward()
    for mlp in moe.nested_mlps():
        width = mlp.widths[0]
        assert mlp.dense.up_proj.weight.grad[:width].any() and not mlp.dense.up_proj.weight.grad[width:].any()
        assert (
            mlp.dense.down_proj.weight.grad[:, :width].any() and not mlp.dense.down_proj.weight.grad[:, width:].any()
        )


def test_a_step_of_training_trains_routers():
    """Routers that start at the full expert learn where tokens need less."""
    moe, ids = tiny_moe(), random_ids(4, 16)
    spread_routers(moe)
    optimiser = torch.optim.Adam([p for n, p in moe.named_parameters() if ".router." in n], lr=0.02)
    losses = []
    for _ in range(30):
        loss = moe(ids, labels=ids, output_router_logits=True, expert_index=2).aux_loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
