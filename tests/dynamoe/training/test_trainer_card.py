"""The card that the trainer of nested experts writes, with each checkpoint too: it must not end a training."""

import pytest

from dynamoe.training.setting import texts, tiny_trainer


def test_the_card_says_what_was_reached(tmp_path):
    """Written into the folder with the last evaluation's figures, in place of a generic one."""
    trainer = tiny_trainer(tmp_path, eval_dataset=texts(3, seed=9), eval_sensitivities=[0.5, 1.0])
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "set_sensitivity" in card and "at sensitivity 0.5" in card and "DynaMoeTrainer" in card


def test_a_resumed_run_may_evaluate_other_sensitivities(tmp_path):
    """Its first checkpoint comes before any figure of them."""
    options = {"save_strategy": "steps", "save_steps": 2, "eval_dataset": texts(3, seed=9)}
    tiny_trainer(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, eval_sensitivities=[0.5, 1.0], **options
    ).train()
    tiny_trainer(tmp_path, eval_sensitivities=[0.7, 1.0], **options).train(resume_from_checkpoint=True)
    card = (tmp_path / "README.md").read_text()
    assert (tmp_path / "checkpoint-4").is_dir()
    assert "at sensitivity 1 |" in card and "at sensitivity 0" not in card


@pytest.mark.parametrize("loss", [1e3, float("inf"), float("nan")])
def test_a_loss_without_bounds_does_not_keep_the_model_from_being_saved(tmp_path, loss):
    trainer = tiny_trainer(tmp_path, eval_sensitivities=[1.0])
    trainer.state.log_history = [{"eval_loss": loss, "eval_1_lm_loss": loss, "eval_1_active_fraction": 1.0}]
    trainer.create_model_card()
    assert "at sensitivity 1 |" in (tmp_path / "README.md").read_text()
