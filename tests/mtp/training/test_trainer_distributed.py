"""Two processes train as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_ext import MtpTrainer
from mtp.training.setting import adapter_of, logged, texts, tiny_trainer


FIGURES = ("loss", "base_loss", "sampler_loss", "consistency_loss", "expected_tokens_per_step", "num_tokens")
EVALUATED = ("eval_loss", "eval_base_loss", "eval_decoded_tokens_per_step")


def train(folder: Path, processes: int) -> MtpTrainer:
    """Four rows per step on all processes together, of different lengths, so that processes have masks of different number."""
    trainer = tiny_trainer(
        folder,
        train_dataset=texts(24, shortest=2),
        eval_dataset=texts(4, seed=9),
        max_steps=5,
        per_device_train_batch_size=2 // processes,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        adam_epsilon=1e-4,
    )
    assert trainer.args.world_size == processes
    trainer.train()
    return trainer


def figures_of(trainer: MtpTrainer) -> dict[str, list[float]]:
    return {name: logged(trainer, name) for name in FIGURES}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> MtpTrainer:
    return train(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, dict]:
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
    figures = json.loads((folder / "figures.json").read_text())
    return {**figures, "adapter": torch.load(folder / "adapter.pt")}


@pytest.mark.parametrize("name", FIGURES)
def test_two_processes_report_what_one_does(one, two, name):
    """Step by step, for half the batch in each."""
    expected = figures_of(one)[name]
    assert len(expected) == 5
    assert two["figures"][name] == pytest.approx(expected, rel=1e-4)


def test_two_processes_learn_what_one_does(one, two):
    """Every weight of the adapter."""
    torch.testing.assert_close(two["adapter"], adapter_of(one), rtol=1e-4, atol=1e-5)


def test_two_processes_evaluate_as_one(one, two):
    """The losses and the steps of decoding."""
    expected = one.evaluate()
    assert two["evaluation"] == pytest.approx({name: expected[name] for name in EVALUATED}, rel=1e-4)


def test_the_card_is_written_once(two):
    """By the first process, which also finds what was measured."""
    assert two["cards"] == 1


def main(folder: Path) -> None:
    """In each of two processes."""
    trainer = train(folder, 2)
    evaluation = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        torch.save(adapter_of(trainer), folder / "adapter.pt")
        found = {"figures": figures_of(trainer), "evaluation": {name: evaluation[name] for name in EVALUATED}}
        found["cards"] = len(list(folder.glob("README.md")))
        (folder / "figures.json").write_text(json.dumps(found))
    # A process that ends before the other may be aborted in its connections.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
