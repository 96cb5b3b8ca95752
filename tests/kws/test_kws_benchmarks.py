"""The benchmarks of keyword spotting on tiny models and clips of noise: each writes its tables."""

import json

import pytest
import torch

from hf_ext import (
    GatedConformerConfig,
    GatedConformerForKeywordDetection,
    KwsFeatureExtractor,
    KwsProcessor,
    SlickConfig,
    SlickForKeywordSpotting,
)
from kws.training.recipes import write_clips
from recipes import run_module


WORDS = ["bed", "bird", "stop", "go", "seven", "happy"]


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    return write_clips(
        folder, [{"text": word, "speaker": speaker} for word in WORDS for speaker in ("ann", "bob", "cleo", "dora")]
    )


def saved(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def page(folder, name):
    assert json.loads((folder / f"{name}.json").read_text())
    return (folder / f"{name}.md").read_text()


def test_detection(clips, tmp_path, monkeypatch):
    config = SlickConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = saved(SlickForKeywordSpotting(config), KwsProcessor(), tmp_path / "spotter")
    text = tmp_path / "text.txt"
    text.write_text("a head led birds to the shop to stop them there " * 2)
    run_module(
        "benchmarks.kws.detection", monkeypatch, "--model", model, "--folders", clips, "--text_files", text,
        "--num_resamples", 3, "--results_dir", tmp_path,
    )  # fmt: skip
    written = page(tmp_path, "detection")
    for negatives in ("other texts", "random phrases", "texts that sound near", "one phoneme away"):
        assert f"| clips | {negatives} | 24 |" in written


def test_gated_conformer(clips, tmp_path, monkeypatch):
    extractor = KwsFeatureExtractor(feature_size=16)
    config = GatedConformerConfig(
        num_mel_bins=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        label2id={word: i for i, word in enumerate(WORDS)}, id2label=dict(enumerate(WORDS)),
    )  # fmt: skip
    names = ("gated", "ungated")
    folders = [saved(GatedConformerForKeywordDetection(config), extractor, tmp_path / name) for name in names]
    run_module(
        "benchmarks.kws.gated_conformer", monkeypatch, "--model", folders[0], "--baseline", folders[1], "--data", clips,
        "--noise", clips, "--held_out_by", "audio", "--num_windows", 24, "--num_timed_windows", 12,
        "--results_dir", tmp_path,
    )  # fmt: skip
    written = page(tmp_path, "gated_conformer")
    assert all(f"| {name} |" in written for name in ("trained without gates", "threshold 0.5"))


def test_cost(tmp_path, monkeypatch, capsys):
    """Of one model, as each is measured in a process of its own."""
    model = ("--only", "SlickForKeywordSpotting", "--seconds", 0.2, "--repeats", 1)
    run_module("benchmarks.kws.cost", monkeypatch, *model)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"parameters", "features_ms", "encoder_ms", "phrase_ms", "memory_mb"}


def test_orderings(clips, tmp_path, monkeypatch):
    """One variant of each model, for two steps."""
    variants = ("SLiCK", "CED", "DSP, equal cuts")
    run_module(
        "benchmarks.kws.orderings", monkeypatch, "--clips", clips, "--recordings", clips, "--num_phrases", 3,
        "--eval_clips", 6, "--steps", 2, "--results_dir", tmp_path, "--only", *variants,
    )  # fmt: skip
    written = page(tmp_path, "orderings")
    assert all(f"| {variant} | 1 |" in written for variant in variants)
    assert "clips, confusable" in written
