"""Which expert a token needs and which it gets: labels, the router, its loss. Written once, for training and decoding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


# Where a fresh router's outputs start: far enough for the full expert at any sensitivity in use, near enough to learn.
START = 4.0


def similarities(partial_outputs: torch.Tensor, similarity: str, output_norm: float | None = None) -> torch.Tensor:
    """
    How near each smaller expert's output comes to the whole MLP's, all from one dense pass (the paper, section 2.2).

    Args:
        partial_outputs (`torch.Tensor` of shape `(num_experts, ..., hidden_size)`):
            Outputs of all experts in ascending order; the last is the whole MLP's.
        similarity (`str`):
            `"projection"`: `<f_e, f> / <f, f>`. `"cosine"`: `<f_e, f> / (|f_e| |f|)`. `"error"`: `1 - |f - f_e|^2 / (|f| s)`
            with the layer's typical `|f|` for `s`.
        output_norm (`float`, *optional*):
            That `s`; by default the token's own `|f|`.

    Returns:
        `torch.Tensor` of shape `(..., num_experts - 1)`.
    """
    # In float32: a ratio of sums over the hidden dimension.
    smaller, whole = partial_outputs[:-1].float(), partial_outputs[-1].float()
    dot = (smaller * whole).sum(-1)
    tiny = torch.finfo(torch.float32).tiny
    if similarity == "projection":
        nearness = dot / (whole * whole).sum(-1).clamp(min=tiny)
    elif similarity == "cosine":
        nearness = dot / (smaller.norm(dim=-1) * whole.norm(dim=-1)).clamp(min=tiny)
    elif similarity == "error":
        norm = whole.norm(dim=-1)
        nearness = 1 - (whole - smaller).square().sum(-1) / (norm * (output_norm or norm)).clamp(min=tiny)
    else:
        raise ValueError(f"`similarity` must be 'projection', 'cosine' or 'error', got {similarity!r}.")
    return nearness.movedim(0, -1)


def smallest_sufficient(nearness: torch.Tensor, sensitivity: float | torch.Tensor) -> torch.Tensor:
    """
    The smallest expert that is near enough: the difficulty label of a token, or the choice of an ordinal router.

    Args:
        nearness (`torch.Tensor` of shape `(..., num_experts - 1)`):
            Measured or predicted nearness of all experts but the last, which is the whole MLP and always sufficient.
        sensitivity (`float` or `torch.Tensor` that broadcasts to `(...)`):
            Nearness demanded; 0 is met by every expert, and 1 by the whole MLP alone.

    Returns:
        `torch.LongTensor` of shape `(...)`.
    """
    # Nearness can exceed 1, and yet full sensitivity means the whole MLP; and be below 0, where no sensitivity demands nothing.
    if isinstance(sensitivity, torch.Tensor):
        sensitivity = sensitivity.to(nearness)[..., None]
        sufficient = ((nearness >= sensitivity) | (sensitivity <= 0)) & (sensitivity < 1)
    else:  # stays a number: as a tensor it would be a constant of a compiled graph, which each value makes anew
        demanded = math.inf if sensitivity >= 1 else sensitivity if sensitivity > 0 else -math.inf
        sufficient = nearness >= demanded
    # Nearness need not ascend: the first sufficient expert counts, whatever a larger one does.
    return (sufficient.cumsum(-1) == 0).sum(-1)


class RouterLinear(nn.Linear):
    """Not `nn.Linear` itself, which is what quantisation replaces: routers are small, and trained behind it too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # TRL trains a quantised model's other weights in bfloat16, whatever the states are in.
        return super().forward(input.to(self.weight.dtype))


class DynaMoeRouter(nn.Module):
    """
    Predicts a token's difficulty at one layer from the input of its MLP: two linear layers (the paper, section 2.3).

    Args:
        hidden_size (`int`):
            Width of the model.
        router_hidden_size (`int`):
            Width of the layer between.
        num_experts (`int`):
            Number of experts.
        router_type (`str`):
            `"ordinal"` or `"classifier"`.
    """

    def __init__(self, hidden_size: int, router_hidden_size: int, num_experts: int, router_type: str):
        super().__init__()
        self.router_type = router_type
        self.hidden = RouterLinear(hidden_size, router_hidden_size)
        self.out = RouterLinear(router_hidden_size, num_experts - 1 if router_type == "ordinal" else num_experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts at the full expert for every token."""
        self.hidden.reset_parameters()
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.bias.fill_(-START)
            if self.router_type == "classifier":
                self.out.bias[-1] = START

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`):
                Input of the MLP.

        Returns:
            `torch.Tensor` of shape `(..., num_experts - 1)`: logits of the nearness of each smaller expert; for a
            classifier of shape `(..., num_experts)`: logits of the label.
        """
        return self.out(nn.functional.silu(self.hidden(hidden_states)))


def chosen_experts(router_logits: torch.Tensor, router_type: str, sensitivity: float | torch.Tensor) -> torch.Tensor:
    """
    The experts that a router chooses, a `torch.LongTensor` of shape `(...)` for logits of shape `(..., outputs)`.

    A classifier's choice does not depend on the sensitivity, its labels did; yet full sensitivity is the whole MLP.
    """
    if router_type == "classifier":
        full = torch.as_tensor(sensitivity, device=router_logits.device) >= 1
        return router_logits.argmax(dim=-1).masked_fill(full, router_logits.shape[-1] - 1)
    return smallest_sufficient(router_logits.float().sigmoid(), sensitivity)


def straight_through(
    router_logits: torch.Tensor, sensitivity: float | torch.Tensor, expert_index: torch.Tensor
) -> torch.Tensor:
    """
    A choice of experts as weights of the chunks of neurons, which let a gradient through to the router.

    Forward they are 1 for the chunks that the expert has and 0 for the others. Backward they are the chances of these under
    logistic noise on the logits: the product of the chances that each smaller expert is not near enough.

    Args:
        router_logits (`torch.Tensor` of shape `(..., num_experts - 1)`):
            What an ordinal [`DynaMoeRouter`] returns.
        sensitivity (`float` or `torch.Tensor` that broadcasts to `(...)`):
            Nearness demanded.
        expert_index (`torch.LongTensor` of shape `(...)`):
            The experts that the tokens take.

    Returns:
        `torch.Tensor` of shape `(..., num_experts)`: of each chunk, the neurons by which an expert exceeds the one before.
    """
    logits = router_logits.float()
    demanded = torch.as_tensor(sensitivity, device=logits.device, dtype=logits.dtype).logit()
    chances = (demanded[..., None] - logits).sigmoid().cumprod(-1)
    used = expert_index[..., None] > torch.arange(logits.shape[-1], device=logits.device)
    return nn.functional.pad(used + (chances - chances.detach()), (1, 0), value=1.0)


def router_loss(
    router_logits: torch.Tensor, nearness: torch.Tensor, router_type: str, sensitivity: float | torch.Tensor
) -> torch.Tensor:
    """
    Loss of a router at each token.

    An ordinal router learns the nearness itself by binary cross-entropy, whose least value for a target between 0 and 1
    lies at the expected nearness; a classifier learns the label.

    Args:
        router_logits (`torch.Tensor` of shape `(..., outputs)`):
            What [`DynaMoeRouter`] returns.
        nearness (`torch.Tensor` of shape `(..., num_experts - 1)`):
            Measured nearness; no gradient flows into it.
        router_type (`str`):
            `"ordinal"` or `"classifier"`.
        sensitivity (`float` or `torch.Tensor`):
            What the labels of a classifier are made with.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    logits, nearness = router_logits.float(), nearness.detach()
    if router_type == "classifier":
        labels = smallest_sufficient(nearness, sensitivity)
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)
    targets = nearness.clamp(0, 1)
    return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)


def mean_over_tokens(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of `(batch_size, sequence_length)` values, without those where a mask of the same shape is 0."""
    if token_mask is None:
        return values.mean()
    weights = token_mask.to(values)
    return (values * weights).sum() / weights.sum().clamp(min=1)


def check_expert_index(expert_index: Any, num_layers: int, shape: tuple[int, ...], num_experts: int) -> None:
    """
    Refuses experts that the caller prescribes and that don't exist.

    Args:
        expert_index (`int` or `torch.LongTensor`, *optional*):
            One for all tokens, or one for each.
        num_layers (`int`), shape (`tuple[int, int]`), num_experts (`int`):
            Of the model, and `(batch_size, sequence_length)` of the tokens.

    Raises:
        ValueError: saying which there are.
    """
    if expert_index is None:
        return
    if isinstance(expert_index, torch.Tensor):
        if tuple(expert_index.shape) not in (shape, (num_layers, *shape)) or expert_index.dtype not in (
            torch.int32,
            torch.int64,
        ):
            raise ValueError(
                f"`expert_index` must be a number, or integers of shape {shape} or {(num_layers, *shape)}, got {expert_index.dtype} "
                f"of shape {tuple(expert_index.shape)}. In `generate`, whose passes differ in length, give a number."
            )
        # A graph can't ask for values.
        found = [] if torch.compiler.is_compiling() else [int(expert_index.min()), int(expert_index.max())]
    else:
        found = [expert_index]
    if any(isinstance(e, bool) or not isinstance(e, int) or not 0 <= e < num_experts for e in found):
        raise ValueError(f"`expert_index` must be from 0 to {num_experts - 1}, got {' to '.join(map(str, found))}.")


def check_forcing_mask(forcing_mask: Any, measures: bool, shape: tuple[int, ...]) -> None:
    """
    Refuses tokens that can't follow their labels.

    Args:
        forcing_mask (`torch.BoolTensor`, *optional*):
            Those that are to.
        measures (`bool`), shape (`tuple[int, int]`):
            Whether labels are measured, and `(batch_size, sequence_length)` of the tokens.

    Raises:
        ValueError: saying what fits.
    """
    if forcing_mask is None:
        return
    if not measures:
        raise ValueError("`forcing_mask` needs `output_nearness=True`: a token's label is measured then.")
    if not isinstance(forcing_mask, torch.Tensor) or forcing_mask.dtype != torch.bool:
        found = getattr(forcing_mask, "dtype", repr(forcing_mask))
        raise ValueError(f"`forcing_mask` must be a tensor of torch.bool, got {found}.")
    if tuple(forcing_mask.shape) != shape:
        raise ValueError(f"`forcing_mask` must have shape {shape}, got {tuple(forcing_mask.shape)}.")


def check_router_noise(router_noise: Any, router_type: str, shape: tuple[int, ...]) -> None:
    """
    Refuses noise that doesn't fit the routers.

    Args:
        router_noise (`torch.Tensor`, *optional*):
            What is added to the logits.
        router_type (`str`), shape (`tuple[int, ...]`):
            Of the model's routers, and `(num_layers, batch_size, sequence_length, num_experts - 1)` of their logits.

    Raises:
        ValueError: saying what fits.
    """
    if router_noise is None:
        return
    if router_type != "ordinal":
        raise ValueError(
            f"`router_noise` is for ordinal routers, and those of this model are {router_type}s: their choice among labels "
            "lets no gradient through. Leave it out, or convert with `router_type='ordinal'`."
        )
    if not isinstance(router_noise, torch.Tensor):
        raise ValueError(f"`router_noise` must be a tensor of shape {shape}, got {router_noise!r}.")
    if tuple(router_noise.shape) != shape:
        raise ValueError(f"`router_noise` must have shape {shape}, got {tuple(router_noise.shape)}.")
