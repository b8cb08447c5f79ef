"""Positive and negative controls: edited models of which the truth is known."""

from repedit.attacks.controls.table import CONTROLS, SCALE, STEPS, Case, Control
from repedit.attacks.controls.worlds import World, questions, world

__all__ = ["CONTROLS", "SCALE", "STEPS", "Case", "Control", "World", "questions", "world"]
