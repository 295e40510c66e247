"""Passes: what touches logits, rows and lists, the same functions for every backend.

`rules` says what row functions take and give; `backends` chooses among the folders and modules
beside it: `triton` (kernels/), `native` (C, for CPUs) and `torch` (plain PyTorch, any device and
float64). A pass is a function over plain tensors; it knows nothing of autograd, of ranks, or of the
losses that call it.
"""
