"""The trainer: what moves, what a step is made of and where masks stand."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM

from hf_ext import MtpTrainer
from hf_ext.mtp.losses import IGNORE_INDEX
from mtp.models import VOCAB_SIZE, random_prompt, randomise
from mtp.training.setting import (
    ASSISTANT,
    EOS,
    NUM_MASKS,
    PRETOKENISED,
    USER,
    adapter_of,
    gated,
    logged,
    texts,
    tiny_lm,
    tiny_trainer,
)
from versions import CHECKPOINTING


def weights_of(trainer: MtpTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same_run(found: MtpTrainer, expected: MtpTrainer, **tolerance: float) -> None:
    """The same losses step by step, and the same adapter behind them."""
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    agreement = [f"agreement_{slot}" for slot in range(1, NUM_MASKS + 1)]
    for name in ("loss", "base_loss", "sampler_loss", "consistency_loss", "expected_tokens_per_step", *agreement):
        assert logged(expected, name)
        torch.testing.assert_close(
            torch.tensor(logged(found, name)), torch.tensor(logged(expected, name)), rtol=1e-5, atol=1e-6, msg=name
        )
    torch.testing.assert_close(adapter_of(found), adapter_of(expected), **tolerance)


# What moves


@pytest.mark.parametrize("frozen_masks", [False, True])
def test_frozen_stays_frozen_and_trainable_moves(tmp_path, frozen_masks):
    """Every parameter of the base model is bit-equal behind training, every one of the adapter's has moved."""
    trainer = tiny_trainer(tmp_path, peft_config=gated(frozen_masks=frozen_masks))
    before = weights_of(trainer)
    trainer.train()
    moved = {name for name, weight in weights_of(trainer).items() if not torch.equal(weight, before[name])}
    expected = {name for name in before if "lora_" in name and not (frozen_masks and "mask_vectors" in name)}
    assert moved == expected
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == expected


def test_a_model_that_carries_an_adapter_is_trained_further(tmp_path):
    """A PeftModel needs no configuration, and its own weights are where training starts."""
    model = get_peft_model(tiny_lm(), gated(num_masks=2))
    randomise(model)
    trainer = tiny_trainer(tmp_path, model=model)
    assert trainer.model is model and trainer.num_masks == 2
    torch.testing.assert_close(
        adapter_of(trainer), {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    )
    before = adapter_of(trainer)
    trainer.train()
    assert all(not torch.equal(weight, before[name]) for name, weight in adapter_of(trainer).items())


def test_a_trained_adapter_is_loaded_with_its_base(tmp_path):
    """What `save_model` writes, AutoPeftModelForCausalLM reads: the same text in the same steps, and trains on."""
    base = tmp_path / "base"
    tiny_lm().save_pretrained(base)
    trainer = tiny_trainer(tmp_path / "adapter", model=str(base))
    trainer.train()
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    prompt = random_prompt(5)
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "return_dict_in_generate": True}
    expected = trainer.model.eval().generate(prompt, **arguments)
    found = loaded.eval().generate(prompt, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    assert int(found.num_steps) == int(expected.num_steps)
    plain = AutoModelForCausalLM.from_pretrained(base).generate(prompt, **arguments)
    assert torch.equal(found.sequences, plain.sequences)


# A step is the same however it is cut


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("batch_size", [2, 1])
def test_gradient_accumulation_equals_a_larger_batch(tmp_path, batch_size, optimizer):
    """4 x 1, 2 x 2 and 1 x 4 rows of different lengths give the same losses and weights."""
    whole = tiny_trainer(tmp_path, optim=optimizer, adam_epsilon=1e-4)
    whole.train()
    cut = tiny_trainer(
        tmp_path,
        optim=optimizer,
        adam_epsilon=1e-4,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=4 // batch_size,
    )
    cut.train()
    assert_same_run(cut, whole, rtol=1e-5, atol=1e-5)


def test_the_loss_is_that_of_the_masks_with_a_label(tmp_path):
    """The weighted sum of the three terms, each over the number of masks; weights of zero leave a term out."""
    weights = {"base_loss_weight": 0.5, "sampler_loss_weight": 0.0, "consistency_loss_weight": 2.0}
    trainer = tiny_trainer(tmp_path, max_steps=1, **weights)
    trainer.train()
    terms = {name: logged(trainer, name)[0] for name in ("base_loss", "sampler_loss", "consistency_loss")}
    expected = sum(weights[f"{name}_weight"] * value for name, value in terms.items())
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert terms["sampler_loss"] > 0


def test_activation_checkpointing_changes_nothing(tmp_path):
    """Some anchors at a time, computed again in the backward pass: the same losses and weights."""
    # In double precision, since Adam makes large steps of the noise in gradients that are nearly zero.
    whole = tiny_trainer(tmp_path, model=tiny_lm().double())
    whole.train()
    chunked = tiny_trainer(tmp_path, model=tiny_lm().double(), **{CHECKPOINTING: True}, anchors_per_chunk=3)
    chunked.train()
    assert_same_run(chunked, whole)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, optimizer):
    """Bit for bit, with dropout, the optimizer's state, the schedule and the anchors of each step."""
    changes = {"optim": optimizer, "save_strategy": "steps", "save_steps": 3, "max_steps": 6, "warmup_steps": 2}
    config = {"lora_dropout": 0.2}
    whole = tiny_trainer(tmp_path / "whole", peft_config=gated(**config), **changes)
    whole.train()
    resumed = tiny_trainer(tmp_path / "resumed", peft_config=gated(**config), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = adapter_of(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_of(resumed).items())
    assert logged(resumed) == logged(whole)


def test_bf16_trains_on_cpu(tmp_path):
    """Autocast: finite losses, a base model that stays, an adapter in fp32 that moves."""
    trainer = tiny_trainer(tmp_path, bf16=True, model=tiny_lm().to(torch.bfloat16))
    before = weights_of(trainer)
    trainer.train()
    assert torch.tensor(logged(trainer)).isfinite().all()
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, before[name]) != ("lora_" in name), name
        assert weight.isfinite().all()


# Where masks stand


def anchors_and_labels(trainer: MtpTrainer) -> list[tuple[list[int], list[int]]]:
    """All anchors that there are in each row of the training set, and its labels."""
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    batch = trainer.data_collator(rows)
    anchors = trainer._draw_anchors(batch, step=0)
    return [(row[row >= 0].tolist(), labels.tolist()) for row, labels in zip(anchors, batch["labels"], strict=True)]


PROMPT_COMPLETION = Dataset.from_dict(
    {"prompt": ["a b c d e ", "a b c ", "f "], "completion": ["f g h i", "d e f g h i", "g"]}
)


def test_masks_stand_behind_the_tokens_of_a_text(tmp_path):
    """Behind each that has a successor."""
    trainer = tiny_trainer(tmp_path, train_dataset=Dataset.from_dict({"text": ["a b c d", "a b"]}))
    assert trainer.args.anchors_per_sequence == 4
    # The end token that TRL appends is predicted, and nothing behind it.
    assert [anchors for anchors, _ in anchors_and_labels(trainer)] == [[0, 1, 2, 3], [0, 1]]


def test_prompts_carry_masks_at_their_last_token_only(tmp_path):
    """With prompt and completion: the token before the completion predicts it."""
    trainer = tiny_trainer(tmp_path, train_dataset=PROMPT_COMPLETION, anchors_per_sequence=100)
    found = anchors_and_labels(trainer)
    for (anchors, labels), prompt, completion in zip(found, (5, 3, 1), (4, 6, 1), strict=True):
        assert anchors == list(range(prompt - 1, prompt + completion))
        assert [label != IGNORE_INDEX for label in labels[: prompt + completion + 1]] == (
            [False] * prompt + [True] * (completion + 1)
        )


def test_a_completion_mask_is_heeded_without_being_asked_for(tmp_path):
    """Rows of token ids with a `completion_mask`, which TRL itself uses only where told."""
    trainer = tiny_trainer(tmp_path, train_dataset=PRETOKENISED, anchors_per_sequence=100)
    assert [anchors for anchors, _ in anchors_and_labels(trainer)] == [[2, 3, 4], [0, 1], [2]]


def test_a_completion_mask_is_ignored_where_told(tmp_path):
    """`completion_only_loss=False` trains on prompts too."""
    trainer = tiny_trainer(tmp_path, train_dataset=PRETOKENISED, anchors_per_sequence=100, completion_only_loss=False)
    assert [anchors for anchors, _ in anchors_and_labels(trainer)] == [[0, 1, 2, 3, 4], [0, 1], [0, 1, 2]]


def test_only_the_assistants_turns_carry_masks(tmp_path):
    """With `assistant_only_loss`, in every turn, from the token before it on."""
    messages = [
        {"role": "user", "content": "a b c"},
        {"role": "assistant", "content": "d e"},
        {"role": "user", "content": "f"},
        {"role": "assistant", "content": "g h i"},
    ]
    trainer = tiny_trainer(
        tmp_path,
        train_dataset=Dataset.from_dict({"messages": [messages]}),
        assistant_only_loss=True,
        anchors_per_sequence=100,
    )
    tokens = trainer.train_dataset[0]["input_ids"]
    a, f = 4, 9
    assert tokens == [USER, a, 5, 6, ASSISTANT, 7, 8, EOS, USER, f, ASSISTANT, 10, 11, 12, EOS]
    ((anchors, labels),) = anchors_and_labels(trainer)
    assert anchors == [4, 5, 6, 10, 11, 12, 13]
    assert [labels[anchor + 1] for anchor in anchors] == [7, 8, EOS, 10, 11, 12, EOS]


def test_conversational_prompts_carry_masks_behind_the_generation_prompt(tmp_path):
    """Prompt and completion as messages."""
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "a b c"}]],
            "completion": [[{"role": "assistant", "content": "d e"}]],
        }
    )
    trainer = tiny_trainer(tmp_path, train_dataset=data, anchors_per_sequence=100)
    ((anchors, labels),) = anchors_and_labels(trainer)
    assert anchors[0] == trainer.train_dataset[0]["input_ids"].index(ASSISTANT)
    assert labels[anchors[0] + 1 : anchors[-1] + 2] == [7, 8, EOS]


def test_anchors_depend_on_row_step_and_seed_alone(tmp_path):
    """Neither on the batch that a row is in nor on its padding; another step or seed draws others."""
    trainer = tiny_trainer(tmp_path, train_dataset=texts(shortest=8))
    rows = [trainer.train_dataset[i] for i in range(6)]
    together = trainer._draw_anchors(trainer.data_collator(rows), step=3)
    alone = [trainer._draw_anchors(trainer.data_collator([row]), step=3)[0].tolist() for row in rows]
    assert together.tolist() == alone
    assert all(len(set(row)) == 4 and row == sorted(row) for row in alone)
    assert trainer._draw_anchors(trainer.data_collator(rows), step=4).tolist() != alone
    trainer.args.seed += 1
    assert trainer._draw_anchors(trainer.data_collator(rows), step=3).tolist() != alone


def test_every_token_is_an_anchor_in_the_end(tmp_path):
    """A subset drawn anew at every step covers a row."""
    trainer = tiny_trainer(tmp_path, train_dataset=texts(count=1, shortest=13))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    drawn = {anchor for step in range(40) for anchor in trainer._draw_anchors(batch, step)[0].tolist()}
    assert drawn == set(range(12))


# Rows and sources of all kinds


def test_texts_too_short_for_masks_give_no_nan(tmp_path):
    """Batches of one or two tokens, alone or beside a longer row."""
    data = Dataset.from_dict({"input_ids": [[3], [4, 5], [6, 7, 8], [9]]})
    for batch_size in (1, 2):
        trainer = tiny_trainer(tmp_path, train_dataset=data, per_device_train_batch_size=batch_size, eval_dataset=data)
        trainer.train()
        assert torch.tensor(logged(trainer)).isfinite().all()
        assert all(weight.isfinite().all() for weight in adapter_of(trainer).values())
        assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()


def test_a_step_without_any_label_moves_nothing(tmp_path):
    """A batch of single tokens has no loss and, without momentum, no update."""
    trainer = tiny_trainer(tmp_path, train_dataset=Dataset.from_dict({"input_ids": [[3], [4]]}), optim="sgd")
    before = weights_of(trainer)
    trainer.train()
    assert logged(trainer) == [0.0] * 4
    torch.testing.assert_close(weights_of(trainer), before, rtol=0, atol=0)


def test_a_streamed_dataset_trains(tmp_path):
    """One that has no length; nothing is decoded from a streamed evaluation set."""
    rows = texts().to_list()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = tiny_trainer(tmp_path, train_dataset=stream, eval_dataset=stream)
    trainer.train()
    assert torch.tensor(logged(trainer)).isfinite().all()
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics and "eval_decoded_tokens_per_step" not in metrics


@pytest.mark.parametrize("shape", ["mistral", "gemma3", "gpt_neox"])
def test_other_shapes_train_and_decode(tmp_path, shape):
    """Finite losses, and a base model that stays as it is."""
    windowed = {} if shape == "gpt_neox" else {"sliding_window": 4}
    trainer = tiny_trainer(tmp_path, model=tiny_lm(shape, **windowed), eval_dataset=texts(2))
    before = {name: weight for name, weight in weights_of(trainer).items() if "lora_" not in name}
    trainer.train()
    assert torch.tensor(logged(trainer)).isfinite().all()
    after = weights_of(trainer)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert trainer.evaluate()["eval_decoded_tokens_per_step"] >= 1


def test_training_teaches_a_cycle(tmp_path):
    """On text that a tiny model knows by heart, decoding soon takes several tokens per step."""
    cycle = torch.tensor([(list(range(4, VOCAB_SIZE)) * 3)[start : start + 30] for start in range(16)])
    model = tiny_lm(initializer_range=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=cycle, labels=cycle).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = Dataset.from_dict({"input_ids": cycle.tolist()})
    trainer = tiny_trainer(
        tmp_path,
        model=model,
        train_dataset=rows,
        eval_dataset=rows,
        max_steps=80,
        per_device_train_batch_size=8,
        eval_prompt_length=4,
        eval_decoding_tokens=24,
        logging_steps=40,
    )
    before = trainer.evaluate()["eval_decoded_tokens_per_step"]
    trainer.train()
    assert before < 2 < trainer.evaluate()["eval_decoded_tokens_per_step"]
    assert logged(trainer)[-1] < logged(trainer)[0]
