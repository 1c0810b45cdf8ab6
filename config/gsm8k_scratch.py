# The same from nothing, on two CPU cores: a whole run on real data without a pretrained model. Two and three steps are what a
# model of this size can learn from 3,600 solutions, and it gets few of them right.

base = "gsm8k.py"
warm_from = ""                # a network of random weights, and a vocabulary learned from the problems

ood_min_steps = 4             # train on solutions of two or three steps, and ask for more out of distribution
prompt_tokens, step_tokens, solution_tokens = 128, 48, 128
bpe_vocab = 2048

warm_steps, warm_batch = 600, 32
warm_muon_lr, warm_adamw_lr = 0.02, 3e-3
gate_result = 0.2
gate_answer = 0.8

# The model: 2.8M parameters.
hidden_size, intermediate_size = 192, 512
num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim = 6, 6, 2, 32
qk_norm = True
max_position_embeddings = 512

# RL: 192 rollouts a step.
steps = 40
prompts_per_step, group_size = 24, 8
thinking_budget = 96
eval_budget = 128
learning_rate = 2e-4
micro_batch_tokens = 4096
eval_samples = 2
