"""Training of masks: the two passes are the paper's one, and a step is the same however it is cut."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_ext import GatedLoraConfig, MtpConfig, MtpTrainer
from hf_ext.mtp import layout
from hf_ext.mtp.two_pass import two_pass_forward


NUM_MASKS = 3
SIZES = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


def tiny(model_type="llama", attention="sdpa", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def adapted(model, **changes):
    torch.manual_seed(1)
    model = get_peft_model(model, GatedLoraConfig(r=2, lora_alpha=4, num_masks=NUM_MASKS, **changes))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def interleaved_losses(model, ids, labels, anchors, window):
    """The paper's single pass over x0 m1..mk x1 m1..mk ..., and its losses slot by slot."""
    base = model.base_model.model
    head, embed, unembed = base.mtp_head, base.get_input_embeddings(), base.get_output_embeddings()
    slots = layout.interleaved(ids.shape[1], NUM_MASKS)
    vectors = head.lora_mask_vectors["default"]
    inputs = torch.stack(
        [
            embed(ids[0, b]) if s == 0 else vectors[s - 1]
            for b, s in zip(slots.block.tolist(), slots.slot.tolist(), strict=True)
        ]
    )[None]
    mask = torch.where(layout.visible(slots, slots, window), 0.0, -1e9).to(inputs.dtype)
    with head.gate.open(slots.is_mask[None]):
        states = base.get_decoder()(
            inputs_embeds=inputs, position_ids=slots.position[None], attention_mask=mask[None, None], use_cache=False
        ).last_hidden_state[0]
    index = {(b, s): i for i, (b, s) in enumerate(zip(slots.block.tolist(), slots.slot.tolist(), strict=True))}
    total = 0.0
    for (block, slot), i in index.items():
        target = block + slot + 1
        if block not in anchors or target >= ids.shape[1] or labels[0, target] == -100:
            continue
        twin = states[index[block + slot, 0]].detach()
        state = twin if slot == 0 else states[i]
        sampled = head.sample_states("default", embed(ids[0, block + slot]), state)
        total = total + F.cross_entropy(unembed(sampled), labels[0, target])
        if slot:
            total = total + F.cross_entropy(unembed(state), labels[0, target]) + (twin - state).square().mean()
    return total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma", "gpt_neox"])
def test_two_passes_equal_the_interleaved_pass(kind, attention):
    """In value and in every gradient, whether masks run at once or a few at a time."""
    window = 4 if kind == "mistral" else None
    model = adapted(tiny(kind, attention, **({"sliding_window": window} if window else {}))).double()
    ids = torch.randint(1, 20, (1, 9), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :3] = -100
    anchors = torch.tensor([[2, 3, 5, 7]])

    expected = interleaved_losses(model, ids, labels, anchors[0].tolist(), window)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for chunk in (None, 2):
        model.zero_grad()
        out = two_pass_forward(model.base_model.model, "default", ids, labels, anchors, anchors_per_chunk=chunk)
        total = (
            out.base_loss.sum() + out.sampler_loss.sum() + out.consistency_loss.sum() + out.token_sampler_loss.sum()
        )
        total.backward()
        # the losses are taken in fp32, as transformers takes them
        torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        assert gradients
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("residual", [True, False])
def test_drafting_says_what_the_trained_sampler_says(residual):
    """`draft` spells `sample_states` out; fed its own guesses one by one, the sampler gives the same ones."""
    base = adapted(tiny(), sampler_residual=residual).base_model.model
    head, embed, unembed = base.mtp_head, base.get_input_embeddings(), base.get_output_embeddings()
    states, token = torch.randn(NUM_MASKS, 16), torch.tensor([5])
    guesses, probabilities = head.draft("default", token, states, embed, unembed)
    for state, guess, probability in zip(states.split(1), guesses, probabilities, strict=True):
        said = unembed(head.sample_states("default", embed(token), state)).softmax(-1)
        token = said.argmax(-1)
        assert token == guess
        torch.testing.assert_close(said.max(), probability)


def tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "</s>", *"abcdefghijklmnopqr"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def texts(count=16):
    """Rows of different lengths."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(5, 14, (count,), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_ids": [torch.randint(2, 20, (n,), generator=generator).tolist() for n in lengths]}
    )


def trainer(folder, model=None, train_dataset=None, peft_config=None, **settings):
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "anchors_per_sequence": 4,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "use_cpu": True,
        "disable_tqdm": True, "optim": "sgd", "max_grad_norm": 0.0, **settings,
    }  # fmt: skip
    return MtpTrainer(
        model=model or tiny(),
        args=MtpConfig(output_dir=str(folder), **settings),
        train_dataset=train_dataset or texts(),
        processing_class=tokenizer(),
        peft_config=peft_config or GatedLoraConfig(r=2, lora_alpha=4, num_masks=NUM_MASKS),
    )


def adapter_of(trained):
    return {name: p.detach().clone() for name, p in trained.model.named_parameters() if "lora_" in name}


def losses_of(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def test_frozen_stays_frozen_and_trainable_moves(tmp_path):
    """Every weight of the base model is bit-equal behind training, every one of the adapter's has moved."""
    trained = trainer(tmp_path, optim="adamw_torch")
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    trained.train()
    for name, parameter in trained.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name


@pytest.mark.parametrize("batch", [2, 1])
def test_gradient_accumulation_equals_a_larger_batch(batch, tmp_path):
    """Losses and weights are the same for 4 x 1, 2 x 2 and 1 x 4 rows of different lengths."""
    whole = trainer(tmp_path)
    whole.train()
    cut = trainer(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch)
    cut.train()
    torch.testing.assert_close(torch.tensor(losses_of(cut)), torch.tensor(losses_of(whole)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter_of(cut), adapter_of(whole), rtol=1e-4, atol=1e-6)


def test_chunked_checkpointing_changes_nothing(tmp_path):
    """`gradient_checkpointing=True` gives the weights that training without it gives."""
    whole = trainer(tmp_path)
    whole.train()
    chunked = trainer(tmp_path, gradient_checkpointing=True, anchors_per_chunk=2)
    chunked.train()
    torch.testing.assert_close(adapter_of(chunked), adapter_of(whole), rtol=1e-5, atol=1e-6)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    """Bit for bit, with AdamW's state and the schedule."""
    settings = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = trainer(tmp_path / "again", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parameter in adapter_of(resumed).items():
        assert torch.equal(parameter, adapter_of(whole)[name]), name


def test_two_processes_train_as_one(tmp_path):
    """Two processes give the losses and the weights of one process with twice the batch."""
    here = Path(__file__)
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import importlib.util, json, sys, torch
            spec = importlib.util.spec_from_file_location("rows", {str(here)!r})
            rows = importlib.util.module_from_spec(spec); spec.loader.exec_module(rows)
            trained = rows.trainer({str(tmp_path / "out")!r}, per_device_train_batch_size=int(sys.argv[1]),
                                   train_sampling_strategy="sequential", max_steps=3)
            assert trained.args.world_size == int(sys.argv[3])
            trained.train()
            if trained.is_world_process_zero():
                torch.save(rows.adapter_of(trained), sys.argv[2])
                print("LOSSES", json.dumps(rows.losses_of(trained)))
            """
        )
    )
    runs = []
    for processes, batch in ((1, 4), (2, 2)):
        # What `accelerate launch` runs where there are several GPUs; for CPUs it wants MPI.
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        launch += [str(script), str(batch), str(tmp_path / f"{processes}.pt"), str(processes)]
        environment = {**os.environ, "PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1"}
        environment["ACCELERATE_USE_CPU"] = "true"
        done = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("LOSSES"))
        runs.append((json.loads(line.removeprefix("LOSSES")), torch.load(tmp_path / f"{processes}.pt")))
    (one_losses, one), (two_losses, two) = runs
    torch.testing.assert_close(torch.tensor(two_losses), torch.tensor(one_losses), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


def test_masks_stand_where_labels_stand(tmp_path):
    """With a completion-only loss, from the last token of the prompt on."""
    data = Dataset.from_dict({"prompt": ["a b c d e", "a b c"], "completion": [" f g h i", " d e f g h i"]})
    trained = trainer(tmp_path, train_dataset=data, anchors_per_sequence=100)
    batch = trained.data_collator([trained.train_dataset[i] for i in range(2)])
    anchors = trained._draw_anchors(batch, step=0)
    for row, labels in zip(anchors, batch["labels"], strict=True):
        expected = [i - 1 for i, label in enumerate(labels.tolist()) if label != -100]
        assert row[row >= 0].tolist() == expected
        assert expected[0] in (2, 4)


def test_an_evaluation_decodes_and_reports_every_slot(tmp_path):
    """Real tokens per step, the agreement of each slot, and the losses."""
    trained = trainer(tmp_path, eval_decoding_tokens=6, eval_prompt_length=3)
    metrics = trained.evaluate(eval_dataset=trained.train_dataset)
    slots = {f"eval_agreement_{slot}" for slot in range(1, NUM_MASKS + 1)}
    assert slots | {"eval_decoded_tokens_per_step", "eval_sampler_loss", "eval_loss"} <= set(metrics)
    assert 1 <= metrics["eval_decoded_tokens_per_step"] <= NUM_MASKS + 1


def test_a_text_too_short_for_masks_gives_no_nan(tmp_path):
    """One row has no label at all behind its only token."""
    data = Dataset.from_dict({"input_ids": [[3], [4, 5], [6, 7, 8]]})
    trained = trainer(tmp_path, train_dataset=data, per_device_train_batch_size=1, max_steps=3)
    trained.train()
    assert all(torch.isfinite(p).all() for p in adapter_of(trained).values())


def test_bf16_trains(tmp_path):
    """A finite loss and a base model that stays as it is."""
    trained = trainer(tmp_path, model=tiny().to(torch.bfloat16), bf16=True)
    trained.train()
    assert all(loss == loss and loss < 1e4 for loss in losses_of(trained))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"packing": True}, "packing"),
        ({"padding_free": True}, "padding_free"),
        ({"eval_packing": True}, "packing"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"consistency_loss_weight": -1.0}, "consistency_loss_weight"),
        ({"soft_target_weight": 1.5}, "soft_target_weight"),
        ({"anchors_per_sequence": 0}, "anchors_per_sequence"),
        ({"eval_decoding_prompts": -1}, "eval_decoding_prompts"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, named, tmp_path):
    """At construction, by name."""
    with pytest.raises(ValueError, match=named):
        MtpConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, **settings)


def test_another_method_is_refused(tmp_path):
    """An ordinary LoRA has no masks to train."""
    from peft import LoraConfig

    with pytest.raises(TypeError, match="GatedLoraConfig"):
        trainer(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM"))


def test_training_teaches_a_cycle(tmp_path):
    """On text that a tiny model knows by heart, decoding soon takes several tokens per step."""
    torch.manual_seed(0)
    model = tiny(initializer_range=0.1)
    cycle = torch.tensor([(list(range(2, 20)) * 3)[i : i + 30] for i in range(18)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        model(input_ids=cycle, labels=cycle).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    data = Dataset.from_dict({"input_ids": cycle.tolist()})
    trained = trainer(
        tmp_path, model=model, train_dataset=data, max_steps=80, optim="adamw_torch", per_device_train_batch_size=8,
        eval_prompt_length=4, eval_decoding_tokens=24, logging_steps=50,
    )  # fmt: skip
    trained.train()
    assert trained.evaluate(eval_dataset=data)["eval_decoded_tokens_per_step"] > 2
