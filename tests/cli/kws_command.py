"""The commands for keyword spotting, called as a user calls them."""

import json
import shutil

from typer.testing import CliRunner

from hf_ext.cli import app


WORDS = ["lights on", "lights off", "play music", "stop", "volume up", "volume down", "yes", "no", "open", "close"]
WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
TINY = ("--set", "hidden_size=16", "--set", "num_hidden_layers=1", "--set", "intermediate_size=16")
QUICK = ("--steps", 2, "--batch-size", 4, "--device", "cpu")


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env=WIDE)


def says(outcome, *words):
    assert outcome.exit_code == 2, outcome.output
    flat = " ".join(outcome.output.replace("│", " ").split())
    for word in words:
        assert word in flat


def without_its_end(folder, parent):
    """The folder of a model whose download broke off."""
    damaged = shutil.copytree(folder, parent / f"{folder.name}-damaged", dirs_exist_ok=True)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return damaged


def with_another_config(folder, parent, **fields):
    """The folder of a model whose config.json is another's."""
    other = shutil.copytree(folder, parent / f"{folder.name}-other", dirs_exist_ok=True)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **fields}))
    return other
