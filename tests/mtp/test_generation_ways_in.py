"""Every way to an adapted model decodes the same."""

from pathlib import Path
from typing import Any

import pytest
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from hf_ext import mtp_generate
from mtp.models import (
    details,
    random_prompt,
    saved_skilled_model,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved_skilled_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path]) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folders[0])
    tokens = base.generate(random_prompt(7), max_new_tokens=30, do_sample=False)
    steps = details(PeftModel.from_pretrained(base, folders[1]), random_prompt(7), max_new_tokens=30).step_lengths
    assert len(steps[0]) < 25
    return tokens.tolist(), steps


class TestWaysIn:
    """The same text, and the same steps, by every way to an adapted model."""

    def check(self, model: Any, expected: Any, **kwargs: Any) -> None:
        output = details(model, random_prompt(7), max_new_tokens=30, **kwargs)
        assert (output.sequences.tolist(), output.step_lengths) == expected

    def test_peft_model(self, folders: tuple[Path, Path], expected: Any) -> None:
        """`PeftModel.from_pretrained(base, folder)`."""
        self.check(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[0]), folders[1]), expected)

    def test_auto_model(self, folders: tuple[Path, Path], expected: Any) -> None:
        """`AutoModelForCausalLM.from_pretrained(adapter folder)`."""
        self.check(AutoModelForCausalLM.from_pretrained(folders[1]), expected)

    def test_auto_peft_model(self, folders: tuple[Path, Path], expected: Any) -> None:
        """`AutoPeftModelForCausalLM.from_pretrained(adapter folder)`."""
        self.check(AutoPeftModelForCausalLM.from_pretrained(folders[1]), expected)

    def test_load_adapter(self, folders: tuple[Path, Path], expected: Any) -> None:
        """`model.load_adapter(folder)` of transformers, with a name."""
        model = AutoModelForCausalLM.from_pretrained(folders[0])
        model.load_adapter(folders[1], adapter_name="fast")
        self.check(model, expected)

    def test_low_cpu_mem_usage(self, folders: tuple[Path, Path], expected: Any) -> None:
        """Weights created on the meta device and then read."""
        base = AutoModelForCausalLM.from_pretrained(folders[0])
        model = PeftModel.from_pretrained(base, folders[1], low_cpu_mem_usage=True)
        assert all(parameter.device.type == "cpu" for parameter in model.parameters())
        self.check(model, expected)

    def test_custom_generate(self, folders: tuple[Path, Path], expected: Any) -> None:
        """`custom_generate=mtp_generate` on a model with the adapter injected, and through PeftModel."""
        self.check(AutoModelForCausalLM.from_pretrained(folders[1]), expected, custom_generate=mtp_generate)
        self.check(AutoPeftModelForCausalLM.from_pretrained(folders[1]), expected, custom_generate=mtp_generate)

    def test_custom_generate_takes_the_options(self, folders: tuple[Path, Path], expected: Any) -> None:
        """The callable takes the same arguments as `generate`."""
        model = AutoModelForCausalLM.from_pretrained(folders[1])
        call = {"num_speculative_tokens": 2, "speculation_strategy": "linear", "max_new_tokens": 30}
        through_door = details(model, random_prompt(7), custom_generate=mtp_generate, **call)
        assert through_door.sequences.tolist() == expected[0]
        assert through_door.step_lengths == details(model, random_prompt(7), **call).step_lengths

    def test_options_in_generation_config(self, folders: tuple[Path, Path], expected: Any) -> None:
        """Options stored in `model.generation_config` hold where the call gives none; the call wins."""
        model = AutoModelForCausalLM.from_pretrained(folders[1])
        reference = details(model, random_prompt(7), max_new_tokens=30, num_speculative_tokens=1)
        model.generation_config.num_speculative_tokens = 1
        stored = details(model, random_prompt(7), max_new_tokens=30)
        assert stored.step_lengths == reference.step_lengths != expected[1]
        self.check(model, expected, num_speculative_tokens=4)
