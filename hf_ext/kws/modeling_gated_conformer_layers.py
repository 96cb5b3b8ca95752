"""The blocks of the gated conformer: each of their modules runs where its gate is open."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_gated_conformer import GatedConformerConfig
from .modeling_kws_conformer import KwsConformerAttention, KwsConformerConvolution, KwsConformerFeedForward


MODULES_PER_LAYER = 4


class GatedConformerSubsampling(nn.Module):
    """
    Three convolutions that leave a quarter of the frames.

    The usual ones in two dimensions would cost as much as all blocks, and can't be left out. They have no padding: a step
    depends on its own seven frames alone, so that windows and streams share steps.
    """

    def __init__(self, config: GatedConformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.conv_in = nn.Conv1d(config.num_mel_bins, size, kernel_size=3, stride=2)
        self.conv_out = nn.Conv1d(size, size, kernel_size=3, stride=2, groups=size)
        self.proj = nn.Linear(size, size)

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.conv_in(input_features.transpose(1, 2)))
        return self.proj(F.relu(self.conv_out(hidden)).transpose(1, 2))


class GatedConformerGates(nn.Linear):
    """Two logits, run and leave out, for each module of a block; the paper's single linear layer for each."""

    def __init__(self, config: GatedConformerConfig) -> None:
        super().__init__(config.hidden_size, 2 * MODULES_PER_LAYER)


class GatedConformerLayer(GradientCheckpointingLayer):
    """
    A conformer block, each of whose modules runs for the windows whose gate is open.

    The convolution keeps the BatchNorm that it has in the paper and in the ungated block. At inference it is a fixed scale
    and shift of each channel: what a window becomes depends neither on the windows run beside it nor on those left out, as
    streams and batches of rows need it; a LayerNorm would give no more. In training all windows go through every module,
    open or not, so its statistics are those of all windows and fit whichever are run later.
    """

    def __init__(self, config: GatedConformerConfig) -> None:
        super().__init__()
        self.feed_forward_in = KwsConformerFeedForward(config)
        self.attention = KwsConformerAttention(config)
        self.convolution = KwsConformerConvolution(config)
        self.feed_forward_out = KwsConformerFeedForward(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gates = GatedConformerGates(config)
        self.temperature = config.gate_temperature
        self.hard = config.gate_relaxation == "straight_through"

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, averaging: torch.Tensor, gated: bool, least_odds: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden (`torch.Tensor` of shape `(num_windows, num_steps, hidden_size)`):
                States.
            mask (`torch.Tensor` of shape `(num_windows, num_steps)`):
                True for steps that are no padding.
            averaging (`torch.Tensor` of shape `(num_windows, 1, num_steps)`):
                What multiplies states to their mean over time.
            gated (`bool`):
                Whether the gates are asked; otherwise every module runs.
            least_odds (`float`):
                Log odds above which a module runs at inference.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: States, the gates, of shape `(num_windows, 4)`, and their logits,
            run and leave out, of shape `(num_windows, 4, 2)`.
        """
        if self.training:
            hidden, gates, logits = self._relaxed(hidden, mask, averaging, gated)
        elif gated:
            hidden, gates, logits = self._skipping(hidden, mask, averaging, least_odds)
        else:
            for run in self._modules_in_order():
                hidden = hidden + run(hidden, mask)
            gates = hidden.new_ones(len(hidden), MODULES_PER_LAYER)
            logits = hidden.new_tensor([torch.inf, 0.0]).expand(*gates.shape, 2)
        # This norm runs even if nothing before it did: it costs little, and training has it so.
        return self.norm(hidden), gates, logits

    def _modules_in_order(self) -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...]:
        return (
            lambda hidden, mask: 0.5 * self.feed_forward_in(hidden),
            self.attention,
            self.convolution,
            lambda hidden, mask: 0.5 * self.feed_forward_out(hidden),
        )

    def _gate_logits(self, hidden: torch.Tensor, averaging: torch.Tensor) -> torch.Tensor:
        """Of the mean over time, as in the paper: of the states as they are, without a norm."""
        mean = torch.bmm(averaging.to(hidden.dtype), hidden)[:, 0]
        return self.gates(mean).float().view(-1, MODULES_PER_LAYER, 2)

    def _relaxed(
        self, hidden: torch.Tensor, mask: torch.Tensor, averaging: torch.Tensor, gated: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Every module runs, and is multiplied by a gate that gradients go through."""
        gates, asked = [], []
        for index, run in enumerate(self._modules_in_order()):
            logits = self._gate_logits(hidden, averaging)[:, index]
            sample = F.gumbel_softmax(logits, self.temperature, hard=self.hard)[:, 0]
            gate = sample if gated else torch.ones_like(sample)
            hidden = hidden + gate[:, None, None].to(hidden.dtype) * run(hidden, mask)
            gates.append(gate)
            asked.append(logits)
        return hidden, torch.stack(gates, 1), torch.stack(asked, 1)

    def _skipping(
        self, hidden: torch.Tensor, mask: torch.Tensor, averaging: torch.Tensor, least_odds: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A module runs for the windows whose gate is open, and for no other."""
        gates, asked = [], []
        has_changed = True
        for index, run in enumerate(self._modules_in_order()):
            # Until a module runs the states are what they were, and so are the gates.
            if has_changed:
                logits = self._gate_logits(hidden, averaging)
                # Asking must cost less than it saves: numbers are compared faster than tensors of a few.
                values = logits.permute(1, 2, 0).tolist()
            is_open = [yes - no > least_odds for yes, no in zip(*values[index], strict=True)]
            gates.append(is_open)
            asked.append(logits[:, index])
            has_changed = any(is_open)
            if all(is_open):
                hidden = hidden + run(hidden, mask)
            elif has_changed:
                windows = torch.tensor(is_open, device=hidden.device).nonzero()[:, 0]
                hidden = hidden.index_add(0, windows, run(hidden[windows], mask[windows]).to(hidden.dtype))
        return hidden, hidden.new_tensor(gates).T, torch.stack(asked, 1)
