"""Positive and negative controls: edited models of which the truth is known."""

from repedit.auditing.controls.table import CONTROLS, SCALE, STEPS, Case, Control
from repedit.auditing.controls.taught import World, questions, world

__all__ = ["CONTROLS", "SCALE", "STEPS", "Case", "Control", "World", "questions", "world"]
