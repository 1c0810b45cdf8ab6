# Many methods and seeds, compared (compare.py): config/small_grpo.py with half of its rollouts, from the same warm start, and
# progress centred over the batch.

base = "small_grpo.py"
prompts_per_step = 16
progress_norm = "mean_std"    # centred: every episode costs the batch's mean progress
J_discount = 1.0
eval_samples = 2
