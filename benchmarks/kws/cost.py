"""
What each keyword spotting model costs: weights, time for a second of audio on one core, and memory.

Random weights of the published sizes, and the shipped model, each in a process of its own. The real-time factor is the time for the features, the
encoder and one phrase, over the length of the clip; a further phrase on the same clip stands beside it. Memory is what the
process grew by, at its peak, from before the model was made.

    python -m benchmarks.kws.cost
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import HfArgumentParser, PreTrainedModel

from benchmarks.mtp.reporting import Table, write
from hf_ext import (
    CedConfig,
    CedForKeywordSpotting,
    DspForKeywordSpotting,
    DspKwsConfig,
    GatedConformerConfig,
    GatedConformerForKeywordDetection,
    KwsConformerConfig,
    KwsConformerForCTC,
    KwsFeatureExtractor,
    KwsProcessor,
    SlickConfig,
    SlickForKeywordSpotting,
    shipped_model,
)


# What the papers report, where they do.
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "SlickForKeywordSpotting": (lambda: SlickForKeywordSpotting(SlickConfig()), "596 K"),
    "SlickForKeywordSpotting, as shipped": (
        lambda: SlickForKeywordSpotting.from_pretrained(shipped_model("slick-small")),
        "",
    ),
    "CedForKeywordSpotting": (lambda: CedForKeywordSpotting(CedConfig()), "3.8 M with its phoneme network"),
    "DspForKeywordSpotting, phonemes": (lambda: DspForKeywordSpotting(DspKwsConfig()), "4.0 M, with words"),
    "GatedConformerForKeywordDetection": (
        lambda: GatedConformerForKeywordDetection(GatedConformerConfig(num_labels=10)),
        "not reported",
    ),
    "KwsConformerForCTC": (lambda: KwsConformerForCTC(KwsConformerConfig()), ""),
}


@dataclass
class CostArguments:
    seconds: float = field(default=1.0, metadata={"help": "Length of the clip."})
    repeats: int = field(default=50, metadata={"help": "Times that each is run; the median counts."})
    only: str | None = field(default=None, metadata={"help": "One model, in this process."})
    results_dir: str | None = field(default=None, metadata={"help": "Where the results go."})


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


@torch.no_grad()
def measure(name: str, args: CostArguments) -> dict[str, Any]:
    torch.set_num_threads(1)
    clip = 0.1 * torch.randn(round(args.seconds * 16000), generator=torch.Generator().manual_seed(0)).numpy()
    before = peak_mb()
    model = MODELS[name][0]().eval()
    extractor = KwsFeatureExtractor(feature_size=model.config.num_mel_bins)
    inputs = dict(extractor(clip, sampling_rate=16000, return_tensors="pt"))
    found = {
        "parameters": model.num_parameters(),
        "features_ms": median_ms(lambda: extractor(clip, sampling_rate=16000, return_tensors="pt"), args.repeats),
    }
    if hasattr(model, "get_text_features"):
        tokens = KwsProcessor(extractor)(text=["hey computer"], return_tensors="pt")
        text = model.get_text_features(tokens["keyword_ids"], tokens["keyword_attention_mask"])
        audio = model.get_audio_features(**inputs)
        found["encoder_ms"] = median_ms(lambda: model.get_audio_features(**inputs), args.repeats)
        found["phrase_ms"] = median_ms(lambda: model.score(audio, text), args.repeats)
    else:
        found["encoder_ms"] = median_ms(lambda: model(**inputs), args.repeats)
    found["memory_mb"] = peak_mb() - before
    return found


def main(args: CostArguments) -> None:
    if args.only is not None:
        print(json.dumps(measure(args.only, args)))
        return
    results = {}
    for name in MODELS:
        command = [sys.executable, "-m", "benchmarks.kws.cost", "--only", name]
        command += ["--seconds", str(args.seconds), "--repeats", str(args.repeats)]
        results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    columns = [
        "model",
        "weights",
        "the paper's",
        "features, ms",
        "encoder, ms",
        "a phrase, ms",
        "real-time factor",
        "MB",
    ]
    rows = []
    for name, found in results.items():
        spent = found["features_ms"] + found["encoder_ms"] + found.get("phrase_ms", 0.0)
        times = (found["features_ms"], found["encoder_ms"], found.get("phrase_ms"))
        factor = f"{spent / 1000 / args.seconds:.4f}"
        rows.append([name, f"{found['parameters']:,}", MODELS[name][1], *times, factor, f"{found['memory_mb']:.0f}"])
    table = Table(f"A clip of {args.seconds:g} s, one core", columns, rows)
    write(
        "cost", "What the models cost", [table], {"models": results}, MODELS[next(iter(MODELS))][0](), args.results_dir
    )


if __name__ == "__main__":
    main(*HfArgumentParser(CostArguments).parse_args_into_dataclasses())
