# Many methods and seeds, compared (compare.py): the task and the warm start of config/small.py with half of its rollouts, in a
# schedule that is nobody's in particular, and progress as in the paper. Three minutes a run on one core.

base = "small.py"
steps = 50
prompts_per_step, group_size = 16, 12
epochs = 1
progress_norm = "mean_std"
J_discount = 1.0
eval_samples = 2
save_every = 10               # compare.py evaluates these checkpoints, to compare at equal tokens and at equal time
