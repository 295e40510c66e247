"""Tools for checking Triton kernels with and without a GPU. Nothing here imports drift_gate."""
