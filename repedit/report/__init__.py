"""Reports as pages: console table, Markdown, one self-contained HTML page."""
