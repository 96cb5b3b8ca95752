"""Precision, recall, F1 and IoU of intervals of time, as an `evaluate` metric: `evaluate.load("path/to/hf_ext/metrics/localization_scores")`."""

import datasets
import evaluate

from hf_ext.metrics.localization import localization_scores


_DESCRIPTION = "Precision, recall, F1 and mean intersection over union of intervals that were found in clips."

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `dict`): for each clip the intervals that were found, with `start`, `end` and `label`
        (empty where there is only one).
    references (`list` of `list` of `dict`): for each clip the intervals that there are.
    min_iou (`float`, *optional*, defaults to 0.5): least intersection over union of a match.
Returns:
    precision, recall, f1, mean_iou (`float`): over all clips; `mean_iou` is that of the matched intervals.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/hf_ext/metrics/localization_scores")
    >>> found = [[{"start": 0.0, "end": 1.0, "label": "stop"}, {"start": 3.0, "end": 4.0, "label": "go"}]]
    >>> actual = [[{"start": 0.0, "end": 0.8, "label": "stop"}]]
    >>> metric.compute(predictions=found, references=actual)["f1"]
    0.6666666666666666
"""

_INTERVALS = [
    {"start": datasets.Value("float64"), "end": datasets.Value("float64"), "label": datasets.Value("string")}
]


class LocalizationScoresMetric(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": _INTERVALS, "references": _INTERVALS}),
        )

    def _compute(self, predictions, references, min_iou=0.5):
        return localization_scores(_as_tuples(predictions), _as_tuples(references), min_iou)._asdict()


def _as_tuples(clips):
    return [[(interval["start"], interval["end"], interval["label"]) for interval in clip] for clip in clips]
