"""The benchmarks' scripts start, and the main one writes its tables."""

import importlib.util
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ext import GatedLoraConfig
from recipes import run_module


FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "mtp"
SCRIPTS = ("prompts", "acceptance", "wall_clock", "training_step", "ablations")
# Those that are run from the repository's root.
MODULES = sorted(
    f"benchmarks.{path.parent.name}.{path.stem}"
    for path in FOLDER.parent.glob("*/*.py")
    if path.parent != FOLDER and path.stem != "contenders"
)


def run(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    # As `python script.py` does: siblings are found beside the script.
    monkeypatch.syspath_prepend(str(FOLDER))
    path = FOLDER / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_runs(script, monkeypatch, capsys):
    if script == "ablations" and importlib.util.find_spec("trl") is None:
        pytest.skip("needs the extra `train`")
    with pytest.raises(SystemExit) as ended:
        run(script, monkeypatch, "--help")
    assert ended.value.code == 0
    assert "--results_dir" in capsys.readouterr().out


@pytest.mark.parametrize("module", MODULES)
def test_help_of_modules_runs(module, monkeypatch, capsys):
    pytest.importorskip("trl", reason="needs the extra `train`")
    with pytest.raises(SystemExit) as ended:
        run_module(module, monkeypatch, "--help")
    assert ended.value.code == 0
    assert "--results_dir" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A random model with a random adapter."""
    torch.manual_seed(0)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(97 + i): 3 + i for i in range(26)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        pad_token_id=0,
    )
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(base), GatedLoraConfig(num_masks=2, r=2))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(adapter)
    return base, adapter


def test_acceptance_writes_its_tables(folders, tmp_path, monkeypatch):
    base, adapter = folders
    prompts = {"tiny": {"input_ids": [[1, 5, 6, 7], [1, 9]]}}
    (tmp_path / "prompts.json").write_text(json.dumps({"sets": prompts}))
    run(
        "acceptance", monkeypatch, "--model", base, "--adapter", adapter, "--results_dir", tmp_path / "results",
        "--max_new_tokens", 12, "--prompts", tmp_path / "prompts.json", "--threads", 1,
    )  # fmt: skip

    written = json.loads((tmp_path / "results" / "acceptance.json").read_text())
    by_format = {d: [r for r in written["results"] if r["dtype"] == d] for d in ("float32", "float64")}
    assert len(by_format["float32"]) == 2 * 3 * 2
    assert len(by_format["float64"]) == 3
    assert all(r["num_identical"] == r["num_prompts"] == 2 and r["num_tokens"] == 24 for r in written["results"])
    assert {"torch", "transformers", "peft", "hf_ext", "processor", "command", "date"} <= written["provenance"].keys()
    page = (tmp_path / "results" / "acceptance.md").read_text()
    assert "| k | linear, no sampler |" in page
    # Folders are named by their last part.
    assert str(tmp_path) not in page + json.dumps(written)


@pytest.mark.parametrize(
    ("script", "options", "titles"),
    [
        (
            "tradeoff",
            ("--only", "routed", "routed 0.65", "budget 0.5", "nearness", "fixed 0.5", "random"),
            ["Perplexity at", "The knob"],
        ),
        ("ablations", ("--only", "reference", "for one sensitivity", "8 experts"), ["Perplexity at"]),
        ("routers", ("--num_examples", 2), ["Routers", "Share of the MLPs", "Tokens that get"]),
    ],
)
def test_nested_experts_are_measured(script, options, titles, folders, tmp_path, monkeypatch):
    """Two steps of each contender, and the tables of what they gave."""
    pytest.importorskip("trl", reason="needs the extra `train`")
    run_module(
        f"benchmarks.dynamoe.{script}", monkeypatch, "--model", folders[0], "--results_dir", tmp_path, "--steps", 2,
        "--seeds", 0, "--batch_size", 4, "--length", 24, "--num_texts", 24, "--num_test_texts", 12, *options,
    )  # fmt: skip
    page = next(tmp_path.glob(f"{script}_*.md")).read_text()
    assert [title for title in titles if f"## {title}" not in page] == []
    assert page.count("| routed") >= (script != "ablations")


def test_the_speed_of_nested_experts_is_measured(tmp_path, monkeypatch):
    """Of the MLPs alone and of the whole model, one expert for all tokens and routers."""
    run_module(
        "benchmarks.dynamoe.speed", monkeypatch, "--hidden_size", 16, "--intermediate_size", 32, "--num_layers", 2,
        "--prompt_length", 8, "--context", 4, "--rounds", 2, "--results_dir", tmp_path,
    )  # fmt: skip
    page = (tmp_path / "speed_16x32x2_cpu.md").read_text()
    assert all(f"| {name} | " in page for name in ("dense", "fixed, 0.25", "fixed, 0.50", "fixed, 0.75", "routed"))
    seconds = json.loads((tmp_path / "speed_16x32x2_cpu.json").read_text())["seconds"]
    assert {what: len(times) for what, times in seconds.items()} == dict.fromkeys(
        ("decode, MLPs", "decode", "prefill, MLPs", "prefill"), 5
    )
