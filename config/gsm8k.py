# Word problems of elementary mathematics (data/gsm8k.py), from a pretrained model, on one GPU. Every key: python train.py --help
#
# It needs two things that don't come with nanomrt: train.jsonl and test.jsonl in data/gsm8k, and the folder of a Llama, Qwen2 or
# Qwen3 in Hugging Face's layout (config.json, model.safetensors, tokenizer.json). Sizes and rates are for half a billion
# parameters; they are a start, and nobody has tuned them.

task = "gsm8k"
warm_from = "pretrained"      # that folder; --warm_from=… names another

# The warm start: people's solutions, one step an episode, so that the policy knows the tags.
warm_steps, warm_batch = 400, 32
warm_muon_lr = 0.0            # what AdamW has pretrained, AdamW goes on with
warm_adamw_lr = 1e-5
gate_result = 0.8             # of the equations it writes hold; people's own are right in .987
gate_answer = 0.9             # of its responses answer with a number

# RL: 512 rollouts a step.
steps = 100
save_every = 50               # a checkpoint of half a billion parameters and their optimiser takes 6 GB
prompts_per_step, group_size = 64, 8
thinking_budget = 256
eval_budget = 320
learning_rate = 1e-6
micro_batch_tokens = 16384
max_position_embeddings = 2048  # mrt, mrt_b and vineppo sample a budget after a prefix
algorithm = "mrt_online"
alpha = 1.0
J_discount = 0.95
progress_norm = "std"
