"""Randomness in training that belongs to a row of text and a step, and to nothing else."""

import zlib

import torch


def row_generator(token_ids: torch.Tensor, step: int, seed: int) -> torch.Generator:
    """
    What a trainer draws for a row has to be the same however rows are spread over micro-batches, processes and resumed
    runs, so it depends on the text of the row, the step and the seed alone.

    Args:
        token_ids (`torch.LongTensor` of shape `(length,)`):
            The row without padding, on the CPU.
        step (`int`):
            The optimizer's step.
        seed (`int`):
            The run's seed.

    Returns:
        `torch.Generator`, on the CPU.
    """
    return torch.Generator().manual_seed(zlib.crc32(token_ids.numpy().tobytes()) ^ (seed * 1_000_003 + step))
