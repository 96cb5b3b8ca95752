"""What the scripts of this folder share: models, tables, and the file that a run leaves behind."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_ext
from hf_ext.cli.compare import describe_machine, share_weights


RESULTS = Path(__file__).resolve().parents[1] / "results"
# Below so many parameters a second thread gains nothing on a CPU.
ONE_THREAD_BELOW = 5_000_000


@dataclass(frozen=True)
class Table:
    """A table with what stands above and below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", _row(self.columns), _row(["---"] * len(self.columns))]
        lines += [_row([_cell(value) for value in row]) for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def load_base(name: str, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def load_adapted(name: str, adapter: str, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any, Any]:
    """The base model free of adapters, the model with the adapter on the same weights, and the tokenizer."""
    model, tokenizer = load_base(name, dtype, device)
    base = share_weights(model)
    with warnings.catch_warnings():
        # PEFT's own use of a property that transformers renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = PeftModel.from_pretrained(model, adapter).eval()
    return base, adapted.to(getattr(torch, dtype)), tokenizer


def set_threads(model: Any, threads: int | None) -> None:
    """`threads` threads; by default one for a small model on a CPU, whose threads would only wait for one another."""
    if threads is None and model.device.type == "cpu" and model.num_parameters() < ONE_THREAD_BELOW:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def last_part(path: str | None) -> str | None:
    """Folders by their last part, Hub ids as they are: a table that is passed on shows no paths."""
    return None if path is None else Path(path).resolve().name if Path(path).exists() else path


def provenance(model: Any) -> dict[str, str]:
    """The command, the machine, the versions and the day."""
    script = Path(sys.argv[0]).resolve()
    command = [f"benchmarks/{script.parent.name}/{script.name}", *(_shortened(word) for word in sys.argv[1:])]
    if script.parent.name != "mtp":
        # Scripts that share this module are run as modules from the repository's root.
        command[0:1] = ["-m", f"benchmarks.{script.parent.name}.{script.stem}"]
    return {
        "command": "python " + shlex.join(command),
        "date": datetime.date.today().isoformat(),
        **describe_machine(model),
        "peft": peft.__version__,
        "hf_ext": hf_ext.__version__,
    }


def _shortened(word: str) -> str:
    name, sign, value = word.rpartition("=")
    return name + sign + (Path(value).name if "/" in value and Path(value).is_absolute() else value)


def write(
    name: str,
    title: str,
    tables: Sequence[Table],
    data: dict[str, Any],
    model: Any,
    folder: str | None = None,
    lead: str = "",
) -> Path:
    """Writes `<name>.json` and `<name>.md` and returns the path of the latter."""
    target = RESULTS / Path(sys.argv[0]).resolve().parent.name if folder is None else Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    source = provenance(model)
    (target / f"{name}.json").write_text(json.dumps({"provenance": source, **data}, indent=1) + "\n", encoding="utf-8")
    facts = ", ".join(f"{key} {value}" for key, value in source.items() if key != "command")
    parts = [f"# {title}", "", *([lead, ""] if lead else []), f"    {source['command']}", "", facts, ""]
    path = target / f"{name}.md"
    path.write_text("\n".join(parts + [table.markdown() for table in tables]), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    return path
