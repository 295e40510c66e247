"""Names of implementations that more than one module knows."""

BASELINE = "eager"
COMPILED = "torch.compile of eager"
OURS = "drift_gate"  # and what starts with it
INPLACE = "drift_gate, in place"
WIDE = "drift_gate, float32 logits"  # of a fused head
WIDE_WHOLE = "drift_gate, float32 logits, one chunk"
GEMM, GEMMS = "bare GEMM", "bare GEMMs"
HOST = "host"  # the suite of host times
STEP = "train_step"  # the suite of whole training steps
LAYERS = "the layers alone"  # and what is left of one without a loss
UNIT = "torch cross_entropy"  # and what they are measured in
