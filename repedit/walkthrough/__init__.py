"""What `repedit demo` and `repedit vision demo` run: acts of a few public calls that a notebook can repeat."""

from repedit.walkthrough.classifying import ForgottenImages, forget_images
from repedit.walkthrough.projecting import Forgotten, forget_capitals
from repedit.walkthrough.pruning import PROMPTS, Walkthrough, walkthrough

__all__ = ["PROMPTS", "Forgotten", "ForgottenImages", "Walkthrough", "forget_capitals", "forget_images", "walkthrough"]
