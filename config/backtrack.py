# MRT's backtracking form: after a failed attempt the policy may go back to one of its running results and on from there.

base = "small_grpo.py"
trace_backtrack = 0.5         # of the attempts after a failure: the warm start shows how it is done
trace_repeat = 0.1
algorithm = "mrt_b"           # every rollout begins with an attempt of its own; what it gained over that is added to its reward
max_position_embeddings = 320 # an attempt, and a budget after it
