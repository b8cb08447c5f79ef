"""Selective pruning: scores of neurons from statistics of two sets, selections, and trajectories of growing edits."""
