"""Attacks on an edited model, and what they show. Nothing here knows how a model was edited."""
