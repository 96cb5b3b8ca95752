"""
Wall-clock of multi-token decoding against the alternatives, all in one run, interleaved prompt by prompt.

Against plain `generate`; plain decoding by a bare loop (what a tiny model gains by leaving `generate`'s own Python is no gain
of speculation); prompt lookup; assisted decoding with a draft model of the same vocabulary. Then where a step's time goes,
piece by piece, and what a forward pass of the bare model costs at 1 to 81 positions.

    python benchmarks/mtp/wall_clock.py --model path/to/stories260k --adapter out/stories260k-mtp --draft_model tiny-lm
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from prompts import prompt_sets
from reporting import Table, last_part, load_adapted, load_base, set_threads, write
from rich.console import Console
from tqdm import tqdm
from transformers import DynamicCache, HfArgumentParser
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from hf_ext import MtpGenerateOutput, shipped_model
from hf_ext.cli.compare import Method, MethodResult, assisted, compare, multi_token, plain, prompt_lookup
from hf_ext.metrics import first_difference
from hf_ext.mtp import layout
from hf_ext.mtp.decoding import Emitter, SpeculativeForward, additive_mask
from hf_ext.mtp.lean_lora import lean_lora


STRATEGIES = ("linear", "adaptive", "quadratic")
WIDTHS = (1, 9, 17, 25, 81)


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of the base model."})
    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    draft_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a model with the same vocabulary, or `tiny-lm`."}
    )
    ks: list[int] = field(default_factory=lambda: [2, 4, 8], metadata={"help": "Numbers of guesses."})
    prompt_set: str = field(default="samples", metadata={"help": "The set of prompts: `samples` or `short`."})
    num_prompts: int = field(default=16, metadata={"help": "Prompts of that set."})
    max_new_tokens: int = field(default=200, metadata={"help": "New tokens per prompt."})
    rounds: int = field(default=3, metadata={"help": "Rounds over all prompts; the spread is between them."})
    repeats: int = field(default=2, metadata={"help": "Timed runs per prompt and round; their median counts."})
    pieces: int = field(default=200, metadata={"help": "Timings of each piece of a step."})
    context: int = field(default=128, metadata={"help": "Tokens in the cache while a step is taken to pieces."})
    dtype: str = field(default="float32", metadata={"help": "Number format."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})
    threads: int | None = field(default=None, metadata={"help": "Threads; by default one for a small model."})
    results_dir: str | None = field(
        default=None, metadata={"help": "Where to write; by default benchmarks/results/mtp."}
    )


@torch.inference_mode()
def bare_loop(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Plain greedy decoding with nothing around the model: a `custom_generate`, so that it enters as all others do."""
    cache = model_kwargs["past_key_values"]
    ends = generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    pieces, token = [input_ids], input_ids
    for _ in range(generation_config.max_length - input_ids.shape[1]):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(dim=-1, keepdim=True)
        pieces.append(token)
        if token.item() in ends:
            break
    return torch.cat(pieces, dim=1)


@torch.inference_mode()
def own_loop(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Any:
    """The loop of multi-token decoding itself, on the model with the adapter, without a mask or a guess."""
    adapter, head = model.mtp_head.active_adapters[0], model.mtp_head
    emitter = Emitter(input_ids, logits_processor, stopping_criteria, None, False, False)
    forward = SpeculativeForward(model, adapter, model_kwargs["past_key_values"], 0)
    token_ids = input_ids[0]
    with forward.started(), lean_lora(model, adapter, head.gate):
        while not emitter.finished:
            emitter.accept(forward(token_ids, 0, 0, ())[0], [])
            token_ids = token_ids.new_tensor(emitter.tokens[-1:])
    if not generation_config.return_dict_in_generate:
        return emitter.sequences()
    steps = len(emitter.tokens)
    return MtpGenerateOutput(
        sequences=emitter.sequences(),
        num_steps=torch.tensor([steps]),
        tokens_per_step=torch.ones(1),
        step_lengths=[[1] * steps],
    )


def compared(
    base: Any, adapted: Any, tokenizer: Any, prompts: list[list[int]], draft: Any, args: Arguments
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """
    Rows of the main table, and milliseconds per step of each method. Behind the reference the methods change places from
    round to round.
    """
    methods = [
        plain(),
        Method("bare loop", {"custom_generate": bare_loop}),
        Method("our loop, no guesses", {"custom_generate": own_loop}, uses_adapter=True),
        prompt_lookup(10),
    ]
    if draft is not None:
        methods.append(assisted(draft))
    methods += [multi_token(k, strategy) for strategy in STRATEGIES for k in args.ks]
    rounds: list[dict[str, MethodResult]] = []
    for number in range(args.rounds):
        others = methods[1:]
        shift = number * max(1, len(others) // args.rounds)
        order = [methods[0], *others[shift:], *others[:shift]]
        results = compare(
            base,
            adapted,
            tokenizer,
            prompts,
            order,
            max_new_tokens=args.max_new_tokens,
            repeats=args.repeats,
            console=Console(stderr=True),
        )
        rounds.append({result.name: result for result in results})
    rows = []
    for method in methods:
        own = [results[method.name] for results in rounds]
        rows.append(
            {
                "method": method.name,
                "tokens_per_step": own[0].tokens_per_step,
                "tokens_per_second": statistics.median(r.tokens_per_second for r in own),
                "over_plain": [
                    r.tokens_per_second / all_["plain"].tokens_per_second for r, all_ in zip(own, rounds, strict=True)
                ],
                "over_bare_loop": [
                    r.tokens_per_second / all_["bare loop"].tokens_per_second
                    for r, all_ in zip(own, rounds, strict=True)
                ],
                "identical": min(_identical(r, all_["plain"]) for r, all_ in zip(own, rounds, strict=True)),
                "prompts": len(prompts),
            }
        )
    step_ms = {
        name: statistics.median(1000 * results[name].seconds / results[name].num_steps for results in rounds)
        for name in rounds[0]
    }
    return rows, step_ms


def _identical(result: MethodResult, reference: MethodResult) -> int:
    pairs = zip(result.runs, reference.runs, strict=True)
    return sum(
        run.first_difference is None and first_difference(run.new_tokens, other.new_tokens) is None
        for run, other in pairs
    )


def timed(calls: dict[Any, Callable[[], Any]], count: int, device: torch.device, desc: str) -> dict[Any, float]:
    """Median milliseconds of each call; they take turns, so that whatever else the machine does slows all alike."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(count + 5), desc=desc, leave=False):
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if number >= 5:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(own) for name, own in times.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def filled_cache(model: Any, context: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    ids = torch.randint(3, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.activate_past_recording()
    return cache


def bare_pass(model: Any, cache: DynamicCache, slots: layout.Slots, num_logits: int) -> Callable[[], None]:
    """A pass of the bare model over the positions of a step, with its attention mask, taken back afterwards."""
    past, width = cache.get_seq_length(), slots.block.shape[0]
    device = model.device
    keys = layout.tokens(-past, 0, device) + slots
    mask = additive_mask(layout.visible(slots, keys), model.dtype)[None, None] if width > 1 else None
    embeddings = torch.randn(1, width, model.config.hidden_size, device=device).to(model.dtype)
    position_ids = (slots.position + past)[None]
    kept = torch.arange(num_logits, device=device)

    def run() -> None:
        model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=kept,
        )
        cache.crop(-width)

    return run


@torch.inference_mode()
def floor(base: Any, args: Arguments) -> dict[int, float]:
    """Milliseconds of a pass of the bare model over so many positions, one set of logits each."""
    cache = filled_cache(base, args.context)
    calls = {width: bare_pass(base, cache, layout.tokens(0, width, base.device), 1) for width in WIDTHS}
    return timed(calls, args.pieces, base.device, "passes")


@torch.inference_mode()
def taken_to_pieces(base: Any, adapted: Any, strategy: str, k: int, args: Arguments) -> dict[str, float]:
    """
    Milliseconds of the pieces of one full step: tokens to verify, masks beside them, LoRA on the masks, drafting,
    acceptance. The passes are measured each on its own, so a piece is the difference of two.
    """
    model, adapter = adapted.base_model.model, adapted.active_adapter
    device, vocabulary = model.device, model.config.vocab_size
    places = (k,) if strategy == "linear" else tuple(range(k + 1))
    tokens = layout.tokens(0, k + 1, device)
    slots = tokens + layout.masks_behind(torch.tensor(places, device=device), k)
    cache, own_cache = filled_cache(base, args.context), filled_cache(base, args.context)
    forward = SpeculativeForward(model, adapter, own_cache, 0)
    token_ids = torch.randint(3, vocabulary, (k + 1,), generator=torch.Generator().manual_seed(1)).to(device)
    states = torch.randn(k, model.config.hidden_size, device=device).to(model.dtype)
    embeddings, unembed = model.get_input_embeddings(), model.get_output_embeddings()
    logits = torch.zeros(k + 1, vocabulary, device=device)
    guesses = [0] * k

    def speculate() -> None:
        forward(token_ids, k, k, places)
        forward.crop(k + 1 + len(places) * k)

    def accept() -> None:
        Emitter(token_ids[None], LogitsProcessorList(), StoppingCriteriaList(), None, False, False).accept(
            logits, guesses
        )

    calls: dict[str, Callable[[], Any]] = {
        "one": bare_pass(base, cache, layout.tokens(0, 1, device), 1),
        "tokens": bare_pass(base, cache, tokens, k + 1),
        "masks": bare_pass(base, cache, slots, k + 1),
        "lora": speculate,
        "draft": lambda: forward.head.draft(adapter, token_ids[:1], states, embeddings, unembed)[0].tolist(),
        "accept": accept,
    }
    with forward.started(), lean_lora(model, adapter, forward.head.gate):
        return timed(calls, args.pieces, device, f"{strategy}, k={k}")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(args: Arguments) -> None:
    base, adapted, tokenizer = load_adapted(args.model, args.adapter, args.dtype, args.device)
    set_threads(base, args.threads)
    draft = None
    if args.draft_model is not None:
        draft_name = str(shipped_model("tiny-lm")) if args.draft_model == "tiny-lm" else args.draft_model
        draft = load_base(draft_name, args.dtype, args.device)[0]
    for model in (base, adapted.base_model.model, draft):
        if model is not None:
            model.generation_config.eos_token_id = None
    ks = args.ks = [k for k in args.ks if k <= adapted.active_peft_config.num_masks]
    counts = {"samples": 0, "short": 0}
    if args.prompt_set not in counts:
        raise ValueError(f"`prompt_set` must be one of {', '.join(counts)}, got '{args.prompt_set}'.")
    counts[args.prompt_set] = args.num_prompts
    prompts = prompt_sets(base, tokenizer, counts["samples"], counts["short"])[args.prompt_set]
    passes = floor(base, args)
    pieces = {(s, k): taken_to_pieces(base, adapted, s, k, args) for s in ("linear", "quadratic") for k in ks}
    rows, step_ms = compared(base, adapted, tokenizer, prompts, draft, args)

    main_table = Table(
        "Tokens per second",
        [
            "method",
            "tokens per step",
            "tokens/s",
            "x plain `generate`",
            "x bare loop",
            "ms per step",
            "identical output",
        ],
        [
            [
                row["method"],
                row["tokens_per_step"],
                f"{row['tokens_per_second']:.0f}",
                spread(row["over_plain"]),
                spread(row["over_bare_loop"]),
                step_ms[row["method"]],
                f"{row['identical']} of {row['prompts']}",
            ]
            for row in rows
        ],
        f"Median (least to most) of {args.rounds} rounds over {len(prompts)} prompts of the set `{args.prompt_set}`, {args.max_new_tokens} new "
        f"tokens each; within a round the median of {args.repeats} runs per prompt. Steps are passes of the target model. "
        "The paper gives no wall-clock; an independent replication of it at 8 guesses saw 1.4x (1.7B) and 1.6x (4B).",
    )
    piece_rows = []
    for (strategy, k), own in pieces.items():
        whole = step_ms[multi_token(k, strategy).name]
        known = own["lora"] + own["draft"] + own["accept"]
        width = k + 1 + (1 if strategy == "linear" else k + 1) * k
        shown = [
            own["one"],
            own["tokens"] - own["one"],
            own["masks"] - own["tokens"],
            own["lora"] - own["masks"],
            own["draft"],
            own["accept"],
            known,
            whole,
        ]
        piece_rows.append([f"{strategy}, k={k}", width, *(f"{value:.3f}" for value in shown)])
    names = [
        "forward, 1 token",
        "+ guesses",
        "+ mask rows",
        "+ LoRA and states",
        "drafting",
        "acceptance",
        "full step",
    ]
    piece_table = Table(
        "Where a step's time goes (ms)",
        ["step", "positions", *names, "measured in `generate`, per step"],
        piece_rows,
        f"{args.context} tokens in the cache. A full step has all its guesses; the last column is the mean over whole calls, "
        "where steps behind a miss of linear decoding and the last steps are smaller, and prefill and set-up are spread over all.",
    )
    pass_table = Table(
        "A forward pass of the bare model",
        ["positions", "ms", "x one position"],
        [[width, f"{ms:.3f}", ms / passes[1]] for width, ms in passes.items()],
        f"{args.context} tokens in the cache. Tokens per step divided by the last column is the most that can be gained.",
    )
    best = max(
        (row for row in rows if row["method"].startswith("multi")), key=lambda r: statistics.median(r["over_plain"])
    )
    rivals = [f"{r['method']} {statistics.median(r['over_plain']):.2f}x" for r in rows[1 : len(rows) - 3 * len(ks)]]
    lead = (
        f"**Fastest: {best['method']}, {statistics.median(best['over_plain']):.2f} times plain `generate`, "
        f"{statistics.median(best['over_bare_loop']):.2f} times the bare loop without speculation.** Others: {', '.join(rivals)}."
    )
    data = {
        "model": last_part(args.model),
        "adapter": last_part(args.adapter),
        "draft_model": last_part(args.draft_model),
        "methods": rows,
        "ms_per_step": step_ms,
        "pieces_ms": [{"strategy": s, "k": k, **own} for (s, k), own in pieces.items()],
        "passes_ms": passes,
    }
    name = f"wall_clock_{last_part(args.model)}" + ("" if args.prompt_set == "samples" else f"_{args.prompt_set}")
    title = f"Wall-clock of {last_part(args.model)}"
    write(name, title, [main_table, piece_table, pass_table], data, base, args.results_dir, lead)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
