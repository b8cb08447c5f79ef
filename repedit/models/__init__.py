"""Models: loading checkpoints, wrapping models of other libraries, and the default model."""
