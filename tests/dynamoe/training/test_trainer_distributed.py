"""Two processes train nested experts as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynamoe.training.setting import logged, texts, tiny_trainer, weights_of
from hf_ext import DynaMoeTrainer


FIGURES = ("loss", "lm_loss", "router_loss", "budget_loss", "active_fraction", "router_accuracy", "num_tokens")
EVALUATED = ("eval_loss", "eval_0.5_lm_loss", "eval_0.5_active_fraction", "eval_0.5_router_accuracy")


def train(folder: Path, processes: int) -> DynaMoeTrainer:
    """
    Four rows per step on all processes together, of different lengths; routers alone at first, then everything, in which
    they learn from the model's loss. The rows of the evaluation don't divide evenly.
    """
    trainer = tiny_trainer(
        folder,
        train_dataset=texts(24, shortest=3),
        eval_dataset=texts(5, seed=9),
        max_steps=5,
        router_steps=2,
        straight_through=True,
        distillation_weight=0.5,
        per_device_train_batch_size=2 // processes,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        eval_sensitivities=[0.5, 1.0],
        adam_epsilon=1e-4,
    )
    assert trainer.args.world_size == processes
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> DynaMoeTrainer:
    return train(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    """What the first of two processes found and saved."""
    folder = tmp_path_factory.mktemp("two")
    # What `accelerate launch` runs where there are several GPUs; on CPUs it needs MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, str(folder)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads((folder / "figures.json").read_text()), "weights": torch.load(folder / "weights.pt")}


@pytest.mark.parametrize("name", FIGURES)
def test_two_processes_report_what_one_does(one, two, name):
    """Step by step, for half the batch in each."""
    expected = logged(one, name)
    assert len(expected) == (3 if name == "budget_loss" else 5)
    assert two["figures"][name] == pytest.approx(expected, rel=1e-4)


def test_two_processes_learn_what_one_does(one, two):
    """Every weight."""
    torch.testing.assert_close(two["weights"], weights_of(one), rtol=1e-3, atol=1e-5)


def test_two_processes_evaluate_as_one(one, two):
    """Losses, fractions, and the counts of labels against choices."""
    expected = one.evaluate()
    assert two["evaluation"] == pytest.approx({name: expected[name] for name in EVALUATED}, rel=1e-4)
    assert two["confusion"] == one.confusion[0.5].tolist()


def main(folder: Path) -> None:
    """In each of two processes."""
    trainer = train(folder, 2)
    evaluation = trainer.evaluate()
    if trainer.is_world_process_zero():
        weights = {name: p.detach().clone() for name, p in trainer.routed.named_parameters()}
        torch.save(weights, folder / "weights.pt")
        found = {
            "figures": {name: logged(trainer, name) for name in FIGURES},
            "evaluation": {name: evaluation[name] for name in EVALUATED},
            "confusion": trainer.confusion[0.5].tolist(),
        }
        (folder / "figures.json").write_text(json.dumps(found))
    # A process that ends before the other may be aborted in its connections.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
