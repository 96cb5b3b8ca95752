"""Ways of decoding side by side: the same prompts, the same model, the same clock. `demo` and `mtp bench` print it."""

from __future__ import annotations

import copy
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_ext.metrics import distinct_ngrams, first_difference


class Strategy(StrEnum):
    """Where masks are placed, as `generate` names it; from the one that computes least to the one that guesses most."""

    linear = "linear"
    adaptive = "adaptive"
    quadratic = "quadratic"


@dataclass(frozen=True)
class Method:
    """
    One way of decoding.

    Args:
        name (`str`):
            As tables show it.
        generate_kwargs (`Mapping[str, Any]`, *optional*):
            What it adds to the call of `generate`.
        uses_adapter (`bool`, *optional*, defaults to `False`):
            Whether the model with the adapter generates, or the bare base model.
    """

    name: str
    generate_kwargs: Mapping[str, Any] = field(default_factory=dict)
    uses_adapter: bool = False


def plain() -> Method:
    """`generate` as it is: one token per step."""
    return Method("plain")


def prompt_lookup(num_tokens: int = 10) -> Method:
    """Guesses copied from earlier text with the same last words, as transformers ships it."""
    return Method("prompt lookup", {"prompt_lookup_num_tokens": num_tokens})


def assisted(draft_model: Any) -> Method:
    """Guesses from a smaller model with the same tokenizer, as transformers ships it."""
    return Method("assisted", {"assistant_model": draft_model})


def multi_token(k: int, strategy: str) -> Method:
    """Guesses from the model itself through its adapter."""
    kwargs = {"num_speculative_tokens": k, "speculation_strategy": str(strategy)}
    return Method(f"multi-token {strategy}, k={k}", kwargs, uses_adapter=True)


@dataclass
class Run:
    """
    One method on one prompt.

    Args:
        prompt_ids (`list[int]`), new_tokens (`list[int]`):
            What went in, what came out.
        seconds (`float`):
            Median over the repeats.
        num_steps (`int`):
            Passes of the model.
        first_difference (`int`, *optional*):
            Index of the first new token that is not the reference's; `None` where all are the same.
        step_lengths (`list[int]`, *optional*):
            Tokens that each step emitted, where the method reports them.
    """

    prompt_ids: list[int]
    new_tokens: list[int]
    seconds: float
    num_steps: int
    first_difference: int | None = None
    step_lengths: list[int] | None = None


@dataclass
class MethodResult:
    """
    One method on all prompts.

    `seconds` is the sum over the prompts of each one's median; `speedup` the ratio of its tokens per second to the
    reference's; `num_identical` the number of prompts on which every token is the reference's.
    """

    name: str
    num_prompts: int
    num_tokens: int
    num_steps: int
    seconds: float
    tokens_per_step: float
    tokens_per_second: float
    speedup: float
    num_identical: int
    distinct_4grams: float
    runs: list[Run] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single runs, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "runs"}


def compare(
    base_model: Any,
    adapter_model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    methods: Sequence[Method],
    *,
    max_new_tokens: int = 200,
    repeats: int = 3,
    console: Console | None = None,
) -> list[MethodResult]:
    """
    Completes every prompt with every method, greedily, one prompt at a time, and measures.

    The first method is the reference that outputs and speed are compared with. Each method first runs untimed on each
    prompt, which warms it up and counts its steps; then the methods take turns, prompt by prompt and repeat by repeat,
    so that whatever else the machine does slows all of them alike.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            The base model, free of adapters: layers with a disabled adapter are slower than layers without one, which
            would flatter every other method. [`share_weights`] gives one without a second copy of the weights.
        adapter_model ([`~peft.PeftModel`], *optional*):
            The same model with the adapter. `None` will do where no method uses it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Encodes the prompts.
        prompts (`Sequence[str]` or `Sequence[Sequence[int]]`):
            As text or as token ids.
        methods (`Sequence[Method]`):
            From [`plain`], [`prompt_lookup`], [`assisted`], [`multi_token`].
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Limit per prompt.
        repeats (`int`, *optional*, defaults to `3`):
            Timed runs per prompt and method; their median counts.
        console ([`~rich.console.Console`], *optional*):
            Where the progress bar is drawn.

    Returns:
        `list[MethodResult]`: in the order of `methods`.

    Raises:
        ValueError: if there are no prompts or methods, if a prompt has no token, or leaves no room for
            `max_new_tokens` within the context of the model.
    """
    if not methods:
        raise ValueError("`methods` is empty: nothing to compare.")
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
    if adapter_model is None and any(method.uses_adapter for method in methods):
        raise ValueError("Multi-token methods need `adapter_model`.")
    encoded = _encoded(base_model, tokenizer, prompts, max_new_tokens)
    base_model.eval()
    runs: list[list[Run]] = []
    with progress_bar(console) as progress, _without_upstream_noise():
        task = progress.add_task("", total=len(encoded) * len(methods) * (repeats + 1))
        for number, prompt_ids in enumerate(encoded, start=1):

            def show(method: Method, number: int = number) -> None:
                progress.update(task, advance=1, description=f"prompt {number} of {len(encoded)}, {method.name}")

            model_of = {True: adapter_model, False: base_model}
            runs.append(_one_prompt(model_of, tokenizer, prompt_ids, methods, max_new_tokens, repeats, show))
    return _summaries(methods, [list(own) for own in zip(*runs, strict=True)])


def _one_prompt(
    model_of: dict[bool, Any],
    tokenizer: Any,
    prompt_ids: list[int],
    methods: Sequence[Method],
    max_new_tokens: int,
    repeats: int,
    show: Callable[[Method], None],
) -> list[Run]:
    def call(method: Method) -> dict[str, Any]:
        return {"max_new_tokens": max_new_tokens, **method.generate_kwargs}

    runs = []
    for method in methods:
        show(method)
        runs.append(_counted(model_of, method, prompt_ids, call(method), tokenizer))
    outputs = [[run.new_tokens] for run in runs]
    seconds: list[list[float]] = [[] for _ in methods]
    for repeat in range(repeats):
        for turn in range(len(methods)):
            i = (turn + repeat) % len(methods)
            show(methods[i])
            model = model_of[methods[i].uses_adapter]
            new_tokens, elapsed = _timed(model, prompt_ids, call(methods[i]), tokenizer)
            outputs[i].append(new_tokens)
            seconds[i].append(elapsed)
    for run, own_outputs, own_seconds in zip(runs, outputs, seconds, strict=True):
        run.seconds = statistics.median(own_seconds)
        differences = [first_difference(runs[0].new_tokens, tokens) for tokens in own_outputs]
        run.first_difference = min((index for index in differences if index is not None), default=None)
    return runs


def _summaries(methods: Sequence[Method], runs: list[list[Run]]) -> list[MethodResult]:
    results: list[MethodResult] = []
    for method, own in zip(methods, runs, strict=True):
        tokens, steps = sum(len(run.new_tokens) for run in own), sum(run.num_steps for run in own)
        seconds = sum(run.seconds for run in own)
        results.append(
            MethodResult(
                name=method.name,
                num_prompts=len(own),
                num_tokens=tokens,
                num_steps=steps,
                seconds=seconds,
                tokens_per_step=tokens / steps,
                tokens_per_second=tokens / seconds,
                speedup=tokens / seconds / results[0].tokens_per_second if results else 1.0,
                num_identical=sum(run.first_difference is None for run in own),
                distinct_4grams=distinct_ngrams([run.new_tokens for run in own], n=4),
                runs=own,
            )
        )
    return results


def _encoded(base_model: Any, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int) -> list[list[int]]:
    if not prompts:
        raise ValueError("`prompts` is empty: nothing to complete.")
    encoded = [tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    limit = getattr(base_model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"The prompt {prompt!r} has no token.")
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"A prompt of {len(ids)} tokens with `max_new_tokens={max_new_tokens}` does not fit into the model's "
                f"context of {limit} tokens: shorten it, or lower `max_new_tokens`."
            )
    return encoded


def _generate(model: Any, prompt_ids: list[int], kwargs: Mapping[str, Any], tokenizer: Any) -> Any:
    input_ids = torch.tensor([prompt_ids], device=model.device)
    padding = model.generation_config.pad_token_id
    if padding is None:
        # No row is ever padded here; without an id, `generate` would warn at every call.
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        pad_token_id=padding,
        **kwargs,
    )


def _counted(
    model_of: dict[bool, Any], method: Method, prompt_ids: list[int], kwargs: Mapping[str, Any], tokenizer: Any
) -> Run:
    """An untimed run: its tokens and its steps, which are passes of the model."""
    if method.uses_adapter:
        output = _generate(model_of[True], prompt_ids, {**kwargs, "return_dict_in_generate": True}, tokenizer)
        sequence, steps, lengths = output.sequences[0], int(output.num_steps[0]), list(output.step_lengths[0])
    else:
        with _counting_passes(model_of[False]) as passes:
            sequence = _generate(model_of[False], prompt_ids, kwargs, tokenizer)[0]
        steps, lengths = len(passes), None
    new_tokens = sequence[len(prompt_ids) :].tolist()
    if lengths is None and steps == len(new_tokens):
        lengths = [1] * steps
    return Run(prompt_ids, new_tokens, seconds=0.0, num_steps=steps, step_lengths=lengths)


@contextmanager
def _counting_passes(model: Any) -> Iterator[list[None]]:
    passes: list[None] = []
    handle = model.register_forward_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        handle.remove()


@contextmanager
def _without_upstream_noise() -> Iterator[None]:
    """Keeps back what transformers says about the way in which its own assisted decoding calls its own `generate`."""

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message.startswith("Passing `generation_config` together") and "min_new_tokens" in message)

    logger = logging.getLogger("transformers.generation.utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _timed(model: Any, prompt_ids: list[int], kwargs: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], float]:
    wait_for(model.device)
    start = time.perf_counter()
    output = _generate(model, prompt_ids, kwargs, tokenizer)
    wait_for(model.device)
    return output[0, len(prompt_ids) :].tolist(), time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given: only then is a time a time."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def progress_bar(console: Console | None) -> Progress:
    """The bar of everything that takes more than a moment; it leaves no trace."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def share_weights(model: Any) -> Any:
    """
    A second model on the same weights: modules of its own, the parameters and buffers of `model`.

    An adapter that is then injected into `model` leaves it untouched, at no cost in memory.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def describe_machine(model: Any) -> dict[str, str]:
    """What a time depends on: processor, threads, device, number format and library versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {
        "processor": _processor_name(),
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return machine


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
