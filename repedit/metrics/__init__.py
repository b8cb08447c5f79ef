"""Measurements of a model's behaviour, one family a file."""
