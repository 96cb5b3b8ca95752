"""Two processes train a keyword spotter as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Subset

from hf_ext import KwsPairDataset
from hf_ext.kws.training.augmentation import KwsAugmenter
from kws.training.setting import LOSSES, UTTERANCES, logged, tiny_model, trainer, weights_of


# The 28 pairs of the evaluation leave a remainder; losses are compared on 16, which go into whole batches.
EVALUATED = ("eval_auc", "eval_hard_auc", "eval_hard_eer", "even_loss", "even_ctc_loss")


def train(folder, processes):
    """Four pairs per step on all processes together, of different lengths, in two micro-batches."""
    run = trainer(
        folder,
        tiny_model(frozen_norms=True),
        KwsPairDataset(UTTERANCES * 4, augmenter=KwsAugmenter()),
        KwsPairDataset(UTTERANCES, every_kind=True),
        per_device_train_batch_size=2 // processes,
        gradient_accumulation_steps=2,
        optim="sgd",
        max_grad_norm=0.0,
        ctc_steps=1,
    )
    assert run.args.world_size == processes
    run.train()
    return run


def evaluated(run):
    figures = run.evaluate() | run.evaluate(Subset(run.eval_dataset, range(16)), metric_key_prefix="even")
    return {name: figures[name] for name in EVALUATED}


def test_two_processes_are_as_one(tmp_path):
    """Every loss, every weight, and the evaluation."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "figures.json").read_text())
    one = train(tmp_path / "one", 1)
    for name in ("loss", *LOSSES):
        assert found["logged"][name] == pytest.approx(logged(one, name), rel=1e-4)
    torch.testing.assert_close(load_file(tmp_path / "weights.safetensors"), weights_of(one), rtol=1e-3, atol=1e-5)
    assert found["evaluation"] == pytest.approx(evaluated(one), rel=1e-4)


def main(folder):
    run = train(folder / "two", 2)
    figures = evaluated(run)
    if run.is_world_process_zero():
        found = {
            "logged": {name: logged(run, name) for name in ("loss", *LOSSES)},
            "evaluation": figures,
        }
        save_file(weights_of(run), folder / "weights.safetensors")
        (folder / "figures.json").write_text(json.dumps(found))
    # A process that ends before the other may be aborted in its connections.
    run.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
