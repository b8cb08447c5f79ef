"""The inner loops: reference implementations in plain torch, Triton kernels, and the choice between them."""
