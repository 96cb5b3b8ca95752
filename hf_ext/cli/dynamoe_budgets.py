"""A nested model at several budgets: quality, time, and where its tokens go."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from hf_ext.cli.charts import Shades
from hf_ext.cli.compare import progress_bar, wait_for
from hf_ext.cli.report import token_texts


@dataclass
class Budget:
    """
    A nested model at one budget, on one text.

    Args:
        name (`str`):
            As tables show it.
        sensitivity (`float`, *optional*):
            What tokens demanded; `None` where one expert was prescribed for all.
        perplexity (`float`):
            Of the next token.
        active_fraction (`float`), active_parameters (`float`):
            Mean share of the MLPs' neurons, and number of parameters, that a token used.
        seconds (`float`):
            Time to read the text, the sum over batches of the median over repeats.
        shares (`list[list[float]]`):
            For each layer, the share of tokens that took each expert.
        confusion (`list[list[list[int]]]`, *optional*):
            For each layer, number of tokens by label (rows) and router's choice (columns). Only where routers choose.
    """

    name: str
    sensitivity: float | None
    perplexity: float
    active_fraction: float
    active_parameters: float
    seconds: float
    shares: list[list[float]]
    confusion: list[list[list[int]]] | None = None

    @property
    def accuracies(self) -> list[float] | None:
        """For each layer, the share of tokens whose router said what their label says."""
        if self.confusion is None:
            return None
        return [sum(row[i] for i, row in enumerate(layer)) / sum(map(sum, layer)) for layer in self.confusion]

    @property
    def router_accuracy(self) -> float | None:
        return None if self.accuracies is None else statistics.mean(self.accuracies)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "router_accuracy": self.router_accuracy}


def batches_of(
    rows: Sequence[Sequence[int]], batch_size: int, device: torch.device | str
) -> list[dict[str, torch.Tensor]]:
    """Rows of like length together, padded on the right."""
    ordered = sorted(rows, key=len)
    batches = []
    for start in range(0, len(ordered), batch_size):
        part = [torch.tensor(row) for row in ordered[start : start + batch_size]]
        lengths = torch.tensor([len(row) for row in part])
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return batches


def served_sensitivities(config: Any, wanted: Sequence[float] | None, usual: Sequence[float]) -> list[float]:
    """What was asked for, else what is usual; classifiers have one of their own. Full sensitivity, the last, is always there."""
    own = config.sensitivity if config.sensitivity < 1 else config.label_sensitivity
    if config.router_type == "classifier":
        usual = [] if own is None else [own]
    return sorted({*(wanted or usual), 1.0})


@torch.no_grad()
def measure(
    model: Any,
    batches: Sequence[dict[str, torch.Tensor]],
    sensitivities: Sequence[float],
    *,
    experts: Sequence[int] = (),
    repeats: int = 3,
    console: Console | None = None,
) -> list[Budget]:
    """
    Reads a text at every budget. Each reads every batch once untimed, which counts; then the budgets take turns, batch by
    batch, so that whatever else the machine does slows all of them alike.

    Args:
        model ([`DynaMoeForCausalLM`]):
            The nested model.
        batches (`Sequence[dict[str, torch.Tensor]]`):
            From [`batches_of`].
        sensitivities (`Sequence[float]`):
            Routed budgets.
        experts (`Sequence[int]`, *optional*):
            Fixed budgets: one expert for every token.
        repeats (`int`, *optional*, defaults to `3`):
            Timed readings; 0 leaves `seconds` at 0.
        console ([`~rich.console.Console`], *optional*):
            Where the progress bar is drawn.

    Returns:
        `list[Budget]`: routed ones first, each in the order given.
    """
    model.eval()
    names = [*(f"θ = {value:g}" for value in sensitivities), *(f"expert {expert + 1} for all" for expert in experts)]
    calls: list[dict[str, Any]] = [
        *({"sensitivity": s} for s in sensitivities),
        *({"expert_index": e} for e in experts),
    ]
    budgets = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(calls) * len(batches) * (repeats + 1))

        def show(name: str) -> None:
            progress.update(task, advance=1, description=name)

        for name, call in zip(names, calls, strict=True):
            budgets.append(_counted(model, batches, name, call, show))
        for batch in batches:
            seconds: list[list[float]] = [[] for _ in calls]
            for _ in range(repeats):
                for name, call, own in zip(names, calls, seconds, strict=True):
                    show(f"{name}, timed")
                    own.append(_timed(model, batch, call))
            for budget, own in zip(budgets, seconds, strict=True):
                budget.seconds += statistics.median(own) if own else 0.0
    return budgets


def _counted(
    model: Any,
    batches: Sequence[dict[str, torch.Tensor]],
    name: str,
    call: dict[str, Any],
    show: Callable[[str], None],
) -> Budget:
    config = model.config
    sensitivity = call.get("sensitivity")
    measures = sensitivity is not None and sensitivity < 1
    loss = active = 0.0
    num_labels = num_tokens = 0
    taken: Any = 0
    confusion: Any = 0
    for batch in batches:
        show(name)
        outputs = model(**batch, **call, output_router_logits=True, output_nearness=measures, use_cache=False)
        mask = batch["attention_mask"].bool()
        labels = batch["input_ids"][:, 1:].masked_fill(~mask[:, 1:], -100)
        logits = outputs.logits[:, :-1].float().flatten(0, 1)
        loss += float(torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum"))
        num_labels += int((labels != -100).sum())
        num_tokens += int(mask.sum())
        active += float((outputs.active_parameters * mask).sum())
        experts = outputs.expert_index[:, mask]
        taken = taken + _counts(experts, config.num_experts)
        if measures:
            wanted = model.labels(outputs.nearness, sensitivity)[:, mask]
            confusion = confusion + _counts(wanted * config.num_experts + experts, config.num_experts**2)
    shares = taken / num_tokens
    widths = torch.tensor(config.expert_widths) / config.expert_widths[-1]
    return Budget(
        name=name,
        sensitivity=sensitivity,
        perplexity=math.exp(min(loss / max(num_labels, 1), 700)),
        active_fraction=float((shares * widths).sum(-1).mean()),
        active_parameters=active / num_tokens,
        seconds=0.0,
        shares=shares.tolist(),
        confusion=confusion.unflatten(-1, (config.num_experts, -1)).tolist() if measures else None,
    )


def _counts(numbers: torch.Tensor, length: int) -> torch.Tensor:
    """How often each number occurs in each row."""
    return torch.stack([row.cpu().bincount(minlength=length) for row in numbers])


def _timed(model: Any, batch: dict[str, torch.Tensor], call: dict[str, Any]) -> float:
    wait_for(model.device)
    start = time.perf_counter()
    model(**batch, **call, use_cache=False)
    wait_for(model.device)
    return time.perf_counter() - start


@torch.no_grad()
def shaded_text(model: Any, tokenizer: Any, ids: Sequence[int], sensitivity: float, title: str) -> Shades:
    """A text in which each token is shaded by the mean width of the experts that it took."""
    inputs = torch.tensor([list(ids)], device=model.device)
    experts = (
        model(inputs, sensitivity=sensitivity, output_router_logits=True, use_cache=False).expert_index[:, 0].cpu()
    )
    widths = torch.tensor(model.config.expert_widths)
    shares = (widths / widths[-1])[experts]
    notes = [
        f"{float(own.mean()):.0%} of the MLPs; by layer: {', '.join(f'{share:.0%}' for share in own.tolist())}"
        for own in shares.T
    ]
    texts = token_texts(tokenizer, [], ids)
    return Shades(title, list(zip(texts, shares.mean(0).tolist(), notes, strict=True)), "the MLPs")
