"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import pytest


MODULES = ["hub.model_card", "mtp.configuration", "mtp.gated_lora", "mtp.generation", "mtp.layout", "mtp.losses"]
MODULES += ["mtp.on_policy", "mtp.trainer"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    """Each module has at least one example and none fails."""
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(f"hf_ext.{name}"), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
