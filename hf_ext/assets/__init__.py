"""The small models that come inside the package."""

from pathlib import Path


# What a folder must hold one of to be a model: a model's own file or an adapter's.
_CONFIG_FILES = ("config.json", "adapter_config.json")


def shipped_model(name: str) -> str:
    """
    The folder of a small model that comes inside the package, for any `from_pretrained`.

    Args:
        name (`str`):
            The name of the model, `"tiny-lm"` for instance.

    Returns:
        `str`: The path of its folder.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from hf_ext import shipped_model

    >>> model = AutoModelForCausalLM.from_pretrained(shipped_model("tiny-lm"))
    ```
    """
    names = shipped_models()
    if name not in names:
        raise ValueError(f"no model {name!r} comes with this package; there are: {', '.join(names) or 'none'}")
    return str(_folder() / name)


def shipped_models() -> list[str]:
    """The names that [`shipped_model`] knows, sorted."""
    return sorted(path.name for path in _folder().iterdir() if any((path / file).is_file() for file in _CONFIG_FILES))


def _folder() -> Path:
    return Path(__file__).parent
