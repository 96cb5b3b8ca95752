"""How much each neuron of each MLP matters and how large its output is, measured on text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .nested_mlp import projection_names


@dataclass
class Calibration:
    """
    What the MLPs did on calibration text, layer by layer.

    Args:
        scores (`list[torch.Tensor]`):
            Importance of each neuron, a float64 tensor of shape `(intermediate_size,)` on the CPU.
        output_norms (`list[float]`, *optional*):
            Root of the mean squared norm of a token's output; None where nothing was run.
    """

    scores: list[torch.Tensor]
    output_norms: list[float] | None


def neuron_importance(
    model: PreTrainedModel,
    mlps: list[Any],
    batches: list[dict[str, torch.Tensor]],
    importance: str,
    disable_tqdm: bool = False,
) -> Calibration:
    """
    Args:
        model ([`~transformers.PreTrainedModel`]):
            The dense model.
        mlps (`list[nn.Module]`):
            Its MLPs, layer by layer.
        batches (`list[dict[str, torch.Tensor]]`):
            Text, see [`calibration_batches`].
        importance (`str`):
            See [`convert_to_dynamoe`].
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Hides the progress bar.

    Returns:
        [`Calibration`]

    Raises:
        ValueError: for activations that are no numbers.
    """
    downs = [getattr(mlp, projection_names(mlp)[-1]) for mlp in mlps]  # type: ignore[index]
    if importance == "none":
        return Calibration([torch.ones(down.in_features, dtype=torch.float64) for down in downs], None)
    squares = [0.0] * len(downs)
    sums = [torch.zeros(down.in_features, dtype=torch.float64) for down in downs]
    real: torch.Tensor = torch.ones(())
    taylor = importance == "taylor"

    def add(layer: int, values: torch.Tensor) -> None:
        # Padding is text that nobody wrote.
        sums[layer] += values.abs()[real.to(values.device).bool()].sum(0).double().cpu()

    def watch(layer: int) -> Any:
        def behind_down(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            hidden = args[0]
            squares[layer] += float(output.detach().double().square().sum(-1)[real.to(output.device).bool()].sum())
            if taylor:
                hidden.register_hook(lambda gradient: add(layer, hidden.detach() * gradient))
            else:
                add(layer, hidden)

        return behind_down

    handles = [down.register_forward_hook(watch(layer)) for layer, down in enumerate(downs)]
    # Taylor needs gradients of activations alone: with one input that asks for them, no weight has to.
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for batch in tqdm(batches, desc="ranking neurons", unit="batch", disable=disable_tqdm):
            ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            real = mask
            with torch.set_grad_enabled(taylor):
                embeddings = model.get_input_embeddings()(ids).requires_grad_(taylor)
                labels = ids.masked_fill(mask == 0, -100) if taylor else None
                outputs = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels, use_cache=False)
                if taylor:
                    # The loss is a mean: back to a sum, so that batches of any size count their tokens alike.
                    (outputs.loss * mask[:, 1:].sum()).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
    broken = [layer for layer, total in enumerate(sums) if not total.isfinite().all()]
    if broken:
        raise ValueError(
            f"The model's activations are NaN or infinite in {len(broken)} of {len(sums)} layers, the first {broken[0]}, on the "
            "calibration text: its weights are damaged, or its precision is too low (try `dtype=torch.bfloat16`)."
        )
    count = sum(int(batch["attention_mask"].sum()) for batch in batches)
    scores = [total / count for total in sums]
    if importance == "activation_norm":
        scores = [s * d.weight.detach().double().norm(dim=0).cpu() for s, d in zip(scores, downs, strict=True)]
    return Calibration(scores, [(square / count) ** 0.5 for square in squares])
