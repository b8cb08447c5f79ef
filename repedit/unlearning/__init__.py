"""Gradient unlearning: losses, combiners, samplers, stop rules and filters as small parts, one loop, and recipes."""
