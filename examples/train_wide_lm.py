"""
Trains a small language model with wide MLPs from scratch, on rows of text: the larger model that nested experts are measured on.

Most of its weights are in MLPs that are eight times as wide as the model, and it reads the same few megabytes often enough for
those to hold what they can, as the MLPs of large models do. With grade-school problems (GSM8K, MIT,
https://huggingface.co/datasets/openai/gsm8k) one core that multiplies in bfloat16 takes three quarters of an hour:

    python examples/train_wide_lm.py --data path/to/gsm8k/train.jsonl --columns question answer --output_dir out/wide-lm

It is an ordinary training script: every training argument can be given, and called again with
`--resume_from_checkpoint true` it goes on where it stopped.
"""

from dataclasses import dataclass, field

from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_torch_bf16_gpu_available


BEGIN, END, PAD = "<s>", "</s>", "<pad>"


@dataclass
class RecipeArguments:
    data: str = field(metadata={"help": "File of JSON lines."})
    columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns of a row's text, a line each."}
    )
    max_length: int = field(default=256, metadata={"help": "Tokens of a row that are read."})
    vocab_size: int = field(default=2_048, metadata={"help": "Tokens of the vocabulary."})
    hidden_size: int = field(default=160, metadata={"help": "Width of the model."})
    intermediate_size: int = field(default=1_280, metadata={"help": "Width of its MLPs."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Its depth."})


@dataclass
class WideLmArguments(TrainingArguments):
    output_dir: str = field(default="out/wide-lm")
    per_device_train_batch_size: int = field(default=24)
    num_train_epochs: float = field(default=8.0)
    learning_rate: float = field(default=2e-3)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=0.05)
    weight_decay: float = field(default=0.05)
    adam_beta2: float = field(default=0.99)
    bf16: bool = field(default=True)
    use_cpu: bool = field(default=not is_torch_bf16_gpu_available())
    logging_steps: float = field(default=50)
    save_steps: float = field(default=500)
    save_total_limit: int | None = field(default=1)
    report_to: str = field(default="none")


def new_tokenizer(texts: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of these texts; digits stand alone, as Llama has them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts["text"],
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[BEGIN, END, PAD], initial_alphabet=alphabet),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(token, bpe.token_to_id(token)) for token in (BEGIN, END)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, pad_token=PAD)


def main(recipe: RecipeArguments, args: WideLmArguments):
    rows = load_dataset("json", data_files=recipe.data, split="train")
    texts = rows.map(
        lambda row: {"text": "\n".join(row[name] for name in recipe.columns)}, remove_columns=rows.column_names
    )
    tokenizer = new_tokenizer(texts, recipe.vocab_size)
    tokenized = texts.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=recipe.max_length),
        batched=True,
        remove_columns="text",
    )
    set_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.hidden_size // 20,
            num_key_value_heads=recipe.hidden_size // 40,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    tokens = sum(map(len, tokenized["input_ids"]))
    print(f"{model.num_parameters():,} parameters, {len(tokenized):,} rows of {tokens:,} tokens")
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokenized,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    checkpoint = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if checkpoint in ("true", "True") else checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main(*HfArgumentParser((RecipeArguments, WideLmArguments)).parse_args_into_dataclasses())
