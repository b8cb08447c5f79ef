"""Positive and negative controls: edited models of which it is known what they have forgotten."""

from repedit.auditing.controls.table import CONTROLS, SCALE, STEPS, AuditInputs, Control
from repedit.auditing.controls.taught import World, questions, world

__all__ = ["CONTROLS", "SCALE", "STEPS", "AuditInputs", "Control", "World", "questions", "world"]
