"""Batches, sequences and words that are spread over ranks, or over micro-batches.

`ranks` has the collectives, `agreement` lets the ranks compare their arguments, `scope` joins what
calls know of a batch, `sequences` puts cut sequences together, `words` sharded vocabularies. Plain
functions over tensors, called inside the ops; they call nothing but `passes.rules` and options.
"""
