"""Model cards: what an adapter or a model is, how it is loaded, and where it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData


TEMPLATES = Path(__file__).parents[1] / "assets" / "templates"
TAGS = ["hf-ext", "mtp", "multi-token-prediction", "speculative-decoding", "arxiv:2507.11851"]
DYNAMOE_TAGS = ["hf-ext", "dynamoe", "mixture-of-experts", "dynamic-compute", "arxiv:2502.12325"]
KWS_TAGS = ["hf-ext", "keyword-spotting", "wake-word", "text-defined-keyword-spotting"]
# For each model type of keyword spotting: arXiv number, title, key, authors, year.
_KWS_PAPERS = {
    "slick": (
        "2409.09067",
        "SLiCK: Exploiting Subsequences for Length-Constrained Keyword Spotting",
        "nishu2024slick",
        "Kumari Nishu and Minsik Cho and Devang Naik",
        2024,
    ),
    "ced_kws": (
        "2308.06472",
        "Flexible Keyword Spotting based on Homogeneous Audio-Text Embedding",
        "nishu2023flexible",
        "Kumari Nishu and Minsik Cho and Paul Dixon and Devang Naik",
        2023,
    ),
    "dsp_kws": (
        "2306.05245",
        "Matching Latent Encoding for Audio-Text based Keyword Spotting",
        "nishu2023matching",
        "Kumari Nishu and Minsik Cho and Devang Naik",
        2023,
    ),
}
# First words of the cards that PEFT and transformers write where there is none; neither says how to load what is there.
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
    base_model = _public_name(config.base_model_name_or_path)
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


def dynamoe_model_card(
    model: Any,
    repo_id: str = "path/to/this/model",
    facts: dict[str, Any] | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """
    The card of a nested model, with what its conversion reported.

    Args:
        model ([`DynaMoeForCausalLM`]):
            The model.
        repo_id (`str`, *optional*):
            Where it will be found.
        facts (`dict[str, Any]`, *optional*):
            Further rows of the table: training text, steps, perplexity by sensitivity.
        tags (`list[str]`, *optional*):
            Tags beside the usual ones.

    Returns:
        [`~huggingface_hub.ModelCard`]

    Example:

    ```python
    >>> from hf_ext import convert_to_dynamoe, shipped_model
    >>> model = convert_to_dynamoe(shipped_model("tiny-lm"), importance="none")
    >>> card = dynamoe_model_card(model, repo_id="me/dynamic", facts={"steps": 5_000})
    >>> "trust_remote_code=True" in card.text
    True
    ```
    """
    config, receipt = model.config, model.config.conversion or {}
    base_model = _public_name(receipt.get("base_model"))
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=sorted({*DYNAMOE_TAGS, *(tags or [])}),
    )
    reported = {}
    if receipt:
        shares = [sum(column) / len(column) for column in zip(*receipt["importance_shares"], strict=True)]
        reported = {
            "neurons ranked by": f"{receipt['importance']}, on {receipt['calibration_tokens']:,} tokens",
            "importance within each expert": ", ".join(f"{share:.0%}" for share in shares),
            "largest change of a logit by reordering": f"{receipt['largest_logit_difference']:.1e}",
            "parameters of the routers": f"{receipt['router_parameters']:,}",
        }
        if receipt["importance"] == "none":
            reported = {name: reported[name] for name in ("parameters of the routers",)}
    experts = torch.arange(config.num_experts).expand(config.base_config.num_hidden_layers, -1)
    counts = model.count_active_parameters(experts).tolist()
    served = config.sensitivity if config.sensitivity < 1 else config.label_sensitivity
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "dynamoe_model_card.md"),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        base_model=base_model,
        model_type=config.base_config.model_type,
        widths=config.expert_widths,
        experts=[(width, f"{count:,}") for width, count in zip(config.expert_widths, counts, strict=True)],
        example_sensitivity=served or 0.8,
        facts={**reported, **(facts or {})},
        **{name: getattr(config, name) for name in ("sensitivity", "router_type", "router_hidden_size", "similarity")},
    )


def kws_model_card(
    model: Any,
    processor: Any,
    repo_id: str = "path/to/this/model",
    facts: dict[str, Any] | None = None,
    figures: dict[str, float] | None = None,
    tags: list[str] | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    The card of a text-defined keyword spotting model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, any of [`AutoModelForKeywordSpotting`].
        processor ([`KwsProcessor`]):
            Its processor.
        repo_id (`str`, *optional*):
            Where it will be found.
        facts (`dict[str, Any]`, *optional*):
            Further rows of the table: training data, steps.
        figures (`dict[str, float]`, *optional*):
            What [`KwsTrainer`] measured: `auc` and `eer`, and the same with a kind of negative before them.
        tags (`list[str]`, *optional*):
            Tags beside the usual ones.
        license (`str`, *optional*):
            Under which the weights may be used, as the Hub calls it: `"apache-2.0"`.

    Returns:
        [`~huggingface_hub.ModelCard`]

    Example:

    ```python
    >>> from hf_ext import KwsProcessor, SlickConfig, SlickForKeywordSpotting
    >>> model = SlickForKeywordSpotting(SlickConfig(num_hidden_layers=1))
    >>> card = kws_model_card(model, KwsProcessor(), repo_id="me/spotter", figures={"hard_auc": 0.9, "hard_eer": 0.17})
    >>> 'pipeline("keyword-spotting", model="me/spotter")' in card.text
    True
    ```
    """
    config, extractor = model.config, processor.feature_extractor
    # A model type of somebody else's has a paper of its own, or none.
    arxiv, title, key, authors, year = _KWS_PAPERS.get(config.model_type, (None,) * 5)
    citation = [f"title   = {{{{{title}}}}}", f"author  = {{{authors}}}", f"year    = {year}"]
    citation += [f"journal = {{arXiv preprint arXiv:{arxiv}}}"]
    data = ModelCardData(
        language="en",
        license=license,
        library_name="transformers",
        pipeline_tag="audio-classification",
        tags=sorted({*KWS_TAGS, *([f"arxiv:{arxiv}"] if arxiv else []), *(tags or [])}),
    )
    measured = figures or {}
    groups = [name.removesuffix("auc") for name in measured if name.endswith("auc")]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "kws_model_card.md"),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        parameters=f"{model.num_parameters():,}",
        model_type=config.model_type,
        arxiv=arxiv,
        paper_title=title,
        channels=extractor.feature_size,
        feature_type="log-mel" if extractor.feature_type == "log_mel" else extractor.feature_type,
        hop_ms=f"{1000 * extractor.hop_length / extractor.sampling_rate:g}",
        sampling_rate=extractor.sampling_rate,
        vocab_size=len(processor.tokenizer),
        max_phonemes=getattr(config, "longest_phrase", None),
        facts=facts or {},
        figures=[
            (group.removesuffix("_") or "all", f"{measured[group + 'auc']:.1%}", f"{measured[group + 'eer']:.1%}")
            for group in groups
        ],
        citation=f"@article{{{key},\n    " + ",\n    ".join(citation) + "\n}",
    )


def write_unless_written(config: Any, folder: str | os.PathLike[str], repo_id: str = "path/to/this/adapter") -> None:
    """Writes the card of an adapter into a folder, unless somebody wrote one: only generic cards are replaced."""
    if not _has_own_card(folder):
        mtp_model_card(config, repo_id).save(Path(folder) / "README.md")


def write_dynamoe_unless_written(
    model: Any, folder: str | os.PathLike[str], repo_id: str = "path/to/this/model"
) -> None:
    """The same for a nested model."""
    if not _has_own_card(folder):
        dynamoe_model_card(model, repo_id).save(Path(folder) / "README.md")


def _has_own_card(folder: str | os.PathLike[str]) -> bool:
    path = Path(folder) / "README.md"
    return path.exists() and not any(words in path.read_text(encoding="utf-8") for words in _GENERIC)


def _public_name(base_model: str | None) -> str | None:
    """The name of a base model, unless it is a folder on somebody's machine, which says nothing to others."""
    if base_model is None or os.path.isabs(base_model) or os.path.isdir(base_model):
        return None
    return base_model
