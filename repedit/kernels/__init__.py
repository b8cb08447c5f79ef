"""The inner loops: their meaning in plain torch, the kernels that do the same faster, and the choice between them."""
