# The newcomer's run: 3-number Countdown from nothing on two CPU cores. Every key: python train.py --help

# The task: reach 10..60 with three different numbers of 1..13, each used once, with + - and *.
numbers, used, number_max = 3, 3, 13
target_min, target_max = 10, 60
operators = "+-*"

# The warm start's flaws are what RL has to mend; outcome reward hardly minds the first two.
trace_repeat = 0.3            # it tries what has just failed once more
trace_go_on = 0.7             # it checks over and over what has just succeeded
trace_give_up = 0.04          # it answers without having found a solution
warm_steps = 700              # about 3 minutes; of the first five seeds one fails the gate below and takes as long again
warm_check_weight = 3.0       # the check is learned last, and RL hardly mends it: who believes a false `yes` stops there
gate_check_precision = 0.85   # .84 to 1.0 after 700 steps

# The model: 0.7M parameters.
hidden_size, intermediate_size = 128, 320
num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim = 4, 4, 2, 32
qk_norm = True                # learns faster, and the sampler's log-probs stay closer to the trainer's
max_position_embeddings = 256

# RL: 384 rollouts a step, at most 12 attempts each. Progress has its baseline in its own trace, so pairs are enough, and several
# passes over many problems pay; they make GRPO worse, in pairs most of all (config/small_grpo.py).
steps = 50
prompts_per_step, group_size = 192, 2
epochs = 3                    # passes over a step's rollouts
thinking_budget = 108         # 12 attempts of 9 tokens
micro_batch_tokens = 2048     # fits a core's cache; on a GPU more is faster
save_every = 10               # compare.py evaluates these checkpoints
learning_rate = 3e-4          # falls to 0 at the end: at a constant rate accuracy falls again after step 40
algorithm = "mrt_online"
alpha = 1.0
gamma = 0.5                   # an episode's own progress counts, half of the next one's, a quarter of the one after that, …
progress_norm = "std"         # not centred: an episode that changes nothing costs nothing …
J_discount = 0.95             # … but where the answer is known, going on costs a twentieth of it
