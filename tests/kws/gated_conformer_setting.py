"""Small gated conformers and features for their tests."""

import torch

from hf_ext import GatedConformerConfig, GatedConformerForKeywordDetection


SMALL = {
    "num_mel_bins": 16,
    "window_frames": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "conv_kernel_size": 5,
    "hidden_dropout": 0.0,
    "num_labels": 3,
}


def small_model(seed=0, **kwargs):
    """With gates of random weights: about half are open, and which depends on the window."""
    torch.manual_seed(seed)
    model = GatedConformerForKeywordDetection(GatedConformerConfig(**{**SMALL, **kwargs})).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.gates.weight.normal_(std=2.0)
            layer.gates.bias.zero_()
    return model


def features(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
