"""Tools for checking Triton kernels with and without a GPU."""
