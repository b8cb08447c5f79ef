"""The inner loops: their meaning in plain torch, and later the kernels that do the same faster."""
