"""A tiny random language model, its tokenizer and a trainer on both, for the tests of training."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_ext import GatedLoraConfig, MtpConfig, MtpTrainer
from mtp.models import VOCAB_SIZE, tiny_model


NUM_MASKS = 3
SPECIAL_TOKENS = ["<pad>", "<eos>", "<user>", "<assistant>"]
PAD, EOS, USER, ASSISTANT = range(4)
WORDS = list("abcdefghijklmnop")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "<assistant> {% generation %}{{ message.content }} <eos>{% endgeneration %} "
    "{% else %}<user> {{ message.content }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
PRETOKENISED = Dataset.from_dict(
    {
        "input_ids": [[4, 5, 6, 7, 8, 9], [4, 5, 6], [9, 8, 7, 6]],
        "completion_mask": [[0, 0, 0, 1, 1, 1], [0, 1, 1], [0, 0, 0, 1]],
    }
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; a chat template that marks what the assistant says."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)}
    assert len(vocabulary) == VOCAB_SIZE
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
    )


def tiny_lm(shape: str = "llama", attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A random model that knows the tokenizer's end and padding tokens."""
    return tiny_model(shape, attention, eos_token_id=EOS, pad_token_id=PAD, **changes)


def gated(**changes: Any) -> GatedLoraConfig:
    """The adapter that the tests train."""
    return GatedLoraConfig(**{"r": 2, "lora_alpha": 4, "num_masks": NUM_MASKS, **changes})


def texts(count: int = 16, shortest: int = 5, longest: int = 13, seed: int = 5) -> Dataset:
    """Random rows of different lengths, as token ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_ids": [torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]}
    )


def settings(folder: Path | str, **changes: Any) -> MtpConfig:
    """Four steps on four rows each, every step logged, nothing saved."""
    return MtpConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "anchors_per_sequence": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "optim": "adamw_torch",
            "eval_decoding_prompts": 2,
            "eval_decoding_tokens": 6,
            "eval_prompt_length": 3,
            **changes,
        }
    )


def tiny_trainer(
    folder: Path | str,
    model: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    peft_config: Any = None,
    **changes: Any,
) -> MtpTrainer:
    """A trainer of a new adapter on a new model, unless others are given; the same weights every time."""
    return MtpTrainer(
        model=tiny_lm() if model is None else model,
        args=settings(folder, **changes),
        train_dataset=texts() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        peft_config=gated() if peft_config is None and not hasattr(model, "peft_config") else peft_config,
    )


def adapter_of(trainer: MtpTrainer) -> dict[str, torch.Tensor]:
    """Copies of the adapter's weights."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


def logged(trainer: MtpTrainer, name: str = "loss") -> list[float]:
    """A figure of every log that has it."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
