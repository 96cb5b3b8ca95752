"""
Trains a multi-token adapter for a small language model on the model's own text, from nothing but the model.

The model writes openings at temperature 1 and continues each greedily; the adapter learns to guess those continuations
several tokens ahead. For karpathy's stories260K (MIT, https://huggingface.co/karpathy/tinyllamas) in transformers format
two cores take a quarter of an hour, text included:

    python examples/train_mtp_on_policy.py --model path/to/stories260k --output_dir out/stories260k-mtp

It is an ordinary training script: `accelerate launch` spreads it over processes, every training argument can be given, and
called again with `--resume_from_checkpoint true` it goes on where it stopped. For a large model give prompts of your own instead
of openings (`--prompts file.jsonl`, a `prompt` in each line), the paper's learning rate (`--learning_rate 2e-4`) and
`--bf16 true`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_ext import GatedLoraConfig, MtpConfig, MtpTrainer, generate_completions


@dataclass
class RecipeArguments:
    model: str = field(metadata={"help": "Folder or Hub id of the base model."})
    prompts: str | None = field(
        default=None, metadata={"help": "JSON lines with a `prompt` each, instead of openings."}
    )
    num_texts: int = field(default=8_192, metadata={"help": "Openings to write where no prompts are given."})
    opening_length: int = field(default=64, metadata={"help": "Tokens of the longest openings."})
    completion_length: int = field(default=192, metadata={"help": "Tokens of the greedy continuations."})
    generation_batch_size: int = field(default=256, metadata={"help": "Texts that are written at a time."})
    num_masks: int = field(default=8, metadata={"help": "Masks, the most tokens guessed ahead."})
    rank: int = field(default=16, metadata={"help": "Rank of the gated LoRA."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that have one; by default all linear ones. A tiny model decodes faster with fewer."},
    )


@dataclass
class StoryMtpArguments(MtpConfig):
    output_dir: str = field(default="out/mtp-adapter")
    max_steps: int = field(default=4_500)
    per_device_train_batch_size: int = field(default=8)
    anchors_per_sequence: int = field(default=16)
    # A tiny model takes and needs a rate far above the paper's 2e-4: every step counts, and nothing can be forgotten.
    learning_rate: float = field(default=8e-3)
    lr_scheduler_type: str = field(default="cosine")
    consistency_loss_weight: float = field(default=0.1)
    warmup_steps: float = field(default=100)
    bf16: bool = field(default=False)
    logging_steps: float = field(default=100)
    eval_strategy: str = field(default="steps")
    eval_steps: float = field(default=1_000)
    save_steps: float = field(default=1_000)
    save_total_limit: int | None = field(default=1)
    report_to: str = field(default="none")


def write_openings(model, tokenizer, recipe: RecipeArguments, folder: Path, seed: int) -> list[list[int]]:
    """Openings of mixed length: half of them the full length, the others of every length from 4 tokens on."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    texts = generate_completions(
        model,
        tokenizer,
        [[start]] * recipe.num_texts,
        output_file=folder / "openings.jsonl",
        batch_size=recipe.generation_batch_size,
        seed=seed,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=recipe.opening_length,
    )["input_ids"]
    lengths = torch.randint(4, recipe.opening_length + 1, (len(texts),), generator=torch.Generator().manual_seed(seed))
    return [
        text if i % 2 else text[:length] for i, (text, length) in enumerate(zip(texts, lengths.tolist(), strict=True))
    ]


def main(recipe: RecipeArguments, args: StoryMtpArguments):
    model = AutoModelForCausalLM.from_pretrained(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    folder = Path(args.output_dir)
    model.to(args.device)
    with args.main_process_first(desc="writing text"):
        if recipe.prompts is None:
            prompts = write_openings(model, tokenizer, recipe, folder, args.seed)
        else:
            prompts = load_dataset("json", data_files=recipe.prompts, split="train")["prompt"]
        texts = generate_completions(
            model,
            tokenizer,
            prompts,
            output_file=folder / "completions.jsonl",
            batch_size=recipe.generation_batch_size,
            max_new_tokens=recipe.completion_length,
        )
    texts = texts.train_test_split(test_size=min(64, len(texts) // 10), seed=args.seed)

    trainer = MtpTrainer(
        model=model,
        args=args,
        train_dataset=texts["train"],
        eval_dataset=texts["test"],
        processing_class=tokenizer,
        peft_config=GatedLoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            num_masks=recipe.num_masks,
            **({} if recipe.target_modules is None else {"target_modules": recipe.target_modules}),
        ),
    )
    checkpoint = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if checkpoint in ("true", "True") else checkpoint)
    trainer.save_model()
    print({name: value for name, value in trainer.evaluate().items() if "tokens_per_step" in name})


if __name__ == "__main__":
    main(*HfArgumentParser((RecipeArguments, StoryMtpArguments)).parse_args_into_dataclasses())
    # A process that ends before the others may be aborted in its connections to them.
    PartialState().destroy_process_group()
