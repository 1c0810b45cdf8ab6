# config/small.py in a schedule that GRPO and MRT share, with standardised progress: what the credit alone makes of as many
# rollouts (README.md).

base = "small.py"
steps = 60
prompts_per_step, group_size = 32, 12
epochs = 1
gamma = 0.0                   # an episode's own progress only
progress_norm = "mean_std"    # centred: every episode costs the batch's mean progress
J_discount = 1.0
