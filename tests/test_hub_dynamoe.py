"""A nested model goes to the Hub and comes back, also where this package is not installed."""

import os
import subprocess
import sys
import textwrap


MAKE = """
    import sys
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from hf_ext import convert_to_dynamoe

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        sys.argv[2], vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.3,
    )
    dense = AutoModelForCausalLM.from_config(config)
    rows = [{"input_ids": list(range(24))}]
    moe = convert_to_dynamoe(dense, 3, calibration_dataset=rows, router_hidden_size=8, disable_tqdm=True)
    with torch.no_grad():
        for mlp in moe.nested_mlps():
            mlp.router.out.weight.normal_(std=2)
            mlp.router.out.bias.zero_()
    moe.set_sensitivity(0.5)
"""
SHOW = """
    def show(model):
        # A file's tensors begin at any address, and slices of those may be multiplied by kernels that round otherwise.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        ids = torch.arange(1, 8)[None]
        text = model.generate(ids, max_new_tokens=12, do_sample=False).tolist()
        with torch.no_grad():
            out = model(ids, output_router_logits=True)
        print([text, out.expert_index.tolist(), out.logits.double().sum().item(), model.config.sensitivity])
"""
# Makes the package unfindable, wherever it is installed.
WITHOUT_HF_EXT = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "hf_ext":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())
"""
PULL = """
    import sys, torch
    from transformers import AutoConfig, AutoModelForCausalLM
    trust = {"trust_remote_code": True} if "hf_ext" not in sys.modules else {}
    assert AutoConfig.from_pretrained(sys.argv[1], **trust).model_type == "dynamoe"
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **trust)
"""


def test_a_model_pushed_and_pulled_is_the_same(hub):
    """With this package, which needs no trust, and without it, by the code that the repository carries."""
    repo_id = f"{hub.user}/dynamoe"
    here = hub.run_python(MAKE + SHOW + "\n    moe.push_to_hub(sys.argv[1])\n    show(moe)", repo_id, "llama")
    expected = here.stdout.strip().splitlines()[-1]
    for before in ("\n    import hf_ext\n", WITHOUT_HF_EXT):
        there = hub.run_python(before + PULL + SHOW + "\n    show(model)", repo_id)
        assert there.stdout.strip().splitlines()[-1] == expected

    files = hub.files(repo_id)
    assert {"config.json", "generation_config.json", "model.safetensors", "modeling_dynamoe.py"} <= set(files)
    card = files["README.md"].decode()
    for words in (
        f'from_pretrained("{repo_id}", trust_remote_code=True)',
        "- arxiv:2502.12325",
        "library_name: transformers",
        "model.set_sensitivity(0.5)",
        "first 8, 16 or all 24 neurons",
        "activation_norm, on 24 tokens",
        "a dense `llama` model",
    ):
        assert words in card, (words, card)


def test_a_card_that_somebody_wrote_stays(hub):
    """On the Hub, and in a folder that is saved to again."""
    code = (
        MAKE
        + """
    from pathlib import Path
    from huggingface_hub import upload_file
    upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id=sys.argv[1])
    moe.push_to_hub(sys.argv[1])
    moe.save_pretrained("out")
    assert "trust_remote_code" in Path("out/README.md").read_text()
    Path("out/README.md").write_text("# Mine")
    moe.save_pretrained("out")
    assert Path("out/README.md").read_text() == "# Mine"
    """
    )
    repo_id = f"{hub.user}/dynamoe-card"
    hub.run_python("from huggingface_hub import create_repo; import sys; create_repo(sys.argv[1])", repo_id)
    hub.run_python(code, repo_id, "llama")
    card = hub.files(repo_id)["README.md"].decode()
    assert "# Mine" in card and "set_sensitivity" not in card


def test_a_folder_carries_its_code(tmp_path):
    """It loads in a process that can't find this package, is saved again from there, and loads again."""

    def run(code, *args):
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HOME")}
        env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
        env |= {"PYTHONPATH": os.environ.get("PYTHONPATH", "")} if "from hf_ext" in code else {}
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return process.stdout.strip().splitlines()[-1]

    first, second = tmp_path / "first", tmp_path / "second"
    expected = run(MAKE + SHOW + "\n    moe.save_pretrained(sys.argv[1])\n    show(moe)", first, "phi3")
    again = "\n    model.save_pretrained(sys.argv[2])\n    show(model)"
    assert run(WITHOUT_HF_EXT + PULL + SHOW + again, first, second) == expected
    assert run(WITHOUT_HF_EXT + PULL + SHOW + "\n    show(model)", second) == expected
    assert {path.name for path in first.glob("*.py")} == {path.name for path in second.glob("*.py")}


def test_what_travels_imports_nothing_of_the_package():
    """Each file that a checkpoint carries imports torch, transformers, what these need, and files beside it."""
    import ast
    from pathlib import Path

    import hf_ext

    folder, seen, todo = Path(hf_ext.__file__).parent / "dynamoe", set(), {"modeling_dynamoe"}
    while todo:
        name = todo.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module
                todo |= {node.module} - seen
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                roots = {name.partition(".")[0] for name in names}
                assert roots <= {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
    assert {"configuration_dynamoe", "nested_mlp", "routing"} <= seen
    assert not seen & {"conversion", "trainer", "calibration"}


def test_a_dense_model_on_the_hub_is_converted_by_its_name(hub):
    """In memory and from file to file; receipt and card name it."""
    repo_id = f"{hub.user}/dynamoe-base"
    code = (
        MAKE.partition("    rows =")[0]
        + """
    from pathlib import Path
    from hf_ext import convert_checkpoint_to_dynamoe

    dense.push_to_hub(sys.argv[1], max_shard_size="4KB")
    options = {"num_experts": 3, "importance": "none", "disable_tqdm": True}
    torch.manual_seed(1)
    moe = convert_to_dynamoe(sys.argv[1], **options)
    torch.manual_seed(1)
    receipt = convert_checkpoint_to_dynamoe(sys.argv[1], "moe", **options)
    assert receipt == moe.conversion_receipt and receipt.base_model == sys.argv[1]
    loaded = AutoModelForCausalLM.from_pretrained("moe").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in moe.state_dict().items())
    assert f"base_model: {sys.argv[1]}" in Path("moe/README.md").read_text()
    """
    )
    hub.run_python(code, repo_id, "llama")
