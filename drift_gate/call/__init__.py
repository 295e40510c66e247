"""What every loss does around its passes.

`arguments` checks single arguments, `rows` those that all losses share, `logits`, `lists` and
`sampled` those of some. `op` calls a loss's forward and backward, in eager mode and under
torch.compile. `weighing` gates and reduces, over ranks where they share; `gradients` writes those
of the logits; `finishing` makes the output. Calls `passes` and `parallel`; called by `head` and
`losses`.
"""
