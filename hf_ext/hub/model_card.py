"""Model cards: what an adapter is, how it is loaded, and where it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


TEMPLATES = Path(__file__).parents[1] / "assets" / "templates"
TAGS = ["hf-ext", "mtp", "multi-token-prediction", "speculative-decoding", "arxiv:2507.11851"]
# First words of the cards that PEFT and transformers write where there is none; neither says how to load this adapter.
_GENERIC = ("# Model Card for Model ID", "This model card has been automatically generated")


def mtp_model_card(
    config: Any,
    repo_id: str = "path/to/this/adapter",
    facts: dict[str, Any] | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """
    The card of a multi-token adapter.

    Args:
        config ([`GatedLoraConfig`]):
            The adapter's configuration.
        repo_id (`str`, *optional*):
            Where it will be found.
        facts (`dict[str, Any]`, *optional*):
            Further rows of the table: training text, steps, measured tokens per step.
        tags (`list[str]`, *optional*):
            Tags beside the usual ones.

    Returns:
        [`~huggingface_hub.ModelCard`]

    Example:

    ```python
    >>> from hf_ext import GatedLoraConfig
    >>> card = mtp_model_card(GatedLoraConfig(num_masks=4), repo_id="me/fast", facts={"steps": 5_000})
    >>> "import hf_ext" in card.text
    True
    ```
    """
    base_model = config.base_model_name_or_path
    if base_model is None or os.path.isabs(base_model) or os.path.isdir(base_model):
        base_model = None  # a folder on somebody's machine says nothing to others
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=sorted({*TAGS, *(tags or [])}),
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "mtp_model_card.md"),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        base_model=base_model,
        prompt="Once upon a time",
        facts=facts or {},
        **{
            name: getattr(config, name)
            for name in ("num_masks", "r", "lora_alpha", "base_num_layers", "base_hidden_size", "base_vocab_size")
        },
    )


def write_unless_written(config: Any, folder: str | os.PathLike[str], repo_id: str = "path/to/this/adapter") -> None:
    """Writes the card of an adapter into a folder, unless somebody wrote one: only generic cards are replaced."""
    path = Path(folder) / "README.md"
    if path.exists() and not any(words in path.read_text(encoding="utf-8") for words in _GENERIC):
        return
    mtp_model_card(config, repo_id).save(path)
