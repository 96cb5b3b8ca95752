"""The models that come inside the package."""

from pathlib import Path

import pytest

import hf_ext
from hf_ext import assets


@pytest.fixture
def two_models(tmp_path, monkeypatch):
    """An assets folder with one model, one adapter and one folder that is neither."""
    for folder, file in (("small", "config.json"), ("small-adapter", "adapter_config.json"), ("notes", "README.md")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    monkeypatch.setattr(assets, "_folder", lambda: tmp_path)
    return tmp_path


def test_gives_the_folder_of_a_model_and_of_an_adapter(two_models):
    assert assets.shipped_model("small") == str(two_models / "small")
    assert assets.shipped_model("small-adapter") == str(two_models / "small-adapter")


@pytest.mark.parametrize("name", ["smal", "", ".", "../small", "notes", "small/"])
def test_unknown_name_lists_those_there_are(two_models, name):
    with pytest.raises(ValueError, match=r"there are: small, small-adapter$") as error:
        assets.shipped_model(name)
    assert repr(name) in str(error.value)


def test_every_shipped_model_is_complete():
    for name in assets.shipped_models():
        folder = Path(hf_ext.shipped_model(name))
        assert list(folder.glob("*.safetensors")), f"{name} has no weights"
        assert (folder / "README.md").is_file(), f"{name} has no card"
