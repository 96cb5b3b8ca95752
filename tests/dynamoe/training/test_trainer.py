"""The trainer of nested experts: what moves, what a step is made of, what is logged and what is refused."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig

from dynamoe.models import WIDTHS, spread_routers, tiny_model
from dynamoe.training.setting import logged, nested, settings, texts, tiny_tokenizer, tiny_trainer, weights_of
from hf_ext import DynaMoeTrainer
from versions import CHECKPOINTING


FIGURES = ("loss", "lm_loss", "router_loss", "active_fraction", "router_accuracy")


def assert_same_run(found: DynaMoeTrainer, expected: DynaMoeTrainer, **tolerance: float) -> None:
    """The same figures step by step, and the same weights behind them."""
    for name in FIGURES:
        assert logged(expected, name)
        torch.testing.assert_close(
            torch.tensor(logged(found, name)), torch.tensor(logged(expected, name)), rtol=1e-4, atol=1e-5, msg=name
        )
    torch.testing.assert_close(weights_of(found), weights_of(expected), **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


def moved_by(trainer: DynaMoeTrainer) -> set[str]:
    before = weights_of(trainer)
    trainer.train()
    return {name for name, weight in weights_of(trainer).items() if not torch.equal(weight, before[name])}


# What moves


def test_routers_alone_move_first(tmp_path):
    """In the first stage the model stays bit-equal, weight decay included, and every router moves."""
    trainer = tiny_trainer(tmp_path, router_steps=4, weight_decay=0.1)
    moved = moved_by(trainer)
    assert moved == {name for name, _ in trainer.model.named_parameters() if ".router." in name}


def test_everything_moves_then(tmp_path):
    """Behind the first stage all weights are trained."""
    trainer = tiny_trainer(tmp_path, router_steps=1, label_forcing=1.0)
    assert moved_by(trainer) == {name for name, _ in trainer.model.named_parameters()}


def test_lora_and_routers_alone(tmp_path):
    """With a LoRA configuration that keeps the routers, nothing else moves."""
    config = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], modules_to_save=["router"])
    trainer = tiny_trainer(tmp_path, peft_config=config, label_forcing=1.0)
    moved = moved_by(trainer)
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("router" in name for name in moved) and any("lora_B" in name for name in moved)


def test_routers_have_a_rate_of_their_own(tmp_path):
    """At a rate of zero for everything else, only routers move."""
    trainer = tiny_trainer(tmp_path, learning_rate=0.0, label_forcing=1.0)
    assert moved_by(trainer) == {name for name, _ in trainer.model.named_parameters() if ".router." in name}


def test_the_teacher_stays(tmp_path):
    """By default a copy of the dense model as it was, which training doesn't touch."""
    model = nested()
    ids = torch.tensor([texts(1)["input_ids"][0]])
    before = model(ids, sensitivity=1.0).logits.detach()
    trainer = tiny_trainer(tmp_path, model=model, distillation_weight=1.0)
    trainer.train()
    with torch.no_grad():
        torch.testing.assert_close(trainer.teacher(ids).logits, before, rtol=0, atol=0)
        assert not torch.allclose(model(ids, sensitivity=1.0).logits, before, atol=1e-3)


# What a step is made of


@pytest.mark.parametrize("straight_through", [False, True])
def test_micro_batches_don_t_matter(tmp_path, straight_through):
    """Four rows at once, or two and two: rows of different lengths, so that neither labels nor tokens are alike."""
    options = {"distillation_weight": 0.5, "adam_epsilon": 1e-4, "straight_through": straight_through}
    whole = tiny_trainer(tmp_path / "a", **options)
    parts = tiny_trainer(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    whole.train()
    parts.train()
    assert_same_run(parts, whole)


@pytest.mark.parametrize("straight_through", [False, True])
def test_resumed_training_is_the_same(tmp_path, straight_through):
    """Interrupted in the second stage, to the bit."""
    options = {"router_steps": 1, "save_strategy": "steps", "save_steps": 2, "distillation_weight": 0.5}
    options["straight_through"] = straight_through
    whole = tiny_trainer(tmp_path, **options)
    whole.train()
    again = tiny_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(weights_of(again), weights_of(whole), rtol=0, atol=0)


@pytest.mark.parametrize("straight_through", [False, True])
def test_checkpointed_activations_change_nothing(tmp_path, straight_through):
    """Layers that run again in the backward pass route as they did."""
    plain = tiny_trainer(tmp_path / "a", straight_through=straight_through)
    checkpointed = tiny_trainer(tmp_path / "b", **{CHECKPOINTING: True}, straight_through=straight_through)
    plain.train()
    checkpointed.train()
    assert_same_run(checkpointed, plain)


def test_labels_decide_at_first(tmp_path):
    """With every token forced, fresh routers that ask for the full expert have no say in the model's loss."""
    losses = []
    for forced in (0.0, 1.0):
        trainer = tiny_trainer(
            tmp_path, label_forcing=forced, label_forcing_ratio=0.0, max_steps=1, min_sensitivity=0.3, sensitivity=0.3
        )
        trainer.train()
        losses.append(logged(trainer, "lm_loss")[0])
    dense = tiny_trainer(tmp_path, sensitivity=1.0, max_steps=1)
    dense.train()
    assert losses[0] == pytest.approx(logged(dense, "lm_loss")[0], rel=1e-5)
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)


def test_routers_learn(tmp_path):
    """Trained alone on the dense model, routers come from the full expert to as much as labels ask for."""
    trainer = tiny_trainer(
        tmp_path, train_dataset=texts(64), max_steps=60, router_steps=60, router_learning_rate=3e-2, sensitivity=0.7
    )
    trainer.train()
    chosen, wanted, loss = (logged(trainer, name) for name in ("active_fraction", "label_fraction", "router_loss"))
    assert chosen[0] == 1 and wanted[0] < 0.9
    assert sum(chosen[-10:]) == pytest.approx(sum(wanted[-10:]), rel=0.15)
    assert sum(loss[-5:]) < 0.6 * sum(loss[:5])


def test_routers_on_the_straight_way_keep_to_the_budget(tmp_path):
    """They learn from the model's loss, which alone would send every token through everything."""
    options = {"train_dataset": texts(64), "max_steps": 60, "router_learning_rate": 3e-2, "sensitivity": 0.5}
    shares = {}
    for weight in (0.0, 50.0):
        trainer = tiny_trainer(tmp_path, straight_through=True, budget_weight=weight, label_forcing=0.0, **options)
        trainer.train()
        assert len(logged(trainer, "budget_loss")) == 60
        shares[weight] = [sum(logged(trainer, name)[-10:]) for name in ("active_fraction", "label_fraction")]
    assert shares[50.0][0] == pytest.approx(shares[50.0][1], rel=0.1)
    assert shares[0.0][0] > 1.15 * shares[0.0][1]


def test_routers_keep_to_a_budget_that_is_given(tmp_path):
    """Whatever the labels of the sensitivity would use."""
    options = {"train_dataset": texts(64), "max_steps": 60, "router_learning_rate": 3e-2, "sensitivity": 0.5}
    for share in (0.4, 0.8):
        trainer = tiny_trainer(tmp_path, straight_through=True, active_fraction=share, label_forcing=0.0, **options)
        trainer.train()
        assert sum(logged(trainer, "active_fraction")[-10:]) / 10 == pytest.approx(share, rel=0.1)


def test_the_straight_way_begins_behind_the_routers_own_stage(tmp_path):
    """Which learns the measured nearness, on the dense model."""
    trainer = tiny_trainer(tmp_path, router_steps=2, straight_through=True)
    trainer.train()
    assert ["budget_loss" in entry for entry in trainer.state.log_history[:4]] == [False, False, True, True]


def test_a_classifier_learns_the_labels_of_its_sensitivity(tmp_path):
    """Which training writes into the configuration, and the decoder alone serves too."""
    trainer = tiny_trainer(tmp_path, model=nested("classifier"), sensitivity=0.6)
    trainer.train()
    model = trainer.routed.eval()
    assert model.config.sensitivity == 0.6
    assert logged(trainer, "router_loss")
    spread_routers(model)
    ids = torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        alone = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        assert torch.equal(alone, model(ids).logits) and not torch.equal(alone, model(ids, sensitivity=1.0).logits)


# What is saved and logged


def test_what_is_saved_is_what_was_trained(tmp_path):
    """Loaded by its folder alone: the same logits at any sensitivity."""
    trainer = tiny_trainer(tmp_path, label_forcing=1.0)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([texts(1)["input_ids"][0]])
    trained = trainer.model.eval()
    with torch.no_grad():
        for sensitivity in (0.4, 1.0):
            expected = trained(ids, sensitivity=sensitivity).logits
            torch.testing.assert_close(loaded(ids, sensitivity=sensitivity).logits, expected)


def test_an_evaluation_does_not_depend_on_its_batches(tmp_path):
    """Losses and fractions are averages over tokens, for each sensitivity, and the counts are of all tokens."""
    rows = texts(7, seed=9)
    found = []
    for batch_size in (1, 4):
        trainer = tiny_trainer(
            tmp_path, eval_dataset=rows, per_device_eval_batch_size=batch_size, eval_sensitivities=[0.5, 1.0]
        )
        found.append((trainer.evaluate(), trainer.confusion))
    for name in (
        "eval_loss",
        "eval_0.5_lm_loss",
        "eval_1_lm_loss",
        "eval_0.5_active_fraction",
        "eval_0.5_router_loss",
    ):
        assert found[0][0][name] == pytest.approx(found[1][0][name], rel=1e-5)
    num_tokens = sum(len(ids) for ids in rows["input_ids"])
    for confusion in (found[0][1], found[1][1]):
        assert confusion[0.5].sum((1, 2)).tolist() == [num_tokens] * 2
    assert torch.equal(found[0][1][0.5], found[1][1][0.5])


def test_figures_of_each_layer_are_logged_on_request(tmp_path):
    """Their means over layers are the figures of all, and shares of experts are what the active fraction is made of."""
    trainer = tiny_trainer(tmp_path, log_layers=True, eval_dataset=texts(3, seed=9), eval_sensitivities=[0.5, 1.0])
    trainer.train()
    plain = tiny_trainer(tmp_path, eval_dataset=texts(3, seed=9), eval_sensitivities=[0.5, 1.0])
    assert not any("layer_" in name for name in plain.evaluate())
    widths = torch.tensor(WIDTHS) / WIDTHS[-1]
    for figures, prefix in ((trainer.state.log_history[0], ""), (trainer.evaluate(), "eval_0.5_")):
        for name in ("active_fraction", "router_accuracy"):
            layers = [figures[f"{prefix}layer_{layer}_{name}"] for layer in range(2)]
            assert sum(layers) / 2 == pytest.approx(figures[prefix + name])
        for layer in range(2):
            shares = torch.tensor([figures[f"{prefix}layer_{layer}_expert_{expert}"] for expert in range(3)])
            assert shares.sum().item() == pytest.approx(1)
            assert (shares * widths).sum().item() == pytest.approx(figures[f"{prefix}layer_{layer}_active_fraction"])


# What is refused


def test_wrong_arguments_are_refused(tmp_path):
    """Before any work is done, by name."""
    with pytest.raises(
        TypeError, match=r"`model` must be a DynaMoeForCausalLM, got LlamaForCausalLM.*convert_to_dynamoe"
    ):
        tiny_trainer(tmp_path, model=tiny_model())
    with pytest.raises(TypeError, match="`args` must be a DynaMoeTrainingConfig, got SFTConfig"):
        DynaMoeTrainer(model=nested(), args=SFTConfig(str(tmp_path), bf16=False, report_to="none"))
    with pytest.raises(ValueError, match="`sensitivity` is needed"):
        tiny_trainer(tmp_path, model=nested("classifier"))
    with pytest.raises(ValueError, match=r"`router_steps`=3 .* `detach_router_input=False`"):
        model = nested()
        model.config.detach_router_input = False
        tiny_trainer(tmp_path, model=model, router_steps=3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lm_loss_weight", -1.0),
        ("router_steps", -1),
        ("router_noise", -0.1),
        ("label_forcing", 1.5),
        ("sensitivity", 1.2),
        ("packing", True),
        ("padding_free", True),
        ("label_smoothing_factor", 0.1),
        ("loss_type", "dft"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, option, value):
    """With the name of the setting and what it was."""
    with pytest.raises(ValueError, match=f"`{option}`.*{value}"):
        settings(tmp_path, **{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("router_learning_rate", -1e-3),
        ("router_learning_rate", float("nan")),
        ("lm_loss_weight", float("nan")),
        ("budget_weight", float("inf")),
        ("min_sensitivity", -0.1),
        ("eval_sensitivities", []),
        ("eval_sensitivities", 0.5),
        ("eval_sensitivities", [0.5, 0.5]),
        ("eval_sensitivities", [0.5, 1.5]),
    ],
)
def test_numbers_that_would_pass_unseen_are_refused(tmp_path, option, value):
    """An optimizer asks no rate of a group that is added to it, and NaN is less than nothing."""
    with pytest.raises(ValueError, match=rf"`{option}` must.*got"):
        settings(tmp_path, **{option: value})


def test_budgets_that_nothing_keeps_are_refused(tmp_path):
    """Shares that are none, no sensitivity to use it at, routers that learn otherwise, and less than the smallest expert."""
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"`active_fraction`={share} must be above 0"):
            settings(tmp_path, active_fraction=share, sensitivity=0.5)
    for sensitivity in (None, 0.0, 1.0):
        with pytest.raises(
            ValueError, match=rf"`active_fraction`=0\.5 is a budget at one `sensitivity`.*got {sensitivity}"
        ):
            settings(tmp_path, active_fraction=0.5, sensitivity=sensitivity)
    with pytest.raises(ValueError, match=r"needs `straight_through=True`.*got False"):
        settings(tmp_path, active_fraction=0.5, sensitivity=0.5, straight_through=False)
    with pytest.raises(ValueError, match=r"at least the share of the smallest expert.*ordinal routers"):
        tiny_trainer(tmp_path, active_fraction=0.05, sensitivity=0.5, straight_through=True)
    with pytest.raises(ValueError, match=r"`active_fraction`=0\.5 is for ordinal routers.*classifier"):
        tiny_trainer(tmp_path, model=nested("classifier"), active_fraction=0.5, sensitivity=0.5, straight_through=True)


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"])
def test_functions_that_would_never_be_called_are_refused(tmp_path, name):
    def own_function(*_):
        raise AssertionError

    with pytest.raises(ValueError, match=rf"`{name}=own_function` would never be called.*Instead"):
        DynaMoeTrainer(model=nested(), args=settings(tmp_path), train_dataset=texts(), **{name: own_function})


def test_a_teacher_that_can_t_teach_is_refused(tmp_path):
    """No model, one that would run for nothing, one of other tokens."""
    with pytest.raises(TypeError, match=r"`teacher_model` must be a model, got 'dense'.*load it first"):
        tiny_trainer(tmp_path, teacher_model="dense", distillation_weight=1.0)
    with pytest.raises(ValueError, match=r"`teacher_model` is given, but with `distillation_weight=0\.0`"):
        tiny_trainer(tmp_path, teacher_model=tiny_model())
    with pytest.raises(ValueError, match="`teacher_model` has a vocabulary of 50 and the model one of 40"):
        tiny_trainer(tmp_path, teacher_model=tiny_model(vocab_size=50), distillation_weight=1.0)


def test_routers_that_are_frozen_can_t_be_trained_alone(tmp_path):
    """But a model with routers that are trained may be adapted around them."""
    config = LoraConfig(r=2, target_modules=["up_proj"])
    with pytest.raises(ValueError, match=r"`router_steps`=2 .*frozen.*`modules_to_save=\[\"router\"\]`"):
        tiny_trainer(tmp_path, peft_config=config, router_steps=2)
    moved = moved_by(tiny_trainer(tmp_path, peft_config=config, label_forcing=1.0))
    assert moved and all("lora_" in name for name in moved)


def test_a_classifier_without_a_sensitivity_of_its_own_is_left_as_it_was(tmp_path):
    """At full sensitivity every label is the whole MLP."""
    model = nested("classifier")
    with pytest.raises(ValueError, match=r"`sensitivity` is needed.*below 1, got 1\.0"):
        tiny_trainer(tmp_path, model=model, sensitivity=1.0)
    with pytest.raises(ValueError, match="`teacher_model`"):
        tiny_trainer(tmp_path, model=model, sensitivity=0.6, teacher_model=tiny_model())
    assert model.config.sensitivity == 1


def test_an_evaluation_without_labels_is_refused(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[2], [3]]})
    with pytest.raises(ValueError, match=r"`eval_dataset` has no token to predict.*longer rows"):
        tiny_trainer(tmp_path, eval_dataset=rows).evaluate()


def test_an_optimizer_that_is_given_keeps_its_groups_and_rates(tmp_path):
    model = nested()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    trainer = DynaMoeTrainer(
        model=model,
        args=settings(tmp_path, max_steps=1, lr_scheduler_type="constant"),
        train_dataset=texts(),
        processing_class=tiny_tokenizer(),
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]


def test_a_model_named_by_its_folder_is_trained_in_full_precision(tmp_path):
    """As SFT does, whatever it was saved in, unless another format is asked for."""
    nested().to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    folder = str(tmp_path / "saved")
    assert tiny_trainer(tmp_path, model=folder).model.dtype == torch.float32
    asked = tiny_trainer(tmp_path, model=tmp_path / "saved", model_init_kwargs={"dtype": "bfloat16"})
    assert asked.model.dtype == torch.bfloat16


def test_a_model_named_by_its_folder_is_quantised_where_that_is_asked_for(tmp_path):
    """As SFT does; its routers are not, and are trained."""
    nested().save_pretrained(tmp_path / "saved")
    trainer = DynaMoeTrainer(
        model=str(tmp_path / "saved"),
        args=settings(tmp_path, max_steps=1),
        train_dataset=texts(),
        processing_class=tiny_tokenizer(),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        peft_config=LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["router"]),
    )
    assert trainer.routed.is_loaded_in_4bit
    assert any(".router." in name for name in moved_by(trainer))
