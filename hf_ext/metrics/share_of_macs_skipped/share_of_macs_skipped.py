"""Share of the multiply-accumulates that gates saved, as an `evaluate` metric: `evaluate.load("path/to/hf_ext/metrics/share_of_macs_skipped")`."""

import datasets
import evaluate

from hf_ext.metrics.detection import share_of_macs_skipped


_DESCRIPTION = "Share of the multiply-accumulates that gates saved."

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `int`): for each frame, 1 for each module that ran and 0 for each that was skipped.
    macs_per_module (`list` of `float`): multiply-accumulates of each module, per frame.
    always_on (`float`, *optional*, defaults to 0): multiply-accumulates per frame that no gate can save.
Returns:
    share_of_macs_skipped (`float`): between 0 (everything ran) and 1.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/hf_ext/metrics/share_of_macs_skipped")
    >>> metric.compute(predictions=[[1, 0], [1, 1]], macs_per_module=[100, 300])
    {'share_of_macs_skipped': 0.375}
"""


class ShareOfMacsSkipped(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int32"))}),
        )

    def _compute(self, predictions, macs_per_module, always_on=0.0):
        return {"share_of_macs_skipped": share_of_macs_skipped(predictions, macs_per_module, always_on)}
