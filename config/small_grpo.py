# The baseline of config/small.py: outcome reward only, in the schedule that suits it. GRPO compares the rollouts of a problem with
# each other, so it wants groups, and a single pass. The family is compared in this schedule, too: --algorithm=vineppo (README.md).

base = "small.py"
algorithm = "grpo"
prompts_per_step, group_size = 32, 12
epochs = 1
progress_norm = "mean_std"    # for methods with progress, as in the paper: standardised …
J_discount = 1.0              # … and with no discount
