"""The conversion of a model larger than memory: its files are rewritten, one shard at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .calibration import calibration_batches, check_calibration
from .conversion import ConversionReceipt, logits_of, probe_tokens, receipt_of, reordered_rows
from .dense_model import beside, check_formula, dense_skeleton, nested_config
from .importance import neuron_importance
from .modeling_dynamoe import DynaMoeForCausalLM
from .nested_mlp import NestedMlp, mlp_places


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Tensors that old checkpoints have and nothing needs.
OBSOLETE = (r"rotary_emb\.inv_freq$", r"attention\.(masked_)?bias$")


def convert_checkpoint_to_dynamoe(
    model: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    num_experts: int = 4,
    *,
    expert_widths: Iterable[int] | None = None,
    calibration_dataset: Any = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    importance: str = "activation_norm",
    calibration_tokens: int = 500_000,
    batch_size: int = 8,
    max_length: int = 1024,
    router_type: str = "ordinal",
    router_hidden_size: int = 256,
    similarity: str = "error",
    max_shard_size: int | str = "5GB",
    device_map: Any = "auto",
    max_memory: dict[Any, Any] | None = None,
    disable_tqdm: bool = False,
) -> ConversionReceipt:
    """
    [`convert_to_dynamoe`] from files to files: the same tensors, with never more than a shard of them in memory.

    To rank neurons the model has to run once; what doesn't fit is then brought from the disk layer by layer. With
    `importance="none"` it is not loaded at all.

    Args:
        model (`str` or `os.PathLike`):
            Folder of the dense model, or its name on the Hub. Its weights must be safetensors.
        output_dir (`str` or `os.PathLike`):
            The new folder. It appears when it is complete.
        num_experts, expert_widths, calibration_dataset, processing_class, importance, calibration_tokens, batch_size, max_length, router_type, router_hidden_size, similarity, disable_tqdm:
            See [`convert_to_dynamoe`]. `importance="taylor"` is not served: it needs the whole model in memory.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`):
            Most bytes of a file that is written, and so of what is held in memory.
        device_map (`str` or `dict`, *optional*, defaults to `"auto"`), max_memory (`dict`, *optional*):
            Where the layers are while neurons are ranked, see [`~transformers.PreTrainedModel.from_pretrained`].

    Returns:
        [`ConversionReceipt`]

    Raises:
        TypeError: for anything but a folder or a name.
        ValueError: as [`convert_to_dynamoe`], for weights that are no safetensors or not those of config.json, and for a folder
            that is there already. Nothing is left behind.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from hf_ext import convert_checkpoint_to_dynamoe, shipped_model

    >>> receipt = convert_checkpoint_to_dynamoe(shipped_model("tiny-lm"), "moe", importance="none", disable_tqdm=True)
    >>> AutoModelForCausalLM.from_pretrained("moe").config.expert_widths == receipt.expert_widths
    True
    ```
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"`model` must be a folder or a name on the Hub, got {type(model).__name__}: what is in memory is converted by "
            "`convert_to_dynamoe`."
        )
    check_calibration(importance, calibration_dataset, calibration_tokens, batch_size, max_length)
    if importance == "taylor":
        raise ValueError(
            "`importance='taylor'` needs gradients through the whole model at once: rank by 'activation_norm', or load the "
            "model and use `convert_to_dynamoe`."
        )
    try:  # not behind hours of ranking
        split_torch_state_dict_into_shards({"weight": torch.empty(1)}, max_shard_size=max_shard_size)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`max_shard_size` must be a number of bytes or a text such as '5GB', got {max_shard_size!r} ({error})"
        ) from error
    if Path(output_dir).exists() and (not Path(output_dir).is_dir() or any(Path(output_dir).iterdir())):
        raise ValueError(f"`output_dir`='{output_dir}' is there already and not empty: give another, or remove it.")
    dense = dense_skeleton(model)
    files = _weight_files(model)
    dense.to(dense.config.dtype or _first_dtype(files))
    config = nested_config(
        dense, num_experts, expert_widths,
        router_type=router_type, router_hidden_size=router_hidden_size, similarity=similarity,
    )  # fmt: skip
    if processing_class is None:
        processing_class = beside(AutoTokenizer, model, "tokenizer_config.json")
    batches: list[dict[str, torch.Tensor]] = []
    if calibration_dataset is not None:
        batches = calibration_batches(
            calibration_dataset, processing_class, calibration_tokens, batch_size, max_length, dense.config
        )
    moe = DynaMoeForCausalLM(config, dense)  # routers have weights, all else has none
    source = _Source(moe, files)
    placed = {"device_map": device_map, "max_memory": max_memory}
    with appearing(Path(output_dir)) as folder:  # which may turn out not to, before hours of ranking
        if importance == "none":
            scores = neuron_importance(dense, [mlp.dense for mlp in moe.nested_mlps()], batches, importance).scores
            orders = None
        else:
            with _loaded(model, placed) as running:
                probe = probe_tokens(running, batches)
                mlps = [getattr(parent, name) for parent, name in mlp_places(running, running.config)]
                check_formula(running, mlps, probe)
                before = logits_of(running, probe).cpu()
                # Of activations alone: weights are there only while their layer runs.
                calibration = neuron_importance(running, mlps, batches, "activation", disable_tqdm)
            scores, config.output_norms = calibration.scores, calibration.output_norms
            if importance == "activation_norm":
                outputs = [f"{name}.dense.{mlp.output}.weight" for name, mlp in _named_mlps(moe)]
                scores = [s * source.read(o).double().norm(dim=0) for s, o in zip(scores, outputs, strict=True)]
            orders = [score.argsort(descending=True, stable=True) for score in scores]
        _write_weights(moe, source, orders, folder, max_shard_size, disable_tqdm)
        config.architectures = [type(moe).__name__]
        custom_object_save(moe, folder, config=config)
        settings = beside(GenerationConfig, model, GENERATION_CONFIG_NAME) or moe.generation_config
        for part in (config, settings, processing_class):
            if part is not None:
                part.save_pretrained(folder)
        difference = 0.0
        if orders is not None:
            if isinstance(device_map, dict):
                placed["device_map"] = {f"model.{name}".rstrip("."): device for name, device in device_map.items()}
            with _loaded(folder, placed) as running:
                difference = float((logits_of(running, probe).cpu() - before).abs().max())
        receipt = receipt_of(moe, str(model), importance, batches, scores, difference)
        config.save_pretrained(folder)
        if moe.card_writer is not None:
            moe.card_writer(moe, folder)
    return receipt


class _Source:
    """
    The tensors of a dense checkpoint under the names that they have in the nested model.

    Args:
        moe ([`DynaMoeForCausalLM`]):
            The nested model, without weights.
        files (`list[str]`):
            The files of the dense one.

    Raises:
        ValueError: for tensors that are missing, left over or of another shape.
    """

    def __init__(self, moe: DynaMoeForCausalLM, files: list[str]):
        self.dtype = moe.model.dtype
        self.places: dict[str, tuple[str, str]] = {}
        wanted, inside = {}, [f"{name}.dense." for name, _ in _named_mlps(moe)]
        shapes = {name: tuple(t.shape) for name, t in moe.state_dict().items() if ".router." not in name}
        for name in shapes:
            place = next((p for p in inside if name.startswith(p)), "")
            dense_name = name.replace(place, place.removesuffix("dense."), 1) if place else name
            wanted[dense_name.removeprefix("model.")] = name
        # Old names of tensors, and those of a bare decoder.
        renamings = [r for r in get_model_conversion_mapping(moe.model) if isinstance(r, WeightRenaming)]
        unknown = []
        for path in files:
            with _opened(path) as file:
                for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                    known = rename_source_key(key, renamings, [], moe.model.base_model_prefix, wanted)[0]
                    if known not in wanted:
                        unknown.append(key)
                        continue
                    found, expected = tuple(file.get_slice(key).get_shape()), shapes[wanted[known]]
                    if found != expected:
                        raise ValueError(
                            f"'{key}' has shape {found} in '{path}' and {expected} by config.json: they don't belong together."
                        )
                    self.places[wanted[known]] = (path, key)
        tied = moe.all_tied_weights_keys
        self.places = {name: place for name, place in self.places.items() if name not in tied}
        missing = [name for name in shapes if name not in self.places and name not in tied]
        ignored = [*(moe._keys_to_ignore_on_load_unexpected or ()), *OBSOLETE]
        unknown = [key for key in unknown if not any(re.search(pattern, key) for pattern in ignored)]
        if missing or unknown:
            raise ValueError(
                f"config.json is not that of the weights in '{files[0]}' and the {len(files) - 1} files beside it: "
                f"{len(missing)} tensors are missing ({', '.join(missing[:3])}), {len(unknown)} have no place "
                f"({', '.join(unknown[:3])})."
            )

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the precision of the model."""
        path, key = self.places[name]
        with _opened(path) as file:
            return file.get_tensor(key).to(self.dtype)


def _write_weights(
    moe: DynaMoeForCausalLM,
    source: _Source,
    orders: list[torch.Tensor] | None,
    folder: Path,
    max_shard_size: int | str,
    disable_tqdm: bool,
) -> None:
    """Fills one shard after the other, as `save_pretrained` would lay them out."""
    layers = {f"{name}.dense.": (layer, mlp.output) for layer, (name, mlp) in enumerate(_named_mlps(moe))}
    own = {name: tensor for name, tensor in moe.state_dict().items() if ".router." in name}
    tensors = {
        name: t.to(source.dtype) for name, t in moe.state_dict().items() if name in own or name in source.places
    }
    # Some names in files are older than those in models.
    as_saved = {next(iter(revert_weight_conversion(moe, {name: tensor}))): name for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(
        {saved: tensors[name] for saved, name in as_saved.items()}, max_shard_size=max_shard_size
    )
    for filename, names in tqdm(plan.filename_to_tensors.items(), desc="writing", unit="shard", disable=disable_tqdm):
        shard = {}
        for saved in names:
            name = as_saved[saved]
            tensor = tensors[name] if name in own else source.read(name)
            place = next((p for p in layers if name.startswith(p)), None)
            if place is not None and orders is not None:
                layer, output = layers[place]
                rest = name.removeprefix(place)
                if rest == f"{output}.weight":
                    tensor = tensor[:, orders[layer]]
                elif not rest.startswith(f"{output}."):
                    tensor = reordered_rows(tensor, orders[layer])
            shard[saved] = tensor.contiguous()
        save_file(shard, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _named_mlps(moe: DynaMoeForCausalLM) -> list[tuple[str, NestedMlp]]:
    return [(name, module) for name, module in moe.named_modules() if isinstance(module, NestedMlp)]


def _weight_files(name: str | os.PathLike[str]) -> list[str]:
    """The safetensors of a checkpoint, downloaded if they are on the Hub."""
    one, index = (
        cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if one is not None:
        return [one]
    if index is None:
        raise ValueError(
            f"'{name}' has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}: load the model and save it with "
            "`save_pretrained`, which writes safetensors."
        )
    _check_index(index)
    return get_checkpoint_shard_files(name, index)[0]


def _check_index(path: str) -> None:
    """Refuses an index that doesn't say in which file each tensor is, which transformers takes for granted."""
    try:
        index = json.loads(Path(path).read_bytes())
        is_sound = isinstance(index["metadata"], dict) and all(
            isinstance(f, str) for f in index["weight_map"].values()
        )
        reason = "" if is_sound and index["weight_map"] else "no file for each tensor"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise ValueError(
            f"'{path}' is no index of a checkpoint ({reason}): it needs a `weight_map` from tensors to files and `metadata`. "
            "It is truncated, damaged or a Git LFS pointer: download it again, or save the model again."
        )


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A file of tensors; which one it is that can't be read, safetensors doesn't say."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' can't be read ({error}): it is truncated, damaged or a Git LFS pointer. Download it again."
        ) from error


def _first_dtype(files: list[str]) -> torch.dtype:
    with _opened(files[0]) as file:
        return next(tensor.dtype for tensor in map(file.get_tensor, file.keys()) if tensor.is_floating_point())


@contextmanager
def _loaded(name: Any, placed: dict[str, Any]) -> Iterator[PreTrainedModel]:
    """The model, as much of it in memory as there is room for; gone behind the block."""
    with tempfile.TemporaryDirectory() as folder:
        yield AutoModelForCausalLM.from_pretrained(name, offload_folder=folder, **placed).eval()


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """
    A folder that is there when it is complete, and not before.

    Args:
        folder (`Path`):
            Where: nothing yet, or an empty folder, which is filled and not replaced. It may be a link, a mounted disk or the
            folder that somebody works in.

    Returns:
        `Path`: the folder to write into, whose files take their place when the block ends well and else disappear.
    """
    folder = folder.resolve()
    is_there = folder.is_dir()
    partial = (folder if is_there else folder.parent) / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    try:
        yield partial
        if is_there:
            for part in list(partial.iterdir()):
                part.rename(folder / part.name)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
