"""
Makes a small language model's compute follow difficulty, on the model's own text, from nothing but the model.

The model writes texts; its MLPs become nested experts; routers learn alone at first, then with the model, which stays near to
what it was. One training serves every sensitivity. For karpathy's stories260K (MIT, https://huggingface.co/karpathy/tinyllamas)
in transformers format one core takes a quarter of an hour, text included:

    python examples/train_dynamoe.py --model path/to/stories260k --output_dir out/stories260k-moe

It is an ordinary training script: `accelerate launch` spreads it over processes, every training argument can be given, and
called again with `--resume_from_checkpoint true` it goes on where it stopped. For a large model give texts of your own
(`--texts file.jsonl`, a `text` in each line), a small rate (`--learning_rate 1e-5 --router_learning_rate 1e-3`) and
`--bf16 true`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_ext import DynaMoeTrainer, DynaMoeTrainingConfig, convert_to_dynamoe, generate_completions


@dataclass
class RecipeArguments:
    model: str = field(metadata={"help": "Folder or Hub id of the dense model."})
    texts: str | None = field(default=None, metadata={"help": "JSON lines with a `text` each, instead of its own."})
    num_texts: int = field(default=8_192, metadata={"help": "Texts to write where none are given."})
    text_length: int = field(default=256, metadata={"help": "Their tokens."})
    temperature: float = field(default=0.8, metadata={"help": "What they are sampled at."})
    generation_batch_size: int = field(default=128, metadata={"help": "Texts that are written at a time."})
    num_experts: int = field(default=4, metadata={"help": "Experts, in equal steps."})
    router_hidden_size: int = field(default=64, metadata={"help": "Width of the routers' hidden layer."})
    num_calibration_texts: int = field(default=400, metadata={"help": "Texts that neurons are ordered by."})


@dataclass
class NestedTrainingArguments(DynaMoeTrainingConfig):
    output_dir: str = field(default="out/dynamoe")
    max_steps: int = field(default=1_000)
    per_device_train_batch_size: int = field(default=24)
    # A tiny model takes, and needs, far higher rates than a large one.
    learning_rate: float = field(default=3e-3)
    router_learning_rate: float = field(default=1e-2)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=20)
    adam_beta2: float = field(default=0.95)
    router_steps: int = field(default=20)
    distillation_weight: float = field(default=1.0)
    max_length: int | None = field(default=256)
    bf16: bool = field(default=False)
    logging_steps: float = field(default=50)
    save_steps: float = field(default=250)
    save_total_limit: int | None = field(default=1)
    report_to: str = field(default="none")


def own_texts(model, tokenizer, recipe: RecipeArguments, folder: Path, seed: int) -> Dataset:
    """Texts that the model writes when nothing holds it back, from its first token on."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return generate_completions(
        model,
        tokenizer,
        [[start]] * recipe.num_texts,
        output_file=folder / "texts.jsonl",
        batch_size=recipe.generation_batch_size,
        seed=seed,
        do_sample=True,
        temperature=recipe.temperature,
        top_k=0,
        max_new_tokens=recipe.text_length - 1,
    ).select_columns("input_ids")


def main(recipe: RecipeArguments, args: NestedTrainingArguments):
    dense = AutoModelForCausalLM.from_pretrained(recipe.model).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    with args.main_process_first(desc="writing text"):
        if recipe.texts is None:
            texts = own_texts(dense, tokenizer, recipe, Path(args.output_dir), args.seed)
        else:
            texts = load_dataset("json", data_files=recipe.texts, split="train")
    texts = texts.train_test_split(test_size=min(128, max(1, len(texts) // 10)), seed=args.seed)
    moe = convert_to_dynamoe(
        dense,
        num_experts=recipe.num_experts,
        calibration_dataset=texts["train"].select(range(min(recipe.num_calibration_texts, len(texts["train"])))),
        processing_class=tokenizer,
        router_hidden_size=recipe.router_hidden_size,
    )
    trainer = DynaMoeTrainer(
        model=moe, args=args, train_dataset=texts["train"], eval_dataset=texts["test"], processing_class=tokenizer
    )
    checkpoint = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if checkpoint in ("true", "True") else checkpoint)
    trainer.save_model()
    figures = trainer.evaluate()
    trainer.create_model_card()  # with these figures
    for value in args.eval_sensitivities:
        fraction, loss = (figures[f"eval_{value:g}_{name}"] for name in ("active_fraction", "lm_loss"))
        print(f"sensitivity {value:g}: {fraction:.1%} of the MLPs, loss {loss:.4f}")


if __name__ == "__main__":
    main(*HfArgumentParser((RecipeArguments, NestedTrainingArguments)).parse_args_into_dataclasses())
    # A process that ends before the others may be aborted in its connections to them.
    PartialState().destroy_process_group()
