"""What token-difficulty routing is compared with: the same model trained the same way, with experts chosen otherwise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from hf_ext import DynaMoeTrainer


IGNORE_INDEX = -100


class ChosenOtherwiseTrainer(DynaMoeTrainer):
    """
    Next-token loss and distillation as in [`DynaMoeTrainer`], but no routers: `choice` is `"fixed"` (the smallest expert for
    every token), `"elastic"` (one expert for every token of a row, drawn for each row, so that one model serves all widths),
    `"random"` (experts of all shares, drawn anew for each token and layer) or `"dense"`.
    """

    choice = "fixed"

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, labels = inputs["input_ids"], inputs["labels"][:, 1:]
        call = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "use_cache": False}
        logits = model(**call, **self._experts(ids)).logits[:, :-1]
        loss = self.args.lm_loss_weight * F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        if self.teacher is not None:
            with torch.no_grad():
                said = self.teacher(**call).logits[:, :-1].log_softmax(-1)
            divergence = F.kl_div(logits.log_softmax(-1), said, reduction="none", log_target=True).sum(-1)
            loss = loss + self.args.distillation_weight * (divergence * (labels != IGNORE_INDEX)).sum()
        return loss / num_items_in_batch

    def _experts(self, ids: torch.Tensor) -> dict[str, Any]:
        if self.choice == "dense":
            return {"sensitivity": 1.0}
        if self.choice == "fixed":
            return {"expert_index": 0}
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        if self.choice == "elastic":
            expert = torch.randint(len(self.routed.config.expert_widths), (ids.shape[0], 1), generator=generator)
            return {"expert_index": expert.expand_as(ids)}
        # A share for each row, as routers in training draw a sensitivity for each row.
        share = torch.rand(ids.shape[0], generator=generator)
        return {"expert_index": random_experts(self.routed, ids, share, generator)}


def random_experts(
    model: Any, ids: torch.Tensor, share: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Experts `(num_layers, batch_size, sequence_length)` drawn for each token and layer without regard to the token, from the
    two whose widths lie around `share`, a tensor of shape `(batch_size,)`, between the smallest expert and the whole.
    """
    widths = torch.tensor(model.config.expert_widths) / model.config.expert_widths[-1]
    wanted = widths[0] + (1 - widths[0]) * share if generator is not None else share
    upper = torch.searchsorted(widths, wanted.clamp(min=float(widths[0]), max=1.0)).clamp(min=1)
    part = (wanted - widths[upper - 1]) / (widths[upper] - widths[upper - 1])
    drawn = torch.rand(len(model.nested_mlps()), *ids.shape, generator=generator)
    return torch.where(drawn < part[:, None], upper[:, None], upper[:, None] - 1)


@torch.no_grad()
def perplexity(model: Any, rows: list[list[int]], batch_size: int = 16, **options: Any) -> tuple[float, float]:
    """
    Perplexity of texts and the share of MLP neurons used, at a `sensitivity`, with one `expert_index` for all tokens, or at
    `random_share`.
    """
    random_share = options.pop("random_share", None)
    total, count = 0.0, 0
    model.eval()
    if random_share is not None:
        torch.manual_seed(0)
    model(torch.tensor([rows[0]]))  # so that there is a count to begin anew
    model.expert_usage(reset=True)
    for start in range(0, len(rows), batch_size):
        batch = [torch.tensor(row) for row in rows[start : start + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in batch])[:, None]).long()
        if random_share is not None:
            options = {"expert_index": random_experts(model, ids, torch.full((len(ids),), random_share))}
        logits = model(ids, attention_mask=mask, **options).logits[:, :-1]
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORE_INDEX)
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != IGNORE_INDEX).sum())
    return math.exp(total / count), model.expert_usage(reset=True).active_fraction
