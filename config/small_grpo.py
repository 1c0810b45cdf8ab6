# The baseline of config/small.py: outcome reward only, in the schedule that suits it. GRPO compares the rollouts of a problem
# with each other; in pairs, and with three passes, it is less accurate (README.md, Results).

base = "small.py"
algorithm = "grpo"
prompts_per_step, group_size = 32, 12
epochs = 1
gamma = 0.0                   # for methods with progress: an episode's own only
