"""Changes of recordings do what they say, keep shapes, and come from their generator alone."""

import pytest
import torch

from hf_ext.kws.training.augmentation import KwsAugmenter, spec_augment
from hf_ext.kws.training.effects import (
    add_noise,
    band_limit,
    change_speed,
    clip_peaks,
    coloured_noise,
    equalize,
    mu_law,
    reverberate,
    room_responses,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tone(hertz, num_samples=16000):
    return torch.sin(2 * torch.pi * hertz * torch.arange(num_samples) / 16000)[None]


def test_noise_is_at_the_ratio_that_was_asked_for_and_leaves_padding_alone():
    speech = torch.cat([0.1 * torch.randn(2, 8000, generator=generator()), torch.zeros(2, 2000)], dim=1)
    noise = coloured_noise(10000, torch.tensor([0.0, 1.5]), generator())
    lengths, snr = torch.tensor([8000, 8000]), torch.tensor([5.0, 20.0])
    added = add_noise(speech, noise, snr, lengths) - speech
    measured = 10 * torch.log10(speech[:, :8000].square().mean(-1) / added[:, :8000].square().mean(-1))
    torch.testing.assert_close(measured, snr, atol=0.01, rtol=0)
    assert added[:, 8000:].abs().max() == 0
    assert add_noise(torch.zeros(1, 100), torch.ones(1, 100), torch.tensor([0.0])).abs().max() == 0
    with pytest.raises(ValueError, match="`noise` has the shape"):
        add_noise(speech, noise[:, :5], snr)


def test_noise_has_its_colour():
    power = torch.fft.rfft(coloured_noise(65536, torch.tensor([0.0, 1.0, 2.0]), generator())).abs().square()
    octaves = torch.stack([power[:, 2**i : 2 ** (i + 1)].mean(-1).log2() for i in range(6, 14)], dim=1)
    slopes = (octaves[:, -1] - octaves[:, 0]) / (octaves.shape[1] - 1)
    torch.testing.assert_close(slopes, torch.tensor([0.0, -1.0, -2.0]), atol=0.15, rtol=0)


def test_room_dies_away_by_60_db_and_shifts_nothing():
    rt60 = torch.tensor([0.2, 0.5])
    responses = room_responses(rt60, torch.tensor([3.0, 3.0]), generator=generator())
    torch.testing.assert_close(responses.norm(dim=-1), torch.ones(2))
    assert responses.abs().argmax(-1).tolist() == [0, 0]
    direct, tail = responses[:, 0].square(), responses[:, 1:].square().sum(-1)
    torch.testing.assert_close(10 * torch.log10(direct / tail), torch.tensor([3.0, 3.0]), atol=1e-3, rtol=0)
    early, late = responses[1, 400:1200].square().mean(), responses[1, 4400:5200].square().mean()
    # A quarter of a second of half a second: 30 dB.
    assert 10 * torch.log10(early / late) == pytest.approx(30, abs=2)
    clip = torch.zeros(2, 3000)
    clip[:, 100] = 1
    wet = reverberate(clip, responses)
    assert wet.shape == clip.shape and wet[:, :100].abs().max() < 1e-5
    torch.testing.assert_close(wet[:, 100:], responses[:, :2900], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="`rt60` must be positive"):
        room_responses(torch.tensor([0.0]), torch.tensor([1.0]))


def test_speed_moves_pitch_and_length_together():
    waves, lengths = change_speed(tone(440).repeat(2, 1), torch.tensor([1.25, 0.8]), torch.tensor([16000, 8000]))
    assert lengths.tolist() == [12800, 10000] and waves.shape == (2, 12800)
    for row, length, hertz in zip(waves, lengths, (550, 352), strict=True):
        peak = torch.fft.rfft(row[:length]).abs().argmax() * 16000 / length
        assert peak == pytest.approx(hertz, abs=2)
    assert waves[0].abs().max() == pytest.approx(1, abs=0.1) and waves[1, 10000:].abs().max() == 0


def test_equalizer_gains_are_those_of_the_frequencies():
    # Points at 100 Hz, 894 Hz and 8 kHz.
    gains = torch.tensor([[0.0, -6.0, -20.0], [0.0, 0.0, 0.0]])
    for hertz, expected in [(60, 0.0), (894, -6.0), (2675, -13.0), (7900, -20.0)]:
        changed = equalize(tone(hertz).expand(2, -1), gains)
        level = 20 * torch.log10(changed[:, 4000:12000].norm(dim=-1) / tone(hertz)[0, 4000:12000].norm())
        assert level.tolist() == pytest.approx([expected, 0.0], abs=0.2)


def test_band_and_line_and_clipping():
    both = tone(100) + tone(5000)
    narrow = band_limit(both, torch.tensor([300.0]), torch.tensor([3400.0]))
    assert narrow.abs().max() < 1e-2
    line = mu_law(0.5 * tone(440))
    assert 1e-4 < (line - 0.5 * tone(440)).abs().max() < 0.02
    assert mu_law(torch.zeros(1, 10)).abs().max() == 0
    assert clip_peaks(tone(440), torch.tensor([0.5])).abs().max() == pytest.approx(0.5, abs=1e-3)


def test_stripes_hide_what_they_may_and_no_padding():
    features = torch.randn(3, 100, 80, generator=generator())
    mask = torch.ones(3, 100)
    mask[1, 40:] = 0
    changed = spec_augment(features, mask, generator(1))
    assert torch.equal(changed, spec_augment(features, mask, generator(1)))
    different = changed != features
    assert 0 < different.float().mean() < 0.5
    assert not different[1, 40:].any()
    assert torch.equal(spec_augment(features, mask, generator(), num_time_masks=0, num_channel_masks=0), features)


def test_chain_is_its_generators_and_keeps_what_labels_need():
    speech = 0.1 * torch.randn(8, 8000, generator=generator())
    lengths = torch.tensor([8000, 5000] * 4)
    augment = KwsAugmenter(**{name: 1.0 for name in vars(KwsAugmenter()) if name.endswith("_probability")})
    changed, new = augment(speech, lengths, generator(3))
    again, _ = augment(speech, lengths, generator(3))
    assert torch.equal(changed, again)
    assert not torch.equal(changed[:, :5000], augment(speech, lengths, generator(4))[0][:, :5000])
    assert changed.isfinite().all() and changed.abs().max() <= 1
    # Nothing is cut: the clip becomes longer by its margins, or shorter by its speed alone.
    assert (new >= lengths / 1.1 - 1).all() and (new <= lengths / 0.9 + 16001).all()
    assert changed.shape[1] >= int(new.max())
    for row, length in zip(changed, new, strict=True):
        assert row[length:].abs().sum() == 0
    off = {name: 0.0 for name in vars(augment) if name.endswith("_probability")}
    still = KwsAugmenter(**off, max_margin=0.0, gain_db=(0.0, 0.0))(speech, lengths, generator())[0]
    torch.testing.assert_close(still[0], speech[0])


def test_recorded_noise_goes_round():
    augment = KwsAugmenter(noises=[torch.ones(100)], noise_probability=1.0, room_probability=0.0)
    changed, lengths = augment(0.1 * torch.randn(2, 4000, generator=generator()), None, generator())
    assert changed.isfinite().all() and len(lengths) == 2


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`noise_probability` must be from 0 to 1, got 2"):
        KwsAugmenter(noise_probability=2)
    with pytest.raises(ValueError, match="`snr_db` must be a range"):
        KwsAugmenter(snr_db=(20.0, 5.0))
    with pytest.raises(ValueError, match="`noises` must be recordings"):
        KwsAugmenter(noises=[torch.zeros(2, 100)])
    with pytest.raises(ValueError, match="`noises` must be recordings"):
        KwsAugmenter(noises=[torch.zeros(100).numpy()])
    with pytest.raises(ValueError, match=r"`speeds` must be a range from least to most, got \[1.1, 0.9\]"):
        KwsAugmenter(speeds=[1.1, 0.9])
    for limits in (5.0, (5.0,), (5.0, 10.0, 20.0), (float("nan"), 5.0), None):
        with pytest.raises(ValueError, match="`snr_db` must be a range from least to most"):
            KwsAugmenter(snr_db=limits)
    with pytest.raises(ValueError, match="`sampling_rate` must be a positive number of hertz, got 0"):
        KwsAugmenter(sampling_rate=0)
    for name in ("speeds", "rt60"):
        with pytest.raises(ValueError, match=f"`{name}` must be positive"):
            KwsAugmenter(**{name: (0.0, 1.0)})
    with pytest.raises(ValueError, match="`max_margin` must not be negative, got nan"):
        KwsAugmenter(max_margin=float("nan"))
    with pytest.raises(ValueError, match=r"`waveforms` must have the shape \(batch, samples\)"):
        KwsAugmenter()(torch.zeros(100))
