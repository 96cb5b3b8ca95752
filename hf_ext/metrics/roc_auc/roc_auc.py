"""Area under the ROC curve, pooled over all trials, as an `evaluate` metric: `evaluate.load("path/to/hf_ext/metrics/roc_auc")`."""

import datasets
import evaluate

from hf_ext.metrics.detection import bootstrap_interval, roc_auc


_DESCRIPTION = "Area under the ROC curve of all trials pooled: the chance that a match scores higher than a mismatch."

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `float`): a score per trial, the higher the more it is a match.
    references (`list` of `int`): 1 for a match, 0 for a mismatch.
    confidence (`float`, *optional*): if given, a bootstrap interval of this confidence is returned as well.
    groups (`list`, *optional*): the speaker or clip of each trial, drawn as a whole for the interval.
Returns:
    roc_auc (`float`): 0.5 is chance.
    roc_auc_interval (`list` of two `float`): if asked for.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/hf_ext/metrics/roc_auc")
    >>> metric.compute(predictions=[0.9, 0.4, 0.6, 0.1], references=[1, 1, 0, 0])
    {'roc_auc': 0.75}
"""


class RocAuc(evaluate.Metric):
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
        result = {"roc_auc": roc_auc(predictions, references)}
        if confidence is not None:
            interval = bootstrap_interval(roc_auc, predictions, references, groups=groups, confidence=confidence)
            result["roc_auc_interval"] = list(interval)
        return result
