# Many methods and seeds, compared (compare.py): config/one_pass.py with half of its rollouts and fewer steps, from the same warm
# start. Three minutes a run on one core.

base = "one_pass.py"
steps = 50
prompts_per_step = 16
eval_samples = 2
save_every = 10               # compare.py evaluates these checkpoints, to compare at equal tokens and at equal time
