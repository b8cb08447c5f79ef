"""What `repedit demo` runs: two acts, each a few public calls that a notebook can repeat."""

from repedit.walkthrough.projecting import Forgotten, forget_capitals
from repedit.walkthrough.pruning import PROMPTS, Walkthrough, walkthrough

__all__ = ["PROMPTS", "Forgotten", "Walkthrough", "forget_capitals", "walkthrough"]
