"""A conversion from files to files gives what one in memory gives, and holds one shard at a time."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dynamoe.models import SHAPES, WIDTHS, calibration_rows, random_ids, tiny_model
from hf_ext import convert_checkpoint_to_dynamoe, convert_to_dynamoe, shipped_model
from hf_ext.dynamoe import shards


OPTIONS = {"expert_widths": WIDTHS, "router_hidden_size": 16, "disable_tqdm": True}


def tensors_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same(folder, expected):
    """Tensor for tensor, and file for file but for what they say of where they come from."""
    ours, theirs = tensors_of(folder), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, expected)]
    for config in configs:
        config["conversion"].pop("base_model")
        assert config["conversion"].pop("largest_logit_difference") < 1e-3
    shares = [torch.tensor(config["conversion"].pop("importance_shares")) for config in configs]
    torch.testing.assert_close(*shares)
    assert configs[0] == configs[1]
    if (expected / "model.safetensors.index.json").exists():
        index, other = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (folder, expected))
        assert index["weight_map"].keys() == other["weight_map"].keys()
        assert index["metadata"]["total_size"] == other["metadata"]["total_size"]


def convert_both_ways(source, folder, size="20KB", **options):
    torch.manual_seed(5)
    moe = convert_to_dynamoe(str(source), **{**OPTIONS, **options})
    moe.save_pretrained(folder / "memory", max_shard_size=size)
    torch.manual_seed(5)
    receipt = convert_checkpoint_to_dynamoe(source, folder / "files", max_shard_size=size, **{**OPTIONS, **options})
    assert receipt.router_parameters == moe.conversion_receipt.router_parameters
    assert_same(folder / "files", folder / "memory")
    return folder / "files"


@pytest.mark.parametrize("importance", ["activation_norm", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_files_give_what_memory_gives(shape, importance, tmp_path):
    """From shards of the dense model to shards of the nested one."""
    dense = tiny_model(shape)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    options = {"importance": importance}
    if importance != "none":
        options["calibration_dataset"] = calibration_rows()
    folder = convert_both_ways(tmp_path / "dense", tmp_path, **options)
    assert len(list(folder.glob("*.safetensors"))) > 2
    moe = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        ids = random_ids(2, 9)
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_layers_that_do_not_fit_are_brought_from_the_disk(tmp_path, monkeypatch):
    """While neurons are ranked: the same order."""
    tiny_model("llama-bias").save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = {"calibration_dataset": calibration_rows(), **OPTIONS}
    torch.manual_seed(5)
    moe = convert_to_dynamoe(str(tmp_path / "dense"), **options)
    devices = []
    with monkeypatch.context() as patch:
        measure = shards.neuron_importance
        patch.setattr(
            shards,
            "neuron_importance",
            lambda model, *args: devices.append({p.device.type for p in model.parameters()}) or measure(model, *args),
        )
        torch.manual_seed(5)
        receipt = convert_checkpoint_to_dynamoe(tmp_path / "dense", tmp_path / "moe", device_map=device_map, **options)
    assert devices == [{"cpu", "meta"}] and receipt.largest_logit_difference < 1e-3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").state_dict()
    for name, tensor in moe.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision_is_that_of_the_dense_model(dtype, tmp_path):
    """Of its configuration where its files say otherwise."""
    tiny_model(dtype=dtype).save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    folder = convert_both_ways(tmp_path / "dense", tmp_path, importance="none")
    assert {tensor.dtype for tensor in tensors_of(folder).values()} == {dtype}


def test_an_output_embedding_that_is_tied_and_in_the_files_is_left_out(tmp_path):
    """As loading and saving does; old names of tensors are known too."""
    dense = tiny_model("qwen2")
    dense.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    assert "model.lm_head.weight" not in tensors_of(convert_both_ways(path.parent, tmp_path, importance="none"))


def test_the_tokenizer_and_generation_settings_come_along(tmp_path):
    texts = ["Once upon a time there was a cat.", "The sun was warm."]
    options = {"calibration_dataset": texts, "num_experts": 4, "disable_tqdm": True}
    source = shipped_model("tiny-lm")
    receipt = convert_checkpoint_to_dynamoe(source, tmp_path / "moe", **options)
    assert receipt.calibration_tokens == convert_to_dynamoe(source, **options).conversion_receipt.calibration_tokens
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "moe", source))
    assert ours(texts).input_ids == theirs(texts).input_ids
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    dense = AutoModelForCausalLM.from_pretrained(source)
    assert loaded.generation_config.to_dict() == dense.generation_config.to_dict()
    assert "set_sensitivity" in (tmp_path / "moe" / "README.md").read_text()


def refuse(source, target, words, **options):
    """Nothing is left behind."""
    before = sorted(path.name for path in target.parent.iterdir())
    with pytest.raises(ValueError) as caught:
        convert_checkpoint_to_dynamoe(source, target, **{**OPTIONS, "importance": "none", **options})
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    assert sorted(path.name for path in target.parent.iterdir()) == before


def test_what_cannot_be_converted_leaves_nothing_behind(tmp_path):
    source, target = tmp_path / "dense", tmp_path / "moe"
    tiny_model().save_pretrained(source, max_shard_size="20KB")
    refuse(source, target, ["`num_experts`=5"], num_experts=5, expert_widths=None)
    refuse(source, target, ["'taylor'", "convert_to_dynamoe"], importance="taylor", calibration_dataset=["text"])
    refuse(source, target, ["`calibration_dataset`"], importance="activation_norm")
    unread = (1 / 0 for _ in range(1))
    for size in ("5 gigs", None):
        words = ["`max_shard_size`", "'5GB'", f"got {size!r}"]
        refuse(source, target, words, max_shard_size=size, importance="activation_norm", calibration_dataset=unread)
    refuse(source, target, ["no text"], importance="activation_norm", calibration_dataset=[])
    refuse(source, source, ["`output_dir`", "not empty"])
    with pytest.raises(
        TypeError, match=r"`model` must be a folder or a name.*got LlamaForCausalLM.*`convert_to_dynamoe`"
    ):
        convert_checkpoint_to_dynamoe(tiny_model(), target, importance="none")
    config = json.loads((source / "config.json").read_text())
    for changes, words in (
        ({"num_hidden_layers": 3}, ["9 tensors are missing", "layers.2"]),
        ({"num_hidden_layers": 1}, ["9 have no place", "layers.1"]),
        ({"vocab_size": 41}, ["has shape (40, 32)", "(41, 32) by config.json"]),
    ):
        (source / "config.json").write_text(json.dumps({**config, **changes}))
        refuse(source, target, words)
    (source / "config.json").write_text(json.dumps(config))
    path = min(source.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    refuse(source, target, [path.name, "truncated, damaged or a Git LFS pointer"])
    for path in source.glob("*.safetensors*"):
        path.unlink()
    refuse(source, target, ["neither model.safetensors nor", "save_pretrained"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSONDecodeError"),
        ("version https://git-lfs.github.com/spec/v1", "JSONDecodeError"),
        ("\xff", "UnicodeDecodeError"),
        ("[]", "TypeError"),
        ('{"metadata": {}}', "KeyError: 'weight_map'"),
        ('{"weight_map": {"a": "b"}}', "KeyError: 'metadata'"),
        ('{"metadata": {}, "weight_map": ["a"]}', "AttributeError"),
        ('{"metadata": {}, "weight_map": {"a": 1}}', "no file for each tensor"),
        ('{"metadata": [], "weight_map": {"a": "b"}}', "no file for each tensor"),
        ('{"metadata": {}, "weight_map": {}}', "no file for each tensor"),
    ],
)
def test_an_index_that_is_none_is_named(text, reason, tmp_path):
    """Of an interrupted download or a broken hand, and not as an error from inside a library."""
    source = tmp_path / "dense"
    tiny_model().save_pretrained(source, max_shard_size="20KB")
    index = source / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    refuse(source, tmp_path / "moe", [str(index), reason, "`weight_map`", "download it again"])


def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    saved = []

    def fail(tensors, path, **options):
        saved.append(path)
        if len(saved) == 2:
            raise OSError("No space left on device")
        save_file(tensors, path, **options)

    monkeypatch.setattr(shards, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint_to_dynamoe(
            tmp_path / "dense", tmp_path / "moe", importance="none", max_shard_size="20KB", **OPTIONS
        )
    assert len(saved) == 2 and [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("kind", ["empty", "link", "link to nothing", "working folder"])
def test_it_fills_the_folder_that_is_meant(kind, tmp_path, monkeypatch):
    """Wherever that lies: to take its place instead may be impossible, and all of the work lost."""
    tiny_model().save_pretrained(tmp_path / "dense")
    meant, named = tmp_path / "meant", tmp_path / "meant"
    if kind != "link to nothing":
        meant.mkdir()
    if kind.startswith("link"):
        named = tmp_path / "link"
        named.symlink_to(meant)
    if kind == "working folder":
        monkeypatch.chdir(meant)
        named = "."
    before = meant.stat().st_ino if meant.exists() else None
    convert_checkpoint_to_dynamoe(tmp_path / "dense", named, importance="none", **OPTIONS)
    assert AutoModelForCausalLM.from_pretrained(meant).config.expert_widths == WIDTHS
    assert before in (None, meant.stat().st_ino) and not [path for path in meant.iterdir() if path.is_dir()]


def test_a_folder_that_cannot_be_made_is_said_before_neurons_are_ranked(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "dense")
    (tmp_path / "file").touch()
    monkeypatch.setattr(shards, "neuron_importance", lambda *_: 1 / 0)
    with pytest.raises(OSError, match="Not a directory"):
        convert_checkpoint_to_dynamoe(
            tmp_path / "dense", tmp_path / "file" / "moe", calibration_dataset=calibration_rows(), **OPTIONS
        )


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    """Neurons would be ranked with it, and files would come out without."""
    source = tmp_path / "dense"
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["down_proj"]))
    adapted.save_pretrained(source)
    words = [str(source), "holds an adapter (adapter_config.json)", "merge it"]
    refuse(source, tmp_path / "moe", words)
    adapted.unload().save_pretrained(source)
    refuse(source, tmp_path / "moe", words)


def test_memory_is_that_of_a_shard(tmp_path):
    """The growth of a process that converts 130 MB in shards of 10 MB stays below three of them."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    code = """
        import resource, sys
        from hf_ext.dynamoe import shards

        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        small, large = sys.argv[1:]
        options = {"importance": "none", "max_shard_size": "10MB", "disable_tqdm": True}
        shards.convert_checkpoint_to_dynamoe(small, "first", **options)  # whatever is imported and set up once
        before = peak()
        shards.convert_checkpoint_to_dynamoe(large, "second", **options)
        print(peak() - before)
    """
    tiny_model().save_pretrained(tmp_path / "small")
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path / "small", tmp_path / "dense"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert float(process.stdout.split()[-1]) < 30
    total = sum(path.stat().st_size for path in (tmp_path / "second").glob("*.safetensors"))
    assert total > 130e6
