"""False rejections at a bound of false alarms per hour, as an `evaluate` metric: `evaluate.load("path/to/hf_ext/metrics/frr_at_false_alarms_per_hour")`."""

import datasets
import evaluate

from hf_ext.metrics.detection import frr_at_false_alarms_per_hour


_DESCRIPTION = "Share of keywords that are missed where the false alarms per hour are held to a bound."

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `float`): for each keyword that was spoken the score of its detection (minus infinity where
        there was none), and the score of each detection where nothing was spoken.
    references (`list` of `int`): 1 for the former, 0 for the latter.
    hours (`float`): how long the audio without keywords is.
    false_alarms_per_hour (`float`, *optional*, defaults to 0.5): the bound.
Returns:
    false_rejection_rate, false_alarms_per_hour, threshold (`float`): at the lowest threshold that keeps to the bound.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/hf_ext/metrics/frr_at_false_alarms_per_hour")
    >>> metric.compute(predictions=[0.9, 0.5, 0.7, 0.6], references=[1, 1, 0, 0], hours=2.0)["false_rejection_rate"]
    0.5
"""


class FrrAtFalseAlarmsPerHour(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions, references, hours, false_alarms_per_hour=0.5):
        return frr_at_false_alarms_per_hour(predictions, references, hours, false_alarms_per_hour)._asdict()
