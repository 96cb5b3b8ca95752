"""What the trainer refuses before any work is done, by name and with the way out."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trl import SFTConfig

from hf_ext import GatedLoraConfig, MtpConfig, MtpTrainer
from mtp.training.setting import (
    adapter_of,
    gated,
    settings,
    texts,
    tiny_lm,
    tiny_tokenizer,
    tiny_trainer,
)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"packing": True}, "`packing`"),
        ({"padding_free": True}, "`padding_free`"),
        ({"eval_packing": True}, "`packing`"),
        ({"loss_type": "dft"}, "`loss_type`"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
        ({"use_liger_kernel": True}, "`use_liger_kernel`"),
        ({"base_loss_weight": -1.0}, "`base_loss_weight`"),
        ({"sampler_loss_weight": -0.1}, "`sampler_loss_weight`"),
        ({"consistency_loss_weight": -1.0}, "`consistency_loss_weight`"),
        ({"soft_target_weight": 1.5}, "`soft_target_weight`"),
        ({"soft_target_weight": -0.5}, "`soft_target_weight`"),
        ({"anchors_per_sequence": 0}, "`anchors_per_sequence`"),
        ({"anchors_per_chunk": 0}, "`anchors_per_chunk`"),
        ({"eval_decoding_prompts": -1}, "`eval_decoding_prompts`"),
        ({"eval_decoding_tokens": 0}, "`eval_decoding_tokens`"),
        ({"eval_prompt_length": 0}, "`eval_prompt_length`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, named):
    """When they are made, by name."""
    with pytest.raises(ValueError, match=named):
        settings(tmp_path, **changes)


def test_another_peft_method_is_refused(tmp_path):
    """As a configuration, or on the model already: an ordinary LoRA has no masks to train."""
    with pytest.raises(TypeError, match=r"`peft_config`.*GatedLoraConfig.*LoraConfig"):
        tiny_trainer(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="LoraModel"):
        tiny_trainer(tmp_path, model=get_peft_model(tiny_lm(), LoraConfig(task_type="CAUSAL_LM")))


def test_an_adapter_for_inference_is_refused(tmp_path):
    """With how to load it for training, and so loaded it trains."""
    get_peft_model(tiny_lm(), gated()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        tiny_trainer(tmp_path, model=PeftModel.from_pretrained(tiny_lm(), tmp_path / "adapter"))
    model = PeftModel.from_pretrained(tiny_lm(), tmp_path / "adapter", is_trainable=True)
    trainer = tiny_trainer(tmp_path, model=model)
    before = adapter_of(trainer)
    trainer.train()
    assert all(not torch.equal(weight, before[name]) for name, weight in adapter_of(trainer).items())


def test_a_model_that_carries_an_adapter_unasked_is_refused(tmp_path):
    """Loaded by transformers or left by another trainer, it would be replaced in silence; unloaded, the model is free."""
    model = tiny_lm()
    model.add_adapter(gated())
    with pytest.raises(TypeError, match="PeftModel"):
        tiny_trainer(tmp_path, model=model, peft_config=gated())
    model = tiny_lm()
    trainer = tiny_trainer(tmp_path, model=model)
    with pytest.raises(TypeError, match="unload"):
        tiny_trainer(tmp_path, model=model, peft_config=gated())
    expected = adapter_of(trainer)
    again = tiny_trainer(tmp_path, model=trainer.model.unload(), peft_config=gated())
    assert adapter_of(again).keys() == expected.keys()


def test_only_the_active_adapter_is_trained(tmp_path):
    """Of several on one model, with its own number of masks."""
    model = get_peft_model(tiny_lm(), gated())
    model.add_adapter("other", gated(num_masks=2))
    model.set_adapter("other")
    trainer = tiny_trainer(tmp_path, model=model)
    assert trainer.num_masks == 2
    before = adapter_of(trainer)
    trainer.train()
    for name, weight in adapter_of(trainer).items():
        assert torch.equal(weight, before[name]) == ("default" in name.split(".")), name


def test_an_adapter_is_made_without_a_configuration(tmp_path):
    """One with default settings."""
    trainer = MtpTrainer(
        model=tiny_lm(), args=settings(tmp_path), train_dataset=texts(), processing_class=tiny_tokenizer()
    )
    trainer.train()
    assert trainer.num_masks == GatedLoraConfig().num_masks


def test_other_arguments_are_refused(tmp_path):
    """Those of SFT have no weights of masks in them."""
    with pytest.raises(TypeError, match=r"`args`.*MtpConfig.*SFTConfig"):
        MtpTrainer(
            model=tiny_lm(),
            args=SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True),
            train_dataset=texts(),
            processing_class=tiny_tokenizer(),
        )


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"])
def test_functions_that_would_never_be_called_are_refused(tmp_path, name):
    """Masks have no logits for them; the message says what to do instead."""

    def score(*args):
        raise AssertionError

    arguments = {"args": settings(tmp_path), "train_dataset": texts(), "processing_class": tiny_tokenizer()}
    with pytest.raises(ValueError, match=f"`{name}=score` would never be called.*Instead, "):
        MtpTrainer(model=tiny_lm(), **arguments, **{name: score})
    MtpTrainer(model=tiny_lm(), **arguments, **{name: None})


def test_defaults_are_the_papers():
    """Weights of 1, no soft targets, its learning rate and schedule."""
    config = MtpConfig(output_dir="unused", report_to="none", bf16=False, use_cpu=True)
    assert (config.base_loss_weight, config.sampler_loss_weight, config.consistency_loss_weight) == (1, 1, 1)
    assert (config.soft_target_weight, config.learning_rate) == (0, 2e-4)
    assert config.lr_scheduler_type == "constant_with_warmup"


def test_a_run_uses_nothing_deprecated(tmp_path):
    """With evaluation and saving; what PEFT does by itself is left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = tiny_trainer(
            tmp_path, max_steps=2, eval_dataset=texts(2), eval_strategy="steps", eval_steps=1, save_strategy="steps"
        )
        trainer.train()
        trainer.save_model()
    deprecations = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, deprecations)]
    assert [message for message in messages if "is_gradient_checkpointing" not in message] == []
