"""Tokens per step as an `evaluate` metric: `evaluate.load("path/to/hf_ext/metrics/tokens_per_step")`."""

import datasets
import evaluate

from hf_ext.metrics.decoding import tokens_per_step


_DESCRIPTION = "Mean number of tokens that one step of decoding emits; plain decoding has 1.0."

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list[int]`): for every generated sequence the tokens that each step emitted, as
        `MtpGenerateOutput.step_lengths` gives them.
Returns:
    tokens_per_step (`float`): all tokens over all steps.
    num_tokens (`int`), num_steps (`int`): the two sums.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("path/to/hf_ext/metrics/tokens_per_step")
    >>> metric.compute(predictions=[[1, 4, 3], [1, 1]])
    {'tokens_per_step': 2.0, 'num_tokens': 10, 'num_steps': 5}
"""

_CITATION = """
@article{samragh2025your,
  title={Your LLM Knows the Future: Uncovering Its Multi-Token Prediction Potential},
  author={Samragh, Mohammad and Kundu, Arnav and Harrison, David and Nishu, Kumari and Naik, Devang and
    Cho, Minsik and Farajtabar, Mehrdad},
  journal={arXiv preprint arXiv:2507.11851},
  year={2025}
}
"""


class TokensPerStep(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int32"))}),
            reference_urls=["https://huggingface.co/papers/2507.11851"],
        )

    def _compute(self, predictions):
        return {
            "tokens_per_step": tokens_per_step(predictions),
            "num_tokens": sum(map(sum, predictions)),
            "num_steps": sum(map(len, predictions)),
        }
