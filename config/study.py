# Half of config/small.py's rollouts and fewer steps, so that many methods and seeds can be compared (compare.py), from the same
# warm start: about four minutes a run on one core.

base = "small.py"
steps = 50
prompts_per_step = 16
eval_samples = 2
save_every = 10               # compare.py evaluates these checkpoints, to compare at equal tokens and at equal time
