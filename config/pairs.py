# Another task for the comparison of config/study.py: two of four numbers, one operation, so an attempt is short (NOTES.md).

base = "study.py"
numbers, used, number_max = 4, 2, 16
target_min, target_max = 3, 60
max_solutions = 2             # both orders of one sum or product; targets from 45 on are never trained on
trace_max_attempts = 14
thinking_budget = 84          # 14 attempts of 6 tokens
eval_budget = 112
steps = 100
save_every = 20
