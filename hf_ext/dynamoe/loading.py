"""What is checked when the weights of a nested model are read: transformers only warns of most of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel


class CheckedLoading:
    """`from_pretrained` for a model that must not be run with weights other than its own."""

    # Named as transformers names them: adapters are loaded by keywords.
    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        with files_named(checkpoint_files):
            loaded = PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
        if expected_keys is None:  # else it is an adapter that is put onto the model
            refuse_other_weights(model, loaded[0], load_config.ignore_mismatched_sizes)
        return loaded

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        # Tensors in place of those of another shape have no values yet, and a router works as a whole.
        for name in {key.rpartition(".router.")[0] for key, *_ in loading_info.mismatched_keys if ".router." in key}:
            model.get_submodule(f"{name}.router").reset_parameters()
        return loading_info


@contextmanager
def files_named(files: Any) -> Iterator[None]:
    """
    Says of weights that can't be read which files they are in, which safetensors doesn't.

    Args:
        files (`list[str]`):
            The files that are read inside.

    Raises:
        ValueError: naming them.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"A file of the checkpoint can't be read ({error}): one of {', '.join(map(str, files))} is truncated, damaged "
            "or a Git LFS pointer. Save or download it again, or run `git lfs pull`."
        ) from error


def refuse_other_weights(model: Any, loading_info: Any, ignore_mismatched_sizes: bool = False) -> None:
    """
    Refuses weights that are not those of the configuration: random tensors in their place would still produce text.

    Args:
        model ([`DynaMoeForCausalLM`]):
            The model.
        loading_info (`~transformers.utils.loading_report.LoadStateDictInfo`):
            What transformers found.
        ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`):
            Whether the caller wants fresh tensors in place of those of another shape.

    Raises:
        ValueError: naming up to three of the tensors that are missing, left over or of another shape.
    """
    tied = model.all_tied_weights_keys
    missing = sorted(k for k in loading_info.missing_keys if tied.get(k, k) in loading_info.missing_keys)
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unexpected = sorted(k for k in loading_info.unexpected_keys if not any(re.search(p, k) for p in ignored))
    mismatched = sorted(loading_info.mismatched_keys)
    if mismatched and not ignore_mismatched_sizes:
        name, found, wanted = mismatched[0]
        raise ValueError(
            f"{len(mismatched)} tensors of the checkpoint have other shapes than the configuration says ({name}: {tuple(found)} "
            f"in place of {tuple(wanted)}): `base_config`, `expert_widths` or the router's settings in config.json are not "
            "those of the weights. Restore the config.json that was saved with them."
        )
    if missing:
        dense = not any(".mlp.dense." in key for key in model.state_dict().keys() - set(missing))
        routers = all(".router." in key for key in missing)
        raise ValueError(
            f"The checkpoint lacks {len(missing)} of {len(model.state_dict())} tensors ({_some(missing)}): "
            + ("its routers were not saved." if routers else "it is truncated, or config.json is not its own.")
            + (
                " If these are the weights of a dense model, make a nested one of it with `convert_to_dynamoe`."
                if dense
                else " Save it again with `save_pretrained`, or download it again."
            )
        )
    if unexpected:
        raise ValueError(
            f"The checkpoint holds {len(unexpected)} tensors that the configuration has no place for ({_some(unexpected)}): "
            "`base_config` in config.json is not that of the weights. Restore the config.json that was saved with them."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
