"""Adapter files that are damaged, or meet another base, by every way to load them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_ext import GatedLoraConfig
from mtp.models import gated_config, random_prompt, randomise, tiny_model


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), gated_config())
    randomise(model)
    model.save_pretrained(folder)
    return folder


def through_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def through_auto_model(base: Path, adapter: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(adapter)


def through_load_adapter(base: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(adapter)
    return model


WAYS = pytest.mark.parametrize("load", [through_peft, through_auto_model, through_load_adapter])
Load = Callable[[Path, Path], Any]


class TestFiles:
    """Adapter files that are damaged, or meet another base, by every way to load them."""

    @pytest.fixture
    def damaged(self, adapter_folder: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))

    @WAYS
    @pytest.mark.parametrize("kept", [0, 5, 300, -1, "pointer"])
    def test_unreadable(self, load: Load, kept: int | str, base_folder: Path, damaged: Path) -> None:
        """A part of a file, or what Git LFS leaves in its place: the folder and a way out are named."""
        file = damaged / "adapter_model.safetensors"
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n"
        file.write_bytes(pointer if isinstance(kept, str) else file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=rf"{damaged}' can't be read \(.+\): .*truncated.* again") as caught:
            load(base_folder, damaged)
        assert isinstance(caught.value.__cause__, SafetensorError)

    def test_other_adapters_have_the_errors_of_their_library(self, base_folder: Path, tmp_path: Path) -> None:
        """An ordinary LoRA passes through, whichever way it is loaded."""
        get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
        for load in (through_peft, through_load_adapter):
            with pytest.raises(SafetensorError):
                load(base_folder, tmp_path)

    @WAYS
    @pytest.mark.parametrize("name", ["layers.1.self_attn.q_proj.lora_B.weight", "mtp_head.lora_mask_vectors"])
    def test_tensor_missing(self, load: Load, name: str, base_folder: Path, damaged: Path) -> None:
        """One tensor of a LoRA layer or of the head."""
        weights = load_file(damaged / "adapter_model.safetensors")
        (key,) = [key for key in weights if key.endswith(name)]
        del weights[key]
        save_file(weights, damaged / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"lacks 1 of {len(weights) + 1} tensors \(.*{name.rsplit('.', 2)[-2]}"):
            load(base_folder, damaged)

    @WAYS
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_a_number(self, load: Load, value: float, base_folder: Path, damaged: Path) -> None:
        """One value of one tensor."""
        weights = load_file(damaged / "adapter_model.safetensors")
        key = next(key for key in weights if key.endswith("mtp_head.lora_sampler_in.weight"))
        weights[key][0, 0] = value
        save_file(weights, damaged / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"NaN or infinity in 1 tensors \(.*lora_sampler_in"):
            load(base_folder, damaged)

    @pytest.mark.parametrize(("damage", "message"), [("unreadable", "can't be read"), ("not a number", "NaN")])
    def test_model_is_plain_after_a_refusal(self, damage: str, message: str, base_folder: Path, damaged: Path) -> None:
        """A refused adapter is taken out again: the model generates plainly, and a good one can be loaded."""
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        expected = model.generate(random_prompt(5), max_new_tokens=9, do_sample=False).tolist()
        file = damaged / "adapter_model.safetensors"
        weights = load_file(file)
        key = next(iter(weights))
        save_file({**weights, key: weights[key] * float("nan")}, file, metadata={"format": "pt"})
        if damage == "unreadable":
            file.write_bytes(b"half")
        with pytest.raises(ValueError, match=message):
            model.load_adapter(damaged)
        assert model.generate(random_prompt(5), max_new_tokens=9, do_sample=False).tolist() == expected
        save_file(weights, file, metadata={"format": "pt"})
        model.load_adapter(damaged)
        output = model.generate(random_prompt(5), max_new_tokens=9, return_dict_in_generate=True)
        assert output.sequences.tolist() == expected
        assert output.step_lengths is not None

    @pytest.mark.parametrize("load", [through_peft, through_load_adapter])
    @pytest.mark.parametrize(
        ("field", "name", "value", "other"),
        [
            ("hidden_size", "base_hidden_size", 24, 30),
            ("num_hidden_layers", "base_num_layers", 2, 3),
            ("vocab_size", "base_vocab_size", 20, 22),
        ],
    )
    def test_other_base(
        self, load: Load, field: str, name: str, value: int, other: int, adapter_folder: Path, tmp_path: Path
    ) -> None:
        """Another width, depth or vocabulary: both values are named."""
        tiny_model(**{field: other}).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"`{name}` is {value} in the adapter and {other} in the model"):
            load(tmp_path, adapter_folder)

    def test_other_base_named_by_the_adapter(self, adapter_folder: Path, damaged: Path, tmp_path: Path) -> None:
        """The same where the adapter's own folder names a base that has changed meanwhile."""
        tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "other")
        config = damaged / "adapter_config.json"
        base = GatedLoraConfig.from_pretrained(damaged).base_model_name_or_path
        config.write_text(config.read_text().replace(base, str(tmp_path / "other")))
        with pytest.raises(ValueError, match="`base_num_layers` is 2 in the adapter and 3 in the model"):
            AutoModelForCausalLM.from_pretrained(damaged)
