"""Equal error rate, pooled over all trials, as an `evaluate` metric: `evaluate.load("path/to/hf_ext/metrics/equal_error_rate")`."""

import datasets
import evaluate

from hf_ext.metrics.detection import bootstrap_interval, equal_error_rate


_DESCRIPTION = "The rate at which misses and false alarms are equally frequent, with one threshold for all trials."

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `float`): a score per trial, the higher the more it is a match.
    references (`list` of `int`): 1 for a match, 0 for a mismatch.
    confidence (`float`, *optional*): if given, a bootstrap interval of this confidence is returned as well.
    groups (`list`, *optional*): the speaker or clip of each trial, drawn as a whole for the interval.
Returns:
    equal_error_rate (`float`): between 0 and 1.
    equal_error_rate_interval (`list` of two `float`): if asked for.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/hf_ext/metrics/equal_error_rate")
    >>> metric.compute(predictions=[0.9, 0.4, 0.6, 0.1], references=[1, 1, 0, 0])
    {'equal_error_rate': 0.5}
"""


class EqualErrorRate(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions, references, confidence=None, groups=None):
        result = {"equal_error_rate": equal_error_rate(predictions, references)}
        if confidence is not None:
            interval = bootstrap_interval(
                equal_error_rate, predictions, references, groups=groups, confidence=confidence
            )
            result["equal_error_rate_interval"] = list(interval)
        return result
