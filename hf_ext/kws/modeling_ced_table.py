"""What the states of an encoder are like for each phoneme."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_ced import CedConfig


# The padding and g2p_en's three other symbols, which stand for no sound.
NUM_SPECIAL = 4


class CedPhonemeTable(nn.Module):
    """What the encoder's states are like for each phoneme. It is built from them and not trained."""

    def __init__(self, config: CedConfig) -> None:
        super().__init__()
        self.vectors: torch.Tensor
        self.register_buffer("vectors", torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.vectors)

    def fill(self, sums: torch.Tensor, counts: torch.Tensor, symbols: Sequence[str] | None = None) -> None:
        """
        Args:
            sums (`torch.Tensor` of shape `(vocab_size, hidden_size)`), counts (`torch.Tensor` of shape `(vocab_size,)`):
                Sum of the states of each phoneme, and their number.
            symbols (`Sequence[str]`, *optional*):
                Names, so that a vowel without states gets the mean of its other stresses.
        """
        heard = counts > 0
        vectors = sums / counts.clamp(min=1)[:, None]
        vectors[~heard] = 0
        for phoneme, others in _other_stresses(symbols or (), heard.tolist()).items():
            vectors[phoneme] = vectors[others].mean(0)
        self.vectors.copy_(vectors)


def are_recognised(labels: torch.Tensor, phoneme_labels: torch.Tensor) -> torch.Tensor:
    """For each clip, whether what the frames say is what was spoken."""
    starts = F.pad(labels[:, 1:] != labels[:, :-1], (1, 0), value=True) & (labels != 0)
    rows = zip(labels, starts, phoneme_labels, strict=True)
    same = [torch.equal(row[start], spoken[spoken > 0]) for row, start, spoken in rows]
    return torch.tensor(same, device=labels.device)


def mean_states_of_runs(states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The phoneme and the mean state of each run of frames with one label, blanks left out."""
    starts = F.pad(labels[:, 1:] != labels[:, :-1], (1, 0), value=True).flatten()
    run = starts.cumsum(0) - 1
    phonemes = labels.flatten()[starts]
    sums = states.new_zeros(len(phonemes), states.shape[-1]).index_add_(0, run, states.flatten(0, 1))
    means = sums / run.bincount(minlength=len(phonemes))[:, None]
    return phonemes[phonemes > 0], means[phonemes > 0]


def _other_stresses(symbols: Sequence[str], heard: Sequence[bool]) -> dict[int, list[int]]:
    """For each phoneme that was not heard, the numbers of those that differ in stress alone and were."""
    bare = [symbol.rstrip("012") for symbol in symbols]
    found = {
        i: [j for j, other in enumerate(bare) if other == bare[i] and heard[j]]
        for i in range(len(bare))
        if not heard[i]
    }
    return {phoneme: others for phoneme, others in found.items() if others}
