"""What the trainer logs, and what its evaluations decode and report."""

import pytest
import torch
from datasets import Dataset

from mtp.training.setting import (
    NUM_MASKS,
    PRETOKENISED,
    gated,
    logged,
    texts,
    tiny_lm,
    tiny_trainer,
)
from versions import CHECKPOINTING


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_evaluation_decodes_and_reports_every_slot(tmp_path, checkpointing):
    """During training: losses, the agreement of each slot, expected and real tokens per step."""
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=texts(4, seed=9),
        eval_strategy="steps",
        eval_steps=2,
        **{CHECKPOINTING: checkpointing},
    )
    trainer.train()
    reports = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(reports) == 2
    for report in reports:
        for slot in range(1, NUM_MASKS + 1):
            assert 0 <= report[f"eval_agreement_{slot}"] <= 1
        assert f"eval_agreement_{NUM_MASKS + 1}" not in report
        assert 1 <= report["eval_expected_tokens_per_step"] <= NUM_MASKS + 1
        assert 1 <= report["eval_decoded_tokens_per_step"] <= NUM_MASKS + 1
        assert {"eval_base_loss", "eval_sampler_loss", "eval_consistency_loss"} <= set(report)


def test_training_logs_losses_and_agreement(tmp_path):
    """At every logging step, also where that is not every step."""
    trainer = tiny_trainer(tmp_path, logging_steps=2)
    trainer.train()
    names = {"loss", "base_loss", "sampler_loss", "consistency_loss", "expected_tokens_per_step", "num_tokens"}
    names |= {f"agreement_{slot}" for slot in range(1, NUM_MASKS + 1)}
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    assert all(names <= set(entry) for entry in entries)
    assert entries[1]["num_tokens"] > entries[0]["num_tokens"] > 0


def test_several_evaluation_sets_are_reported_side_by_side(tmp_path):
    """Each under its name, decoding included; one of them with prompts of its own."""
    sets = {"plain": texts(3, seed=9), "prompted": PRETOKENISED}
    trainer = tiny_trainer(tmp_path, train_dataset=PRETOKENISED, eval_dataset=sets)
    metrics = trainer.evaluate()
    for name in sets:
        assert torch.tensor(metrics[f"eval_{name}_loss"]).isfinite()
        assert metrics[f"eval_{name}_decoded_tokens_per_step"] >= 1
        assert f"eval_{name}_agreement_1" in metrics
        assert any(f"eval_{name}_decoded_tokens_per_step" in entry for entry in trainer.state.log_history)


def test_an_evaluation_ends_where_the_models_positions_do(tmp_path):
    """Fewer tokens are decoded where the table of positions ends before, and none behind a prompt that fills it."""
    for prompt_length, measured in ((5, True), (16, False)):
        trainer = tiny_trainer(
            tmp_path,
            model=tiny_lm("gpt2", n_positions=16),
            eval_dataset=texts(3, shortest=16, longest=16),
            eval_prompt_length=prompt_length,
            eval_decoding_tokens=100,
        )
        assert ("eval_decoded_tokens_per_step" in trainer.evaluate()) == measured


def test_rows_that_are_prepared_already_are_decoded(tmp_path):
    """With `skip_prepare_dataset` and no labels of their own."""
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = tiny_trainer(tmp_path, eval_dataset=texts(3), **prepared)
    assert trainer.evaluate()["eval_decoded_tokens_per_step"] >= 1


def test_the_best_checkpoint_is_that_of_the_most_tokens_per_step(tmp_path):
    """Figures of an evaluation serve to choose a checkpoint."""
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=texts(3),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_decoded_tokens_per_step",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_metric == max(logged(trainer, "eval_decoded_tokens_per_step"))


def test_figures_do_not_depend_on_the_batches_of_an_evaluation(tmp_path):
    """Averages are over masks: a last batch of one row has no more say than its masks."""
    figures = []
    for batch_size in (5, 2, 1):
        trainer = tiny_trainer(tmp_path, eval_dataset=texts(5, longest=30), per_device_eval_batch_size=batch_size)
        metrics = trainer.evaluate()
        names = [f"eval_agreement_{slot}" for slot in range(1, NUM_MASKS + 1)]
        names += ["eval_base_loss", "eval_sampler_loss", "eval_consistency_loss", "eval_expected_tokens_per_step"]
        names += ["eval_loss"]
        figures.append([metrics[name] for name in names])
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)
    assert figures[2] == pytest.approx(figures[0], rel=1e-5)


def test_the_loss_of_an_evaluation_is_that_of_its_parts(tmp_path):
    """Weighted as in training, and the same in the log."""
    weights = {"base_loss_weight": 0.5, "sampler_loss_weight": 2.0, "consistency_loss_weight": 0.0}
    trainer = tiny_trainer(tmp_path, eval_dataset=texts(3), per_device_eval_batch_size=2, **weights)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(0.5 * metrics["eval_base_loss"] + 2 * metrics["eval_sampler_loss"])
    assert logged(trainer, "eval_loss") == [metrics["eval_loss"]]


def test_decoding_at_evaluation_can_be_switched_off(tmp_path):
    """With no prompts to decode there is no such figure."""
    trainer = tiny_trainer(tmp_path, eval_dataset=texts(2), eval_decoding_prompts=0)
    assert "eval_decoded_tokens_per_step" not in trainer.evaluate()


def test_evaluation_is_the_same_twice(tmp_path):
    """Its anchors are not drawn anew, so figures of different steps compare."""
    trainer = tiny_trainer(tmp_path, eval_dataset=texts(4), peft_config=gated(lora_dropout=0.5))
    clock = ("runtime", "per_second", "num_tokens")
    first, second = (
        {name: value for name, value in trainer.evaluate().items() if not name.endswith(clock)} for _ in range(2)
    )
    assert first == second


def test_a_perfect_sampler_is_reported_as_such(tmp_path):
    """A base model that always says one token, which the sampler says too: all guesses right, the most tokens per step."""
    model = tiny_lm()
    with torch.no_grad():
        # Every state is (1, 0, 0, ...) and its unembedding says token 7.
        model.model.norm.weight.zero_()
        model.model.norm.register_forward_hook(lambda module, args, output: output + torch.eye(1, output.shape[-1]))
        model.lm_head.weight.zero_()
        model.lm_head.weight[7, 0] = 5.0
    rows = Dataset.from_dict({"input_ids": [[7] * 10, [7] * 12]})
    trainer = tiny_trainer(tmp_path, model=model, train_dataset=rows, eval_dataset=rows, eval_decoding_tokens=16)
    metrics = trainer.evaluate()
    assert [metrics[f"eval_agreement_{slot}"] for slot in range(1, NUM_MASKS + 1)] == [1.0] * NUM_MASKS
    assert metrics["eval_expected_tokens_per_step"] == NUM_MASKS + 1
    assert metrics["eval_decoded_tokens_per_step"] > NUM_MASKS
