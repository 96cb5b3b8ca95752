"""What a nested model's budgets look like: table, curves, heat maps, and what they say in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hf_ext.cli.charts import Curve, HeatMap
from hf_ext.cli.dynamoe_budgets import Budget
from hf_ext.cli.report import Bars, Block, Table


# What counts as nearly the dense model's quality.
TOLERANCE = 0.05


def routed(budgets: Sequence[Budget]) -> list[Budget]:
    """Those with routers, cheapest first; the last is the dense model."""
    return sorted((b for b in budgets if b.sensitivity is not None), key=lambda budget: budget.sensitivity or 0.0)


def fixed(budgets: Sequence[Budget]) -> list[Budget]:
    return [budget for budget in budgets if budget.sensitivity is None]


def cheapest(budgets: Sequence[Budget]) -> Budget:
    """The least sensitivity whose perplexity is within the tolerance of the dense model's."""
    own = routed(budgets)
    limit = own[-1].perplexity * (1 + TOLERANCE)
    return next((budget for budget in own if budget.perplexity <= limit), own[-1])


def interpolated(budgets: Sequence[Budget], fraction: float) -> float | None:
    """Perplexity of the routed model at an active fraction between two that were measured; `None` beyond them."""
    own = sorted(routed(budgets), key=lambda budget: budget.active_fraction)
    for low, high in itertools.pairwise(own):
        if low.active_fraction <= fraction <= high.active_fraction and low.active_fraction < high.active_fraction:
            part = (fraction - low.active_fraction) / (high.active_fraction - low.active_fraction)
            return math.exp((1 - part) * math.log(low.perplexity) + part * math.log(high.perplexity))
    return None


def budgets_table(budgets: Sequence[Budget], caption: str, **extra: Sequence[str]) -> Table:
    """
    Args:
        budgets (`Sequence[Budget]`):
            One row each; the cheapest that is nearly as good as the dense model is emphasised.
        caption (`str`):
            Above the table.
        extra (`Sequence[str]`):
            Further columns by name, in which `_` stands for a space.
    """
    dense = routed(budgets)[-1]
    columns = ["budget", "active MLP", "active parameters", "perplexity", "time against dense", "router accuracy"]
    rows = []
    for i, budget in enumerate(budgets):
        accuracy = budget.router_accuracy
        rows.append(
            [
                budget.name,
                f"{budget.active_fraction:.0%}",
                shortened(budget.active_parameters),
                _short(budget.perplexity),
                f"{budget.seconds / dense.seconds:.2f}" if dense.seconds else "-",
                "-" if accuracy is None else f"{accuracy:.0%}",
                *(column[i] for column in extra.values()),
            ]
        )
    columns += [name.replace("_", " ") for name in extra]
    return Table(columns, rows, caption, budgets.index(cheapest(budgets)))


def shortened(number: float) -> str:
    """A number of parameters as people say it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _short(perplexity: float) -> str:
    return f"{perplexity:.3f}" if perplexity < 100 else f"{perplexity:.3g}"


def trade_off(budgets: Sequence[Budget], others: Sequence[tuple[str, Sequence[Budget]]] = ()) -> list[Block]:
    """Quality against active parameters and against time, for the routers, the fixed experts and others."""
    dense = routed(budgets)[-1]
    series = [("routers", routed(budgets)), ("one expert for all", [*fixed(budgets), dense]), *others]
    # A small expert alone may be so bad that nothing else could be told apart.
    limit = 1.5 * max(budget.perplexity for budget in routed(budgets))
    kept = [(name, [budget for budget in own if budget.perplexity <= limit]) for name, own in series]
    kept = [(name, own) for name, own in kept if own]
    unit, size = next(
        ((u, s) for s, u in ((1e9, "billions"), (1e6, "millions")) if dense.active_parameters >= s), ("thousands", 1e3)
    )
    by_size = [(n, [(b.active_parameters / size, b.perplexity, _said(b)) for b in own]) for n, own in kept]
    curves: list[Block] = [
        Curve("Quality against active parameters", f"active parameters per token, {unit}", "perplexity", by_size)
    ]
    if dense.seconds:
        timed = [
            (n, [(b.seconds / dense.seconds, b.perplexity, _said(b)) for b in own if b.seconds]) for n, own in kept
        ]
        timed = [(name, points) for name, points in timed if points]
        curves.append(Curve("Quality against measured time", "time of reading, dense = 1", "perplexity", timed))
    return curves


def _said(budget: Budget) -> str:
    return f"{budget.name}, {budget.active_fraction:.0%} of the MLPs, perplexity {_short(budget.perplexity)}"


def experts_map(budget: Budget, widths: Sequence[int]) -> HeatMap:
    """Which share of the tokens took which expert, layer by layer."""
    return HeatMap(
        f"Experts that tokens took, {budget.name}",
        "width of the expert",
        "layer",
        [f"{width / widths[-1]:.0%}" for width in widths],
        [str(layer + 1) for layer in range(len(budget.shares))],
        budget.shares,
    )


def routers_charts(budget: Budget, widths: Sequence[int]) -> list[Block]:
    """What routers choose by what they should, over all layers, and how often they are right in each."""
    if budget.confusion is None or budget.accuracies is None:
        return []
    names = [f"{width / widths[-1]:.0%}" for width in widths]
    totals = [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*budget.confusion, strict=True)]
    shares = [[cell / max(sum(row), 1) for cell in row] for row in totals]
    bars = [(f"layer {i + 1}", value, f"{value:.0%}") for i, value in enumerate(budget.accuracies)]
    return [
        HeatMap(f"Routers' choices by what was needed, {budget.name}", "chosen", "needed", names, names, shares),
        Bars("Tokens whose router chose what was needed", bars),
    ]


def verdict(budgets: Sequence[Budget]) -> list[str]:
    """What the table says and what it does not, in plain sentences."""
    dense, best = routed(budgets)[-1], cheapest(budgets)
    said = []
    if all(budget.active_fraction > 0.99 for budget in routed(budgets)):
        return ["The routers still send nearly every token to the whole MLP: train them, see `hf-ext dynamoe train`."]
    if best is dense:
        said.append(
            f"No sensitivity below 1 stays within {TOLERANCE:.0%} of the dense perplexity: train the routers longer."
        )
    else:
        said.append(
            f"At {best.name} a token uses {best.active_fraction:.0%} of the MLPs on average, and perplexity is "
            f"{_short(best.perplexity)} against {_short(dense.perplexity)} of the whole model."
        )
    for budget in fixed(budgets):
        reached = interpolated(budgets, budget.active_fraction)
        if reached is not None:
            said.append(
                f"Where all tokens get {budget.active_fraction:.0%}, perplexity is {_short(budget.perplexity)}; where routers "
                f"hand out the same on average, {_short(reached)} (between the two nearest sensitivities)."
            )
    if best is not dense and best.seconds and best.seconds > 0.95 * dense.seconds:
        said.append(
            "Time does not follow here: MLPs of this size take little of it, and choosing costs some too. Where they are "
            "wide it does: `hf-ext dynamoe bench --shape 2048,8192,8`."
        )
    if best.router_accuracy is not None:
        said.append(f"Routers choose exactly what was needed for {best.router_accuracy:.0%} of the tokens.")
    return said
