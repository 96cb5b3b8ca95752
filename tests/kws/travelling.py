"""A model on a machine that has its repository and not this package."""

import os
import subprocess
import sys

import torch


def output_without_the_package(model, inputs, auto_class, folder, output="logits"):
    """
    What a model that is saved with its code returns where `hf_ext` can't be imported.

    The classes are told to take their code along in a process of its own: they keep it in mind.
    """
    weights, repository, given, found = (folder / name for name in ("weights", "repo", "inputs.pt", "output.pt"))
    model.save_pretrained(weights)
    torch.save(inputs, given)
    name, config = type(model).__name__, type(model.config).__name__
    save = f"""
from hf_ext import {config}, {name}
{config}.register_for_auto_class()
{name}.register_for_auto_class({auto_class!r})
{name}.from_pretrained({str(weights)!r}).save_pretrained({str(repository)!r})
"""
    load = f"""
import sys, torch
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_ext":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
from transformers import {auto_class}
model = {auto_class}.from_pretrained({str(repository)!r}, trust_remote_code=True)
torch.save(model(**torch.load({str(given)!r}))[{output!r}].detach(), {str(found)!r})
"""
    environment = {**os.environ, "HF_HOME": str(folder / "home")}
    for code in (save, load):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )
        assert run.returncode == 0, run.stderr
    return torch.load(found)
