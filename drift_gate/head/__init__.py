"""The fused LM head: logits exist for a chunk of rows at a time, or not at all.

`check` turns a `Head` and hidden states into plain tensors and rules. `walk` goes through the rows:
`logits` makes a chunk's, `chunks` says which rows are one, the losses of `chunk_losses` find values
and then the gradient in the logits' place, `sums` adds up its products with head and hidden states.
`scan` is the form whose backward makes the logits again. `sparse` is for gradients with K entries a
row. These call `passes` and `parallel`, and are called by `losses`.
"""
