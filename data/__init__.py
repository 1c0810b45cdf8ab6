"""The tasks. What each must offer: data/task.py."""

from dataclasses import replace
from pathlib import Path

from data.countdown import Countdown
from data.gsm8k import GSM8K
from data.task import Task
from nanomrt.config import RunConfig

TASKS = {"countdown": Countdown, "gsm8k": GSM8K}


def load_task(config: RunConfig, checkpoint: Path | None = None) -> Task:
    """The task of a config; a pretrained model's vocabulary is taken from a checkpoint of the run, if there is one. Raises
    UserError with the fix if its keys are impossible or its data are missing."""
    if config.warm_from and checkpoint:  # the folder that the run began with may have gone since
        config = replace(config, warm_from=str(checkpoint))
    return TASKS[config.task](config)
