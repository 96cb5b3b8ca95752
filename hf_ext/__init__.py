"""
`hf_ext`: multi-token prediction adapters, dynamic compute and text-defined keyword spotting on the Hugging Face stack.

Importing the package registers its methods with the libraries underneath and loads nothing heavy: every public name is
imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_ext._extras import missing_extra
from hf_ext.registration import register


if TYPE_CHECKING:
    from hf_ext.assets import shipped_model
    from hf_ext.dynamoe.configuration_dynamoe import DynaMoeConfig
    from hf_ext.dynamoe.conversion import convert_to_dynamoe
    from hf_ext.dynamoe.modeling_dynamoe import DynaMoeForCausalLM
    from hf_ext.dynamoe.shards import convert_checkpoint_to_dynamoe
    from hf_ext.dynamoe.trainer import DynaMoeTrainer
    from hf_ext.dynamoe.trainer_config import DynaMoeTrainingConfig
    from hf_ext.kws.configuration_ced import CedConfig
    from hf_ext.kws.configuration_dsp_kws import DspKwsConfig
    from hf_ext.kws.configuration_gated_conformer import GatedConformerConfig
    from hf_ext.kws.configuration_kws_conformer import KwsConformerConfig
    from hf_ext.kws.configuration_slick import SlickConfig
    from hf_ext.kws.feature_extraction_kws import KwsFeatureExtractor, KwsStreamState
    from hf_ext.kws.modeling_auto import AutoModelForKeywordSpotting
    from hf_ext.kws.modeling_ced import CedForKeywordSpotting
    from hf_ext.kws.modeling_dsp_kws import DspForKeywordSpotting
    from hf_ext.kws.modeling_gated_conformer import GatedConformerForKeywordDetection
    from hf_ext.kws.modeling_gated_conformer_outputs import GatedConformerStreamState
    from hf_ext.kws.modeling_kws_conformer_ctc import KwsConformerForCTC
    from hf_ext.kws.modeling_slick import SlickForKeywordSpotting
    from hf_ext.kws.processing_kws import KwsProcessor
    from hf_ext.kws.spotting.pipeline import KeywordSpottingPipeline
    from hf_ext.kws.tokenization_phoneme import PhonemeTokenizer
    from hf_ext.kws.training.augmentation import KwsAugmenter, spec_augment
    from hf_ext.kws.training.corpora import (
        build_libriphrase,
        libriphrase_trials,
        load_speech_commands,
        phrases_of_words,
        read_alignment,
    )
    from hf_ext.kws.training.datasets import KwsDataCollator, KwsPairDataset, KwsTrialDataset
    from hf_ext.kws.training.effects import coloured_noise
    from hf_ext.kws.training.mining import PhoneticIndex, confusable_phonemes, phonetic_distance
    from hf_ext.kws.training.synthesis import synthesize_phrases
    from hf_ext.kws.training.trainer import KwsTrainer
    from hf_ext.kws.training.trainer_config import KwsTrainingConfig
    from hf_ext.kws.training.utterances import load_utterances, read_audio
    from hf_ext.kws.training.window_scores import decide_windows, time_windows
    from hf_ext.kws.training.windows import KwsWindowDataCollator, KwsWindowDataset, hold_out, load_noises
    from hf_ext.mtp.configuration import GatedLoraConfig
    from hf_ext.mtp.gated_lora import GatedLoraModel
    from hf_ext.mtp.generation import MtpGenerateOutput, MtpGenerationMixin, mtp_generate
    from hf_ext.mtp.on_policy import generate_completions
    from hf_ext.mtp.trainer import MtpTrainer
    from hf_ext.mtp.trainer_config import MtpConfig


__version__ = "0.1.0"

__all__ = [
    "AutoModelForKeywordSpotting",
    "CedConfig",
    "CedForKeywordSpotting",
    "DspForKeywordSpotting",
    "DspKwsConfig",
    "DynaMoeConfig",
    "DynaMoeForCausalLM",
    "DynaMoeTrainer",
    "DynaMoeTrainingConfig",
    "GatedConformerConfig",
    "GatedConformerForKeywordDetection",
    "GatedConformerStreamState",
    "GatedLoraConfig",
    "GatedLoraModel",
    "KeywordSpottingPipeline",
    "KwsAugmenter",
    "KwsConformerConfig",
    "KwsConformerForCTC",
    "KwsDataCollator",
    "KwsFeatureExtractor",
    "KwsPairDataset",
    "KwsProcessor",
    "KwsStreamState",
    "KwsTrainer",
    "KwsTrainingConfig",
    "KwsTrialDataset",
    "KwsWindowDataCollator",
    "KwsWindowDataset",
    "MtpConfig",
    "MtpGenerateOutput",
    "MtpGenerationMixin",
    "MtpTrainer",
    "PhonemeTokenizer",
    "PhoneticIndex",
    "SlickConfig",
    "SlickForKeywordSpotting",
    "build_libriphrase",
    "coloured_noise",
    "confusable_phonemes",
    "convert_checkpoint_to_dynamoe",
    "convert_to_dynamoe",
    "decide_windows",
    "generate_completions",
    "hold_out",
    "libriphrase_trials",
    "load_noises",
    "load_speech_commands",
    "load_utterances",
    "mtp_generate",
    "phonetic_distance",
    "phrases_of_words",
    "read_alignment",
    "read_audio",
    "shipped_model",
    "spec_augment",
    "synthesize_phrases",
    "time_windows",
]

_MODULE_OF_NAME = {
    "AutoModelForKeywordSpotting": "hf_ext.kws.modeling_auto",
    "CedConfig": "hf_ext.kws.configuration_ced",
    "CedForKeywordSpotting": "hf_ext.kws.modeling_ced",
    "DspForKeywordSpotting": "hf_ext.kws.modeling_dsp_kws",
    "DspKwsConfig": "hf_ext.kws.configuration_dsp_kws",
    "DynaMoeConfig": "hf_ext.dynamoe.configuration_dynamoe",
    "DynaMoeForCausalLM": "hf_ext.dynamoe.modeling_dynamoe",
    "DynaMoeTrainer": "hf_ext.dynamoe.trainer",
    "DynaMoeTrainingConfig": "hf_ext.dynamoe.trainer_config",
    "GatedConformerConfig": "hf_ext.kws.configuration_gated_conformer",
    "GatedConformerForKeywordDetection": "hf_ext.kws.modeling_gated_conformer",
    "GatedConformerStreamState": "hf_ext.kws.modeling_gated_conformer_outputs",
    "GatedLoraConfig": "hf_ext.mtp.configuration",
    "GatedLoraModel": "hf_ext.mtp.gated_lora",
    "KeywordSpottingPipeline": "hf_ext.kws.spotting.pipeline",
    "KwsAugmenter": "hf_ext.kws.training.augmentation",
    "KwsConformerConfig": "hf_ext.kws.configuration_kws_conformer",
    "KwsConformerForCTC": "hf_ext.kws.modeling_kws_conformer_ctc",
    "KwsDataCollator": "hf_ext.kws.training.datasets",
    "KwsFeatureExtractor": "hf_ext.kws.feature_extraction_kws",
    "KwsPairDataset": "hf_ext.kws.training.datasets",
    "KwsProcessor": "hf_ext.kws.processing_kws",
    "KwsStreamState": "hf_ext.kws.feature_extraction_kws",
    "KwsTrainer": "hf_ext.kws.training.trainer",
    "KwsTrainingConfig": "hf_ext.kws.training.trainer_config",
    "KwsTrialDataset": "hf_ext.kws.training.datasets",
    "KwsWindowDataCollator": "hf_ext.kws.training.windows",
    "KwsWindowDataset": "hf_ext.kws.training.windows",
    "MtpConfig": "hf_ext.mtp.trainer_config",
    "MtpGenerateOutput": "hf_ext.mtp.generation",
    "MtpGenerationMixin": "hf_ext.mtp.generation",
    "MtpTrainer": "hf_ext.mtp.trainer",
    "PhonemeTokenizer": "hf_ext.kws.tokenization_phoneme",
    "PhoneticIndex": "hf_ext.kws.training.mining",
    "SlickConfig": "hf_ext.kws.configuration_slick",
    "SlickForKeywordSpotting": "hf_ext.kws.modeling_slick",
    "build_libriphrase": "hf_ext.kws.training.corpora",
    "coloured_noise": "hf_ext.kws.training.effects",
    "confusable_phonemes": "hf_ext.kws.training.mining",
    "convert_checkpoint_to_dynamoe": "hf_ext.dynamoe.shards",
    "convert_to_dynamoe": "hf_ext.dynamoe.conversion",
    "decide_windows": "hf_ext.kws.training.window_scores",
    "generate_completions": "hf_ext.mtp.on_policy",
    "hold_out": "hf_ext.kws.training.windows",
    "libriphrase_trials": "hf_ext.kws.training.corpora",
    "load_noises": "hf_ext.kws.training.windows",
    "load_speech_commands": "hf_ext.kws.training.corpora",
    "load_utterances": "hf_ext.kws.training.utterances",
    "mtp_generate": "hf_ext.mtp.generation",
    "phonetic_distance": "hf_ext.kws.training.mining",
    "phrases_of_words": "hf_ext.kws.training.corpora",
    "read_alignment": "hf_ext.kws.training.corpora",
    "read_audio": "hf_ext.kws.training.utterances",
    "shipped_model": "hf_ext.assets",
    "spec_augment": "hf_ext.kws.training.augmentation",
    "synthesize_phrases": "hf_ext.kws.training.synthesis",
    "time_windows": "hf_ext.kws.training.window_scores",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    except Exception as error:
        replacement = missing_extra(error, needed_by=f"`hf_ext.{name}`")
        if replacement is None:
            raise
        raise replacement from error
    # From here on the name is an ordinary attribute and this function is not asked again.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
