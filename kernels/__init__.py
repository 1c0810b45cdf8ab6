"""The operations that decide the speed of nanomrt, behind one name each. `reference` says what they mean."""

from kernels.reference import attention, branch_attention, token_logprobs

__all__ = ["attention", "branch_attention", "token_logprobs"]
