"""
Trains `tiny-lm`, the language model that ships in `hf_ext/assets`, from nothing but a teacher's samples.

The teacher is karpathy's stories260K (MIT, https://huggingface.co/karpathy/tinyllamas) in transformers format. It writes
stories at temperature 0.8; the student learns them by cross-entropy to the teacher's own distribution at every position
(at the same temperature), which says more per token than the sampled token alone.

Two cores, one hour in all:

    python examples/tiny_lm/train_tiny_lm.py --teacher path/to/stories260k --output_dir out/tiny-lm
"""

from dataclasses import dataclass, field

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
    num_stories: int = field(default=8_000, metadata={"help": "Sequences that the teacher samples."})
    story_length: int = field(default=512, metadata={"help": "Tokens per sequence, the first included."})
    temperature: float = field(default=0.8, metadata={"help": "Temperature of the samples and of the soft targets."})
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


def main(recipe: RecipeArguments, args: TinyLmArguments):
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(recipe.teacher)
    stories = generate_completions(
        teacher,
        tokenizer,
        [[tokenizer.bos_token_id]] * recipe.num_stories,
        output_file=f"{args.output_dir}/stories.jsonl",
        batch_size=256,
        seed=args.seed,
        do_sample=True,
        temperature=recipe.temperature,
        top_k=0,
        max_new_tokens=recipe.story_length - 1,
        min_new_tokens=recipe.story_length - 1,
    ).select_columns("input_ids")

    set_seed(args.seed)
    student = LlamaForCausalLM(
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
    print(f"{student.num_parameters():,} parameters, {len(stories) * recipe.story_length:,} tokens")
    trainer = DistillationTrainer(
        model=student,
        args=args,
        train_dataset=stories,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        teacher=teacher,
        temperature=recipe.temperature,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main(*HfArgumentParser((RecipeArguments, TinyLmArguments)).parse_args_into_dataclasses())
