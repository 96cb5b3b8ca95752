"""A small model and inputs for it."""

import torch

from hf_ext import CedConfig, CedForKeywordSpotting


SMALL = {
    "num_mel_bins": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "hidden_dropout": 0.0,
    "verifier_size": 12,
}


def small_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return CedForKeywordSpotting(CedConfig(**{**SMALL, **kwargs})).eval()


def batch(frames=(60, 41, 90), phonemes=(5, 9, 2), mels=16):
    random = torch.Generator().manual_seed(1)
    features = torch.zeros(len(frames), max(frames), mels)
    ids = torch.zeros(len(phonemes), max(phonemes), dtype=torch.long)
    for row, length in enumerate(frames):
        features[row, :length] = torch.randn(length, mels, generator=random)
    for row, length in enumerate(phonemes):
        ids[row, :length] = torch.randint(4, 74, (length,), generator=random)
    mask = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    return {"input_features": features, "attention_mask": mask.long(), "keyword_ids": ids}
