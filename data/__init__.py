"""The tasks. What each must offer: data/task.py."""

from data.countdown import Countdown
from data.gsm8k import GSM8K
from data.task import Task
from nanomrt.config import RunConfig

TASKS = {"countdown": Countdown, "gsm8k": GSM8K}


def load_task(config: RunConfig) -> Task:
    """The task of a config. Raises ValueError with the fix if its keys are impossible or its data are missing."""
    return TASKS[config.task](config)
