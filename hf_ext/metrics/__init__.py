from hf_ext.metrics.decoding import distinct_ngrams, first_difference, ngram_overlap, tokens_per_step
from hf_ext.metrics.detection import (
    DetPoints,
    OperatingPoint,
    bootstrap_interval,
    det_points,
    equal_error_rate,
    frr_at_false_alarms_per_hour,
    roc_auc,
    share_of_macs_skipped,
)
from hf_ext.metrics.localization import LocalizationScores, interval_iou, localization_scores


__all__ = [
    "DetPoints",
    "LocalizationScores",
    "OperatingPoint",
    "bootstrap_interval",
    "det_points",
    "distinct_ngrams",
    "equal_error_rate",
    "first_difference",
    "frr_at_false_alarms_per_hour",
    "interval_iou",
    "localization_scores",
    "ngram_overlap",
    "roc_auc",
    "share_of_macs_skipped",
    "tokens_per_step",
]
