"""A trainer of tiny keyword spotting models on tones, for the tests of training."""

import numpy as np
import torch

from hf_ext import KwsPairDataset, KwsTrainer, KwsTrainingConfig, SlickConfig, SlickForKeywordSpotting


LOSSES = ("utterance_loss", "prefix_loss", "ctc_loss")
WORDS = ["lights on", "lights off", "play music", "stop", "volume up", "yes", "no"]


def spoken(word):
    """A tone for each letter: what can be learned in a few steps."""
    seconds = np.arange(1600) / 16000
    tones = [0.3 * np.sin(2 * np.pi * (300 + 120 * (ord(letter) % 26)) * seconds) for letter in word]
    return {"array": np.concatenate(tones).astype(np.float32), "sampling_rate": 16000}


UTTERANCES = [{"audio": spoken(word), "text": word} for word in WORDS]


def tiny_model(frozen_norms=False):
    torch.manual_seed(0)
    config = SlickConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, hidden_dropout=0.0
    )
    model = SlickForKeywordSpotting(config)
    for module in model.modules() if frozen_norms else ():
        if isinstance(module, torch.nn.BatchNorm1d):
            # Its statistics are those of a micro-batch.
            module.train = lambda mode=True, module=module: module
            module.training = False
    return model


def trainer(folder, model=None, train_dataset=None, eval_dataset=None, **changes):
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "warmup_steps": 0,
        **changes,
    }
    return KwsTrainer(
        model=tiny_model() if model is None else model,
        args=KwsTrainingConfig(str(folder), **settings),
        train_dataset=KwsPairDataset(UTTERANCES * 4) if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
