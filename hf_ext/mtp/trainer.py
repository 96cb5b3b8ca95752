"""Training of mask vectors, gated LoRA and sampler head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from trl import SFTTrainer

from hf_ext.hub.model_card import mtp_model_card
from hf_ext.row_generators import row_generator

from .configuration import GatedLoraConfig
from .gated_lora import GatedLoraModel
from .losses import IGNORE_INDEX, leading_agreement
from .trainer_config import MtpConfig
from .two_pass import mask_labels


_LOSSES = ("base_loss", "sampler_loss", "consistency_loss")


class MtpTrainer(SFTTrainer):
    """
    Trains a gated LoRA adapter to guess several tokens ahead (https://huggingface.co/papers/2507.11851, section 2.5).

    Data, collation, distribution, checkpoints and logging are [`~trl.SFTTrainer`]'s: any text, prompt-completion or
    conversational dataset works, and completion-only and assistant-only losses place masks where they place labels. The best text is the
    model's own, see [`generate_completions`].

    It logs, beside the losses, `agreement_j`, the share of masks in slot `j` where the sampler says what the base model
    says, and `expected_tokens_per_step`, one plus the number of guesses right in a row; an evaluation also decodes
    prompts and logs `eval_decoded_tokens_per_step`. Losses and agreement, `eval_loss` included, are averages over
    masks, whatever the size of a batch.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The base model, or one that carries a gated LoRA adapter already.
        args ([`MtpConfig`], *optional*):
            Settings.
        peft_config ([`GatedLoraConfig`], *optional*):
            The adapter to make; by default one with default settings unless `model` has one.
        train_dataset, eval_dataset, processing_class, callbacks, optimizers and the rest:
            As in [`~trl.SFTTrainer`], except for what masks have no use for: `compute_metrics`,
            `preprocess_logits_for_metrics` and `compute_loss_func`.

    Raises:
        TypeError: for a configuration or an adapter of another PEFT method, and for a model with an adapter that is no
            [`~peft.PeftModel`].
        ValueError: for an adapter that was loaded for inference, for functions of logits, which it would never call, and for
            4-bit weights that have been repacked for inference on a CPU.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from hf_ext import GatedLoraConfig, MtpConfig, MtpTrainer, shipped_model

    >>> folder = shipped_model("tiny-lm")
    >>> model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    >>> trainer = MtpTrainer(
    ...     model=model,
    ...     args=MtpConfig(output_dir="adapter", max_steps=1, report_to="none", bf16=False),
    ...     train_dataset=Dataset.from_dict({"text": ["Once upon a time there was a cat."]}),
    ...     processing_class=tokenizer,
    ...     peft_config=GatedLoraConfig(num_masks=4),
    ... )
    >>> output = trainer.train()  # doctest: +SKIP
    ```
    """

    _tag_names = ["trl", "mtp", "hf-ext", "speculative-decoding"]
    _name = "MTP"
    # The losses are sums divided by the number of masks in the whole step, on all processes.
    loss_is_scaled_for_ga = True

    args: MtpConfig

    # What transformers would call with logits that the losses over masks never put together, and the way out.
    _functions_of_logits: ClassVar[dict[str, str]] = {
        "compute_metrics": "add figures to the metrics that `evaluate` returns, in a subclass's `evaluation_loop`",
        "preprocess_logits_for_metrics": "leave it out together with `compute_metrics`",
        "compute_loss_func": "set the weights of the losses in `MtpConfig` or override `compute_loss`",
    }

    def __init__(
        self,
        model: Any,
        args: MtpConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if args is None:
            args = MtpConfig("mtp-adapter")
        if not isinstance(args, MtpConfig):
            raise TypeError(f"`args` must be an MtpConfig, got {type(args).__name__}.")
        carries_adapter = isinstance(model, PeftModel)
        if peft_config is None and not carries_adapter:
            peft_config = GatedLoraConfig()
        if peft_config is not None and not isinstance(peft_config, GatedLoraConfig):
            raise TypeError(f"`peft_config` must be a GatedLoraConfig, got {type(peft_config).__name__}.")
        if carries_adapter and not isinstance(model.base_model, GatedLoraModel):
            raise TypeError(f"`model` carries a {type(model.base_model).__name__}; masks need a gated LoRA adapter.")
        if carries_adapter and not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "The adapter of `model` was loaded for inference. Load it with "
                "`PeftModel.from_pretrained(..., is_trainable=True)`."
            )
        if not carries_adapter and hasattr(model, "mtp_head"):
            raise TypeError(
                f"`model` is a {type(model).__name__} that carries an adapter already, which a new one would replace. Give "
                "the PeftModel (`PeftModel.from_pretrained(model, ..., is_trainable=True)`) to train that adapter further, or "
                "`peft_model.unload()` to start anew."
            )
        for name, way_out in self._functions_of_logits.items():
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}={getattr(kwargs[name], '__name__', kwargs[name])}` would never be called: there are no "
                    f"logits of the whole text, only losses and agreement of masks. Instead, {way_out}."
                )
        columns = getattr(train_dataset, "column_names", None) or []
        if args.completion_only_loss is None and "completion_mask" in columns:
            args.completion_only_loss = True
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            **kwargs,
        )
        _keep_differentiable(self.model)
        self.num_masks = self._tuned.peft_config[self._tuned.active_adapters[0]].num_masks
        # Of every figure since the last log: the sum, and the number of masks or anchors that it is over.
        self._totals: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}

    @property
    def _tuned(self) -> GatedLoraModel:
        return self.accelerator.unwrap_model(self.model).base_model

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> torch.Tensor | None:
        """Draws the anchors of the step and counts the masks that have a label, over all micro-batches and processes."""
        count = torch.zeros((), device=device)
        for batch in batch_samples:
            batch["mtp_anchors"] = self._draw_anchors(batch, self.state.global_step)
            labels = mask_labels(batch["labels"], batch["mtp_anchors"], self.num_masks)[..., 1:]
            count += (labels != IGNORE_INDEX).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def _draw_anchors(self, inputs: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """
        A random subset of the tokens that predict a label, in each row. It depends on the text of the row, the step and
        the seed alone, so that it is the same however rows are spread over micro-batches, processes and resumed runs.
        """
        rows = []
        for ids, labels, seen in zip(
            inputs["input_ids"].cpu(), inputs["labels"].cpu(), inputs["attention_mask"].cpu(), strict=True
        ):
            candidates = (labels[1:] != IGNORE_INDEX).nonzero().squeeze(-1)
            generator = row_generator(ids[seen.bool()], step, self.args.seed)
            chosen = torch.randperm(len(candidates), generator=generator)[: self.args.anchors_per_sequence]
            rows.append(candidates[chosen].sort().values)
        anchors = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        if anchors.shape[1] == 0:
            anchors = anchors.new_full((len(rows), 1), -1)
        return anchors.to(inputs["input_ids"].device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        mode = "train" if self.model.training else "eval"
        anchors = inputs.get("mtp_anchors")
        outputs: Any = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["labels"],
            mtp_anchors=self._draw_anchors(inputs, 0) if anchors is None else anchors,
            soft_target_weight=self.args.soft_target_weight,
            measure_agreement=mode == "eval" or self._logs_this_step(),
            anchors_per_chunk=self.args.anchors_per_chunk if self.args.gradient_checkpointing else None,
        )
        sums = {
            "base_loss": outputs.base_loss.sum(),
            "sampler_loss": outputs.sampler_loss.sum() + outputs.token_sampler_loss.sum(),
            "consistency_loss": outputs.consistency_loss.sum(),
        }
        num_masks = (outputs.valid.sum() if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        loss = self._weighted(sums) / num_masks
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages gradients over processes, and the number of masks is that of all of them.
            loss = loss * self.accelerator.num_processes
        self._record(mode, inputs, outputs, sums)
        return (loss, outputs) if return_outputs else loss

    def _weighted(self, losses: dict[str, Any]) -> Any:
        return sum(getattr(self.args, f"{name}_weight") * losses[name] for name in _LOSSES)

    def _logs_this_step(self) -> bool:
        return (self.state.global_step + 1) % max(1, self.state.logging_steps or 1) == 0

    @torch.no_grad()
    def _record(self, mode: str, inputs: dict[str, torch.Tensor], outputs: Any, sums: dict[str, torch.Tensor]) -> None:
        gather = self.accelerator.gather_for_metrics
        valid = outputs.valid.sum((0, 1)).float()
        # Each a sum and what it is over.
        pairs = {name: torch.stack([value.detach().float(), valid.sum()]) for name, value in sums.items()}
        if outputs.sampler_agrees is not None:
            agrees = outputs.sampler_agrees.sum((0, 1)).float()
            for slot in range(self.num_masks):
                pairs[f"agreement_{slot + 1}"] = torch.stack([agrees[slot], valid[slot]])
            complete = outputs.valid.all(-1)
            steps = (1 + leading_agreement(outputs.sampler_agrees)) * complete
            pairs["expected_tokens_per_step"] = torch.stack([steps.sum(), complete.sum()]).float()
        for name, pair in zip(pairs, gather(torch.stack(list(pairs.values()))[None]).sum(0), strict=True):
            self._totals[mode][name] = self._totals[mode].get(name, 0) + pair
        if mode == "train":
            self._total_train_tokens += gather(inputs["attention_mask"].sum()).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _figures(self, mode: str) -> dict[str, float]:
        """Averages since the last call, over all masks, however these were spread over batches."""
        totals, self._totals[mode] = self._totals[mode], {}
        pairs = {name: pair.tolist() for name, pair in totals.items()}
        return {name: total / count for name, (total, count) in pairs.items() if count > 0}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(self._figures("train"))
        super().log(logs, start_time)

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the adapter's card, with what it was trained on and what it reached, into the output folder."""
        if not self.is_world_process_zero():
            return
        measured = [
            value
            for entry in self.state.log_history
            for name, value in entry.items()
            if name.endswith("decoded_tokens_per_step")
        ]
        facts = {
            "trained with": f"{type(self).__name__}, hf_ext, TRL, PEFT, transformers",
            "training text": dataset_name,
            "steps": self.state.global_step,
            "sequences per step": self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            "tokens per step on the evaluation set": measured[-1] if measured else None,
        }
        repo_id = self.args.hub_model_id or model_name or Path(self.args.output_dir).name
        card = mtp_model_card(
            self._tuned.peft_config[self._tuned.active_adapters[0]],
            repo_id,
            facts={name: value for name, value in facts.items() if value},
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        )
        card.save(Path(self.args.output_dir) / "README.md")

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        figures = self._figures("eval")
        if "base_loss" in figures:
            # In place of transformers' mean over batches, in which a mask's say depends on the batch that it is in.
            figures["loss"] = self._weighted(figures)
        # A streamed dataset can be read once only.
        if self.args.eval_decoding_prompts and hasattr(dataloader.dataset, "select"):
            figures |= self._decode(dataloader.dataset)
        # Under the name of the evaluation set where there are several.
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def _decode(self, dataset: Any) -> dict[str, float]:
        """Tokens per step over the first prompts of a dataset, by the decoding that users get."""
        model = self.accelerator.unwrap_model(self.model)
        longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        was_training = model.training
        model.eval()
        tokens = steps = 0
        for row in dataset.select(range(min(self.args.eval_decoding_prompts, len(dataset)))):
            # As the collator has it: rows without labels are labels themselves.
            labels = row.get("labels", row["input_ids"])
            first_label = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), 0)
            prompt = row["input_ids"][: first_label or self.args.eval_prompt_length]
            room = self.args.eval_decoding_tokens if longest is None else longest - len(prompt)
            if room < 1:
                continue
            input_ids = torch.tensor([prompt], device=self.args.device)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=min(self.args.eval_decoding_tokens, room),
                do_sample=False,
                return_dict_in_generate=True,
            )
            tokens += output.sequences.shape[1] - len(prompt)
            steps += int(output.num_steps)
        model.train(was_training)
        return {"decoded_tokens_per_step": tokens / steps} if steps else {}


def _keep_differentiable(model: torch.nn.Module) -> None:
    """
    On a CPU bitsandbytes repacks 4-bit weights in the first pass that carries no gradients, such as pass one of a step,
    and no gradient gets through the packed ones.
    """
    for name, module in model.named_modules():
        if getattr(getattr(module, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit weights of `model` ({name}) have been repacked for inference on a CPU, by a pass without "
                "gradients, and nothing can be trained over them. Load the model anew and give it to the trainer before it "
                "generates."
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
