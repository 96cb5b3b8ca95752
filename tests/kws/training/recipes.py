"""Folders of clips for the recipes of `examples/`."""

import csv

import numpy as np
import pytest


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
