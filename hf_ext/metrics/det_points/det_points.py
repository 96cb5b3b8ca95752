"""Points of the detection error trade-off, as an `evaluate` metric: `evaluate.load("path/to/hf_ext/metrics/det_points")`."""

import datasets
import evaluate

from hf_ext.metrics.detection import det_points


_DESCRIPTION = "The rates of false alarms and of misses at every threshold that matters."

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `float`): a score per trial, the higher the more it is a match.
    references (`list` of `int`): 1 for a match, 0 for a mismatch.
Returns:
    false_alarm_rates, miss_rates, thresholds (`list` of `float`): from the highest threshold down.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/hf_ext/metrics/det_points")
    >>> metric.compute(predictions=[0.9, 0.4, 0.6, 0.1], references=[1, 1, 0, 0])["miss_rates"]
    [1.0, 0.5, 0.5, 0.0, 0.0]
"""


class DetPointsMetric(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions, references):
        points = det_points(predictions, references)
        return {name: values.tolist() for name, values in points._asdict().items()}
