# Many methods and seeds, compared (compare.py): config/small_grpo.py with half of its rollouts, from the same warm start.

base = "small_grpo.py"
prompts_per_step = 16
eval_samples = 2
