# Many methods and seeds, compared (compare.py): config/one_pass.py with half of its rollouts and fewer steps, from the same warm
# start. Less than three minutes a run on one core.

base = "one_pass.py"
warm_steps = 500              # as in its runs under results/study: a check that is right less often than in config/small.py
warm_check_weight = 1.0
gate_check_precision = 0.7
steps = 50
prompts_per_step = 16
eval_samples = 2
save_every = 10               # compare.py evaluates these checkpoints, to compare at equal tokens and at equal time
