"""The documentation: pages in Markdown, and what `make docs` adds to them: the reference and the command line."""
