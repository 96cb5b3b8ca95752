"""The small conformer that the keyword spotting models hear with."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer


# The fewest frames of features that the two convolutions at the entrance make one state of.
_LEAST_FRAMES = 7


def sinusoids(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Sines and cosines of positions, of shape `(len(positions), size)`."""
    steps = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[:, None] * torch.exp(steps * (-math.log(10000.0) / size))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :size]


class KwsConformerSubsampling(nn.Module):
    """Two convolutions that leave a quarter of the frames."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        size, mels = config.hidden_size, config.num_mel_bins
        self.conv_in = nn.Conv2d(1, size, kernel_size=3, stride=2)
        self.conv_out = nn.Conv2d(size, size, kernel_size=3, stride=2)
        self.proj = nn.Linear(size * self.reduced(mels), size)

    @staticmethod
    def reduced(length: Any) -> Any:
        """Length that both convolutions leave, of one length (`int`) or of many (`torch.Tensor`)."""
        return ((length - 1) // 2 - 1) // 2

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.conv_in(input_features[:, None]))
        hidden = F.relu(self.conv_out(hidden))
        return self.proj(hidden.transpose(1, 2).flatten(2))


class KwsConformerFeedForward(nn.Module):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down_proj(self.dropout(F.silu(self.up_proj(self.norm(hidden))))))


class KwsConformerAttention(nn.Module):
    """Self-attention with relative positions, as in Transformer-XL."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.head_dim = size // self.num_heads
        self.norm = nn.LayerNorm(size)
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.o_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.position_proj = nn.Linear(size, size, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(self.num_heads, 1, self.head_dim))
        self.position_bias = nn.Parameter(torch.zeros(self.num_heads, 1, self.head_dim))
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.attention_dropout = config.hidden_dropout

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, size = hidden.shape
        hidden = self.norm(hidden)
        query, key, value = (self._heads(proj(hidden)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        # Positions from the farthest in the future to the farthest in the past.
        distances = torch.arange(length - 1, -length, -1, device=hidden.device)
        positions = self._heads(self.position_proj(sinusoids(distances, size).to(hidden.dtype))[None])
        by_distance = (query + self.position_bias) @ positions.transpose(-1, -2)
        bias = self._shift(by_distance) / math.sqrt(self.head_dim)
        bias = bias.masked_fill(~mask[:, None, None], torch.finfo(bias.dtype).min)
        attended = F.scaled_dot_product_attention(
            query + self.content_bias,
            key,
            value,
            attn_mask=bias,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.dropout(self.o_proj(attended.transpose(1, 2).reshape(batch, length, size)))

    def _heads(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    @staticmethod
    def _shift(by_distance: torch.Tensor) -> torch.Tensor:
        """From `(..., query, distance)` to `(..., query, key)`."""
        length = by_distance.shape[-2]
        padded = F.pad(by_distance, (1, 0))
        shifted = padded.flatten(-2).unflatten(-1, (2 * length, length))[..., 1:, :]
        return shifted.flatten(-2).unflatten(-1, (length, 2 * length - 1))[..., :length]


class KwsConformerConvolution(nn.Module):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        size, kernel = config.hidden_size, config.conv_kernel_size
        self.norm = nn.LayerNorm(size)
        self.in_proj = nn.Linear(size, 2 * size)
        self.depthwise = nn.Conv1d(size, size, kernel, padding=kernel // 2, groups=size)
        self.batch_norm = nn.BatchNorm1d(size)
        self.out_proj = nn.Linear(size, size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = F.glu(self.in_proj(self.norm(hidden)))
        hidden = hidden.masked_fill(~mask[..., None], 0.0)
        hidden = self.depthwise(hidden.transpose(1, 2)).transpose(1, 2)
        if self.training:
            # Statistics of speech alone: how much padding a batch happens to have must not matter.
            speech, norm = hidden[mask], self.batch_norm
            if len(speech) > 1:
                normed = norm(speech)
            else:
                # A single state, of one very short clip, has no deviation of its own.
                normed = F.batch_norm(
                    speech, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
                )
            hidden = torch.zeros_like(hidden, dtype=normed.dtype).masked_scatter(mask[..., None], normed)
        else:
            hidden = self.batch_norm(hidden.transpose(1, 2)).transpose(1, 2)
        return self.dropout(self.out_proj(F.silu(hidden)))


class KwsConformerLayer(GradientCheckpointingLayer):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.feed_forward_in = KwsConformerFeedForward(config)
        self.attention = KwsConformerAttention(config)
        self.convolution = KwsConformerConvolution(config)
        self.feed_forward_out = KwsConformerFeedForward(config)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = hidden + 0.5 * self.feed_forward_in(hidden)
        hidden = hidden + self.attention(hidden, mask)
        hidden = hidden + self.convolution(hidden, mask)
        hidden = hidden + 0.5 * self.feed_forward_out(hidden)
        return self.norm(hidden)


class KwsConformerEncoder(nn.Module):
    """
    Conformer over frames of features, at a quarter of their rate.

    Args:
        config (`PreTrainedConfig`):
            With `num_mel_bins`, `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `intermediate_size`,
            `conv_kernel_size` and `hidden_dropout`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.num_mel_bins = config.num_mel_bins
        self.subsampling = KwsConformerSubsampling(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([KwsConformerLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            input_features (`torch.Tensor` of shape `(batch_size, num_frames, num_mel_bins)`):
                Features, padded on the right. Fewer than 7 frames are padded with zeros.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for frames that are no padding.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: States of shape `(batch_size, frames, hidden_size)`, and a mask of shape
            `(batch_size, frames)` that is true for those that are no padding.
        """
        if input_features.dim() != 3 or input_features.shape[-1] != self.num_mel_bins:
            raise ValueError(
                f"`input_features` must have the shape (batch_size, num_frames, {self.num_mel_bins}), got "
                f"{tuple(input_features.shape)}: `feature_size` of the feature extractor is `num_mel_bins` of the model."
            )
        batch, num_frames, _ = input_features.shape
        if attention_mask is None:
            attention_mask = input_features.new_ones((batch, num_frames), dtype=torch.long)
        elif attention_mask.shape != (batch, num_frames):
            raise ValueError(
                f"`attention_mask` has the shape {tuple(attention_mask.shape)} and `input_features` has {(batch, num_frames)} "
                "frames: one value for each."
            )
        else:
            # What stands in the padding must not reach the state of a clip of a few frames.
            input_features = input_features.masked_fill(~attention_mask.bool()[..., None], 0.0)
        input_features = F.pad(input_features, (0, 0, 0, max(_LEAST_FRAMES - num_frames, 0)))
        hidden = self.dropout(self.subsampling(input_features))
        lengths = self.subsampling.reduced(attention_mask.sum(-1).clamp(min=_LEAST_FRAMES))
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden, mask


def check_phoneme_labels(name: str, labels: torch.Tensor, batch_size: int, vocab_size: int) -> None:
    """Raises a `ValueError` if there is no row of labels for each clip, or one is no symbol of the vocabulary."""
    if labels.dim() != 2 or len(labels) != batch_size:
        raise ValueError(
            f"`{name}` must have the shape ({batch_size}, num_spoken), got {tuple(labels.shape)}: a row of phonemes for each "
            "clip."
        )
    # The CTC loss would read whatever stands behind in memory.
    if labels.numel() and int(labels.max()) >= vocab_size:
        raise ValueError(
            f"`{name}` has the phoneme {int(labels.max())} and `vocab_size` is {vocab_size}: make them with the model's own "
            "tokenizer."
        )


def phoneme_ctc_loss(logits: torch.Tensor, mask: torch.Tensor, phoneme_labels: torch.Tensor) -> torch.Tensor:
    """
    Mean over clips of the CTC loss, each divided by the clip's number of phonemes. Symbol 0 is the blank.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, frames, vocab_size)`):
            Scores of the symbols by frame.
        mask (`torch.Tensor` of shape `(batch_size, frames)`):
            True for frames that are no padding.
        phoneme_labels (`torch.Tensor` of shape `(batch_size, num_spoken)`):
            The phonemes that were spoken; -100 or 0 behind them.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    targets = phoneme_labels.clamp(min=0)
    # Clips with more phonemes than frames can't be aligned: they count nothing instead of infinitely much.
    return F.ctc_loss(
        logits.float().log_softmax(-1).transpose(0, 1),
        targets,
        input_lengths=mask.sum(-1),
        target_lengths=(targets > 0).sum(-1),
        blank=0,
        zero_infinity=True,
    )
