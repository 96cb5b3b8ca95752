"""
The front end against torchaudio's, in an environment of its own (`make test-torchaudio`).

torchaudio's last release, 2.11.0, loads beside the torch of that version and no later one, and where it is installed and
doesn't load, it takes transformers' processing modules down with it. So it is no dependency, and not in the environment
of the other tests.

Last figures, with torch 2.11.0 and torchaudio 2.11.0 on a CPU: amplitudes differ by at most 1e-5 of a frame's largest,
logarithms by 2e-5 on average and 3e-3 at most (where a chirp drowns the other channels); streams by nothing.
"""

import numpy as np
import pytest
import torch
import torchaudio

from hf_ext import KwsFeatureExtractor


# Both compute in float32, whose rounding is in proportion to the strongest frequency of a frame. So amplitudes are compared
# in units of the frame's largest; the logarithm of a channel that is weak beside its neighbours is off by more.
AMPLITUDE_TOLERANCE = 2e-5


def signals():
    rng = np.random.default_rng(0)
    times = np.arange(16000) / 16000
    yield "noise", 0.1 * rng.standard_normal(16000)
    yield "loud noise", rng.uniform(-1, 1, 16000)
    yield "chirp in noise", 0.5 * np.sin(2 * np.pi * (100 + 3000 * times) * times) + 0.01 * rng.standard_normal(16000)
    yield "offset", 0.3 + 0.05 * rng.standard_normal(8000)
    yield "one window", 0.1 * rng.standard_normal(400)


SIGNALS = {name: torch.from_numpy(values.astype(np.float32)) for name, values in signals()}


def ours(extractor, samples):
    return extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"][0]


def assert_same(request, got, expected):
    assert got.shape == expected.shape
    ours, theirs = (features.double().div(2).exp() for features in (got, expected))
    error = ((ours - theirs).abs().amax(-1) / theirs.amax(-1)).max().item()
    of_logarithm = (got - expected).abs()
    print(
        f"{request.node.name}: {len(got)} frames, largest difference of amplitude {error:.0e}, of logarithm "
        f"{of_logarithm.max():.0e}, on average {of_logarithm.mean():.0e}"
    )
    assert error < AMPLITUDE_TOLERANCE


@pytest.mark.parametrize("settings", [{}, {"feature_size": 40, "f_min": 64.0, "f_max": 7600.0}, {"win_length": 512}])
@pytest.mark.parametrize("name", SIGNALS)
def test_fbank(name, settings, request):
    samples = SIGNALS[name]
    if len(samples) < settings.get("win_length", 400):
        pytest.skip("torchaudio gives no frame of less than a window")
    extractor = KwsFeatureExtractor("fbank", **settings)
    expected = torchaudio.compliance.kaldi.fbank(
        samples[None] * 2**15,
        num_mel_bins=extractor.feature_size,
        frame_length=extractor.win_length / 16,
        frame_shift=10.0,
        low_freq=extractor.f_min,
        high_freq=extractor.f_max or 8000.0,
        sample_frequency=16000.0,
        dither=0.0,
    )
    assert_same(request, ours(extractor, samples), expected)


@pytest.mark.parametrize("settings", [{}, {"feature_size": 40, "f_min": 64.0, "f_max": 7600.0}, {"win_length": 512}])
@pytest.mark.parametrize("name", SIGNALS)
def test_mel_spectrogram(name, settings, request):
    samples = SIGNALS[name]
    if len(samples) < settings.get("win_length", 400):
        pytest.skip("torchaudio gives no frame of less than a window")
    extractor = KwsFeatureExtractor("log_mel", **settings)
    mel = torchaudio.transforms.MelSpectrogram(
        sample_rate=16000,
        n_fft=512,
        win_length=extractor.win_length,
        hop_length=160,
        f_min=extractor.f_min,
        f_max=extractor.f_max,
        n_mels=extractor.feature_size,
        center=False,
    )
    # torch.stft puts a window that is shorter than the transform into its middle, ours begins with it: the samples are
    # moved by the difference, and the power doesn't hear it.
    margin = (512 - extractor.win_length) // 2
    expected = mel(torch.nn.functional.pad(samples, (margin, margin))).clamp(min=1e-6).log().T
    assert_same(request, ours(extractor, samples), expected)


@pytest.mark.parametrize("feature_type", ["log_mel", "fbank"])
def test_stream(feature_type, request):
    extractor = KwsFeatureExtractor(feature_type)
    samples, state, parts = SIGNALS["chirp in noise"], extractor.start_stream(sampling_rate=16000), []
    for chunk in samples.split(777):
        features, state = extractor.stream(chunk, state)
        parts.append(features)
    assert_same(request, torch.cat(parts), ours(extractor, samples))
