"""What is checked when the weights of an adapter are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel

from .configuration import GatedLoraConfig


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def check_adapter_weights(weights: dict[str, torch.Tensor], expected: set[str]) -> None:
    """
    Refuses weights of an adapter that are incomplete or not numbers: half an adapter would still generate the right
    text, only slowly, and nobody would look for the reason.

    Args:
        weights (`dict[str, torch.Tensor]`):
            What was read.
        expected (`set[str]`):
            Names of the adapter's tensors.

    Raises:
        ValueError: naming up to three of the tensors that are missing or hold NaN or infinity.
    """
    missing = sorted(expected - weights.keys())
    if missing:
        raise ValueError(
            f"The adapter's file lacks {len(missing)} of {len(expected)} tensors ({_some(missing)}): it is truncated or "
            "belongs to another architecture. Download or save it again."
        )
    broken = sorted(name for name, tensor in weights.items() if name in expected and not tensor.isfinite().all())
    if broken:
        raise ValueError(
            f"The adapter's file holds NaN or infinity in {len(broken)} tensors ({_some(broken)}): training diverged or "
            "the file is damaged."
        )


def check_loaded_adapter(model: PreTrainedModel, loading_info: Any) -> None:
    """
    The same for an adapter that transformers has just read into a model: it only warns of what is missing.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model; an adapter that is refused is taken out of it again.
        loading_info (`~transformers.utils.loading_report.LoadStateDictInfo`):
            What transformers found.

    Raises:
        ValueError: as [`check_adapter_weights`].
    """
    name = next(reversed(model.peft_config))
    if not isinstance(model.peft_config[name], GatedLoraConfig):
        return
    weights = {key: tensor for key, tensor in model.named_parameters() if _belongs_to(key, name)}
    read = {key: tensor for key, tensor in weights.items() if key not in loading_info.missing_keys}
    try:
        check_adapter_weights(read, set(weights))
    except ValueError:
        model.delete_adapter(name)
        raise


def refuse_unreadable_adapter(model: Any, name: str, source: Any, error: Exception) -> None:
    """
    Says which adapter it is that safetensors can't read; does nothing for adapters of other methods.

    Args:
        model ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]):
            The model; out of one of transformers the adapter, which has no weights yet, is taken again.
        name (`str`):
            Name of the adapter.
        source (`str` or `os.PathLike`):
            Its folder, or its name on the Hub.
        error (`Exception`):
            What safetensors said.

    Raises:
        ValueError: naming the file and the way out.
    """
    if not isinstance(getattr(model, "peft_config", {}).get(name), GatedLoraConfig):
        return
    if not isinstance(model, PeftModel):
        model.delete_adapter(name)
    raise ValueError(
        f"adapter_model.safetensors of the adapter '{source}' can't be read ({error}): it is truncated, damaged or a Git "
        "LFS pointer. Save it again, download it again (`force_download=True` from the Hub) or run `git lfs pull`."
    ) from error


def _belongs_to(key: str, adapter: str) -> bool:
    _, is_adapter, rest = key.partition(".lora_")
    return bool(is_adapter) and f".{adapter}." in f".{rest}."


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
