# Half of config/small.py's rollouts, so that many methods and seeds can be compared (compare.py). The same warm start.

base = "small.py"
prompts_per_step = 16
save_every = 10               # compare.py evaluates these checkpoints, to compare at equal tokens and at equal time
