"""nanomrt: Meta Reinforcement Fine-Tuning from scratch. Start reading at `train.py`, then `nanomrt/mrt.py`."""
