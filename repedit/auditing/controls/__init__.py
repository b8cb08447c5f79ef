"""Positive and negative controls: edited models whose correct verdict is known."""

from repedit.auditing.controls.table import CONTROLS, SCALE, STEPS, AuditInputs, Control
from repedit.auditing.controls.taught import World, questions, world

__all__ = ["CONTROLS", "SCALE", "STEPS", "AuditInputs", "Control", "World", "questions", "world"]
