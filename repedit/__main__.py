"""`python -m repedit`."""

from repedit.cli import main

main()
