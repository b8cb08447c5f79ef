"""Recipes of gradient unlearning, each an expression over losses, combiners, samplers and filters."""

from repedit.gradient.recipes.basic import ga, grad_diff, npo_gdr

__all__ = ["ga", "grad_diff", "npo_gdr"]
