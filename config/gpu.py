# One GPU: 4-number Countdown with longer traces, in bf16. Every key: python train.py --help

# The task: reach 10..100 with four different numbers of 1..20, each used once, with all four operations.
numbers, used, number_max = 4, 4, 20
target_min, target_max, max_value = 10, 100, 400
operators = "+-*/"
max_solutions = 24            # of about 430 chains: search takes tens of attempts
ood_target_min = 80
ood_max_solutions = 8

# The warm start's flaws are what RL has to mend; outcome reward hardly minds the first two.
trace_max_attempts = 24
trace_repeat = 0.3            # it tries what has just failed once more
trace_go_on = 0.7             # it checks over and over what has just succeeded
trace_give_up = 0.02          # it answers without having found a solution
warm_steps, warm_batch = 2000, 256
gate_check_recall = 0.6

# The model: 21M parameters.
hidden_size, intermediate_size = 512, 1280
num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim = 8, 8, 2, 64
max_position_embeddings = 640 # mrt, mrt_b and vineppo sample a budget after a prefix

# RL: 1,024 rollouts a step, at most 24 attempts each.
steps = 200
prompts_per_step, group_size = 64, 16
thinking_budget = 288         # 24 attempts of 12 tokens
eval_budget = 384
learning_rate = 1e-4
micro_batch_tokens = 65536
algorithm = "mrt_online"      # progress centred, in GRPO's schedule (the defaults): not the form of config/small.py
alpha = 1.0
