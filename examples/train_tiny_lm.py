"""
Trains `tiny-lm`, the language model that ships in `hf_ext/assets`, from nothing but a teacher's text.

The teacher is karpathy's stories260K (MIT, https://huggingface.co/karpathy/tinyllamas) in transformers format. Three stages:

1. The teacher writes stories at temperature 0.8, and the student learns the teacher's own distribution at every position,
   which says more per token than the sampled token alone.
2. A small model that says its most likely words for long goes round in circles. So the teacher writes again, at temperature
   0.5 and never the same eight tokens twice, and the student learns that text as it stands.
3. The student writes greedily itself, and what it says twice is made less likely (unlikelihood training,
   https://huggingface.co/papers/1908.04319), in a few rounds beside more of the calm text. This is what makes its greedy
   output worth reading.

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
    unlikelihood_rounds: int = field(default=2, metadata={"help": "Rounds of the third stage."})
    texts_per_round: int = field(default=2_048, metadata={"help": "Greedy texts that the student writes in each."})
    unlikelihood_weight: float = field(default=0.5, metadata={"help": "Weight beside the cross-entropy."})
    unlikelihood_learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of the third stage."})
    repeated_length: int = field(default=8, metadata={"help": "As many tokens said twice count as a repetition."})
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


class UnlikelihoodTrainer(Trainer):
    def __init__(self, *args, weight, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        calm, greedy, repeated = inputs["input_ids"], inputs["greedy_ids"], inputs["repeated"][:, 1:]
        outputs = model(input_ids=torch.cat([calm, greedy]))
        log_probabilities = outputs.logits[:, :-1].log_softmax(-1)
        said = log_probabilities.gather(-1, torch.cat([calm, greedy])[:, 1:, None]).squeeze(-1)
        of_calm, of_greedy = said.split(len(calm))
        unlikelihood = -torch.log1p(-of_greedy.exp().clamp(max=1 - 1e-5)) * repeated
        loss = -of_calm.mean() + self.weight * unlikelihood.sum() / repeated.sum().clamp(min=1)
        return (loss, outputs) if return_outputs else loss


def is_repeated(tokens, length):
    """1 at each token that ends a run of `length` tokens said before in the same text."""
    seen, marks = set(), []
    for end in range(1, len(tokens) + 1):
        run = tuple(tokens[max(0, end - length) : end])
        marks.append(float(run in seen))
        seen.add(run)
    return marks


def unlikelihood_round(student, tokenizer, stories, recipe, args, number):
    """The student continues openings greedily and unlearns what it says twice."""
    calm = stories.shuffle(seed=args.seed + number).select(range(recipe.texts_per_round))
    openings = [row["input_ids"][: 8 + i % 32] for i, row in enumerate(calm)]
    width = recipe.calm_story_length
    texts = generate_completions(student, tokenizer, openings, batch_size=256, max_new_tokens=width - 40)["input_ids"]
    marks = [is_repeated(text, recipe.repeated_length) for text in texts]
    print(f"round {number}: {sum(map(sum, marks)) / sum(map(len, marks)):.1%} of the tokens repeat")
    calm = calm.add_column(
        "greedy_ids", [text + [tokenizer.pad_token_id or 0] * (width - len(text)) for text in texts]
    )
    return calm.add_column("repeated", [row + [0.0] * (width - len(row)) for row in marks])


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
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()

    stories = write_stories(
        teacher, tokenizer, folder / "calm_stories.jsonl", recipe.num_calm_stories, recipe.calm_story_length, args.seed,
        temperature=0.5, no_repeat_ngram_size=8,
    )  # fmt: skip
    stories = stories.map(lambda row: {"labels": row["input_ids"]})
    stage_args = replace(args, num_train_epochs=recipe.calm_epochs, learning_rate=recipe.calm_learning_rate)
    second_stage = folder / "second-stage"
    if not (second_stage / "model.safetensors").exists():
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(first_stage),
            args=replace(stage_args, output_dir=str(second_stage)),
            train_dataset=stories,
            **common,
        )
        trainer.train()
        # The teacher ends a story by beginning another.
        trainer.model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
        trainer.save_model()

    student = AutoModelForCausalLM.from_pretrained(second_stage)
    stage_args = replace(args, num_train_epochs=1, learning_rate=recipe.unlikelihood_learning_rate, save_strategy="no")
    stage_args = replace(stage_args, remove_unused_columns=False)
    # A pull on every text the student writes: at the rate of the stage before, it soon writes nothing that reads.
    for number in range(recipe.unlikelihood_rounds):
        texts = unlikelihood_round(student, tokenizer, stories, recipe, args, number)
        trainer = UnlikelihoodTrainer(
            model=student, args=stage_args, train_dataset=texts, weight=recipe.unlikelihood_weight, **common
        )
        trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*HfArgumentParser((RecipeArguments, TinyLmArguments)).parse_args_into_dataclasses())
