"""Training of the text-defined keyword spotting models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_ext.hub.model_card import kws_model_card
from hf_ext.kws.processing_kws import KwsProcessor
from hf_ext.kws.training.datasets import PAIR_KINDS, KwsDataCollator, KwsTrialDataset
from hf_ext.kws.training.trainer_config import LOSSES, KwsTrainingConfig
from hf_ext.kws.training.utterances import are_at_hand, column
from hf_ext.metrics import equal_error_rate, roc_auc


class KwsTrainer(Trainer):
    """
    Trains models of the keyword spotting convention, such as [`SlickForKeywordSpotting`], on pairs of a clip and a phrase.

    Optimisation, distribution, checkpoints and logging are [`~transformers.Trainer`]'s. Each loss is a mean over the
    pairs of a step, whatever micro-batches and processes they are spread over. (What looks at a batch as a whole, as a
    conformer's convolutions and the contrastive loss do, still sees one micro-batch at a time.)

    It logs the unweighted losses. An evaluation also logs, pooled over all phrases with one threshold, `auc` and `eer`
    against all negatives and, for each kind of negative in the data, `random_auc`, `random_eer`, `hard_auc` and so on. (On
    several processes, pairs that fill up the last batch count twice in the evaluated losses, and once in these figures.)

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        args ([`KwsTrainingConfig`], *optional*):
            Settings.
        train_dataset, eval_dataset ([`KwsPairDataset`] or [`KwsTrialDataset`], *optional*):
            Pairs. For evaluation give `every_kind=True`; a dict of several is evaluated one by one.
        processing_class ([`KwsProcessor`], *optional*):
            What makes pairs into inputs, and is saved with the model; by default one with default settings.
        data_collator, compute_metrics, callbacks, optimizers and the rest:
            As in [`~transformers.Trainer`]; by default [`KwsDataCollator`] and the figures above.

    Raises:
        TypeError: for another kind of `args`, model or processor.
        ValueError: if the processor's features or phonemes are not the model's, or phrases are longer than it takes.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_ext import KwsPairDataset, KwsTrainer, KwsTrainingConfig, SlickConfig, SlickForKeywordSpotting

    >>> clip = {"array": np.random.default_rng(0).normal(size=8000) / 10, "sampling_rate": 16000}
    >>> utterances = [{"audio": clip, "text": text} for text in ("lights on", "lights off", "play music")]
    >>> trainer = KwsTrainer(
    ...     model=SlickForKeywordSpotting(SlickConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=16)),
    ...     args=KwsTrainingConfig("slick", max_steps=1, report_to="none", use_cpu=True),
    ...     train_dataset=KwsPairDataset(utterances),
    ...     eval_dataset=KwsPairDataset(utterances, every_kind=True),
    ... )
    >>> output = trainer.train()  # doctest: +SKIP
    >>> sorted(name for name in trainer.evaluate() if name.endswith("auc"))  # doctest: +SKIP
    ['eval_auc', 'eval_confusable_auc', 'eval_hard_auc', 'eval_random_auc']
    ```
    """

    # The losses are divided by the number of pairs in the whole step, on all processes.
    loss_is_scaled_for_ga = True

    args: KwsTrainingConfig

    def __init__(
        self,
        model: Any = None,
        args: KwsTrainingConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: KwsProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = KwsTrainingConfig("kws")
        if not isinstance(args, KwsTrainingConfig):
            raise TypeError(f"`args` must be a KwsTrainingConfig, got {type(args).__name__}.")
        if processing_class is None:
            processing_class = KwsProcessor()
        if not isinstance(processing_class, KwsProcessor):
            raise TypeError(f"`processing_class` must be a KwsProcessor, got {type(processing_class).__name__}.")
        channels, expected = processing_class.feature_extractor.feature_size, _num_mel_bins(model)
        if expected not in (None, channels):
            raise ValueError(
                f"`processing_class` makes {channels} channels and the model takes {expected} (`num_mel_bins`): use the "
                f"processor of the model, or KwsProcessor(KwsFeatureExtractor(feature_size={expected}))."
            )
        # There may be several to evaluate on, by name.
        several = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
        named = {f"eval_dataset[{name!r}]" if name else "eval_dataset": own for name, own in several.items()}
        _check_phrases(model, processing_class, {"train_dataset": train_dataset, **named})
        if kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = detection_metrics
        self.data_collator: Any
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or KwsDataCollator(processing_class, hide_stripes=args.hide_stripes),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.add_callback(_EpochOfPairs())
        # Of every loss since the last log: its sum over pairs, and their number.
        self._totals: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Counts the pairs of the step, over all micro-batches and processes."""
        count = torch.tensor(float(sum(len(batch["labels"]) for batch in batch_samples)), device=device)
        if self.model.training and self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        training = self.model.training
        num_pairs = len(inputs["labels"])
        outputs = model(**{name: value for name, value in inputs.items() if name != "pair_kinds"})
        losses = {name: outputs[name] for name in LOSSES if outputs.get(name) is not None}
        weights = self._weights(training)
        if losses:
            loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        else:
            # A model with a loss of its own.
            losses, loss = {"utterance_loss": outputs["loss"]}, outputs["loss"]
        if training and num_items_in_batch is not None:
            loss = loss * num_pairs / num_items_in_batch
            if self.args.average_tokens_across_devices:
                # DDP averages gradients over processes, and the count is that of all of them.
                loss = loss * self.accelerator.num_processes
        self._record("train" if training else "eval", losses, num_pairs)
        return (loss, outputs) if return_outputs else loss

    def _weights(self, training: bool) -> dict[str, float]:
        config = self.accelerator.unwrap_model(self.model).config
        weights = {}
        for name in LOSSES:
            own = getattr(self.args, f"{name}_weight")
            weights[name] = getattr(config, f"{name}_weight", 1.0) if own is None else own
            if training and name != "ctc_loss" and self.state.global_step < self.args.ctc_steps:
                weights[name] = 0.0
        return weights

    @torch.no_grad()
    def _record(self, mode: str, losses: dict[str, torch.Tensor], num_pairs: int) -> None:
        sums = {name: torch.stack([value.detach().float() * num_pairs, value.new_tensor(num_pairs)]) for name, value in losses.items()}  # fmt: skip
        totals = self._totals[mode]
        for name, pair in sums.items():
            totals[name] = totals.get(name, torch.zeros_like(pair)) + pair

    def _figures(self, mode: str) -> dict[str, float]:
        """Means of the losses since the last call, over all pairs."""
        totals, self._totals[mode] = self._totals[mode], {}
        if not totals:
            return {}
        gathered = self.accelerator.gather(torch.stack(list(totals.values()))[None]).sum(0).tolist()
        return {name: total / count for name, (total, count) in zip(totals, gathered, strict=True)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._figures("train"))
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._totals["eval"] = {}
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._figures("eval").items()})
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`], with a model card beside the model."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self._write_card(output_dir or self.args.output_dir)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the model's card, with what it was trained on and what it reached, into the output folder."""
        self._write_card(self.args.output_dir, model_name, tags, dataset, license)

    def _write_card(
        self,
        folder: str,
        model_name: str | None = None,
        tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        if not self.is_world_process_zero():
            return
        facts = {
            "trained with": f"{type(self).__name__}, hf_ext, transformers",
            "training data": dataset if isinstance(dataset, str) else ", ".join(dataset or []),
            "steps": self.state.global_step,
            "pairs per step": self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
        }
        card = kws_model_card(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            self.args.hub_model_id or model_name or Path(folder).resolve().name,
            facts={name: value for name, value in facts.items() if value},
            figures=self._reached(),
            tags=[tags] if isinstance(tags, str) else tags,
            license=license,
        )
        card.save(Path(folder) / "README.md")

    def _reached(self) -> dict[str, float]:
        """AUC and EER of the last evaluation, or of the last of each set where there are several, with its name before them."""
        several = [f"{name}_" for name in self.eval_dataset] if isinstance(self.eval_dataset, Mapping) else []
        figures: dict[str, float] = {}
        for own in ["", *several]:
            prefix = f"eval_{own}"
            # A set may be called as a kind of negative is, and then have figures of the name of another's.
            marks = {f"{prefix}auc", f"{prefix}runtime"}
            evaluations = [entry for entry in self.state.log_history if marks <= set(entry)]
            last: dict[str, float] = evaluations[-1] if evaluations else {}
            kinds = [
                name[len(prefix) : -len("auc")] for name in last if name.startswith(prefix) and name.endswith("auc")
            ]
            for kind in kinds:
                # Metrics of one's own may have an AUC without the other.
                if f"{prefix}{kind}eer" in last:
                    row = f"{own[:-1]}, {kind or 'all_'}" if own else kind
                    figures |= {f"{row}{measure}": last[f"{prefix}{kind}{measure}"] for measure in ("auc", "eer")}
        return figures

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return self._by_duration(dataset, batch_size) or super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # Evaluation must not take draws from the training.
        own_draws = torch.Generator().manual_seed(self.args.seed)
        sampler = self._by_duration(eval_dataset, self.args.eval_batch_size, own_draws)
        return sampler or super()._get_eval_sampler(eval_dataset)

    def _by_duration(self, dataset: Any, batch_size: int, generator: Any = None) -> LengthGroupedSampler | None:
        """Clips of like length together. Those that transformers looks for are of features, which the collator makes."""
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "durations"):
            return None
        milliseconds = [round(1000 * seconds) for seconds in dataset.durations()]
        return LengthGroupedSampler(batch_size, lengths=milliseconds, generator=generator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._without_stripes(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self._without_stripes(super().get_test_dataloader, test_dataset)

    def _without_stripes(self, make: Any, dataset: Any) -> Any:
        collator: Any = self.data_collator
        if isinstance(collator, KwsDataCollator) and collator.hide_stripes:
            self.data_collator = replace(collator, hide_stripes=False)
        try:
            return make(dataset)
        finally:
            self.data_collator = collator


def detection_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    AUC and equal error rate of all pairs pooled, and of each kind of negative apart.

    Args:
        prediction ([`~transformers.EvalPrediction`]):
            Logits of shape `(num_pairs,)`, and as label ids labels and kinds of pairs, places in `PAIR_KINDS`.

    Returns:
        `dict[str, float]`: `auc` and `eer`, and the same with the kind of negative before them. Without positives, or
        without negatives, there are none.
    """
    predictions: Any = prediction.predictions
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions, dtype=np.float64)
    labels, kinds = (np.asarray(column).astype(int) for column in prediction.label_ids)
    groups = {"": labels == 0}
    groups |= {f"{kind}_": (labels == 0) & (kinds == i) for i, kind in enumerate(PAIR_KINDS)}
    figures = {}
    for name, negatives in groups.items():
        if negatives.any() and labels.any():
            chosen = negatives | (labels == 1)
            scores, targets = _listed(logits[chosen]), _listed(labels[chosen])
            figures[f"{name}auc"] = roc_auc(scores, targets)
            figures[f"{name}eer"] = equal_error_rate(scores, targets)
    return figures


class _EpochOfPairs(TrainerCallback):
    """Tells the pairs which epoch they are drawn for, before the workers copy them."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dataset: Any = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if hasattr(dataset, "set_epoch"):
            # Resumed in the middle of an epoch, the state has a fraction.
            dataset.set_epoch(int((state.epoch or 0) + 1e-6))


def _check_phrases(model: Any, processor: KwsProcessor, datasets: dict[str, Any]) -> None:
    """Whether the model takes phrases at all, these phonemes, and so many of them."""
    if isinstance(model, PreTrainedModel) and not hasattr(model, "get_text_features"):
        raise TypeError(
            f"`model` is a {type(model).__name__}, which takes no phrases: train it with transformers' Trainer, on what its own "
            "collator makes."
        )
    config: Any = getattr(model, "config", None)
    symbols = len(processor.tokenizer)
    if not processor.takes_words and getattr(config, "vocab_size", symbols) < symbols:
        raise ValueError(
            f"`processing_class` has {symbols} phonemes and the model takes {config.vocab_size} (`vocab_size`): make it with "
            f"`vocab_size={symbols}`."
        )
    longest = getattr(config, "longest_phrase", None)
    for name, dataset in datasets.items():
        if processor.takes_words and "confusable" in getattr(dataset, "kinds", ()):
            raise ValueError(
                f"`{name}` has the kind 'confusable', which is made up of phonemes, and the model takes words: leave it out of "
                "the `shares`."
            )
        most = 0 if longest is None else _most_phonemes(dataset, processor.tokenizer)
        if longest is not None and most > longest:
            raise ValueError(
                f"`{name}` has phrases of up to {most} phonemes and the model takes {longest} (`max_phonemes`): make a "
                f"KwsPairDataset with `max_phonemes={longest}`, which leaves longer ones out, and leave them out of given trials."
            )


def _most_phonemes(dataset: Any, tokenizer: Any) -> int:
    """The most phonemes that a phrase of the pairs has, as far as it can be told without making them."""
    if hasattr(dataset, "most_phonemes"):
        return dataset.most_phonemes
    if not isinstance(dataset, KwsTrialDataset) or not are_at_hand(dataset.trials):
        return 0
    return max((len(tokenizer.tokenize(phrase)) for phrase in set(column(dataset.trials, "phrase"))), default=0)


def _num_mel_bins(model: Any) -> int | None:
    return getattr(getattr(model, "config", None), "num_mel_bins", None)


def _listed(values: np.ndarray) -> Sequence[Any]:
    return values.tolist()
