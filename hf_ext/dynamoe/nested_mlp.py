"""The nested slice, written once: an MLP of which each token uses the first neurons only."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .configuration_dynamoe import DynaMoeConfig
from .routing import DynaMoeRouter, chosen_experts, similarities, smallest_sufficient, straight_through


# Names of an MLP's projections, its input side first and its output side last, and of its activation.
LAYOUTS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("dense_h_to_4h", "dense_4h_to_h"))
ACTIVATIONS = ("act_fn", "activation_fn", "act")
CONVERTIBLE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "phi3", "gpt_neox")


@dataclass
class LayerRouting:
    """What one layer did in one pass."""

    expert_index: torch.Tensor
    router_logits: torch.Tensor | None
    nearness: torch.Tensor | None


class PassSettings(NamedTuple):
    """What one pass is told, see [`DynaMoeForCausalLM.forward`]."""

    sensitivity: float | torch.Tensor
    expert_index: int | torch.Tensor | None = None
    forcing_mask: torch.Tensor | None = None
    router_noise: torch.Tensor | None = None
    wants_logits: bool = False
    measures: bool = False


class Routing:
    """
    How the current pass routes. One object is shared by all layers of a model; `begin` and `end` stand around a pass.

    Layers that a model's own checkpointing runs again in the backward pass route as they did, see `checkpointed`. For those
    that something else runs again, the settings stay until the next pass where gradients flow: there a pass has to go backward
    before the next one begins. Passes in several threads take turns.

    Args:
        sensitivity (`float`):
            The model's own.
    """

    def __init__(self, sensitivity: float):
        self.layers: list[LayerRouting] | None = None
        self.turn = threading.RLock()
        self.rest(sensitivity)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, turn=threading.RLock())

    def rest(self, sensitivity: float) -> None:
        """Between passes the model's own sensitivity holds: some trainers run the decoder alone."""
        self.own_sensitivity = sensitivity
        self.settings, self.layers = PassSettings(sensitivity), None

    def rest_outside_a_pass(self, *_: Any) -> None:
        """In front of the decoder, which may run alone: what the last pass of a training left is not meant for it."""
        if self.layers is None:
            self.rest(self.own_sensitivity)

    def alone(self) -> AbstractContextManager[Any]:
        """What a pass stands in; a graph that is being traced has no locks."""
        return nullcontext() if torch.compiler.is_compiling() else self.turn

    def begin(self, *settings: Any) -> None:
        """Starts a pass with the [`PassSettings`]."""
        self.settings, self.layers = PassSettings(*settings), []

    def checkpointed(self, checkpoint: Any, layer: Any, *args: Any) -> Any:
        """
        Runs a layer by a checkpointing function.

        Args:
            checkpoint (`Callable`):
                The function, such as `torch.utils.checkpoint.checkpoint`.
            layer (`Callable`), args (`Any`):
                What it is to run now, and again in the backward pass; other passes may have come between.
        """
        if torch.compiler.is_compiling():  # a graph holds both runs, and each its own settings
            return checkpoint(layer, *args)
        return checkpoint(partial(self._run, self.settings, layer), *args)

    def _run(self, settings: PassSettings, layer: Any, *args: Any) -> Any:
        with self.alone():
            now, self.settings = self.settings, settings
            try:
                return layer(*args)
            finally:
                self.settings = now

    def end(self, num_layers: int | None = None) -> list[LayerRouting]:
        """
        What the layers did, in order; from here on nothing is kept.

        Raises:
            ValueError: if fewer took part than there are.
        """
        layers, self.layers = self.layers, None
        assert layers is not None, "`begin` comes first"
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self.rest(self.own_sensitivity)
        if num_layers is not None and len(layers) != num_layers:
            raise ValueError(
                f"{len(layers)} of the model's {num_layers} nested MLPs took part: the others are copies, which hear nothing of "
                'how it routes, or were replaced. With PEFT, give `modules_to_save=["router"]` instead of whole MLPs, and '
                "adapt their projections by `target_modules`."
            )
        return layers

    def given_expert(self, layer: int, num_experts: int) -> int | torch.Tensor | None:
        """The expert that the caller or the sensitivity prescribes for a layer, or None where the router decides."""
        expert, sensitivity = self.settings.expert_index, self.settings.sensitivity
        if isinstance(expert, torch.Tensor):
            return expert[layer] if expert.dim() == 3 else expert
        if expert is None and isinstance(sensitivity, float) and sensitivity >= 1:
            return num_experts - 1
        return expert


class RoutedCheckpointing:
    """`activation_checkpointing_enable` for a model whose layers share how they route."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        # Not a closure, which a deep copy of the model would share.
        routed = partial(self.routing.checkpointed, gradient_checkpointing_func)  # type: ignore[attr-defined]
        super()._set_gradient_checkpointing(enable, routed, **kwargs)  # type: ignore[misc]


class NestedMlp(nn.Module):
    """
    An MLP and its router. Expert `e` is the first `widths[e]` neurons: slices of the dense weights, no copies.

    Args:
        dense (`nn.Module`):
            The MLP. At full width it is called as it stands, so that the output is the dense model's bit for bit.
        config ([`DynaMoeConfig`]):
            Widths and router.
        layer (`int`):
            Number of the layer.
        routing ([`Routing`]):
            Shared by all layers.
    """

    def __init__(self, dense: nn.Module, config: DynaMoeConfig, layer: int, routing: Routing):
        super().__init__()
        layout = projection_names(dense)
        assert layout is not None, "`nest_mlps` checks it"
        self.dense = dense
        self.inputs, self.output = layout[:-1], layout[-1]
        self.activation = activation_of(dense)
        self.config, self.layer, self.routing = config, layer, routing
        self.router = DynaMoeRouter(
            config.base_config.hidden_size, config.router_hidden_size, config.num_experts, config.router_type
        )
        # The base model's own rule would give it ordinary random weights.
        for module in self.router.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]

    @property
    def widths(self) -> list[int]:
        return self.config.expert_widths

    @property
    def parameters_per_neuron(self) -> int:
        """Weights and biases that belong to one neuron: its rows of the input side, its column of the output side."""
        total = num_weights(_linear(self.dense, self.output).weight)
        for name in self.inputs:
            total += sum(map(num_weights, _linear(self.dense, name).parameters(recurse=False)))
        return total // self.widths[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
                The MLP's input, behind the norm.
        """
        routing, last = self.routing, self.config.num_experts - 1
        now = routing.settings
        expert = routing.given_expert(self.layer, self.config.num_experts)
        if isinstance(expert, torch.Tensor):
            expert = expert.to(x.device)
        logits = nearness = hidden = chunks = None
        if expert is None or now.wants_logits:
            # A loss of the routed model is a function of the choice, and the choice of what the router sees.
            detach = self.config.detach_router_input and now.router_noise is None
            logits = self.router(x.detach() if detach else x)
        if now.measures:
            hidden = self._hidden(x)
            nearness = self._measure(hidden)
        if expert is None:
            assert logits is not None
            noise = now.router_noise
            noisy = logits if noise is None else logits + noise[self.layer].to(logits)
            expert = chosen_experts(noisy.detach(), self.config.router_type, now.sensitivity)
            if now.forcing_mask is not None and nearness is not None:
                label = smallest_sufficient(nearness, now.sensitivity)
                expert = torch.where(now.forcing_mask.to(label.device), label, expert)
            if noise is not None:
                chunks = straight_through(noisy, now.sensitivity, expert)
        if routing.layers is not None:
            index = expert if isinstance(expert, torch.Tensor) else torch.full(x.shape[:2], expert, device=x.device)
            routing.layers.append(LayerRouting(index, logits, nearness))
        if isinstance(expert, int):
            return self.dense(x) if expert == last else self._one_expert(x, expert, hidden)
        if chunks is not None:
            return self._weighted(self._hidden(x) if hidden is None else hidden, chunks)
        if hidden is not None or not self._can_slice():
            return self._masked(self._hidden(x) if hidden is None else hidden, expert)
        if expert.numel() == 1:
            single = int(expert)
            return self.dense(x) if single == last else self._one_expert(x, single, None)
        return self._by_chunks(x.flatten(0, -2), expert.flatten()).view_as(x)

    def _can_slice(self) -> bool:
        """
        Whether only what is needed can be computed: over plain linear layers, outside training, and not where a graph
        is being traced, which can't depend on data. The masked form is the same function at dense cost.
        """
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and self._is_plain()

    def _is_plain(self) -> bool:
        """No adapter, no quantised weight, none that is brought from elsewhere while its module runs (meta till then)."""
        layers = [getattr(self.dense, name) for name in (*self.inputs, self.output)]
        return all(type(layer) is nn.Linear and layer.weight.device.type != "meta" for layer in layers)

    def _one_expert(self, x: torch.Tensor, expert: int, hidden: torch.Tensor | None) -> torch.Tensor:
        width = self.widths[expert]
        if not self._is_plain():
            hidden = self._hidden(x) if hidden is None else hidden
            return self._masked(hidden, torch.full(x.shape[:-1], expert, device=x.device))
        hidden = self._hidden_slice(x, 0, width) if hidden is None else hidden[..., :width]
        down = _linear(self.dense, self.output)
        return F.linear(hidden, down.weight[:, :width], down.bias)

    def _masked(self, hidden: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        widths = torch.tensor(self.widths, device=hidden.device)[expert]
        neurons = torch.arange(hidden.shape[-1], device=hidden.device)
        return getattr(self.dense, self.output)(hidden * (neurons < widths[..., None]))

    def _weighted(self, hidden: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        sizes = torch.tensor([0, *self.widths], device=hidden.device).diff()
        return getattr(self.dense, self.output)(hidden * chunks.to(hidden.dtype).repeat_interleave(sizes, dim=-1))

    def _by_chunks(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """
        Tokens `(num_tokens, hidden_size)` in the order of their experts, largest first: the tokens that use a chunk of
        neurons are then the first ones, so that each chunk is one product over a shrinking slice, without gathering.
        """
        order = expert.argsort(descending=True, stable=True)
        at_least = torch.bincount(expert, minlength=len(self.widths)).flip(0).cumsum(0).flip(0).tolist()
        down = _linear(self.dense, self.output)
        x = x[order]
        y = F.linear(self._hidden_slice(x, 0, self.widths[0]), down.weight[:, : self.widths[0]], down.bias)
        for num_tokens, start, end in zip(at_least[1:], self.widths, self.widths[1:], strict=False):
            if num_tokens == 0:
                break
            hidden, weight = self._hidden_slice(x[:num_tokens], start, end), down.weight[:, start:end]
            if y.dtype == hidden.dtype == weight.dtype:
                y[:num_tokens].addmm_(hidden, weight.t())
            else:  # autocast leaves products in place alone
                y[:num_tokens] += F.linear(hidden, weight)
        result = torch.empty_like(y)
        result[order] = y
        return result

    def _hidden(self, x: torch.Tensor) -> torch.Tensor:
        return neurons_of(self.dense, self.inputs, self.activation, x)

    def _hidden_slice(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The neurons from `start` to `end` only."""
        inputs = []
        for name in self.inputs:
            layer = _linear(self.dense, name)
            # A fused projection holds the gates of all neurons and then their other inputs.
            for offset in range(0, layer.weight.shape[0], self.widths[-1]):
                rows = slice(offset + start, offset + end)
                inputs.append(F.linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows]))
        return self.activation(inputs[0]) * inputs[1] if len(inputs) == 2 else self.activation(inputs[0])

    @torch.no_grad()
    def _measure(self, hidden: torch.Tensor) -> torch.Tensor:
        """Nearness of the smaller experts, all from the one dense pass that made `hidden`."""
        hidden, down = hidden.detach(), getattr(self.dense, self.output)
        if self._is_plain():
            total = hidden.new_zeros(()) if down.bias is None else down.bias
            outputs = []
            for start, end in zip([0, *self.widths], self.widths, strict=False):
                total = total + F.linear(hidden[..., start:end], down.weight[:, start:end])
                outputs.append(total)
        else:
            neurons = torch.arange(hidden.shape[-1], device=hidden.device)
            outputs = [down(hidden * (neurons < width)) for width in self.widths]
        norms = self.config.output_norms
        return similarities(torch.stack(outputs), self.config.similarity, norms[self.layer] if norms else None)


def num_weights(parameter: torch.Tensor) -> int:
    """How many there are, also where bitsandbytes has packed two of 4 bits into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


def neurons_of(mlp: nn.Module, inputs: tuple[str, ...], activation: Any, x: torch.Tensor) -> torch.Tensor:
    """All neurons of an MLP, through its modules themselves: they may be quantised or carry adapters."""
    values = [getattr(mlp, name)(x) for name in inputs]
    if inputs == ("gate_up_proj",):
        values = list(values[0].chunk(2, dim=-1))
    return activation(values[0]) * values[1] if len(values) == 2 else activation(values[0])


def activation_of(mlp: nn.Module) -> Any:
    return next(getattr(mlp, name) for name in ACTIVATIONS if hasattr(mlp, name))


def projection_names(mlp: nn.Module) -> tuple[str, ...] | None:
    """Names of an MLP's projections if it is one that can be nested, else None."""
    for names in LAYOUTS:
        if all(_is_linear(getattr(mlp, name, None)) for name in names) and any(hasattr(mlp, a) for a in ACTIVATIONS):
            return names
    return None


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Module) and getattr(module, "weight", None) is not None


def _linear(dense: nn.Module, name: str) -> Any:
    """A projection's own layer, also beneath an adapter."""
    layer = getattr(dense, name)
    return getattr(layer, "base_layer", layer)


def mlp_places(model: nn.Module, config: Any) -> list[tuple[nn.Module, str]]:
    """
    Where a dense model's MLPs stand: of each layer the parent module and the name in it.

    Raises:
        ValueError: if there isn't one in every layer.
    """
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if not isinstance(parent, NestedMlp) and (isinstance(child, NestedMlp) or projection_names(child) is not None)
    ]
    if any(isinstance(getattr(parent, name), NestedMlp) for parent, name in places):
        raise ValueError("The model is nested already: convert the dense model.")
    num_layers, width = (getattr(config, name, None) for name in ("num_hidden_layers", "intermediate_size"))
    # A mixture's shared expert has the same projections and another width.
    places = [(parent, name) for parent, name in places if _neurons(getattr(parent, name)) == width]
    if len(places) != num_layers:
        layouts = ", ".join("/".join(names) for names in LAYOUTS)
        raise ValueError(
            f"A model of type '{config.model_type}' can't be converted: it needs in each of its {num_layers} layers one MLP of "
            f"`intermediate_size`={width} neurons with linear projections named {layouts}; found {len(places)}. Can be "
            f"converted: {', '.join(CONVERTIBLE)}, and others with such MLPs."
        )
    return places


def _neurons(mlp: nn.Module) -> int | None:
    return getattr(_linear(mlp, projection_names(mlp)[-1]), "in_features", None)  # type: ignore[index]


def nest_mlps(model: nn.Module, config: DynaMoeConfig, routing: Routing) -> None:
    """Puts a [`NestedMlp`] around every MLP of a dense model, in place; what it checkpoints already routes from then on."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            routed = partial(routing.checkpointed, module._gradient_checkpointing_func)
            module._gradient_checkpointing_func = routed  # type: ignore[assignment]
    for layer, (parent, name) in enumerate(mlp_places(model, config.base_config)):
        dense = getattr(parent, name)
        nested = NestedMlp(dense, config, layer, routing)
        weight = _linear(dense, nested.output).weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        setattr(parent, name, nested.to(device=weight.device, dtype=dtype) if weight.device.type != "meta" else nested)
