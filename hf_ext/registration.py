"""
The only place that touches the tables of the libraries underneath.

PEFT has to know the method `GATED_LORA` as soon as both packages are imported, in whichever order. Importing PEFT takes
seconds, so `import hf_ext` does not do it: it leaves a hook that runs when somebody imports PEFT, whether that is the
user, transformers on meeting an adapter, or this package.
"""

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

import wrapt


_HOME_OF_AUTO_MODELS = "transformers.models.auto.modeling_auto"
_HOMES_OF_AUTO_CLASSES = {
    "AutoConfig": "transformers.models.auto.configuration_auto",
    "AutoFeatureExtractor": "transformers.models.auto.feature_extraction_auto",
    "AutoModel": _HOME_OF_AUTO_MODELS,
    "AutoModelForKeywordSpotting": "hf_ext.kws.modeling_auto",
    "AutoProcessor": "transformers.models.auto.processing_auto",
    "AutoTokenizer": "transformers.models.auto.tokenization_auto",
}

_HOME_OF_PIPELINES = "transformers.pipelines"
_KWS_PIPELINE = "hf_ext.kws.spotting.pipeline:KeywordSpottingPipeline"
_KWS_TASK, _KWS_DEFAULT_MODEL = "keyword-spotting", "slick-small"

# For each configuration, which class of ours each Auto class gives.
_AUTO_CLASSES = {
    "hf_ext.dynamoe.configuration_dynamoe:DynaMoeConfig": {
        "AutoModelForCausalLM": "hf_ext.dynamoe.modeling_dynamoe:DynaMoeForCausalLM",
    },
    "hf_ext.kws.configuration_ced:CedConfig": {
        "AutoFeatureExtractor": "hf_ext.kws.feature_extraction_kws:KwsFeatureExtractor",
        "AutoModel": "hf_ext.kws.modeling_ced:CedForKeywordSpotting",
        "AutoModelForKeywordSpotting": "hf_ext.kws.modeling_ced:CedForKeywordSpotting",
        "AutoProcessor": "hf_ext.kws.processing_kws:KwsProcessor",
        "AutoTokenizer": "hf_ext.kws.tokenization_phoneme:PhonemeTokenizer",
    },
    "hf_ext.kws.configuration_gated_conformer:GatedConformerConfig": {
        "AutoFeatureExtractor": "hf_ext.kws.feature_extraction_kws:KwsFeatureExtractor",
        "AutoModel": "hf_ext.kws.modeling_gated_conformer:GatedConformerForKeywordDetection",
        "AutoModelForAudioClassification": "hf_ext.kws.modeling_gated_conformer:GatedConformerForKeywordDetection",
    },
    "hf_ext.kws.configuration_kws_conformer:KwsConformerConfig": {
        "AutoFeatureExtractor": "hf_ext.kws.feature_extraction_kws:KwsFeatureExtractor",
        "AutoModel": "hf_ext.kws.modeling_kws_conformer_ctc:KwsConformerForCTC",
        "AutoModelForCTC": "hf_ext.kws.modeling_kws_conformer_ctc:KwsConformerForCTC",
        "AutoProcessor": "hf_ext.kws.processing_kws:KwsProcessor",
        "AutoTokenizer": "hf_ext.kws.tokenization_phoneme:PhonemeTokenizer",
    },
    "hf_ext.kws.configuration_dsp_kws:DspKwsConfig": {
        "AutoFeatureExtractor": "hf_ext.kws.feature_extraction_kws:KwsFeatureExtractor",
        "AutoModel": "hf_ext.kws.modeling_dsp_kws:DspForKeywordSpotting",
        "AutoModelForKeywordSpotting": "hf_ext.kws.modeling_dsp_kws:DspForKeywordSpotting",
        "AutoProcessor": "hf_ext.kws.processing_kws:KwsProcessor",
        "AutoTokenizer": "hf_ext.kws.tokenization_phoneme:PhonemeTokenizer",
    },
    "hf_ext.kws.configuration_slick:SlickConfig": {
        "AutoFeatureExtractor": "hf_ext.kws.feature_extraction_kws:KwsFeatureExtractor",
        "AutoModel": "hf_ext.kws.modeling_slick:SlickForKeywordSpotting",
        "AutoModelForKeywordSpotting": "hf_ext.kws.modeling_slick:SlickForKeywordSpotting",
        "AutoProcessor": "hf_ext.kws.processing_kws:KwsProcessor",
        "AutoTokenizer": "hf_ext.kws.tokenization_phoneme:PhonemeTokenizer",
    },
}

# What our modules take from those of transformers' modules that import Auto classes themselves, and the last name of the
# module of ours that several families are made of: none can be imported from within its import.
_NEEDED_WHOLE = {
    "hf_ext.kws.modeling_kws_conformer": "phoneme_ctc_loss",
    "hf_ext.kws.modeling_kws_base": "TextDefinedKwsPreTrainedModel",
    "transformers.modeling_layers": "GradientCheckpointingLayer",
    "transformers.modeling_utils": "PreTrainedModel",
    "transformers.generation.utils": "GenerationMixin",
    "transformers.processing_utils": "ProcessorMixin",
}


def register() -> None:
    """Leave the import hooks. They run at once for what is imported already."""
    wrapt.register_post_import_hook(_when_peft_is_imported, "peft")
    wrapt.register_post_import_hook(_when_mtp_is_imported, "hf_ext.mtp")
    for module in (_HOME_OF_PIPELINES, _KWS_PIPELINE.partition(":")[0]):
        wrapt.register_post_import_hook(_add_pipeline, module)
    for module in _modules_to_watch():
        wrapt.register_post_import_hook(_fill_auto_tables, module)


def _when_peft_is_imported(_: ModuleType) -> None:
    register_peft()


def _when_mtp_is_imported(_: ModuleType) -> None:
    # The modules of `hf_ext.mtp` import PEFT. If the first of them were what triggered PEFT's import, the hook would
    # find that very module half executed. The package has run at this point and none of its modules has started.
    importlib.import_module("peft")


def _modules_to_watch() -> list[str]:
    ours = [*_AUTO_CLASSES, *(place for row in _AUTO_CLASSES.values() for place in row.values())]
    return [*_HOMES_OF_AUTO_CLASSES.values(), *_NEEDED_WHOLE, *(place.partition(":")[0] for place in ours)]


def _fill_auto_tables(_: ModuleType) -> None:
    """
    Make transformers' Auto classes know the families, as far as the Auto classes are imported.

    Some of transformers' modules import Auto classes while they are half executed. Nothing is done then: this function
    runs again when they are whole. The same holds for the families' own modules.
    """
    if any(name in sys.modules and not hasattr(sys.modules[name], part) for name, part in _NEEDED_WHOLE.items()):
        return
    for config_place, classes in _AUTO_CLASSES.items():
        for auto_name, place in {"AutoConfig": config_place, **classes}.items():
            home = sys.modules.get(_HOMES_OF_AUTO_CLASSES.get(auto_name, _HOME_OF_AUTO_MODELS))
            auto = getattr(home, auto_name, None)
            if auto is None:
                continue
            config, ours = _imported(config_place), _imported(place)
            if config is not None and ours is not None:
                auto.register(config.model_type if ours is config else config, ours, exist_ok=True)


def _imported(place: str) -> Any:
    """What is called `"module:name"`; `None` while its module is being executed."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name, None)


def _add_pipeline(_: ModuleType) -> None:
    """
    Make `transformers.pipeline` know the task "keyword-spotting", as soon as both it and our pipeline are imported whole.

    A task that transformers has under this name itself, one day, is left alone.
    """
    registry = getattr(sys.modules.get(_HOME_OF_PIPELINES), "PIPELINE_REGISTRY", None)
    if registry is None:
        return
    pipeline_class = _imported(_KWS_PIPELINE)
    # Importing it may have run this function in between.
    if pipeline_class is None or _KWS_TASK in registry.supported_tasks:
        return

    from hf_ext.assets import shipped_model
    from hf_ext.kws.modeling_auto import AutoModelForKeywordSpotting

    registry.register_pipeline(
        _KWS_TASK,
        pipeline_class=pipeline_class,
        pt_model=AutoModelForKeywordSpotting,
        default={"model": (shipped_model(_KWS_DEFAULT_MODEL), "main")},
        type="multimodal",
    )
    # Saving would take it for code to put beside the model, and loading what was saved then ask for `trust_remote_code`.
    del pipeline_class._registered_impl


def register_peft() -> None:
    """
    Make PEFT know the method `GATED_LORA`. Imports PEFT; does nothing if the method is known already.

    `peft.utils.register_peft_method` accepts only names that are members of `peft.PeftType`, and an enumeration can't
    be extended by subclassing, so the member is added to it first.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    if "GATED_LORA" not in PeftType.__members__:
        _add_str_enum_member(PeftType, "GATED_LORA")
    if PeftType["GATED_LORA"] in PEFT_TYPE_TO_TUNER_MAPPING:
        return

    from hf_ext.mtp.configuration import GatedLoraConfig
    from hf_ext.mtp.gated_lora import GatedLoraModel

    # The prefix is LoRA's because the layers are LoRA's; AdaLoRA shares it in the same way.
    register_peft_method(
        name="gated_lora",
        config_cls=GatedLoraConfig,
        model_cls=GatedLoraModel,
        prefix=GatedLoraModel.prefix,
        is_mixed_compatible=False,
    )
    wrapt.wrap_function_wrapper("peft", "PeftModel._upload_modified_files", _upload_with_our_card)
    wrapt.wrap_function_wrapper("peft", "PeftModel.load_adapter", _load_naming_the_file)
    wrapt.wrap_function_wrapper(
        "transformers.integrations.peft", "PeftAdapterMixin.load_adapter", _load_naming_the_file
    )


def _upload_with_our_card(wrapped: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    `PeftModel.push_to_hub` puts a generic card over the one that was saved with the adapter. PEFT offers no hook for it
    and makes no class of its own for a method, so the method that uploads is wrapped; other adapters pass through.
    """
    from hf_ext.hub.model_card import write_unless_written
    from hf_ext.mtp.configuration import GatedLoraConfig

    config = model.peft_config[model.active_adapter]
    if isinstance(config, GatedLoraConfig):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        write_unless_written(config, call["working_dir"], call["repo_id"])
    return wrapped(*args, **kwargs)


def _load_naming_the_file(wrapped: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    safetensors doesn't say which file it can't read. Every way to load an adapter goes through one of the two methods
    named `load_adapter`, which read the file themselves and offer no hook; other adapters pass through.
    """
    from safetensors import SafetensorError

    try:
        return wrapped(*args, **kwargs)
    except SafetensorError as error:
        from hf_ext.mtp.adapter_weights import refuse_unreadable_adapter

        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        source = call.get("model_id") or call.get("peft_model_id")
        refuse_unreadable_adapter(model, call.get("adapter_name") or "default", source, error)
        raise


def _add_str_enum_member(cls: Any, name: str) -> None:
    """Add the member `name`, with its name as value, to an enumeration whose members are strings."""
    member = str.__new__(cls, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = cls
    member._sort_order_ = len(cls.__members__)
    # The attribute comes first: an enumeration refuses to rebind the name of an existing member.
    setattr(cls, name, member)
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[name] = member
    # `value in cls` asks this list from Python 3.13 on.
    hashable_values = cls.__dict__.get("_hashable_values_")
    if hashable_values is not None:
        hashable_values.append(name)
