"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import pytest


MODULES = ["hub.model_card", "mtp.configuration", "mtp.gated_lora", "mtp.generation", "mtp.layout", "mtp.losses"]
MODULES += ["mtp.on_policy", "mtp.trainer"]
MODULES += ["dynamoe.configuration_dynamoe", "dynamoe.conversion", "dynamoe.modeling_dynamoe", "dynamoe.shards"]
MODULES += ["kws.feature_extraction_kws", "kws.g2p", "kws.processing_kws", "kws.spelling"]
MODULES += ["kws.configuration_gated_conformer", "kws.modeling_gated_conformer"]
MODULES += ["kws.configuration_kws_conformer", "kws.modeling_kws_conformer_ctc"]
MODULES += ["kws.configuration_slick", "kws.modeling_auto", "kws.modeling_slick", "kws.tokenization_phoneme"]
MODULES += ["kws.spotting.pipeline"]
MODULES += ["kws.configuration_ced", "kws.modeling_ced"]
MODULES += ["kws.configuration_dsp_kws", "kws.modeling_dsp_kws", "kws.modeling_kws_contrastive"]
MODULES += ["kws.modeling_kws_partition"]
MODULES += [
    "kws.training.mining",
    "kws.training.synthesis",
    "kws.training.augmentation",
    "kws.training.datasets",
    "kws.training.corpora",
    "kws.training.window_scores",
    "kws.training.windows",
    "kws.training.trainer",
]
MODULES += ["metrics.decoding", "metrics.detection", "metrics.localization"]


class FencedParser(doctest.DocTestParser):
    """Takes the fence that ends an example, in Hugging Face's style, for its end and not for its output."""

    def parse(self, string, name="<string>"):
        return super().parse(string.replace("```python", "").replace("```", ""), name)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    """Each module has at least one example and none fails."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"hf_ext.{name}")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(parser=FencedParser()).find(module, f"hf_ext.{name}"):
        runner.run(test)
    assert runner.tries > 0
    assert runner.failures == 0
