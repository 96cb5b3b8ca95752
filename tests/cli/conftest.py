"""A random model with a random multi-token adapter, random spotters and clips for them, all small, as folders."""

import csv
import string
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertTokenizer, DistilBertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cli.kws_command import WORDS
from hf_ext import (
    DspForKeywordSpotting,
    DspKwsConfig,
    GatedLoraConfig,
    KwsProcessor,
    SlickConfig,
    SlickForKeywordSpotting,
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: any text has an encoding, and most characters beyond ASCII need several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1, **{byte: i for i, byte in enumerate(alphabet, start=2)}}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="session")
def base_folder(tokenizer, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=None,
        # Out of reach, so that every text has the length that was asked for.
        eos_token_id=None,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("cli") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _saved_adapter(base_folder: Path, config, folder: Path) -> Path:
    torch.manual_seed(1)
    base = LlamaForCausalLM.from_pretrained(base_folder)
    base.config._name_or_path = str(base_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(base_folder) -> Path:
    return _saved_adapter(base_folder, GatedLoraConfig(r=2, num_masks=3), base_folder.parent / "adapter")


@pytest.fixture(scope="session")
def lora_folder(base_folder) -> Path:
    """An adapter of another kind."""
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    return _saved_adapter(base_folder, config, base_folder.parent / "lora")


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """A tone for each letter, two clips a word: an audiofolder."""
    folder = tmp_path_factory.mktemp("recordings")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "speaker"])
        for word in WORDS:
            for speaker, pitch in (("ann", 300), ("bob", 220)):
                time = np.arange(1600) / 16000
                tones = [0.3 * np.sin(2 * np.pi * (pitch + 120 * (ord(letter) % 26)) * time) for letter in word]
                name = f"{word.replace(' ', '-')}-{speaker}.wav"
                soundfile.write(folder / name, np.concatenate(tones), 16000)
                writer.writerow([name, word, speaker])
    return folder


@pytest.fixture(scope="session")
def spotter_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("spotter") / "tiny"
    config = SlickConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    SlickForKeywordSpotting(config).save_pretrained(folder)
    KwsProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def words_folder(tmp_path_factory):
    """A model that takes words, in letters."""
    folder = tmp_path_factory.mktemp("words") / "tiny"
    letters = string.ascii_lowercase
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    text = DistilBertConfig(vocab_size=len(pieces), dim=8, hidden_dim=16, n_layers=1, n_heads=2)
    config = DspKwsConfig(text_config=text, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    DspForKeywordSpotting(config).save_pretrained(folder)
    KwsProcessor(tokenizer=BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})).save_pretrained(folder)
    return folder
