"""What the adapter holds beside LoRA: the mask vectors and the sampler head."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .configuration import GatedLoraConfig


class Gate:
    """
    Says which positions of the current forward pass are masks. One object is shared by all layers of a model.

    It is closed (`positions = 0`) except inside `with gate.open(...)`, so a model that carries the adapter computes what
    the base model computes unless somebody asks for masks.
    """

    def __init__(self) -> None:
        self.positions: int | torch.Tensor = 0
        self.shape: tuple[int, int] = (0, 0)

    def open(self, positions: int | torch.Tensor, shape: tuple[int, int]) -> _OpenGate:
        """
        Args:
            positions (`int` or `torch.BoolTensor` of shape `(batch_size, sequence_length)`):
                The number of masks at the end of the sequence, or True at each mask.
            shape (`tuple[int, int]`):
                `(batch_size, sequence_length)` of the pass.
        """
        return _OpenGate(self, positions, shape)

    def sequences(self, inputs: torch.Tensor) -> torch.Tensor:
        """
        What a layer is given, or gives, as `(batch_size, sequence_length, features)`. Some models (opt, experts shared by
        all tokens) lay all sequences of a batch one behind the other.

        Raises:
            ValueError: where a layer has not exactly the tokens of the pass, so that nobody knows which of them are masks.
        """
        if inputs.shape[:-1] == self.shape:
            return inputs
        if inputs.ndim != 2 or inputs.shape[0] != self.shape[0] * self.shape[1]:
            raise ValueError(
                f"A layer with gated LoRA got an input of shape {tuple(inputs.shape)} in a pass over {self.shape[0]} "
                f"sequences of {self.shape[1]} positions, so it can't tell masks from tokens. Leave the layers that see "
                "some of the tokens only (experts, a pooler), or something else, out of `target_modules`, or name them in "
                "`exclude_modules`."
            )
        return inputs.unflatten(0, self.shape)


class _OpenGate:
    def __init__(self, gate: Gate, positions: int | torch.Tensor, shape: tuple[int, int]):
        self.gate, self.positions, self.shape = gate, positions, shape

    def __enter__(self) -> None:
        self.gate.positions, self.gate.shape = self.positions, self.shape

    def __exit__(self, *exc_info: Any) -> None:
        self.gate.positions = 0


class MtpHead(nn.Module, BaseTunerLayer):
    """
    Mask vectors and sampler head of every adapter on one model, kept as PEFT keeps LoRA matrices: one entry per adapter
    name in each container, so that saving, loading, switching, disabling and deleting are PEFT's own.

    The sampler (paper, section 2.3) turns the embedding of the token just chosen and the hidden state of a mask into a
    state for the model's own unembedding: two blocks of linear layer, SiLU and layer norm.

    Args:
        hidden_size (`int`):
            Width of the base model.
    """

    adapter_layer_names = (
        "lora_mask_vectors",
        "lora_sampler_in",
        "lora_sampler_in_norm",
        "lora_sampler_out",
        "lora_sampler_out_norm",
    )

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.gate = Gate()
        self.base_device = torch.device("cpu")
        self.residual: dict[str, bool] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.lora_mask_vectors = nn.ParameterDict()
        self.lora_sampler_in = nn.ModuleDict()
        self.lora_sampler_in_norm = nn.ModuleDict()
        self.lora_sampler_out = nn.ModuleDict()
        self.lora_sampler_out_norm = nn.ModuleDict()

    def add_adapter(self, name: str, config: GatedLoraConfig, embeddings: Any) -> None:
        """
        Args:
            name (`str`):
                Name of the adapter.
            config ([`GatedLoraConfig`]):
                Its configuration.
            embeddings (`nn.Module`):
                The base model's input embedding; the masks start with the mean and the deviation of its outputs.
        """
        self.lora_mask_vectors[name] = nn.Parameter(_like_embeddings(embeddings, config.num_masks))
        self.lora_sampler_in[name] = nn.Linear(2 * self.hidden_size, self.hidden_size)
        self.lora_sampler_in_norm[name] = nn.LayerNorm(self.hidden_size)
        self.lora_sampler_out[name] = nn.Linear(self.hidden_size, self.hidden_size)
        last_norm = nn.LayerNorm(self.hidden_size)
        if config.sampler_residual:
            nn.init.zeros_(last_norm.weight)
        self.lora_sampler_out_norm[name] = last_norm
        self.residual[name] = config.sampler_residual
        if config.frozen_masks:
            self.frozen_peft_weight_names[name] = ("lora_mask_vectors",)
        weight = embeddings.weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        for container in self.adapter_layer_names[1:]:
            getattr(self, container)[name].to(dtype=dtype)
        self.base_device = weight.device

    @contextlib.contextmanager
    def onloaded(self) -> Iterator[None]:
        """Within this context weights that accelerate offloads are there: decoding reads them without calling modules."""
        with contextlib.ExitStack() as stack:
            for module in self.modules():
                stack.enter_context(align_module_device(module))
            yield

    def sample_states(self, name: str, previous_embeddings: torch.Tensor, mask_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            name (`str`):
                Name of the adapter.
            previous_embeddings (`torch.Tensor` of shape `(..., hidden_size)`):
                Input embedding of the token before the one to predict.
            mask_states (`torch.Tensor` of shape `(..., hidden_size)`):
                Hidden states of the masks behind the final norm.

        Returns:
            `torch.Tensor` of shape `(..., hidden_size)`: the states to unembed.
        """
        first: Any = self.lora_sampler_in[name]
        inputs = torch.cat([previous_embeddings, mask_states], dim=-1).to(first.weight.dtype)
        hidden = self.lora_sampler_in_norm[name](nn.functional.silu(first(inputs)))
        hidden = self.lora_sampler_out_norm[name](nn.functional.silu(self.lora_sampler_out[name](hidden)))
        hidden = hidden.to(mask_states.dtype)
        return hidden + mask_states if self.residual[name] else hidden

    @torch.no_grad()
    def draft(
        self,
        name: str,
        last_token: torch.Tensor,
        mask_states: torch.Tensor,
        embeddings: nn.Module,
        unembed: Callable[[torch.Tensor], torch.Tensor],
        least_probability: float = 0.0,
    ) -> tuple[torch.Tensor, list[float]]:
        """
        Guesses the successors of a token greedily, each guess fed to the next.

        Args:
            name (`str`):
                Name of the adapter.
            last_token (`torch.LongTensor` of shape `(1,)`):
                The token before the first guess.
            mask_states (`torch.Tensor` of shape `(num_guesses, hidden_size)`):
                Hidden states of the masks of its block.
            embeddings (`nn.Module`):
                The base model's input embedding.
            unembed (`Callable`):
                From states to the base model's logits.
            least_probability (`float`, *optional*, defaults to `0.0`):
                Ends with the first guess that is less likely to be reached and right; 0 makes all of them.

        Returns:
            `tuple`: the guesses, of shape `(num_guesses,)` or shorter, and for each the probability by the sampler that it and
            all before it are right; no probabilities where none was asked for.
        """
        first: Any = self.lora_sampler_in[name]
        second: Any = self.lora_sampler_out[name]
        first_norm: Any = self.lora_sampler_in_norm[name]
        second_norm: Any = self.lora_sampler_out_norm[name]
        size, dtype, residual = (self.hidden_size,), first.weight.dtype, self.residual[name]
        # The share of the masks is the same whatever is chosen: one product for all of them.
        of_embedding, of_mask = first.weight[:, : self.hidden_size].t(), first.weight[:, self.hidden_size :]
        from_masks = nn.functional.linear(mask_states.to(dtype), of_mask, first.bias)
        # [`sample_states`] spelled out in functions: on a small model calling modules costs as much as computing.
        token, guesses, probabilities, reached = last_token, [], [], 1.0
        for from_mask, mask_state in zip(from_masks.split(1), mask_states.split(1), strict=True):
            hidden = nn.functional.silu(torch.addmm(from_mask, embeddings(token).to(dtype), of_embedding))
            hidden = torch.layer_norm(hidden, size, first_norm.weight, first_norm.bias, first_norm.eps)
            hidden = nn.functional.silu(nn.functional.linear(hidden, second.weight, second.bias))
            hidden = torch.layer_norm(hidden, size, second_norm.weight, second_norm.bias, second_norm.eps)
            hidden = hidden.to(mask_state.dtype)
            logits = unembed(hidden + mask_state if residual else hidden)
            highest, token = logits.max(dim=-1)
            guesses.append(token)
            if least_probability:
                reached *= math.exp(highest.item() - logits.logsumexp(dim=-1).item())
                probabilities.append(reached)
                if reached < least_probability:
                    break
        return torch.cat(guesses), probabilities

    # PEFT asks these of every tuner layer; there is no base layer here to answer for us.
    @property
    def weight(self) -> torch.Tensor:
        return next(self.parameters())

    @property
    def bias(self) -> None:
        return None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or self.base_device
        for container in self.adapter_layer_names:
            if adapter_name in getattr(self, container):
                entry = getattr(self, container)[adapter_name]
                if container == "lora_mask_vectors":
                    self.lora_mask_vectors[adapter_name] = nn.Parameter(
                        entry.to(device), requires_grad=entry.requires_grad
                    )
                else:
                    entry.to(device)


def highest_probability(logits: torch.Tensor) -> torch.Tensor:
    """Probability of the most likely token of each row of logits `(..., vocab_size)`."""
    return (logits.max(dim=-1).values - logits.logsumexp(dim=-1)).exp()


def _like_embeddings(embeddings: Any, num_masks: int) -> torch.Tensor:
    """Random vectors with the per-dimension mean and deviation of what the embedding gives for a token."""
    weight = embeddings.weight
    if weight.device.type == "meta":
        return torch.empty(num_masks, weight.shape[-1], device="meta", dtype=weight.dtype)
    # Through the module and not from its weight: some models (gemma) scale inside it.
    table = embeddings(torch.arange(weight.shape[0], device=weight.device)).detach().float()
    vectors = table.mean(0) + table.std(0) * torch.randn(num_masks, table.shape[-1], device=table.device)
    return vectors.to(weight.dtype if weight.is_floating_point() else torch.float32)
