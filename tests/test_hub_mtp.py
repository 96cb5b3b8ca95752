"""An adapter goes to the Hub and comes back: pushed by the model and by the trainer, pulled in a fresh process."""

import pytest


MAKE = """
    import sys
    import torch, hf_ext
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from hf_ext import GatedLoraConfig

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, eos_token_id=None, bos_token_id=None)
    )
    base.push_to_hub(sys.argv[1])
    base = LlamaForCausalLM.from_pretrained(sys.argv[1])
    config = GatedLoraConfig(r=4, num_masks=3)
"""
PUSH = (
    MAKE
    + """
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.push_to_hub(sys.argv[2])
    ids = torch.arange(1, 8)[None]
    out = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    print([out.sequences.tolist(), out.step_lengths])
    """
)
PULL = """
    import sys, torch, hf_ext
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    base_id, adapter_id = sys.argv[1:]
    ids = torch.arange(1, 8)[None]
    loaded = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_id), adapter_id),
        AutoPeftModelForCausalLM.from_pretrained(adapter_id),
        AutoModelForCausalLM.from_pretrained(adapter_id),
    ]
    for model in loaded:
        out = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
        print([out.sequences.tolist(), out.step_lengths])
"""
TRAIN = (
    MAKE
    + """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from hf_ext import MtpConfig, MtpTrainer

    words = {word: i for i, word in enumerate(["<pad>", "</s>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    text = Dataset.from_dict({"text": ["a b c d e f g h i j a b c d"] * 4})
    args = MtpConfig(
        output_dir="out", hub_model_id=sys.argv[2], max_steps=2, report_to="none", bf16=False, use_cpu=True,
        logging_steps=1, eval_decoding_tokens=8, eval_prompt_length=4,
    )
    trainer = MtpTrainer(model=base, args=args, train_dataset=text, eval_dataset=text, processing_class=tokenizer,
                         peft_config=config)
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    ids = torch.arange(1, 8)[None]
    model = trainer.model.eval()
    out = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    print([out.sequences.tolist(), out.step_lengths])
    """
)


@pytest.mark.parametrize(("name", "push"), [("model", PUSH), ("trainer", TRAIN)])
def test_an_adapter_pushed_and_pulled_generates_the_same(hub, name, push):
    """PeftModel, AutoPeftModel and AutoModel give the output and the steps of the process that pushed."""
    base_id, adapter_id = f"{hub.user}/mtp-base-{name}", f"{hub.user}/mtp-adapter-{name}"
    here = hub.run_python(push, base_id, adapter_id).stdout.strip().splitlines()[-1]
    there = hub.run_python(PULL, base_id, adapter_id).stdout.strip().splitlines()[-3:]
    assert there == [here] * 3

    files = hub.files(adapter_id)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
    assert not any(path.endswith((".bin", ".pt", ".pkl")) and path != "training_args.bin" for path in files)
    card = files["README.md"].decode()
    for words in ("import hf_ext", f'from_pretrained("{adapter_id}")', f"base_model: {base_id}", "- hf-ext", "peft"):
        assert words in card, words
