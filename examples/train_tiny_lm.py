"""
Trains `tiny-lm`, the language model that ships in `hf_ext/assets`, from nothing but a teacher's text.

The teacher is karpathy's stories260K (MIT, https://huggingface.co/karpathy/tinyllamas) in transformers format. Two stages:

1. The teacher writes stories at temperature 0.8, and the student learns the teacher's own distribution at every position,
   which says more per token than the sampled token alone.
2. A small model that says its most likely words for long goes round in circles. So the teacher writes again, at temperature
   0.5 and never the same eight tokens twice, and the student learns that text as it stands.

Two cores, one hour in all; each stage leaves its text and its model, and a second call goes on where the first stopped:

    python examples/train_tiny_lm.py --teacher path/to/stories260k --output_dir out/tiny-lm
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_ext import generate_completions


@dataclass
class RecipeArguments:
    teacher: str = field(metadata={"help": "Folder or Hub id of the teacher, a causal LM with its tokenizer."})
    num_stories: int = field(default=8_000, metadata={"help": "Sequences of the first stage."})
    story_length: int = field(default=512, metadata={"help": "Tokens of each, the first included."})
    temperature: float = field(default=0.8, metadata={"help": "Temperature of the first stage's text and targets."})
    num_calm_stories: int = field(default=6_144, metadata={"help": "Sequences of the second stage."})
    calm_story_length: int = field(default=256, metadata={"help": "Tokens of each, the first included."})
    calm_epochs: float = field(default=2.0, metadata={"help": "Epochs of the second stage."})
    calm_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the second stage."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the student."})
    intermediate_size: int = field(default=256, metadata={"help": "Width of the student's MLP."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Depth of the student."})


@dataclass
class TinyLmArguments(TrainingArguments):
    output_dir: str = field(default="out/tiny-lm")
    per_device_train_batch_size: int = field(default=8)
    num_train_epochs: float = field(default=4.0)
    learning_rate: float = field(default=4e-3)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=0.05)
    weight_decay: float = field(default=0.05)
    adam_beta2: float = field(default=0.99)
    logging_steps: float = field(default=50)
    save_steps: float = field(default=500)
    save_total_limit: int | None = field(default=1)
    report_to: str = field(default="none")


class DistillationTrainer(Trainer):
    def __init__(self, *args, teacher, temperature, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.temperature = temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            targets = (self.teacher(input_ids=inputs["input_ids"]).logits / self.temperature).softmax(-1)
        outputs = model(input_ids=inputs["input_ids"])
        loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten(0, 1))
        return (loss, outputs) if return_outputs else loss


def write_stories(teacher, tokenizer, path, number, length, seed, **sampling):
    return generate_completions(
        teacher,
        tokenizer,
        [[tokenizer.bos_token_id]] * number,
        output_file=path,
        batch_size=256,
        seed=seed,
        do_sample=True,
        top_k=0,
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        **sampling,
    ).select_columns("input_ids")


def new_student(recipe, teacher, tokenizer):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=teacher.config.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.hidden_size // 16,
            num_key_value_heads=recipe.hidden_size // 32,
            max_position_embeddings=teacher.config.max_position_embeddings,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=teacher.config.pad_token_id,
        )
    )


def main(recipe: RecipeArguments, args: TinyLmArguments):
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(recipe.teacher)
    folder = Path(args.output_dir)
    common = {"processing_class": tokenizer, "data_collator": default_data_collator}

    first_stage = folder / "first-stage"
    if not (first_stage / "model.safetensors").exists():
        stories = write_stories(
            teacher, tokenizer, folder / "stories.jsonl", recipe.num_stories, recipe.story_length, args.seed,
            temperature=recipe.temperature,
        )  # fmt: skip
        set_seed(args.seed)
        student = new_student(recipe, teacher, tokenizer)
        print(f"{student.num_parameters():,} parameters, {len(stories) * recipe.story_length:,} tokens")
        stage_args = replace(args, output_dir=str(first_stage))
        trainer = DistillationTrainer(
            model=student, args=stage_args, train_dataset=stories, teacher=teacher, temperature=recipe.temperature, **common
        )  # fmt: skip
        checkpoint = args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=True if checkpoint in ("true", "True") else checkpoint)
        trainer.save_model()

    stories = write_stories(
        teacher, tokenizer, folder / "calm_stories.jsonl", recipe.num_calm_stories, recipe.calm_story_length, args.seed,
        temperature=0.5, no_repeat_ngram_size=8,
    )  # fmt: skip
    stories = stories.map(lambda row: {"labels": row["input_ids"]})
    stage_args = replace(args, num_train_epochs=recipe.calm_epochs, learning_rate=recipe.calm_learning_rate)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(first_stage), args=stage_args, train_dataset=stories, **common
    )
    trainer.train()
    # The teacher ends a story by beginning another.
    trainer.model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    trainer.save_model()


if __name__ == "__main__":
    main(*HfArgumentParser((RecipeArguments, TinyLmArguments)).parse_args_into_dataclasses())
