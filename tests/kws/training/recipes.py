"""The recipes of `examples/` as modules, and folders of clips for them."""

import csv
import importlib.util
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from conftest import REPOSITORY


@contextmanager
def imported_recipe(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # A checkpoint has the arguments in it, which pickle looks for where they were defined.
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        yield module


def write_clips(folder, rows, num_samples=8_000):
    """An `audiofolder` with a clip of noise for each row, which has its `text` and whatever else."""
    soundfile, random = pytest.importorskip("soundfile"), np.random.default_rng(0)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", *rows[0]])
        writer.writeheader()
        for i, row in enumerate(rows):
            soundfile.write(folder / f"{i}.wav", random.normal(size=num_samples) / 10, 16_000)
            writer.writerow({"file_name": f"{i}.wav", **row})
    return folder
