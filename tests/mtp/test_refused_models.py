"""What the configuration refuses, and models that an adapter can't be put on."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_ext import GatedLoraConfig, GatedLoraModel
from mtp.models import add_adapter, gated_config, plain, random_prompt, tiny_model


# Of what is common to many architectures under one name or another; each takes what its configuration has.
SMALL = {
    "vocab_size": 20, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size": 32, "intermediate_size": 40,
    "decoder_ffn_dim": 40, "d_inner": 40, "dim_ff": 40, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2,
    "decoder_layers": 2, "encoder_layers": 1, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "dim_head": 8,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
READ_BOTH_WAYS = [
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl",
]  # fmt: skip


def small_model(model_type: str, **settings: Any) -> PreTrainedModel:
    """A model of any architecture with random weights."""
    defaults = AutoConfig.for_model(model_type).to_dict()
    small = {name: value for name, value in SMALL.items() if name in defaults}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**small, **settings})).eval()


class TestConfiguration:
    """What the configuration refuses, with the reason."""

    @pytest.mark.parametrize("num_masks", [0, -3])
    def test_num_masks(self, num_masks: int) -> None:
        """Fewer than one mask."""
        with pytest.raises(ValueError, match=f"`num_masks` must be at least 1, got {num_masks}"):
            GatedLoraConfig(num_masks=num_masks)

    def test_task_type(self) -> None:
        """Another task."""
        with pytest.raises(ValueError, match=r"`task_type` must be 'CAUSAL_LM' .* got 'SEQ_CLS'"):
            GatedLoraConfig(task_type="SEQ_CLS")

    @pytest.mark.parametrize(
        ("option", "value", "reason"),
        [
            ("use_dora", True, "mask tokens only"),
            ("bias", "all", "no longer the base model's"),
            ("bias", "lora_only", "no longer the base model's"),
            ("lora_bias", True, "mask tokens only"),
            ("modules_to_save", ["norm"], "no longer the base model's"),
            ("trainable_token_indices", [1, 2], "no longer the base model's"),
            ("target_parameters", ["mlp.experts.gate_up_proj"], "mask tokens only"),
            ("layer_replication", [(0, 1), (0, 2)], "no longer the base model's"),
            ("init_lora_weights", "pissa", "rewrites base weights"),
            ("init_lora_weights", "olora", "rewrites base weights"),
            ("target_modules", "lm_head", "output embedding"),
            ("target_modules", ["q_proj", "lm_head"], "output embedding"),
            ("target_modules", ["model.embed_tokens"], "input embedding"),
        ],
    )
    def test_option(self, option: str, value: Any, reason: str) -> None:
        """Options of LoRA that reach ordinary tokens or have no gated form."""
        with pytest.raises(ValueError, match=rf"(?s)`{option}=.*{reason}"):
            GatedLoraConfig(**{option: value})


class TestBases:
    """Models that an adapter can't be put on."""

    @pytest.mark.parametrize("targets", [r".*(lm_head|q_proj)", r".*embed_tokens|.*q_proj"])
    def test_embedding_by_regular_expression(self, targets: str) -> None:
        """A pattern that matches an embedding is seen on the model."""
        with pytest.raises(ValueError, match=r"`target_modules.*[Ee]mbedding"):
            get_peft_model(tiny_model(), gated_config(target_modules=targets))

    def test_targets_that_are_no_linear_layers(self) -> None:
        """A norm."""
        with pytest.raises(ValueError, match="RMSNorm"):
            get_peft_model(tiny_model(), gated_config(target_modules=["input_layernorm"]))

    def test_encoder_decoder(self) -> None:
        """T5."""
        config = T5Config(
            vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
            get_peft_model(T5ForConditionalGeneration(config), gated_config(target_modules=["q", "v"]))

    @pytest.mark.parametrize("model_type", READ_BOTH_WAYS)
    def test_attention_in_both_directions(self, model_type: str) -> None:
        """As models of the BERT family do unless told otherwise; the way out is named."""
        with pytest.raises(ValueError, match=r"reads its text in both directions.*`is_decoder=True`"):
            add_adapter(small_model(model_type))

    @pytest.mark.parametrize("model_type", ["bert", "electra", "xlm-roberta-xl"])
    def test_way_out_of_attention_in_both_directions(self, model_type: str) -> None:
        """Then output is the base model's; the layers of the head, where no mask comes, are left alone."""
        model = add_adapter(small_model(model_type, is_decoder=True))
        decoder = set(model.get_decoder().modules())
        assert all(module in decoder for module in model.modules() if isinstance(module, LoraLayer))
        expected = plain(model, random_prompt(9), max_new_tokens=12)
        assert model.generate(random_prompt(9), max_new_tokens=12).tolist() == expected.tolist()

    @pytest.mark.parametrize(
        ("shape", "setting", "way_out"),
        [
            ("llama", {"is_causal": False}, "is_causal=True"),
            ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=None"),
        ],
    )
    def test_causal_model_made_to_read_in_both_directions(
        self, shape: str, setting: dict[str, Any], way_out: str
    ) -> None:
        """As embedding models are."""
        with pytest.raises(ValueError, match=f"reads its text in both directions.*`{way_out}`"):
            add_adapter(tiny_model(shape, **setting))

    @pytest.mark.parametrize(
        ("model_type", "missing"),
        [
            ("bloom", ["position_ids"]),
            ("cpmant", ["inputs_embeds", "position_ids"]),
            ("mamba", ["position_ids", "past_key_values"]),
            ("mpt", ["position_ids"]),
            ("openai-gpt", ["past_key_values"]),
            ("roformer", ["position_ids"]),
            ("rwkv", ["position_ids", "past_key_values"]),
            ("trocr", ["position_ids", "logits_to_keep"]),
            ("whisper", ["position_ids", "logits_to_keep"]),
            ("xlnet", ["position_ids", "past_key_values"]),
        ],
    )
    def test_forward_without_what_masks_need(self, model_type: str, missing: list[str]) -> None:
        """The arguments that are missing are named, each with its reason."""
        model = small_model(model_type)
        with pytest.raises(
            ValueError, match="`forward` doesn't take " + ", ".join(rf"`{name}` \(.+?\)" for name in missing)
        ):
            add_adapter(model)
        assert not any("lora_" in name for name, _ in model.named_parameters())

    @pytest.mark.parametrize(
        ("model_type", "settings", "reason"),
        [
            ("falcon", {"alibi": True}, "`alibi=True`"),
            ("jamba", {}, "keeps a state"),
            ("recurrent_gemma", {}, "keeps a state"),
            ("rembert", {"is_decoder": True}, "embeddings have 256 values and its states 32"),
            ("minimax", {}, r"minimax has \['linear_attention'\]"),
        ],
    )
    def test_layers_that_masks_would_disturb(self, model_type: str, settings: dict[str, Any], reason: str) -> None:
        """Positions that are counted, and states from which a guess can't be taken out."""
        with pytest.raises(ValueError, match=reason):
            add_adapter(small_model(model_type, **settings))

    def test_without_a_language_modelling_head(self) -> None:
        """The bare decoder."""
        with pytest.raises(ValueError, match=r"needs .* language-modelling head, got LlamaModel"):
            get_peft_model(LlamaModel(tiny_model().config), gated_config())

    def test_no_transformers_model(self) -> None:
        """Any other module."""
        with pytest.raises(ValueError, match=r"needs a transformers model .* got Sequential"):
            GatedLoraModel(nn.Sequential(nn.Linear(2, 2)), gated_config(target_modules=["0"]), "default")
