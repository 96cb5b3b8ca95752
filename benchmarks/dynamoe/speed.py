"""
Does the clock follow the active parameters? Decode and prefill of nested experts against the dense model, random weights.

    python -m benchmarks.dynamoe.speed --hidden_size 2048 --intermediate_size 8192 --num_layers 8

All contenders take turns within one run; ratios are of medians. `fixed` gives all tokens one expert and runs no router;
`routed` goes through routers of random weights, at the sensitivity where they use about half of the neurons.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, HfArgumentParser, LlamaConfig

from benchmarks.mtp.reporting import Table, write
from hf_ext import convert_to_dynamoe


# Different tokens that the MLPs are timed on.
INPUTS = 64


@dataclass
class Arguments:
    hidden_size: int = field(default=2048, metadata={"help": "Width of the model."})
    intermediate_size: int = field(default=8192, metadata={"help": "Neurons of each MLP."})
    num_layers: int = field(default=8, metadata={"help": "Layers."})
    num_experts: int = field(default=4, metadata={"help": "Experts, in equal steps."})
    prompt_length: int = field(default=512, metadata={"help": "Tokens of a prefill."})
    context: int = field(default=128, metadata={"help": "Tokens in the cache at a decoding step."})
    rounds: int = field(
        default=32, metadata={"help": "Timed decoding steps of each contender; a fifth as many prefills."}
    )
    dtype: str = field(default="float32", metadata={"help": "Number format."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})
    threads: int | None = field(default=None, metadata={"help": "Threads; by default torch's."})
    results_dir: str | None = field(default=None, metadata={"help": "Where to write."})


def build(args: Arguments) -> Any:
    """A converted model of random weights, its routers too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=max(1, args.hidden_size // 128),
        vocab_size=1024,
        max_position_embeddings=args.prompt_length + args.context + 1,
    )
    with torch.device(args.device):
        dense = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
        moe = convert_to_dynamoe(dense, args.num_experts, importance="none").eval()
    with torch.no_grad():
        for mlp in moe.nested_mlps():
            mlp.router.out.weight.normal_(std=1.0)
            mlp.router.out.bias.zero_()
    return moe


def bisected(fraction: Callable[[float], float]) -> float:
    """The sensitivity at which half of the neurons are used."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if fraction(middle) < 0.5 else (low, middle)
    return low


@torch.no_grad()
def active_fraction(moe: Any, ids: torch.Tensor, given: dict[str, Any]) -> float:
    """Share of the neurons that tokens use in one call."""
    moe(ids, **given)
    moe.expert_usage(reset=True)  # with what was counted before
    moe(ids, **given)
    return moe.expert_usage(reset=True).active_fraction


def contenders(moe: Any, sensitivity: float) -> dict[str, dict[str, Any]]:
    """By name: what to give to the model's call."""
    fixed = {
        f"fixed, {width / moe.config.expert_widths[-1]:.2f}": {"expert_index": expert}
        for expert, width in enumerate(moe.config.expert_widths[:-1])
    }
    return {"dense": {"sensitivity": 1.0}, **fixed, "routed": {"sensitivity": sensitivity}}


def timed(calls: dict[str, Callable[[], None]], rounds: int, device: torch.device, desc: str) -> dict[str, float]:
    """Median seconds of each call; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in tqdm(range(rounds + 1), desc=desc):
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if round_number:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def mlp_calls(moe: Any, options: dict[str, dict[str, Any]], length: int) -> dict[str, Callable[[], None]]:
    """
    All MLPs one after the other, nothing else. Each call has other inputs, since one token is no mean: over them the routers
    use half of the neurons, at a sensitivity found for them.
    """
    size = moe.config.base_config.hidden_size
    inputs = torch.randn(max(1, INPUTS // length), 1, length, size, device=moe.device, dtype=moe.dtype)
    mlps = moe.nested_mlps()

    @torch.no_grad()
    def fraction(sensitivity: float) -> float:
        widths = torch.tensor(moe.config.expert_widths, device=moe.device) / moe.config.expert_widths[-1]
        chosen = [moe.choices(mlp.router(inputs.flatten(0, 1)), sensitivity) for mlp in mlps]
        return float(widths[torch.stack(chosen)].mean())

    half = bisected(fraction)

    def call(given: dict[str, Any]) -> Callable[[], None]:
        sensitivity = min(given.get("sensitivity", 1.0), 1.0)
        sensitivity = half if sensitivity < 1 else sensitivity
        turns = itertools.cycle(inputs)

        def run() -> None:
            with torch.no_grad():
                x = next(turns)
                moe.routing.begin(sensitivity, given.get("expert_index"))
                for mlp in mlps:
                    mlp(x)
                moe.routing.end()

        return run

    return {name: call(given) for name, given in options.items()}


def model_calls(moe: Any, options: dict[str, dict[str, Any]], ids: torch.Tensor, context: int) -> dict[str, Any]:
    """The whole model: a prefill of `ids`, or one token behind `context` others."""

    def call(given: dict[str, Any]) -> Callable[[], None]:
        cache = DynamicCache(config=moe.config.base_config)
        if context:
            with torch.no_grad():
                moe(ids[:, :context], past_key_values=cache, **given)
                cache.activate_past_recording()

        def run() -> None:
            with torch.no_grad():
                if not context:
                    moe(ids, use_cache=False, logits_to_keep=1, **given)
                    return
                moe(ids[:, context : context + 1], past_key_values=cache, **given)
                cache.crop(-1)

        return run

    return {name: call(given) for name, given in options.items()}


def main(args: Arguments) -> None:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    moe = build(args)
    ids = torch.randint(1024, (1, args.prompt_length), device=moe.device)
    sensitivity = bisected(lambda value: active_fraction(moe, ids, {"sensitivity": value}))
    options = contenders(moe, sensitivity)
    seconds, rows = {}, []
    for what, context, length, rounds in (
        ("decode", args.context, 1, args.rounds),
        ("prefill", 0, args.prompt_length, max(3, args.rounds // 5)),
    ):
        seconds[f"{what}, MLPs"] = timed(mlp_calls(moe, options, length), rounds, moe.device, f"{what}, MLPs")
        calls = model_calls(moe, options, ids, context)
        seconds[what] = timed(calls, rounds, moe.device, what)
    fractions = {name: active_fraction(moe, ids, given) for name, given in options.items()}
    for name in options:
        ratios = [seconds[what]["dense"] / seconds[what][name] for what in seconds]
        rows.append([name, fractions[name], *ratios, *(1e3 * seconds[what][name] for what in seconds)])
    columns = [
        "experts",
        "active fraction",
        *(f"{what}: x dense" for what in seconds),
        *(f"{what}: ms" for what in seconds),
    ]
    shape = f"hidden {args.hidden_size}, intermediate {args.intermediate_size}, {args.num_layers} layers"
    half = next(row for row in rows if row[0].startswith("fixed") and abs(row[1] - 0.5) < 1e-6)
    routed = rows[-1]
    lead = (
        f"**At an active fraction of one half the MLPs decode {half[2]:.2f} times as fast as dense ones with one expert for all "
        f"tokens and {routed[2]:.2f} times through routers; they prefill {half[4]:.2f} and {routed[4]:.2f} times as fast.**"
    )
    note = (
        f"{shape}, {args.num_experts} experts, {args.dtype}, random weights, batch 1; decoding behind {args.context} tokens, "
        f"prefill of {args.prompt_length}. Routers at sensitivity {sensitivity:.3f}; decoding with the whole model is of "
        "one token, whose fraction is its own."
    )
    name = f"speed_{args.hidden_size}x{args.intermediate_size}x{args.num_layers}_{args.device}"
    write(
        name,
        "Speed of nested experts",
        [Table("Against dense", columns, rows, note)],
        {"seconds": seconds},
        moe,
        args.results_dir,
        lead,
    )


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
