"""A trainer of tiny nested models, for the tests of training."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dynamoe.models import VOCAB_SIZE, WIDTHS, tiny_model
from hf_ext import DynaMoeForCausalLM, DynaMoeTrainer, DynaMoeTrainingConfig, convert_to_dynamoe


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, the first of them for padding and end."""
    vocabulary = {f"w{index}": index for index in range(VOCAB_SIZE)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w1")


def texts(count: int = 16, shortest: int = 5, longest: int = 13, seed: int = 5) -> Dataset:
    """Random rows of different lengths, as token ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_ids": [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]}
    )


def nested(router_type: str = "ordinal", **changes: Any) -> DynaMoeForCausalLM:
    """A converted model of random weights; its routers are random too, except where a test wants them fresh."""
    return convert_to_dynamoe(
        tiny_model(eos_token_id=1, pad_token_id=0),
        expert_widths=WIDTHS,
        importance="none",
        router_hidden_size=8,
        router_type=router_type,
        **changes,
    )


def settings(folder: Path | str, **changes: Any) -> DynaMoeTrainingConfig:
    """Four steps on four rows each, every step logged, nothing saved."""
    return DynaMoeTrainingConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "router_learning_rate": 1e-2,
            "router_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "optim": "adamw_torch",
            **changes,
        }
    )


def tiny_trainer(folder: Path | str, model: Any = None, train_dataset: Any = None, **changes: Any) -> DynaMoeTrainer:
    """What goes to the trainer itself is taken out of the changes, the rest are settings."""
    own = {name: changes.pop(name) for name in ("eval_dataset", "peft_config", "teacher_model") if name in changes}
    return DynaMoeTrainer(
        model=nested() if model is None else model,
        args=settings(folder, **changes),
        train_dataset=texts() if train_dataset is None else train_dataset,
        processing_class=tiny_tokenizer(),
        **own,
    )


def logged(trainer: DynaMoeTrainer, name: str) -> list[float]:
    """A figure at every step where it was logged."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights_of(trainer: DynaMoeTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
