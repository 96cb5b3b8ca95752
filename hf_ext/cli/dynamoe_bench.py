"""`hf-ext dynamoe bench`: time of decoding and of prefill against the dense model, at several active fractions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext import DynaMoeForCausalLM, convert_to_dynamoe
from hf_ext.cli.compare import describe_machine, progress_bar, share_weights, wait_for
from hf_ext.cli.dynamoe_budgets import served_sensitivities
from hf_ext.cli.dynamoe_views import shortened
from hf_ext.cli.loading import chosen_device, load_nested, make_folder, number_format, short_name, suitable_threads
from hf_ext.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    SensitivityOption,
    ThreadsOption,
    integers,
)
from hf_ext.cli.report import Table, rich_table, write_json


@dataclass
class Timing:
    """
    One way of running the model.

    Args:
        name (`str`):
            As tables show it.
        decode_fraction (`float`), prefill_fraction (`float`):
            Share of the MLPs' neurons that tokens used.
        decode_seconds (`float`), prefill_seconds (`float`):
            Per token; medians over the repeats.
        decode_speedup (`float`), prefill_speedup (`float`):
            The dense model's time over this one's.
    """

    name: str
    decode_fraction: float
    prefill_fraction: float
    decode_seconds: float
    prefill_seconds: float
    decode_speedup: float = 1.0
    prefill_speedup: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def random_model(shape: Sequence[int], num_experts: int, device: str | None, dtype: str) -> DynaMoeForCausalLM:
    """
    A nested llama with random weights, whose routers spread the tokens over all experts.

    Args:
        shape (`Sequence[int]`):
            Width of the model, of its MLPs, and number of layers.
        num_experts (`int`):
            Number of experts.
        device (`str`, *optional*), dtype (`str`):
            Where it lies, and its number format; `"auto"` is float32.

    Raises:
        typer.BadParameter: for a shape that no model can have, and for a number format or device that there isn't.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise typer.BadParameter(
            f"--shape is hidden,intermediate,layers such as 2048,8192,8; got {','.join(map(str, shape))}."
        )
    hidden, intermediate, layers = shape
    heads = max(1, hidden // 64)
    if hidden % (2 * heads):
        raise typer.BadParameter(
            f"--shape: a width of {hidden} doesn't divide into {heads} heads; take a multiple of 64."
        )
    device, weights = chosen_device(device), number_format("float32" if dtype == "auto" else dtype)
    torch.manual_seed(0)
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=4096,
            dtype=weights,
        )
    ).to(weights)
    try:
        model = convert_to_dynamoe(dense, num_experts, importance="none", disable_tqdm=True)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for mlp in model.nested_mlps():
        torch.nn.init.normal_(mlp.router.out.weight, std=0.3)
        torch.nn.init.zeros_(mlp.router.out.bias)
    return model.to(device).eval()


def random_tokens(model: Any, batch_size: int, num_tokens: int) -> torch.Tensor:
    """For a model whose weights are random too, or where no text is at hand."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch_size, num_tokens), generator=generator).to(model.device)


def dense_of(model: Any) -> Any:
    """The dense model that a nested one was made of, on the same weights."""
    dense = share_weights(model.model)
    nested = type(model.nested_mlps()[0])
    for parent in list(dense.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nested):
                setattr(parent, name, child.dense)
    return dense.eval()


@torch.no_grad()
def measure_times(
    model: Any,
    sensitivities: Sequence[float],
    *,
    prompt: torch.Tensor,
    new_tokens: int = 32,
    repeats: int = 3,
    console: Console | None = None,
) -> list[Timing]:
    """
    Times the dense model, each expert for all tokens, and the routers, which take turns.

    Args:
        model ([`DynaMoeForCausalLM`]):
            The nested model.
        sensitivities (`Sequence[float]`):
            What is asked of the routers.
        prompt (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            What is read in a prefill.
        new_tokens (`int`, *optional*, defaults to `32`):
            Tokens that its first row is continued by.
        repeats (`int`, *optional*, defaults to `3`):
            Timed runs; the median counts.
        console ([`~rich.console.Console`], *optional*):
            Where the progress bar is drawn.

    Returns:
        `list[Timing]`: the dense model first.
    """
    config = model.config
    dense = dense_of(model)
    ways: list[tuple[str, Any, dict[str, Any]]] = [("dense", dense, {})]
    ways += [(f"expert {e + 1} for all", model, {"expert_index": e}) for e in reversed(range(config.num_experts))]
    ways += [(f"routers, θ = {value:g}", model, {"sensitivity": value}) for value in sensitivities]
    decodes: list[list[float]] = [[] for _ in ways]
    prefills: list[list[float]] = [[] for _ in ways]
    fractions = [(1.0, 1.0)] * len(ways)
    with progress_bar(console) as progress:
        task = progress.add_task("", total=(repeats + 1) * len(ways))
        for repeat in range(repeats + 1):
            for i, (name, own, call) in enumerate(ways):
                progress.update(task, description=name)
                prefill, prefill_fraction = _prefill(own, prompt, call)
                decode, decode_fraction = _decode(own, prompt[:1], new_tokens, call)
                progress.update(task, advance=1)
                fractions[i] = decode_fraction, prefill_fraction
                if repeat:  # the first warms up
                    decodes[i].append(decode / new_tokens)
                    prefills[i].append(prefill / prompt.numel())
    timings = [
        Timing(name, *fraction, statistics.median(decode), statistics.median(prefill))
        for (name, _, _), fraction, decode, prefill in zip(ways, fractions, decodes, prefills, strict=True)
    ]
    for timing in timings:
        timing.decode_speedup = timings[0].decode_seconds / timing.decode_seconds
        timing.prefill_speedup = timings[0].prefill_seconds / timing.prefill_seconds
    return timings


def _prefill(model: Any, prompt: torch.Tensor, call: dict[str, Any]) -> tuple[float, float]:
    _fraction(model)
    wait_for(model.device)
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1, **call)
    wait_for(model.device)
    return time.perf_counter() - start, _fraction(model)


def _decode(model: Any, prompt: torch.Tensor, new_tokens: int, call: dict[str, Any]) -> tuple[float, float]:
    outputs = model(prompt, use_cache=True, logits_to_keep=1, **call)
    _fraction(model)
    wait_for(model.device)
    start = time.perf_counter()
    for _ in range(new_tokens):
        token = outputs.logits[:, -1:].argmax(-1)
        outputs = model(token, past_key_values=outputs.past_key_values, use_cache=True, **call)
    wait_for(model.device)
    return time.perf_counter() - start, _fraction(model)


def _fraction(model: Any) -> float:
    """Share of the MLPs that was used since the last question."""
    if not isinstance(model, DynaMoeForCausalLM):
        return 1.0
    try:
        return model.expert_usage(reset=True).active_fraction
    except ValueError:  # nothing was routed since
        return 0.0


def timings_table(timings: Sequence[Timing], caption: str) -> Table:
    """The table that `dynamoe bench` prints; the fastest decoding is the one emphasised."""
    columns = ("way", "decode: MLP", "ms per token", "speed-up", "prefill: MLP", "ms per token", "speed-up")
    rows = [
        (
            timing.name,
            f"{timing.decode_fraction:.0%}",
            f"{1000 * timing.decode_seconds:.2f}",
            f"{timing.decode_speedup:.2f}x",
            f"{timing.prefill_fraction:.0%}",
            f"{1000 * timing.prefill_seconds:.3f}",
            f"{timing.prefill_speedup:.2f}x",
        )
        for timing in timings
    ]
    return Table(columns, rows, caption, max(range(len(timings)), key=lambda i: timings[i].decode_speedup))


def mlp_share(model: Any) -> float:
    """Share of a model's parameters that lies in its MLPs."""
    neurons = sum(mlp.parameters_per_neuron for mlp in model.nested_mlps()) * model.config.expert_widths[-1]
    return neurons / model.num_parameters()


def bench(
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a converted model.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Instead of a model, random weights: hidden,intermediate,layers as in 2048,8192,8."),
    ] = None,
    num_experts: Annotated[int, typer.Option(help="Number of experts, with --shape.")] = 4,
    sensitivity: SensitivityOption = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What is read, as often as it takes, and continued. By default random tokens, all difficult."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prefill.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are decoded.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a prefill; decoding has one.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")] = 3,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    json_file: JsonOption = None,
) -> None:
    """
    Time decoding and prefill against the dense model: with one expert for all tokens, and with routers.

    All ways take turns in one run, so that what else the machine does slows them alike. With random weights the routers
    are random too: their times are real, their choices mean nothing.
    """
    console = Console()
    if (model is None) == (shape is None):
        raise typer.BadParameter("give either --model, a converted model, or --shape, as in --shape 2048,8192,8.")
    tokenizer = None
    with console.status("Making the model" if model is None else "Loading the model"):
        if model is None:
            moe, name = random_model(integers("--shape", str(shape)), num_experts, device, dtype), f"random, {shape}"
        else:
            (moe, tokenizer), name = load_nested(model, device, dtype), short_name(model)
    limit = getattr(moe.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise typer.BadParameter(
            f"--prompt-tokens {prompt_tokens} and --new-tokens {new_tokens} exceed the model's context of {limit} tokens."
        )
    read = random_tokens(moe, batch_size, prompt_tokens)
    if prompt is not None:
        if tokenizer is None:
            raise typer.BadParameter("--prompt needs a --model: random weights have no tokenizer.")
        ids = torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.long, device=moe.device)
        if len(ids) == 0:
            raise typer.BadParameter(f"--prompt {prompt!r} has no token.")
        read = ids.repeat(prompt_tokens // len(ids) + 1)[:prompt_tokens].expand(batch_size, -1)
    if json_file is not None:
        make_folder(json_file.parent)
    wanted = [s for s in served_sensitivities(moe.config, sensitivity, (0.3, 0.5, 0.7)) if s < 1]
    with suitable_threads(moe, threads):
        try:
            timings = measure_times(moe, wanted, prompt=read, new_tokens=new_tokens, repeats=repeats, console=console)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        machine = describe_machine(moe)
    caption = (
        f"{name}: {shortened(moe.num_parameters())} parameters, {mlp_share(moe):.0%} of them in MLPs; decoding 1 sequence, "
        f"prefill of {batch_size} x {prompt_tokens} tokens"
    )
    console.print(rich_table(timings_table(timings, caption)))
    console.print("Measured on: " + ", ".join(f"{key} {value}" for key, value in machine.items()), style="dim")
    if json_file is not None:
        write_json(json_file, {"machine": machine, "model": name, "timings": [timing.to_dict() for timing in timings]})
        console.print(f"Written: {json_file}", markup=False, highlight=False)
