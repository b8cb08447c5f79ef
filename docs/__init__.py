"""The reference, made from the docstrings and from the command line itself: `make docs` writes build/docs/."""
