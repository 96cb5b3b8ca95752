"""transformers, PEFT and datasets push to the test Hub and pull from it."""

from typing import Any

import pytest

from hub_fixtures import Hub


PUSH_MODELS = """
import json
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import Trainer, TrainingArguments

torch.manual_seed(0)
inputs = torch.arange(8)[None]

def logits(model):
    with torch.no_grad():
        return model.eval()(inputs).logits[0].tolist()

told = {}
shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, initializer_range=0.5, **shape))
base.push_to_hub("tester/hub-tiny")
told["base"] = logits(base)

vocab = {"<unk>": 0} | {letter: index for index, letter in enumerate("abcdefgh", start=1)}
words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
tokenizer.push_to_hub("tester/hub-tiny")
told["ids"] = tokenizer("a c z").input_ids

# From the Hub, so that the adapter knows the name of its base.
base = AutoModelForCausalLM.from_pretrained("tester/hub-tiny")
lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
adapted = get_peft_model(base, lora)
adapted.push_to_hub("tester/hub-adapter")
told["adapter"] = logits(adapted)
adapted.push_to_hub("tester/hub-adapter", revision="attempt")

setup = TrainingArguments("out", hub_model_id="tester/hub-trained", report_to="none", max_steps=1, use_cpu=True)
trainer = Trainer(adapted, setup, train_dataset=[{"input_ids": inputs[0], "labels": inputs[0]}])
trainer.train()
trainer.push_to_hub()
told["trained"] = logits(trainer.model)
print(json.dumps(told))
"""

PULL_MODELS = """
import json
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits[0].tolist()

told = {"ids": AutoTokenizer.from_pretrained("tester/hub-tiny")("a c z").input_ids}
base = AutoModelForCausalLM.from_pretrained("tester/hub-tiny")
told["base"] = logits(base)
told["PeftModel"] = logits(PeftModel.from_pretrained(base, "tester/hub-adapter"))
told["AutoPeftModelForCausalLM"] = logits(AutoPeftModelForCausalLM.from_pretrained("tester/hub-adapter"))
told["AutoModelForCausalLM"] = logits(AutoModelForCausalLM.from_pretrained("tester/hub-adapter"))
told["revision"] = logits(AutoPeftModelForCausalLM.from_pretrained("tester/hub-adapter", revision="attempt"))
told["trained"] = logits(AutoPeftModelForCausalLM.from_pretrained("tester/hub-trained"))
told["card"] = ModelCard.load("tester/hub-trained").data.to_dict()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def pushed(hub: Hub) -> Any:
    """A tiny Llama, its tokenizer, a LoRA adapter and a trained adapter on the Hub; gives their outputs before the push."""
    return hub.run_json(PUSH_MODELS)


@pytest.fixture(scope="module")
def pulled(hub: Hub, pushed: Any) -> Any:
    """The outputs of the same models, pulled in a process that has never seen them."""
    return hub.run_json(PULL_MODELS)


def test_model_and_tokenizer_come_back(pushed: Any, pulled: Any) -> None:
    """A model pulled from the Hub computes the logits it had before the push, and its tokenizer gives the same ids."""
    assert pulled["ids"] == pushed["ids"] == [1, 3, 0]
    assert pulled["base"] == [pytest.approx(row, abs=1e-5) for row in pushed["base"]]


@pytest.mark.parametrize("way", ["PeftModel", "AutoPeftModelForCausalLM", "AutoModelForCausalLM", "revision"])
def test_adapter_comes_back(pushed: Any, pulled: Any, way: str) -> None:
    """An adapter computes the same logits, whichever class loads it, from `main` or a branch; and not those of its base."""
    assert pulled[way] == [pytest.approx(row, abs=1e-5) for row in pushed["adapter"]]
    assert pulled[way][-1] != pytest.approx(pushed["base"][-1], abs=1e-2)


def test_trainer_pushes_weights_and_card(hub: Hub, pushed: Any, pulled: Any) -> None:
    """`Trainer.push_to_hub` pushes the weights as trained, with a card that names the base model and the method."""
    assert {"README.md", "adapter_model.safetensors"} <= set(hub.files("tester/hub-trained"))
    assert pulled["trained"] == [pytest.approx(row, abs=1e-5) for row in pushed["trained"]]
    assert pulled["card"]["base_model"] == "tester/hub-tiny"
    assert "lora" in pulled["card"]["tags"]


def test_dataset_comes_back(hub: Hub) -> None:
    """`Dataset.push_to_hub` and `load_dataset` go through the Hub as models do."""
    pytest.importorskip("datasets")
    hub.run_python("from datasets import Dataset; Dataset.from_dict({'x': [1, 2, 3]}).push_to_hub('tester/hub-rows')")
    code = "from datasets import load_dataset; print(list(load_dataset('tester/hub-rows', split='train')['x']))"
    assert hub.run_json(code) == [1, 2, 3]


def test_libraries_call_nothing_that_the_hub_lacks(hub: Hub, pulled: Any) -> None:
    """Each request made so far met an endpoint, and none of them met a bug."""
    assert hub.server.unserved == []
    assert hub.server.errors == []
