"""Hooks of accelerate, which move inputs and bring offloaded weights, do their work while decoding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from mtp.models import (
    add_adapter,
    details,
    make_skilled,
    random_prompt,
    saved_skilled_model,
    skilled_model,
    tiny_model,
)


PROMPT = random_prompt(7)


def offload_all(model: PreTrainedModel, folder: Path) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def dispatch(model: PreTrainedModel, folder: Path) -> None:
    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offload_layers(model: PreTrainedModel, folder: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk", "mtp_head": "disk"}
    dispatch_model(model, {**places, **layers}, main_device="cpu", offload_dir=folder, force_hooks=True)


def hooks(model: PreTrainedModel) -> dict[str, Any]:
    """What accelerate has put into each module."""
    return {name: vars(m).get("forward") for name, m in model.named_modules() if hasattr(m, "_hf_hook")}


@pytest.mark.parametrize("place", [offload_all, dispatch, offload_layers])
@pytest.mark.parametrize("strategy", ["quadratic", "adaptive"])
def test_steps_are_those_without_hooks(place: Any, strategy: str, tmp_path: Path) -> None:
    """Wherever weights are kept; and every hook is there afterwards, so a second call does the same."""
    call = {"max_new_tokens": 20, "speculation_strategy": strategy}
    expected = details(skilled_model(), PROMPT, **call)
    model = skilled_model()
    place(model, tmp_path)
    before = hooks(model)
    for _ in range(2):
        output = details(model, PROMPT, **call)
        assert output.sequences.tolist() == expected.sequences.tolist()
        assert output.step_lengths == expected.step_lengths
    assert before and hooks(model) == before


def test_weights_are_offloaded_again() -> None:
    """Those of the head too, which decoding reads without calling it."""
    model = skilled_model()
    offload_all(model, Path())
    model.generate(PROMPT, max_new_tokens=9)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_new_adapter_on_a_dispatched_model() -> None:
    """Takes the steps that it takes elsewhere."""
    model = tiny_model()
    dispatch(model, Path())
    make_skilled(add_adapter(model))
    expected = details(skilled_model(), PROMPT, max_new_tokens=20)
    assert details(model, PROMPT, max_new_tokens=20).step_lengths == expected.step_lengths


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved_skilled_model(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("add", ["new", "peft", "transformers"])
def test_adapter_onto_an_offloaded_model(add: str, folders: tuple[Path, Path]) -> None:
    """Is refused, since its weights would be nowhere; the model is left plain."""
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    offload_all(model, Path())
    expected = model.generate(PROMPT, max_new_tokens=20, do_sample=False)
    with pytest.raises(ValueError, match=r"are offloaded.* Add or load the adapter first"):
        if add == "new":
            add_adapter(model)
        elif add == "peft":
            PeftModel.from_pretrained(model, folders[1])
        else:
            model.load_adapter(folders[1])
    assert model.generate(PROMPT, max_new_tokens=20, do_sample=False).tolist() == expected.tolist()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(device_map: str, folders: tuple[Path, Path]) -> None:
    """However the model is loaded by it."""
    base, adapter = folders
    expected = details(skilled_model(), PROMPT, max_new_tokens=20).step_lengths
    injected = AutoModelForCausalLM.from_pretrained(base, device_map=device_map)
    injected.load_adapter(adapter)
    for model in (
        injected,
        AutoModelForCausalLM.from_pretrained(adapter, device_map=device_map),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, device_map=device_map), adapter),
    ):
        assert details(model, PROMPT, max_new_tokens=20).step_lengths == expected
