# config/small.py with outcome reward only: the baseline is the same code with alpha = 0.

base = "small.py"
alpha = 0.0
