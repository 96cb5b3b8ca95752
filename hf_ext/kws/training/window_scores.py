"""What a detector with gates makes of windows: how often it is right, what it skips, and how long it takes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_ext.kws.training.windows import KwsWindowDataCollator
from hf_ext.metrics import interval_iou, share_of_macs_skipped


# A length that is not positive is no interval.
LEAST_LENGTH = 0.01


@dataclass
class KwsWindowDecisions:
    """
    What a model made of windows, one after the other.

    Args:
        right (`numpy.ndarray` of shape `(num_windows,)`):
            Whether a keyword was found and is the right one; where there is none, whether nothing was found.
        iou (`numpy.ndarray` of shape `(num_windows,)`):
            Intersection over union of the keyword and where it was placed; not a number where there is none.
        gates (`numpy.ndarray` of shape `(num_windows, num_modules)`):
            1 for modules that ran.
        kinds (`numpy.ndarray` of shape `(num_windows,)`):
            What each window holds, see [`KwsWindowDataset`].
    """

    right: np.ndarray
    iou: np.ndarray
    gates: np.ndarray
    kinds: np.ndarray

    def figures(self, modules: Sequence[int], always_on: int = 0) -> dict[str, float]:
        """
        How often the model is right, and how much of its work it skips, by what a window holds.

        Args:
            modules (`Sequence[int]`), always_on (`int`, *optional*, defaults to `0`):
                Multiply-accumulates of each gated module and of what always runs, as
                [`GatedConformerForKeywordDetection.count_macs`] gives them.

        Returns:
            `dict[str, float]`: `"accuracy"` and `"IoU of words"`, and for each kind `"accuracy, kind"`, `"skipped, kind"`, the
            share of the gated work, and `"skipped of all, kind"`. Words are windows with a keyword; without any there is no
            IoU.
        """
        result = {"accuracy": self.right.mean()}
        for kind in sorted(set(self.kinds)):
            chosen = self.kinds == kind
            result[f"accuracy, {kind}"] = self.right[chosen].mean()
            result[f"skipped, {kind}"] = share_of_macs_skipped(self.gates[chosen], modules)
            result[f"skipped of all, {kind}"] = share_of_macs_skipped(self.gates[chosen], modules, always_on)
        if not np.isnan(self.iou).all():
            result["IoU of words"] = np.nanmean(self.iou)
        return {name: round(float(value), 4) for name, value in result.items()}


@torch.no_grad()
def decide_windows(
    model: Any,
    windows: Sequence[Mapping[str, Any]],
    collator: KwsWindowDataCollator,
    batch_size: int = 64,
    **options: Any,
) -> KwsWindowDecisions:
    """
    Which windows the model is right about, how well it places their keywords, and which modules ran for them.

    Args:
        model ([`GatedConformerForKeywordDetection`]):
            In evaluation mode.
        windows (`Sequence[Mapping]`):
            Items of [`KwsWindowDataset`].
        collator ([`KwsWindowDataCollator`]):
            With the model's feature extractor.
        batch_size (`int`, *optional*, defaults to `64`):
            Windows at a time.
        options:
            Of each call of the model: `gated`, `gate_threshold`.

    Returns:
        [`~kws.training.window_scores.KwsWindowDecisions`]

    Raises:
        ValueError: if there are no windows or the model is in training mode.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext import GatedConformerConfig, GatedConformerForKeywordDetection, KwsFeatureExtractor
    >>> from hf_ext import KwsWindowDataCollator, KwsWindowDataset, decide_windows

    >>> clip = {"array": torch.randn(8000).numpy() / 10, "sampling_rate": 16000}
    >>> windows = list(KwsWindowDataset([{"audio": clip, "text": "yes"}], [torch.randn(50000)], {"yes": 0}, num_windows=8))
    >>> collator = KwsWindowDataCollator(KwsFeatureExtractor(feature_size=40, win_length=480))
    >>> model = GatedConformerForKeywordDetection(GatedConformerConfig(num_labels=1)).eval()
    >>> decide_windows(model, windows, collator, gate_threshold=1.0).figures(*model.count_macs())["skipped, noise"]
    1.0
    ```
    """
    if not len(windows):
        raise ValueError("`windows` is empty: there is nothing to decide.")
    if model.training:
        raise ValueError("Decisions have no dropout and no samples of gates: call `model.eval()` first.")
    right, iou, gates = [], [], []
    for start in range(0, len(windows), batch_size):
        batch = collator(windows[start : start + batch_size])
        output = model(**{name: values.to(model.device) for name, values in batch.items()}, **options)
        found = output.detection_logits[:, 0] > 0
        right.append(output.logits.argmax(-1).where(found, -100).cpu() == batch["labels"])
        iou += [
            _iou(place, target)
            for place, target in zip(output.locations[:, 0].tolist(), batch["location_targets"].tolist(), strict=True)
        ]
        gates.append(output.gates[:, 0].cpu())
    return KwsWindowDecisions(
        torch.cat(right).numpy(),
        np.array(iou),
        torch.cat(gates).numpy(),
        np.array([window["kind"] for window in windows]),
    )


@torch.no_grad()
def time_windows(
    contenders: Mapping[str, tuple[Any, Mapping[str, Any]]],
    windows: Sequence[Mapping[str, Any]],
    collator: KwsWindowDataCollator,
) -> dict[str, dict[str, float]]:
    """
    The time that models take for one window of each kind, without its features. They take turns.

    Args:
        contenders (`Mapping[str, tuple]`):
            For each name a model and the options of its calls, as in [`decide_windows`].
        windows (`Sequence[Mapping]`), collator ([`KwsWindowDataCollator`]):
            As in [`decide_windows`]. The first window is put twice: it warms up.

    Returns:
        `dict[str, dict[str, float]]`: for each name and kind of window the median, in milliseconds.
    """
    times: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    for number, window in enumerate([*windows[:1], *windows]):
        features = collator([window])["input_features"]
        # Whoever comes first finds the caches cold: it is another each time.
        first = number % len(contenders)
        for name, (model, options) in [*contenders.items()][first:] + [*contenders.items()][:first]:
            on_device = features.to(model.device)
            start = time.perf_counter()
            model(on_device, **options).logits.cpu()
            if number:
                times[name].setdefault(window["kind"], []).append(1e3 * (time.perf_counter() - start))
    return {
        name: {kind: round(float(np.median(values)), 3) for kind, values in sorted(by_kind.items())}
        for name, by_kind in times.items()
    }


def _iou(place: Sequence[float], target: Sequence[float]) -> float:
    """Of intervals that are given by centre and length."""
    if not target[1]:
        return float("nan")
    ends = [
        (centre - max(length, LEAST_LENGTH) / 2, centre + max(length, LEAST_LENGTH) / 2)
        for centre, length in (place, target)
    ]
    return interval_iou(*ends)
