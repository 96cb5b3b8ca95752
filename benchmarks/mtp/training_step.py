"""
Time and memory of a training step with masks, against an ordinary LoRA step on the same tokens.

A random llama of some 10 million parameters, one sequence, AdamW. With masks: 8 masks behind 128 tokens, all losses of the
paper. Ordinary: PEFT's LoRA of the same rank, cross-entropy over all tokens. Each configuration runs in a fresh process;
memory is the peak beyond what the process held with model and optimizer loaded.

    python benchmarks/mtp/training_step.py
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from reporting import Table, write
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from hf_ext import GatedLoraConfig


@dataclass
class Arguments:
    lengths: list[int] = field(default_factory=lambda: [512, 2048, 4096], metadata={"help": "Sequence lengths."})
    num_masks: int = field(default=8, metadata={"help": "Masks."})
    num_anchors: int = field(default=128, metadata={"help": "Tokens with masks behind them."})
    anchors_per_chunk: int = field(default=32, metadata={"help": "Anchors at a time with gradient checkpointing."})
    rank: int = field(default=16, metadata={"help": "Rank of both adapters."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the model."})
    num_layers: int = field(default=8, metadata={"help": "Its depth."})
    vocab_size: int = field(default=8192, metadata={"help": "Its vocabulary."})
    steps: int = field(default=3, metadata={"help": "Timed steps behind one that is not."})
    dtype: str = field(default="float32", metadata={"help": "Number format of the base model."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})
    threads: int | None = field(default=None, metadata={"help": "Threads; by default as many as there are cores."})
    results_dir: str | None = field(
        default=None, metadata={"help": "Where to write; by default benchmarks/results/mtp."}
    )
    one: str | None = field(default=None, metadata={"help": "Used by the script itself: one configuration, as JSON."})


def base_model(args: Arguments) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=8 * args.hidden_size // 3,
        num_hidden_layers=args.num_layers,
        num_attention_heads=max(1, args.hidden_size // 32),
        num_key_value_heads=max(1, args.hidden_size // 64),
        max_position_embeddings=max(4096, *args.lengths) + 64,
    )
    return LlamaForCausalLM(config).to(device=args.device, dtype=getattr(torch, args.dtype))


def step_of(method: str, checkpointing: bool, model: Any, args: Arguments) -> Any:
    """A function of a sequence that makes one step."""
    if method == "masks":
        config: LoraConfig = GatedLoraConfig(r=args.rank, lora_alpha=2 * args.rank, num_masks=args.num_masks)
    else:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets, task_type="CAUSAL_LM")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tuned = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        if method == "ordinary":
            return tuned(input_ids=ids, labels=ids, use_cache=False).loss
        anchors = torch.randperm(ids.shape[1] - 1, device=ids.device)[None, : args.num_anchors].sort().values
        chunk = args.anchors_per_chunk if checkpointing else None
        out = tuned(input_ids=ids, labels=ids, mtp_anchors=anchors, anchors_per_chunk=chunk)
        sums = (out.base_loss, out.sampler_loss, out.token_sampler_loss, out.consistency_loss)
        return sum(term.sum() for term in sums) / out.valid.sum()

    def step(ids: torch.Tensor) -> None:
        loss_of(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def held_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    # Kilobytes on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_one(configuration: dict[str, Any], args: Arguments) -> dict[str, float]:
    """In a process of its own: the peak of an earlier configuration would hide that of a later one."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = base_model(args)
    parameters = model.num_parameters()
    step = step_of(configuration["method"], configuration["checkpointing"], model, args)
    step(torch.randint(3, args.vocab_size, (1, 16), device=args.device))
    before = held_bytes(args.device)
    times = []
    for number in range(args.steps + 1):
        ids = torch.randint(3, args.vocab_size, (1, configuration["length"]), device=args.device)
        start = time.perf_counter()
        step(ids)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        if number > 0:
            times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "peak_mb": (peak_bytes(args.device) - before) / 2**20,
        "parameters": parameters,
    }


def main(args: Arguments) -> None:
    if args.one is not None:
        print(json.dumps(measure_one(json.loads(args.one), args)))
        return
    grid = [
        {"length": length, "method": method, "checkpointing": checkpointing}
        for length in args.lengths
        for checkpointing in (False, True)
        for method in ("ordinary", "masks")
    ]
    results = []
    for configuration in tqdm(grid, unit="configuration"):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(configuration)]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if child.returncode != 0:
            print(f"{configuration} ended with {child.returncode}; it is left out.", file=sys.stderr)
            continue
        results.append({**configuration, **json.loads(child.stdout.strip().splitlines()[-1])})
    found = {(r["length"], r["checkpointing"], r["method"]): r for r in results}
    rows = []
    for length in args.lengths:
        for checkpointing in (False, True):
            ordinary, masks = (found.get((length, checkpointing, m)) for m in ("ordinary", "masks"))
            cells: list[Any] = [length, "yes" if checkpointing else "no"]
            for key, form in (("seconds", "{:.2f}"), ("peak_mb", "{:.0f}")):
                cells += [form.format(r[key]) if r else "failed" for r in (ordinary, masks)]
                cells.append(f"{masks[key] / ordinary[key]:.2f}" if ordinary and masks else "")
            rows.append(cells)
    columns = ["tokens", "checkpointing", "LoRA (s)", "masks (s)", "ratio", "LoRA (MB)", "masks (MB)", "ratio"]
    million = results[0]["parameters"] / 1e6 if results else 0
    note = (
        f"Random llama of {million:.1f} million parameters ({args.num_layers} layers of {args.hidden_size}, vocabulary "
        f"{args.vocab_size}), batch of 1, rank {args.rank}, {args.dtype}; {args.num_masks} masks behind {args.num_anchors} "
        f"tokens. Median of {args.steps} steps. Checkpointing is per layer for LoRA, per {args.anchors_per_chunk} anchors with "
        "masks. All masks behind every token, as in the paper, would be an interleaved sequence "
        f"{args.num_masks + 1} times as long."
    )
    tables = [Table("One training step", columns, rows, note)]
    write("training_step", "The training step", tables, {"results": results}, base_model(args), args.results_dir)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
