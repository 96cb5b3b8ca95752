"""The Auto class of the text-defined keyword spotting models."""

from collections import OrderedDict

from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


# `hf_ext.registration` fills it.
MODEL_FOR_KEYWORD_SPOTTING_MAPPING: _LazyAutoMapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class AutoModelForKeywordSpotting(_BaseAutoModelClass):
    """
    Whichever text-defined keyword spotting model a configuration or a checkpoint is of.

    Example:

    ```python
    >>> from hf_ext import AutoModelForKeywordSpotting, SlickConfig

    >>> type(AutoModelForKeywordSpotting.from_config(SlickConfig(num_hidden_layers=1))).__name__
    'SlickForKeywordSpotting'
    ```
    """

    _model_mapping = MODEL_FOR_KEYWORD_SPOTTING_MAPPING
