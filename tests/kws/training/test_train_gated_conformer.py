"""The recipe of the gated conformer: gates that open late, speakers that are kept apart, going on where it stopped."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from hf_ext import KwsWindowDataCollator, KwsWindowDataset
from hf_ext.kws.modeling_gated_conformer_outputs import GatedConformerOutput
from kws.training.recipes import write_clips
from recipes import as_words, imported_recipe


soundfile = pytest.importorskip("soundfile")

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "num_mel_bins": 16}


@pytest.fixture(scope="module")
def recipe():
    with imported_recipe("train_gated_conformer") as module:
        yield module


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    clips, noise = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("noise")
    rows = [{"text": "yes" if i % 2 else "no", "speaker": f"speaker_{i // 2}"} for i in range(12)]
    write_clips(clips, rows, num_samples=6_000)
    random = np.random.default_rng(1)
    soundfile.write(noise / "kitchen.wav", random.normal(size=40_000) / 30, 16_000)
    return clips, noise


def run(recipe, folders, output_dir, **changes):
    clips, noise = folders
    settings = {
        "data": clips,
        "noise": noise,
        "output_dir": output_dir,
        "max_steps": 4,
        "ungated_steps": 2,
        "gate_ramp_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "num_eval_windows": 24,
        "num_timed_windows": 12,
        "use_cpu": True,
        "disable_tqdm": True,
        **SIZES,
        **changes,
    }
    recipe.main(*recipe.read_arguments(as_words(settings)))


def test_trains_saves_and_goes_on_where_it_stopped(recipe, folders, tmp_path, capsys):
    run(recipe, folders, tmp_path / "whole")
    printed = capsys.readouterr().out
    for figure in (
        "accuracy, keyword",
        "skipped, noise",
        "IoU of words",
        "milliseconds of a window",
        "10 clips to train on",
    ):
        assert figure in printed
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "whole")
    assert model.config.id2label == {0: "no", 1: "yes"}
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    run(recipe, folders, tmp_path / "part", resume_from_checkpoint="true")
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_gates_are_left_as_they_are_until_they_are_asked(recipe, folders, tmp_path):
    run(recipe, folders, tmp_path, ungated_steps=4)
    model = AutoModelForAudioClassification.from_pretrained(tmp_path)
    assert all((layer.gates.weight == 0).all() for layer in model.layers)
    run(recipe, folders, tmp_path, ungated_steps=0)
    model = AutoModelForAudioClassification.from_pretrained(tmp_path)
    assert all((layer.gates.weight != 0).any() for layer in model.layers)


def test_windows_that_are_kept_are_computed_once(recipe, folders, tmp_path):
    run(recipe, folders, tmp_path, kept_windows=3)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    clip = {"array": np.random.default_rng(0).normal(size=6_000) / 10, "sampling_rate": 16_000}
    windows = KwsWindowDataset([{"audio": clip, "text": "yes"}], [torch.randn(40_000)], {"yes": 0}, num_windows=3)
    collator = KwsWindowDataCollator(extractor)
    kept = recipe.KeptWindows(windows, collator)
    rows = [kept[i] for i in range(3)]
    assert all(kept[i] is rows[i] for i in range(3)) and len(kept) == 3
    ours, expected = recipe.joined(rows), collator(list(windows))
    assert set(ours) == set(expected)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name])


def test_clips_that_are_only_trained_on(recipe, folders, tmp_path, capsys):
    run(recipe, folders, tmp_path, more_data=folders[0])
    assert "22 clips to train on, 2 to evaluate on" in capsys.readouterr().out


def test_goes_on_from_a_model_without_gates(recipe, folders, tmp_path):
    """Its weights but for the gates, which begin anew, and its features; and words that it doesn't know are refused."""
    run(recipe, folders, tmp_path / "ungated", ungated_steps=4)
    options = {"model": tmp_path / "ungated", "ungated_steps": 0, "gate_open_probability": 0.7}
    run(recipe, folders, tmp_path / "gated", learning_rate=0.0, **options)
    before, after = (AutoModelForAudioClassification.from_pretrained(tmp_path / name) for name in ("ungated", "gated"))
    assert torch.equal(after.classifier.weight, before.classifier.weight)
    run_odds, leave_odds = after.layers[0].gates.bias[:2].tolist()
    assert torch.tensor(run_odds - leave_odds).sigmoid() == pytest.approx(0.7, abs=1e-4)
    means = [AutoFeatureExtractor.from_pretrained(tmp_path / name).mean for name in ("ungated", "gated")]
    assert means[0] == means[1]
    others = write_clips(tmp_path, [{"text": "go", "speaker": str(i)} for i in range(4)])
    with pytest.raises(ValueError, match=r"`--model` .*knows other words"):
        run(recipe, (others, folders[1]), tmp_path / "others", **options)


def test_gates_stay_near_the_answers_of_the_model_without(recipe):
    """The distance is least, its own entropy, where the answers are the same; of windows without a word it asks no name."""
    said = GatedConformerOutput(detection_logits=torch.tensor([[2.0], [-2.0]]), class_logits=torch.randn(2, 1, 3))
    labels = torch.tensor([1, -100])
    least = recipe.distance_of_answers(said, said, labels)
    for name in ("detection_logits", "class_logits"):
        moved = GatedConformerOutput(**{**said, name: said[name] + torch.randn(said[name].shape)})
        assert recipe.distance_of_answers(moved, said, labels) > least
    named = said.class_logits + torch.tensor([0.0, 1.0])[:, None, None] * torch.randn(3)
    moved = GatedConformerOutput(**{**said, "class_logits": named})
    torch.testing.assert_close(recipe.distance_of_answers(moved, said, labels), least)


def test_gates_of_windows_of_noise_are_shut_however_open_they_are(recipe):
    odds = torch.tensor([[[8.0, -2.0]], [[8.0, -2.0]]], requires_grad=True)
    outputs = GatedConformerOutput(gate_probabilities=odds.sigmoid())
    recipe.shut_loss(outputs, torch.tensor([True, False]), macs=(3, 1)).backward()
    # The cross-entropy's gradient is the probability, here of a module with three quarters of the work and one of two windows.
    expected = odds.detach().sigmoid() * torch.tensor([0.75, 0.25]) * torch.tensor([0.5, 0.0])[:, None, None]
    torch.testing.assert_close(odds.grad, expected, atol=0, rtol=1e-3)


def test_a_small_setting_gives_way_to_what_is_given(recipe):
    words = ["--data", "clips", "--noise", "noise", "--small", "--use_cpu", "True"]
    _, small = recipe.read_arguments(words)
    _, changed = recipe.read_arguments([*words, "--max_steps", "7"])
    _, gated = recipe.read_arguments([*words, "--model", "out"])
    assert (small.max_steps, small.ungated_steps, changed.max_steps) == (2_400, 2_400, 7)
    assert (gated.max_steps, gated.ungated_steps) == (1_500, 0)
    assert changed.gate_loss_weight == gated.gate_loss_weight == recipe.SMALL["gate_loss_weight"]
