"""Drivers that carry a plan out: on a live model, or on the files of a checkpoint."""
